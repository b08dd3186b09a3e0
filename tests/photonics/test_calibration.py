"""Calibration: what each step takes out, how far it holds, what it finds broken, and when a chip is refused."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest
import torch
from hal_photonics.calibrate import bits, calibrate, probe_snr
from hal_photonics.profiles.profile import Profile
from hal_photonics.session import PhotonicSession
from hal_photonics.simulator.chip import Fault, SimulatedDriver
from hal_photonics.simulator.core import Corrections, PhotonicCore
from hal_photonics.simulator.imperfections import odd_polynomial

import hal_core as hal
from hal_core import DeviceUnavailableError


@pytest.mark.parametrize("chip", [1, 2, 3])
def test_most_of_the_gain_is_kept_on_unseen_weights(generic: Profile, chip: int) -> None:
    _, report = calibrate(SimulatedDriver(attrs.evolve(generic, chip=chip)))
    assert report.after - report.before >= 2
    assert report.kept >= 0.8
    assert report.faults == ()


def test_dark_codes_find_the_offsets(generic: Profile) -> None:
    driver = SimulatedDriver(generic)
    found = calibrate(driver)[0]
    left = (found.offset - driver.chip.offset).abs().max()
    assert float(left) < 0.25 * float(driver.chip.offset.abs().max())


def test_the_vector_sweep_straightens_bent_inputs(generic: Profile) -> None:
    """A bow of 30 codes rms falls below 3."""
    levels = 511
    bent = generic.replace(converters__input_bits=10, noise__input_bow=30, noise__input_ripple=1.7)
    driver = SimulatedDriver(bent, linearised=False)
    found = calibrate(driver)[0]
    wanted = torch.linspace(-0.8, 0.8, 33).unsqueeze(1).expand(-1, 64)
    plain = odd_polynomial(driver.chip.bow, wanted) + wanted
    slope = (plain * wanted).sum(0) / wanted.square().sum(0)
    straightened = found.sent_inputs((wanted * levels).round(), levels) / levels
    arrived = driver.chip.bent(straightened, linearised=False)
    arrived_slope = (arrived * wanted).sum(0) / wanted.square().sum(0)
    before = (plain / slope - wanted).square().mean().sqrt() * levels
    after = (arrived / arrived_slope - wanted).square().mean().sqrt() * levels
    assert float(before) > 8
    assert float(after) < 3


def test_straightened_inputs_make_better_products(generic: Profile) -> None:
    driver = SimulatedDriver(generic.replace(noise__input_bow=12), linearised=False)
    corrections, report = calibrate(driver)
    without = corrections._replace(inverse=Corrections.none(generic).inverse)
    noise = torch.Generator().manual_seed(5)
    assert report.after - probe_snr(PhotonicCore(driver, without), 99, noise) > 0.5, "the vector sweep's result off"


def test_predistortion_takes_the_weight_errors_out(generic: Profile) -> None:
    driver = SimulatedDriver(generic)
    corrections, report = calibrate(driver)
    plain = Corrections.none(generic)
    without = corrections._replace(cell_gain=plain.cell_gain, cell_offset=plain.cell_offset)
    noise = torch.Generator().manual_seed(5)
    assert report.after - probe_snr(PhotonicCore(driver, without), 99, noise) > 1.5, "pre-distortion off"


@pytest.mark.parametrize(
    ("fault", "where", "named"),
    [
        (Fault.DEAD_INPUT, (5,), "dead input 5"),
        (Fault.DEAD_COLUMN, (7,), "dead column 7"),
        (Fault.STUCK_WEIGHT, (3, 9), "stuck weight (3, 9)"),
    ],
)
def test_a_fault_is_found_named_and_served_around_as_declared(
    generic: Profile, fault: Fault, where: tuple[int, ...], named: str
) -> None:
    driver = SimulatedDriver(generic)
    driver.inject(fault, where)
    report = calibrate(driver)[1]
    assert report.faults == (named,)
    assert report.refusal(generic) == ""
    assert f"({named} ...)" in report.refusal(generic.replace(calibration__faults_tolerated=0))


def test_a_chip_below_the_floor_does_not_serve_and_says_why(generic: Profile) -> None:
    noisy = generic.replace(noise__readout_noise=100)
    session = opened(noisy)
    assert session.state == "off"
    request = hal.AttentionRequest(1, 1, 1, 2, 2, 4, 4, "float32")
    prepared = session.prepare_attention(*[torch.ones(1, 1, 2, 4)] * 3, request=request)
    with pytest.raises(DeviceUnavailableError, match=r"state off \(signal-to-noise of .* dB after .*floor is 10"):
        session.compute_attention(prepared)


def test_a_raw_chip_serves_without_corrections(generic: Profile) -> None:
    raw, calibrated = opened(generic.raw()), opened(generic)
    assert raw.state == calibrated.state == "ready"
    assert raw.core.corrections is None
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    errors = [float((s.core.multiply(a, b, rng=(1, 2)) - a @ b).norm()) for s in (raw, calibrated)]
    assert errors[1] < 0.8 * errors[0]


def test_the_command_stores_and_prints_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    from hal_cli import main

    from hal_core.calibration import load_calibration

    assert main(["calibrate", "photonic:0"]) == 0
    shown = capsys.readouterr().out
    assert "SNR before" in shown
    assert "bits after" in shown
    assert "█" in shown
    stored = load_calibration(hal.devices()[[d.id for d in hal.devices()].index("photonic:0")])
    assert stored is not None
    q = torch.ones(1, 1, 8, 16)
    error = hal.explain(q, q, q, backend="photonic:0").winner.estimate.error
    assert error.low == pytest.approx(10 ** (-stored.values["SNR after, dB"] / 20))
    assert error.high == 0.5
    assert error.basis == "modelled"
    assert stored.values["bits after"] == pytest.approx(bits(stored.values["SNR after, dB"]), abs=0.01)


@pytest.mark.filterwarnings("ignore:the calibration:RuntimeWarning")
@pytest.mark.parametrize("value", [None, "loud", [1], 1e9, math.inf, math.nan, -1e9, True])
def test_a_calibration_that_somebody_edited_does_not_take_the_device_out(value: object) -> None:
    """Its error is then unknown; the device stays, with its modelled time."""
    from hal_core.calibration import save
    from hal_core.registry import registry

    device = next(d for d in hal.devices() if d.id == "photonic:0")
    save(device, {"profile": "generic", "SNR after, dB": value})
    registry.refresh("photonic:0")
    q = torch.ones(1, 1, 8, 16)
    estimate = hal.explain(q, q, q, backend="photonic:0").winner.estimate
    assert estimate.error is None
    assert estimate.time.middle > 0


def opened(profile: Profile) -> PhotonicSession:
    device: Any = hal.Device(id="test:0", family="photonic", vendor="v", model="m", fidelity=hal.Fidelity.SIMULATED)
    return PhotonicSession(device, SimulatedDriver(profile))
