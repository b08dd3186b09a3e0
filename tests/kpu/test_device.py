"""kpu:0 through hal_core: what it says it is, what it refuses and why, estimates, meters, kernels, profiles."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hal_kpu.backend import KPUDevices
from hal_kpu.profiles.profile import load
from hal_kpu.tiling import longest_head

import hal_core as hal
from hal_core import ContractError, UnsupportedError
from hal_core.testing import reference, relative_error


@pytest.fixture
def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=["t768", "t4x4"])
def other(request: pytest.FixtureRequest) -> Iterator[str]:
    """Another machine, registered at run time under a name of its own."""

    class Other(KPUDevices):
        def devices(self) -> list[hal.Device]:
            import attrs

            return [attrs.evolve(device, id="other:0") for device in super().devices()]

    hal.register(Other(load(request.param)))
    yield "other:0"
    hal.unregister("other")


def test_it_says_what_it_is() -> None:
    device = next(d for d in hal.devices() if d.id == "kpu:0")
    assert device.fidelity == "simulated"
    assert device.driver == "simulated from profile t64"
    assert "torch.compile kpu" in device.features
    q = torch.randn(1, 2, 16, 32)
    estimate = hal.explain(q, q, q, backend="kpu:0").winner.estimate
    assert estimate.time.basis == "modelled"
    assert estimate.time.provenance == "assumed"


def test_automatic_selection_never_takes_it_unasked() -> None:
    q = torch.randn(1, 2, 16, 32)
    assert hal.explain(q, q, q).chosen != "kpu:0"


def test_a_head_that_no_array_holds_is_refused_with_the_buffer_and_the_way_out() -> None:
    longest = longest_head(load("t64"), "float32")
    q = torch.randn(1, 1, 4, longest + 1)
    with pytest.raises(UnsupportedError) as caught:
        hal.attention(q, q, q, backend="kpu:0")
    assert "bytes beside one array asked, 262,144 bytes offered" in str(caught.value)
    assert f"use a head_dim of {longest} or less, or a narrower dtype" in str(caught.value)
    q = q.bfloat16()
    assert hal.attention(q, q, q, backend="kpu:0").shape == q.shape


def test_every_machine_gives_attention(other: str, draw: torch.Generator) -> None:
    q, k, v = torch.randn(2, 4, 50, 24, generator=draw), *(torch.randn(2, 2, 70, 24, generator=draw) for _ in range(2))
    out, lse = hal.attention(q, k, v, backend=other, causal="bottom_right", enable_gqa=True, return_lse=True)
    want = reference(q, k, v, causal="bottom_right")
    assert relative_error(out, want.out) < 1e-5
    assert relative_error(lse, want.lse) < 1e-5


def test_a_meter_sums_modelled_time_and_energy() -> None:
    q = torch.randn(2, 4, 64, 32)
    estimate = hal.explain(q, q, q, backend="kpu:0").winner.estimate
    with hal.meter() as meter:
        for _ in range(3):
            hal.attention(q, q, q, backend="kpu:0")
    record = meter.records["kpu:0"]
    assert record.time.middle == pytest.approx(3 * estimate.time.middle)
    assert record.energy.middle == pytest.approx(3 * estimate.energy.middle)
    assert record.time.basis == "modelled"


def test_estimates_are_cheap_after_the_first_of_a_bucket() -> None:
    from time import perf_counter

    backend = KPUDevices()
    found = backend.devices()[0]
    requests = [hal.AttentionRequest(1, 12, 12, n, n, 64, 64, "float32") for n in range(481, 513)]
    backend.estimate(requests[0], found)
    start = perf_counter()
    for request in requests:
        backend.estimate(request, found)
    assert (perf_counter() - start) / len(requests) < 0.005


def test_a_profile_is_chosen_by_the_environment() -> None:
    code = "import hal_core as hal; print([d.model for d in hal.devices() if d.id == 'kpu:0'])"
    for name, wanted in (("t256", "['T256']"), ("nonsense", "[]")):
        environment = os.environ | {"HAL_KPU_PROFILE": name, "HAL_PLUGINS": "kpu"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.strip() == wanted, done.stderr


def test_a_profile_that_is_not_there_is_named_with_the_closest_and_no_install_is_advised() -> None:
    code = (
        "import torch, hal_core as hal, hal_kpu\n"
        "for call in (lambda: hal.attention(*torch.ones(3, 1, 1, 4, 8), backend='kpu:0'), hal_kpu.info):\n"
        "    try: call()\n"
        "    except hal.HalError as error: print(error)"
    )
    environment = os.environ | {"HAL_KPU_PROFILE": "t265", "HAL_PLUGINS": "kpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    first, second = done.stdout.splitlines()
    wanted = "HAL_KPU_PROFILE: 't265' is no profile (did you mean 't256'?): use t16x16, t256, t32x32"
    assert first.startswith(f"kpu:0 is installed but has no device: {wanted}"), done.stderr
    assert second.startswith(wanted)
    assert "pip" not in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_multiply_with_wide_sums(dtype: torch.dtype, draw: torch.Generator) -> None:
    a, b = (torch.randn(3, *size, generator=draw).to(dtype) for size in ((20, 70), (70, 33)))
    got = hal.kernel("matmul", backend="kpu:0")(a, b)
    assert got.dtype == dtype
    assert relative_error(got, a.double() @ b.double()) < 2 * torch.finfo(dtype).eps
    bias = torch.randn(33, generator=draw).to(dtype)
    got = hal.kernel("linear", backend="kpu:0")(a, b[0].T, bias)
    assert relative_error(got, a.double() @ b[0].double() + bias.double()) < 2 * torch.finfo(dtype).eps


def test_kernels_state_their_cost_and_are_metered(draw: torch.Generator) -> None:
    linear, x, weight = hal.kernel("linear", backend="kpu:0"), torch.randn(64, 96), torch.randn(128, 96)
    estimate = linear.estimate(x, weight)
    with hal.meter() as meter:
        linear(x, weight)
    record = meter.records["kpu:0"]
    assert record.time == estimate.time
    assert record.energy == estimate.energy
    assert record.macs == 64 * 96 * 128
    assert estimate.time.basis == "modelled"
    assert linear.estimate(torch.randn(640, 96), weight).time.low > estimate.time.middle


def test_kernels_refuse_what_the_array_does_not_multiply() -> None:
    matmul, linear = (hal.kernel(name, backend="kpu:0") for name in ("matmul", "linear"))
    with pytest.raises(ContractError, match="float64"):
        matmul(torch.randn(2, 2).double(), torch.randn(2, 2).double())
    with pytest.raises(ContractError, match="bfloat16"):
        matmul(torch.randn(2, 2), torch.randn(2, 2).bfloat16())
    with pytest.raises(ContractError, match=r"\[2, 3\] and b \[2, 3\]"):
        matmul(torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(ContractError, match=r"\[N, K\]"):
        linear(torch.randn(2, 3), torch.randn(4, 2))


def test_a_session_compares_fused_with_scores_through_dram() -> None:
    request = hal.AttentionRequest(1, 8, 8, 256, 256, 64, 64, "float32")
    found = hal.session("kpu:0").compare(request)
    assert found.fused.cycles < found.unfused.cycles
    pairs = 8 * 256 * 256 * 4
    assert found.unfused.external_bytes >= request.bytes_moved + 4 * pairs  # written and read, scores and weights
    assert found.fused.external_bytes < request.bytes_moved + pairs
    seconds = hal.explain(*(torch.randn(1, 8, 256, 64) for _ in range(3)), backend="kpu:0").winner.estimate.time.middle
    assert seconds == pytest.approx(found.fused.seconds)


def test_its_kernels_do_not_depend_on_other_plugins() -> None:
    code = (
        "import torch, hal_core as hal; "
        "x = torch.randn(4, 8); "
        "print([list(hal.kernel(n, backend='kpu:0')(x, y).shape) for n, y in (('matmul', x.T), ('linear', x))])"
    )
    environment = os.environ | {"HAL_PLUGINS": "kpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[[4, 4], [4, 4]]", done.stderr


def test_options_choose_the_clock_and_the_simulator(draw: torch.Generator) -> None:
    q = torch.randn(1, 2, 64, 32, generator=draw)
    plain, times = hal.attention(q, q, q, backend="kpu:0"), {}
    for name, options in {
        "own": {},
        "fast": {"clock_mhz": 4750},
        "exact": {"fidelity": "cycle_accurate"},
    }.items():
        with hal.use("kpu:0", options=options), hal.meter() as meter:
            out = hal.attention(q, q, q)
        times[name] = meter.records["kpu:0"].time
        assert relative_error(out, plain.double()) < 1e-6
    assert times["own"].middle / 10 <= times["fast"].middle < times["own"].middle
    assert times["exact"].middle == pytest.approx(times["own"].middle, rel=0.05)
    assert "cycle-accurate simulation" in times["exact"].source


def test_cycle_accurate_values_come_from_the_stepped_array(draw: torch.Generator, monkeypatch) -> None:
    from hal_kpu.simulator import values

    kinds = []
    monkeypatch.setattr(values, "multiply", lambda *given: kinds.append(given[2:4]) or multiply(*given))
    multiply = __import__("hal_kpu.simulator.array", fromlist=["multiply"]).multiply
    q = torch.randn(1, 1, 16, 8, generator=draw).bfloat16()
    with hal.use("kpu:0", options={"fidelity": "cycle_accurate"}):
        hal.attention(q, q, q)
    assert kinds == [load("t64").arrays("bfloat16")[:2]] * 2  # QK^T and PV


def test_an_unknown_option_is_refused_with_those_there_are() -> None:
    q = torch.randn(1, 1, 8, 8)
    for options, offered in (({"fidelity": "exact"}, "'transactional', 'cycle_accurate'"), ({"clock_mhz": 0}, "1 to")):
        with hal.use("kpu:0", options=options), pytest.raises(UnsupportedError, match=offered):
            hal.attention(q, q, q)


def test_a_session_states_what_the_prepared_call_costs() -> None:
    q, k = torch.randn(1, 8, 96, 64), torch.randn(1, 8, 320, 64)
    session = hal.session("kpu:0")
    request = hal.AttentionRequest(1, 8, 8, 96, 320, 64, 64, "float32")
    cost = session.cost(session.prepare_attention(q, k, k, request=request))
    assert cost.time.middle == pytest.approx(session.compare(request).fused.seconds)
    with hal.meter() as meter:
        hal.attention(q, k, k, backend="kpu:0")
    assert meter.records["kpu:0"].time.middle == cost.time.middle, "the exact lengths, not those of the bucket"
    coarse = session.cost(session.prepare_attention(q, k, k, 96, request=request))
    assert coarse.time.middle > cost.time.middle, "one block of all rows leaves arrays without work"


def test_other_machines_are_devices_beside_it(tmp_path) -> None:
    from hal_kpu.profiles.profile import FOLDER

    devices = KPUDevices()
    assert {"t64", "t256", "t768"} <= set(devices.profile_names())
    mine = tmp_path / "mine.toml"
    mine.write_text((FOLDER / "t256.toml").read_text().replace('name = "t256"', 'name = "mine"'))
    q = torch.randn(1, 8, 256, 64)
    times = {}
    for number, profile in enumerate(("t256", str(mine), "t4x4")):
        hal.register(devices.at_profile(profile, f"beside{number}"), f"beside{number}")
        try:
            device = hal.device(f"beside{number}")
            assert device.model == (profile if number != 1 else "mine").upper()
            assert not any(feature.startswith("torch.compile") for feature in device.features), "that is kpu:0's"
            with hal.meter() as meter:
                hal.attention(q, q, q, backend=device.id)
            times[number] = meter.records[device.id].time.middle
            if number == 1:
                before = device.fingerprint
                mine.write_text(mine.read_text() + "\n# changed\n")
                assert devices.at_profile(str(mine), "beside1").devices()[0].fingerprint != before
        finally:
            hal.unregister(f"beside{number}")
    assert times[0] == times[1] < times[2]
    with pytest.raises(ContractError, match="no profile"):
        devices.at_profile("t65", "beside")
