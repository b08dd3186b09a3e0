"""The hypothetical ring bank: every figure assumed, and held to everything it claims."""

from __future__ import annotations

import pytest
import torch
from hal_luminous.backend import LuminousBackend
from hal_photonics.calibrate import calibrate
from hal_photonics.simulator.chip import SimulatedDriver

import hal_core as hal
from hal_core import Provenance
from hal_core.testing import ConformanceSuite, check_backend


class TestBank(ConformanceSuite):
    backend = "luminous:0"
    quick = True


@pytest.mark.slow
def test_the_bank_conforms_in_full() -> None:
    report = check_backend("luminous:0")
    assert report.passed, str(report)


def test_every_figure_is_assumed_and_the_device_says_hypothetical() -> None:
    profile = LuminousBackend().profiles[0]
    assert {figure.provenance for figure in profile.figures.values()} == {Provenance.ASSUMED}
    device = LuminousBackend().devices()[0]
    assert "hypothetical" in device.vendor
    q = torch.ones(1, 1, 8, 16)
    estimate = hal.explain(q, q, q, backend="luminous:0").winner.estimate
    assert estimate.time.provenance == estimate.energy.provenance == "assumed"


def test_calibration_takes_the_rings_errors_out() -> None:
    report = calibrate(SimulatedDriver(LuminousBackend().profiles[0]))[1]
    assert report.after > report.before + 3
    assert report.kept >= 0.8


def test_colder_rings_are_off_their_weights() -> None:
    profile = LuminousBackend().profiles[0].replace(ring__temperature_error=0)
    warm = LuminousBackend().profiles[0].replace(ring__temperature_error=0.1)
    x, w = torch.full((1, 4, 64), 127.0), torch.full((1, 64, 64), 30.0)
    exact, off = (SimulatedDriver(p).read(x, w, noise=None).codes for p in (profile, warm))
    assert float((exact - off).abs().mean()) > 1
