"""Single products and convolutions: cycles, drains, values, at three fidelities."""

from __future__ import annotations

import numpy as np
import pytest
from hal_kpu import BEHAVIORAL, CYCLE_ACCURATE, TRANSACTIONAL, simulate_conv2d, simulate_gemm
from hal_kpu.profiles.profile import load
from hal_kpu.simulator.array import DATAFLOWS
from hal_kpu.simulator.engines import BufferTooSmallError
from hal_kpu.simulator.products import gemm

from hal_core.errors import ContractError

from .test_array import TABLE, closed_form


@pytest.mark.parametrize("fidelity", [TRANSACTIONAL, CYCLE_ACCURATE])
@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize(("shape", "array", "cycles"), TABLE)
def test_compute_cycles_equal_the_published_table(shape, array, cycles, dataflow, fidelity):
    stats = simulate_gemm(*shape, rows=array[0], cols=array[1], dataflow=dataflow, fidelity=fidelity)
    tiles = -(-shape[0] // array[0]) * -(-shape[1] // array[1])
    assert stats.compute_cycles == cycles[dataflow]
    assert stats.drain_cycles == (tiles * array[0] if dataflow == "os" else 0)
    assert stats.busy_cycles == stats.compute_cycles + 1  # the array's own time in the whole machine's run
    assert stats.busy_cycles + stats.stall_cycles + stats.idle_cycles == stats.cycles
    assert stats.total_macs == np.prod(shape)


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_whole_runs_of_random_products(dataflow, seed):
    rng = np.random.default_rng(seed)
    for _ in range(60):
        M, N, K, R, C = (int(n) for n in rng.integers(1, 40, 5))
        a, b = rng.integers(-128, 128, (M, K), dtype=np.int8), rng.integers(-128, 128, (K, N), dtype=np.int8)
        stats = simulate_gemm(M, N, K, rows=R, cols=C, dataflow=dataflow, a=a, b=b)
        quick = simulate_gemm(M, N, K, rows=R, cols=C, dataflow=dataflow, dtype="int8", fidelity=TRANSACTIONAL)
        assert np.array_equal(stats.product[0], a.astype(np.int32) @ b.astype(np.int32))
        assert stats.active_macs == stats.total_macs == M * N * K
        assert stats.compute_cycles == quick.compute_cycles == closed_form((M, N, K), (R, C), dataflow)
        assert stats.drain_cycles == quick.drain_cycles
        assert stats.busy_cycles == quick.busy_cycles == stats.compute_cycles + 1


def test_the_machine_s_cycles_count_what_the_pes_take(monkeypatch):
    """A register a cycle late makes the stepped tile longer, and the whole machine's run with it."""
    from hal_kpu.simulator import cycle_accurate

    good = simulate_gemm(40, 40, 40, rows=8, cols=8)
    real = cycle_accurate.multiply
    late = (("right", 7, 7), ("down", 7, 7))
    monkeypatch.setattr(cycle_accurate, "multiply", lambda *args: real(*args, delays=late))
    cycle_accurate.stepped_cycles.cache_clear()
    bad = simulate_gemm(40, 40, 40, rows=8, cols=8)
    cycle_accurate.stepped_cycles.cache_clear()
    assert bad.busy_cycles == good.busy_cycles + 25  # one cycle in each of 5 x 5 tiles
    assert bad.cycles > good.cycles


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_behavioral_gives_values_and_counts_without_cycles(dtype):
    stats = simulate_gemm(20, 30, 40, rows=8, cols=8, dtype=dtype, fidelity=BEHAVIORAL)
    exact = simulate_gemm(20, 30, 40, rows=8, cols=8, dtype=dtype, fidelity=CYCLE_ACCURATE)
    assert stats.cycles == 0
    assert stats.total_macs == 20 * 30 * 40
    assert np.allclose(stats.product, exact.product, rtol=1e-4, atol=1e-4)
    if dtype == "int8":
        assert np.array_equal(stats.product, exact.product)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 2), (3, 1, 1, 4)]
)
def test_a_convolution_is_its_products(stride, padding, dilation, groups, seed):
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-9, 9, (2, 4, 11, 13), generator=generator, dtype=torch.int32)
    w = torch.randint(-9, 9, (8, 4 // groups, 3, 3), generator=generator, dtype=torch.int32)
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    want = torch.conv2d(x.double(), w.double(), **how)
    for dataflow in DATAFLOWS:
        stats = simulate_conv2d(
            2, 4, 11, 13, 8, 3, rows=8, cols=4, dataflow=dataflow, x=x.numpy(), weight=w.numpy(), **how
        )
        assert np.array_equal(stats.product, want.numpy())
        positions, window = want[:, 0].numel(), 4 // groups * 9
        one = closed_form((positions, 8 // groups, window), (8, 4), dataflow) + 1
        assert stats.compute_cycles == groups * one - 1
        assert stats.active_macs == want.numel() * window


def test_overlapping_windows_are_read_from_dram_once_and_gathered_on_the_chip():
    stats = simulate_conv2d(1, 16, 32, 32, 16, 3, padding=1, rows=16, cols=16, fidelity=TRANSACTIONAL)
    plain = simulate_gemm(32 * 32, 16, 16 * 9, rows=16, cols=16, fidelity=TRANSACTIONAL)
    data, gathered = 4 * 32 * 32 * 16, 4 * 32 * 32 * 16 * 9
    assert plain.external_bytes - stats.external_bytes == pytest.approx(gathered - data, rel=0.6)
    assert stats.external_bytes >= data + 4 * 32 * 32 * 16  # in and out


def test_what_cannot_be_simulated_is_told():
    with pytest.raises(ContractError, match="M = 0 was given: a whole number from 1 on is wanted"):
        simulate_gemm(0, 1, 1)
    with pytest.raises(ContractError, match=r"rows = 2\.5 was given"):
        simulate_gemm(1, 1, 1, rows=2.5)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="dataflow 'xs' was given"):
        simulate_gemm(1, 1, 1, dataflow="xs")  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="fidelity 7 was given: use BEHAVIORAL"):
        simulate_gemm(1, 1, 1, fidelity=7)
    with pytest.raises(ContractError, match=r"the first operand is \[2, 2\], \[1, 3, 3\] is wanted"):
        simulate_gemm(3, 3, 3, a=np.ones((2, 2)))
    with pytest.raises(ContractError, match="int8 and float32 were given: one dtype"):
        simulate_gemm(2, 2, 2, a=np.ones((2, 2), np.int8), b=np.ones((2, 2), np.float32))
    with pytest.raises(ContractError, match="has no position: pad more"):
        simulate_conv2d(1, 1, 2, 2, 1, 5)
    with pytest.raises(ContractError, match="3 to 4 channels in 2 groups"):
        simulate_conv2d(1, 3, 9, 9, 4, 3, groups=2)
    tiny = load("t4x4").replace(buffers__l2=100)
    with pytest.raises(BufferTooSmallError, match=r"L2 holds 100 B .* are needed, .* for buffer"):
        simulate_gemm(64, 64, 64, rows=32, cols=32, profile=tiny)


def test_a_larger_array_brings_larger_buffers_unless_a_profile_is_given():
    assert simulate_gemm(300, 300, 8, rows=256, cols=3, fidelity=TRANSACTIONAL).cycles > 0
    assert gemm.machine(256, 3)["buffers.l2"] == 64 * load("t32x32")["buffers.l2"]
    assert gemm.machine(256, 3, "t64")["buffers.l2"] == load("t64")["buffers.l2"]
