"""The CPU as a backend: what it knows of the machine, what it estimates, what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hal_cpu import discovery
from hal_cpu.backend import CpuBackend
from hal_cpu.cost import Rates, estimate

import hal_core as hal
from hal_core import AttentionRequest, Basis, Provenance
from hal_core.calibration import save

REQUEST = AttentionRequest(1, 8, 8, 256, 256, 64, 64, "float32")


def test_devices_and_estimates_need_no_torch() -> None:
    script = (
        "import sys; from hal_cpu.backend import CpuBackend; from hal_core import AttentionRequest as R;"
        "b = CpuBackend();"
        "d = b.devices()[0]; b.capabilities(d); b.estimate(R(1, 8, 8, 64, 64, 64, 64, 'float32'), d);"
        "print(d.id, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["cpu:0", "False"], run.stderr


def test_there_is_no_device_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hal_cpu.backend._torch_version", lambda: None)
    assert list(CpuBackend().devices()) == []
    assert "pip install" in CpuBackend().why_absent()


def test_a_system_that_says_nothing_gives_assumed_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(discovery, "_CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(discovery, "_CACHES", tmp_path / "absent")
    found = discovery.this_machine.__wrapped__()
    assert not found.frequency_known
    assert found.l2 > 0
    assert found.l3 > found.l2
    assert found.cores >= 1


def test_sizes_are_read_from_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    caches = (("Data", 1, "48K"), ("Instruction", 1, "64K"), ("Unified", 2, "2048K"), ("Unified", 3, "30M"))
    for number, (kind, level, size) in enumerate(caches):
        folder = tmp_path / f"index{number}"
        folder.mkdir()
        for name, text in (("type", kind), ("level", str(level)), ("size", size)):
            (folder / name).write_text(text + "\n")
    cpuinfo = tmp_path / "cpuinfo"
    lines = (
        "vendor_id\t: Some",
        "model name\t: Fast 9000",
        "cpu MHz\t: 3100.5",
        "flags\t: avx2 amx_fp16",
        "",
        "cores: 1",
    )
    cpuinfo.write_text("\n".join(lines))
    monkeypatch.setattr(discovery, "_CPUINFO", cpuinfo)
    monkeypatch.setattr(discovery, "_CACHES", tmp_path)
    found = discovery.this_machine.__wrapped__()
    assert (found.model, found.l2, found.l3, found.frequency) == ("Fast 9000", 2 << 20, 30 << 20, 3100.5e6)
    assert found.simd == ("avx2", "amx_fp16")
    assert found.multiplies_float16
    assert not found.multiplies_bfloat16


def test_without_a_calibration_estimates_are_assumed_and_wide() -> None:
    given = CpuBackend().estimate(REQUEST, hal.devices()[0])
    assert (given.time.basis, given.time.provenance) == (Basis.MODELLED, Provenance.ASSUMED)
    assert given.time.high >= 10 * given.time.low
    assert given.energy is None
    assert sum(given.parts.values()) == pytest.approx(given.time.middle)


def test_a_stored_calibration_is_used() -> None:
    device = hal.devices()[0]
    values = {"bandwidth": 1e9, "rates": {"native float32": 1e6}, "calls": {"native": 1e-3}, "spread": 1.5}
    save(device, values)
    given = CpuBackend().estimate(REQUEST, device)
    assert given.time.basis is Basis.MEASURED
    seconds = REQUEST.macs / 1e6 + 1e-3
    assert given.time.low == pytest.approx(seconds / 1.5)
    assert given.time.high == pytest.approx(seconds * 1.5)


@pytest.mark.parametrize("path", [{}, {"softcap": 5.0}, {"lse": True}, {"len_q": 1, "heads_kv": 2}], ids=str)
def test_more_work_is_never_estimated_cheaper(path: dict[str, object]) -> None:
    rates = Rates.assumed(discovery.this_machine())
    small = replace(REQUEST, **path)
    for field, value in (("batch", 9), ("len_k", 9999), ("dim_v", 300)):
        large = replace(small, **{field: value})
        assert estimate(large, rates, 2).time.low >= estimate(small, rates, 2).time.low
        if "softcap" not in path:  # tiles are cut to the cache: longer ones of fewer heads at a time may take less
            assert estimate(large, rates, 2).memory >= estimate(small, rates, 2).memory


@pytest.mark.slow
def test_calibration_measures_what_estimates_need() -> None:
    backend, device, seen = CpuBackend(), hal.devices()[0], []
    values = backend.calibrate(device, lambda text, share: seen.append((text, share)))
    assert json.loads(json.dumps(values)) == values
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    assert seen[-1][1] == 1.0
    assert backend.estimate(REQUEST, device).time.basis is Basis.MEASURED
    for path in ("native", "fused", "tiled", "packed", "decode"):
        assert values["calls"][path] > 0
        assert values["rates"][f"{path} float32"] > 0
    assert values["bandwidth"] > 0


GOOD = {"bandwidth": 1e9, "rates": {"native float32": 1e6}, "calls": {"native": 1e-3}, "spread": 1.5}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"bandwidth": 0} | {k: v for k, v in GOOD.items() if k != "bandwidth"},
        GOOD | {"rates": {"native float32": 0}},
        GOOD | {"rates": {"native float32": "fast"}},
        GOOD | {"rates": {"native float32": float("nan")}},
        GOOD | {"calls": {"native": -1e-3}},
        GOOD | {"calls": [1]},
        GOOD | {"spread": 0.5},
        GOOD | {"spread": None},
        GOOD | {"bandwidth": True},
        GOOD | {"bandwidth": 10**400},
    ],
    ids=str,
)
def test_a_damaged_calibration_is_named_and_not_used(values: dict[str, object]) -> None:
    device = hal.device("cpu:0")
    save(device, values)
    backend = CpuBackend()
    with pytest.warns(RuntimeWarning, match=r"calibration .*cpu-0.*\.json.* is not used") as warned:
        given = [backend.estimate(REQUEST, device) for _ in range(3)]
    assert len(warned) == 1
    assert all(each.time.basis is Basis.MODELLED for each in given)


def test_times_that_scatter_are_measured_again_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal_cpu import calibrate

    tries = iter([[0.008, 0.5, 0.5], [0.008, 0.4, 0.4], [0.008, 0.5, 0.3]])
    monkeypatch.setattr(calibrate, "_times", lambda call, budget, most: next(tries))
    with pytest.warns(RuntimeWarning, match=r"calls of a call took 8 to 500 ms: other programs"):
        assert calibrate._steady(lambda: None, 0.1, "a call") == 0.008
    assert next(tries, None) is None


def test_steady_times_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal_cpu import calibrate

    tries = iter([[0.010, 0.011, 0.012]])
    monkeypatch.setattr(calibrate, "_times", lambda call, budget, most: next(tries))
    assert calibrate._steady(lambda: None, 0.1, "a call") == 0.010
