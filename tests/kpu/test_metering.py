"""A compiled model inside `hal.meter`: the work of kpu:0, with modelled time and energy, also where values are
behavioral.
"""

from __future__ import annotations

import pytest
import torch
from hal_kpu.frontend.fx.coverage import measure
from hal_kpu.profiles.profile import load
from hal_simulation import RELATIVE_UNCERTAINTY
from torch import nn

import hal_core as hal


@pytest.mark.parametrize("fidelity", ["kpu", "kpu_transactional"])
def test_a_compiled_model_is_metered_as_the_device(fidelity: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8)).eval()
    compiled, x = torch.compile(model, backend=fidelity), torch.randn(16, 24)
    with torch.no_grad():
        compiled(x)
        with hal.meter() as meter, measure() as measured:
            compiled(x)
            compiled(x)
    record, covered = meter.records["kpu:0"], measured.coverage()
    assert list(meter.records) == ["kpu:0"]
    assert record.calls == 2
    assert record.macs == covered.kpu_macs == 2 * 16 * (24 * 40 + 40 * 8)
    assert record.time.basis == "modelled"
    assert "not calibrated" in record.energy.source
    assert record.wall > 0
    if fidelity == "kpu_transactional":
        assert record.time.middle == pytest.approx(covered.kpu_seconds)
        assert record.time.high == pytest.approx(covered.kpu_seconds * (1 + RELATIVE_UNCERTAINTY["assumed"]))


def test_it_is_timed_on_the_machine_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    compiled, x = torch.compile(nn.Linear(64, 64), backend="kpu"), torch.randn(256, 64)
    seconds = []
    for name in ("t64", "t768"):
        monkeypatch.setattr(hal.session("kpu:0"), "profile", load(name))
        with torch.no_grad(), hal.meter() as meter:
            compiled(x)
        record = meter.records["kpu:0"]
        assert f"profile {name}" in record.time.source
        seconds.append(record.time.middle)
    assert seconds[1] < seconds[0]


def test_without_a_meter_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*given: object) -> None:
        raise AssertionError("timed without a meter")

    monkeypatch.setattr("hal_kpu.frontend.fx.partition.Plan.time", timed)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(nn.Linear(4, 4), backend="kpu")(torch.randn(2, 4))
