"""Detection, memory, and failures of OpenCL devices."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.registry import registry
from hal_core.testing import reference, relative_error

backend_module = pytest.importorskip("hal_opencl.backend", exc_type=ImportError)
from hal_opencl import discovery, tiling  # noqa: E402

WHY = """
import hal_core as hal
from hal_core.registry import registry
print([d.id for d in hal.devices() if d.family == "opencl"], registry.why_absent(registry.entry("opencl")))
"""


def request(tensor: torch.Tensor, **changes: Any) -> hal.AttentionRequest:
    batch, heads, length, dim = tensor.shape
    values = {"len_q": length, "len_k": length, "dim_qk": dim, "dim_v": dim, "dtype": "float32"} | changes
    return hal.AttentionRequest(batch=batch, heads_q=heads, heads_kv=heads, **values)


def test_without_a_driver_the_device_is_absent_and_says_why(tmp_path: Path) -> None:
    environment = os.environ | {"OCL_ICD_VENDORS": str(tmp_path), "OPENCL_VENDOR_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WHY], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (
        "[] opencl is installed but has no device: no OpenCL driver; install pocl-opencl-icd for a CPU" in done.stdout
    )


def test_a_cpu_counts_as_emulated(device: hal.Device) -> None:
    handle = discovery.find().handles[device.id]
    wanted = hal.Fidelity.EMULATED if discovery.is_cpu(handle) else hal.Fidelity.HARDWARE
    assert device.fidelity is wanted


def test_many_mixed_calls_leave_memory_as_it_was(session: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reserved = []
    for n in range(300):
        length = (3, 17, 40, 64, 9)[n % 5]
        query = torch.randn(1 + n % 2, 2, length, (32, 64)[n % 2], generator=generator)
        session.bind(request(query))(query, query, query)
        reserved.append(session.memory.pool.reserved)
    assert session.memory.stats().in_use == 0
    assert len(set(reserved[10:])) == 1
    assert session.memory.fragmentation <= 0.25
    assert session.memory.trim() > 0


def test_mixed_calls_do_not_fragment_a_device_with_memory_of_its_own(
    apart: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Looked at while a call holds its memory; afterwards nothing is held, and nothing could be in pieces."""
    generator, seen = torch.Generator().manual_seed(seed), []
    waited = apart.engine.wait

    def look(what: str, *given: Any, **more: Any) -> None:
        seen.append((apart.memory.pool.fragmentation, apart.memory.pool.reserved))
        waited(what, *given, **more)

    monkeypatch.setattr(apart.engine, "wait", look)
    for n in range(200):
        length, dim = (3, 17, 40, 64, 9, 130)[n % 6], (32, 64)[n % 2]
        query = torch.randn(1 + n % 3, 2, length, dim, generator=generator)
        mask = torch.rand(length, length, generator=generator) > 0.3
        wanted = request(query, mask=hal.MaskKind.BOOLEAN if n % 4 == 0 else hal.MaskKind.NONE)
        apart.bind(wanted)(query, query, query, mask if n % 4 == 0 else None)
    assert len(seen) > 200
    assert max(fragmentation for fragmentation, _ in seen) <= 0.25
    assert len({reserved for _, reserved in seen[10:]}) == 1


def test_tensors_on_a_cpu_are_read_where_they_lie(session: Any) -> None:
    if not session.engine.shares_memory:
        pytest.skip("this device has memory of its own")
    query = torch.randn(1, 2, 64, 64)
    session.bind(request(query))(query, query, query)
    assert session.memory.stats().copies == 0
    turned = torch.randn(1, 64, 2, 64).transpose(1, 2)
    session.bind(request(turned))(turned, query, query)
    assert session.memory.stats().copies == 1


def test_memory_beyond_the_limit_is_refused_and_the_session_stays_usable(device: hal.Device) -> None:
    from hal_opencl.session import OpenClSession

    with OpenClSession(device, discovery.find().handles[device.id], 1 << 20) as session:
        large, small = torch.randn(1, 4, 2048, 64), torch.randn(1, 1, 16, 32)
        with pytest.raises(hal.MemoryLimitError, match="1,048,576"):
            session.bind(request(large))(large, large, large)
        assert session.memory.stats().in_use == 0
        assert bool(session.bind(request(small))(small, small, small).isfinite().all())


def test_a_closed_session_says_so(device: hal.Device) -> None:
    session = registry.backend_of(device).open(device)
    session.close()
    query = torch.randn(1, 1, 8, 32)
    with pytest.raises(hal.DeviceUnavailableError, match="was closed"):
        session.bind(request(query))(query, query, query)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_opening_and_closing_leaves_no_memory_behind(device: hal.Device) -> None:
    query, before = torch.randn(1, 1, 8, 32), 0
    for n in range(40):
        with registry.backend_of(device).open(device) as session:
            session.bind(request(query))(query, query, query)
        if n == 9:
            before = resident()
    assert resident() - before < 30 * 100_000, "0.5 MB were left behind by each"


FAST = [(64, 49152, torch.float32), (256, 16384, torch.float16)]
SLOW = [
    (d, r, t)
    for d, r, t in itertools.product((32, 64, 96, 128, 192, 256), (49152, 16384), (torch.float32, torch.float16))
    if (d, r, t) not in FAST
]


@pytest.mark.parametrize(
    ("dim", "room", "dtype"), FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_the_gpu_program_agrees_with_float64_on_any_device(
    session: Any, monkeypatch: pytest.MonkeyPatch, dim: int, room: int, dtype: torch.dtype, seed: int
) -> None:
    """Local-memory tiles are a GPU's program; a CPU's driver runs them too, slowly."""
    shape = tiling.shape_of(room, dim, 75, 140)
    assert shape.local_bytes(dim) <= room
    monkeypatch.setattr(session.tiling, "shape", lambda *arguments: shape)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 4, 75, dim, generator=generator).to(dtype)
    key, value = (torch.randn(1, 2, 140, dim, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(1, 1, 75, 140, generator=generator) > 0.3
    wanted = hal.AttentionRequest(
        batch=1,
        heads_q=4,
        heads_kv=2,
        len_q=75,
        len_k=140,
        dim_qk=dim,
        dim_v=dim,
        dtype=str(dtype).removeprefix("torch."),
        causal=hal.Causal.BOTTOM_RIGHT,
        mask=hal.MaskKind.BOOLEAN,
        softcap=5.0,
        lse=True,
    )
    out, lse = session.bind(wanted)(query, key, value, mask)
    want = reference(query, key, value, mask, request=wanted)
    assert relative_error(out, want.out) <= (1e-5 if dtype == torch.float32 else 2e-3)
    assert relative_error(lse, want.lse) <= 1e-5


@pytest.mark.parametrize(("dim", "rows"), [(64, 2), pytest.param(96, 5, marks=pytest.mark.slow)])
def test_the_gpu_program_for_few_rows_agrees_with_float64_on_any_device(
    session: Any, monkeypatch: pytest.MonkeyPatch, dim: int, rows: int, seed: int
) -> None:
    shape = tiling.shape_of(49152, dim, 2 * rows, 700)
    assert shape.rows < 64
    assert shape.local_bytes(dim) <= 49152
    monkeypatch.setattr(session.tiling, "shape", lambda *arguments: shape)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, 4, rows, dim, generator=generator)
    key, value = (torch.randn(1, 2, 700, dim, generator=generator) for _ in range(2))
    wanted = hal.AttentionRequest(
        batch=1,
        heads_q=4,
        heads_kv=2,
        len_q=rows,
        len_k=700,
        dim_qk=dim,
        dim_v=dim,
        dtype="float32",
        causal=hal.Causal.BOTTOM_RIGHT,
    )
    out = session.bind(wanted)(query, key, value)
    assert relative_error(out, reference(query, key, value, request=wanted).out) <= 1e-5


@pytest.fixture
def apart(device: hal.Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A session that takes the device for one with memory of its own; copies go through slots of 8 KiB.

    It runs a CPU's program, which compiles sooner there.
    """
    from hal_opencl import session
    from hal_opencl.runtime import engine, staging

    monkeypatch.setattr(engine, "is_cpu", lambda handle: False)
    monkeypatch.setattr(staging, "_SLOT", 8192)
    monkeypatch.setattr(tiling, "shape_of", lambda *arguments: tiling.Shape(16, 64))
    with session.OpenClSession(device, discovery.find().handles[device.id]) as opened:
        yield opened


@pytest.mark.parametrize("dim", [64, 40])
def test_tensors_travel_through_pinned_slots(apart: Any, dim: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    turned = torch.randn(2, 37, 3, dim, generator=generator).transpose(1, 2)  # rows without a common stride
    key, value = (torch.randn(2, 3, 300, dim, generator=generator) for _ in range(2))
    out = apart.bind(request(turned, len_k=300))(turned, key, value)
    want = torch.nn.functional.scaled_dot_product_attention(turned.double(), key.double(), value.double())
    assert relative_error(out, want) <= 1e-5
    assert apart.memory.stats().copies == 5  # query, key, value; the result and its log-sum-exp
    ring, pool = apart.memory.ring, apart.memory.pool
    assert ring.nbytes == 4 * 8192, "four slots, though results came while operands were still on their way"
    kept = pool.reserved + ring.nbytes + apart.memory.scratch.reserved
    assert apart.memory.stats().pooled == kept
    assert apart.memory.trim() == kept
    assert apart.memory.stats().pooled == 0


def test_rows_longer_than_a_slot_travel_in_pieces(apart: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 5000, generator=generator)
    assert bool((apart.kernel("vector_add")(x, x) == 2 * x).all())
    assert bool((apart.kernel("vector_add")(x.t(), x.t()) == 2 * x.t()).all())


def test_a_copy_that_does_not_end_is_given_up_by_name(apart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hal_opencl.runtime import staging

    class Stuck:
        """pyopencl, but for copies that are submitted and never run."""

        def enqueue_copy(self, *arguments: Any, **options: Any) -> Any:
            return SimpleNamespace(command_execution_status=2)

        def __getattr__(self, name: str) -> Any:
            return getattr(pyopencl, name)

    pyopencl, waited = staging.cl, apart.engine.wait
    query = torch.randn(1, 2, 200, 64)
    with monkeypatch.context() as patched:
        patched.setattr(staging, "cl", Stuck())
        patched.setattr(apart.engine, "wait", lambda what, timeout=0.05, event=None: waited(what, timeout, event))
        with pytest.raises(hal.DeviceUnavailableError, match=r"did not copy operands within 0.05 s"):
            apart.bind(request(query))(query, query, query)
    ring = apart.memory.ring
    assert len(ring._busy) * 8192 == ring.nbytes, "the device may still read them"
    for event, _ in ring._busy:
        event.command_execution_status = -5  # a copy that failed is over too
    with pytest.raises(hal.DeviceUnavailableError, match="was lost"):
        apart.bind(request(query))(query, query, query)
    apart.engine.lost = False  # the driver that failed is gone
    for event, _ in ring._busy:
        event.command_execution_status = 0
    assert bool(apart.bind(request(query))(query, query, query).isfinite().all())


@pytest.mark.parametrize("fails", ["to start", "to end"])
def test_slots_come_back_from_results_that_cannot_be_fetched(
    apart: Any, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    from hal_opencl.runtime import staging

    query, copy, waited = torch.randn(1, 2, 200, 64), staging.cl.enqueue_copy, apart.engine.wait
    apart.bind(request(query))(query, query, query)
    ring = apart.memory.ring

    def start(queue: Any, target: Any, source: Any, **place: Any) -> Any:
        if "src_offset" in place and place["src_offset"] % 65536:  # some way into a result
            raise staging.cl.LogicError(staging.cl._cl._ErrorRecord("clEnqueueReadBuffer", -54, ""))
        return copy(queue, target, source, **place)

    def end(what: str, timeout: float = 60.0, event: Any = None) -> None:
        if event is not None and what.startswith("compute"):  # a result's
            raise hal.DeviceUnavailableError("it did not end")
        waited(what, timeout, event)

    with monkeypatch.context() as patched:
        patched.setattr(staging.cl, "enqueue_copy", start) if fails == "to start" else None
        patched.setattr(apart.engine, "wait", end) if fails == "to end" else None
        with pytest.raises(hal.DeviceUnavailableError, match="could not copy" if fails == "to start" else "did not"):
            apart.bind(request(query))(query, query, query)
    assert (len(ring._busy) + len(ring._free)) * 8192 == ring.nbytes
    assert bool(apart.bind(request(query))(query, query, query).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("group", "len_q"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 4), (1, 9)])
def test_few_rows_read_the_keys_where_they_lie(
    session: Any, group: int, len_q: int, dtype: torch.dtype, seed: int
) -> None:
    generator, len_k = torch.Generator().manual_seed(seed), 700
    query = torch.randn(2, 2 * group, len_q, 64, generator=generator).to(dtype)
    key, value = (torch.randn(2, 2, len_k, 64, generator=generator).to(dtype) for _ in range(2))
    wanted = hal.AttentionRequest(
        batch=2,
        heads_q=2 * group,
        heads_kv=2,
        len_q=len_q,
        len_k=len_k,
        dim_qk=64,
        dim_v=64,
        lse=True,
        dtype=str(dtype).removeprefix("torch."),
        causal=hal.Causal.BOTTOM_RIGHT,
        window=(650, 0),
        softcap=7.0 if group == 2 else None,
    )
    before = session.memory.pool.allocations
    out, lse = session.bind(wanted)(query, key, value)
    want = reference(query, key, value, request=wanted)
    assert relative_error(out, want.out) <= (1e-5 if dtype == torch.float32 else 2e-3)
    assert relative_error(lse, want.lse) <= 1e-5
    if session.engine.shares_memory:  # beside splits and their log-sum-exp, nothing is made of the keys
        packed = key.numel() * 4
        assert session.memory.pool.allocations > before
        assert (session.memory.pool.peak >= packed) == (group * len_q > 8)
