"""Every Lightmatter device, held to everything it claims; and MiniLM on it."""

from __future__ import annotations

import pytest
from hal_photonic_lightmatter.backend import LightmatterBackend

import hal_core as hal
from hal_core.testing import ConformanceSuite, check_backend


class TestMeasuredChip(ConformanceSuite):
    backend = "lightmatter:0"
    quick = True


@pytest.mark.slow
@pytest.mark.parametrize(
    "device", ["lightmatter:0", "lightmatter:1", "lightmatter:2", "lightmatter:3", "lightmatter:4", "lightmatter:5"]
)
def test_every_profile_conforms_but_for_what_it_declares(device: str) -> None:
    report = check_backend(device)
    failed = {result.name for result in report.results if result.status == "failed"}
    assert failed == set(report.declared), str(report)
    assert not failed or device == "lightmatter:1"


def test_the_chip_without_calibration_does_not_conform_and_says_why(seed: int) -> None:
    report = check_backend("lightmatter:1", seed=seed, checks=["contract", "structure"])
    assert report["contract"].passed
    assert not report.passed
    line = str(report).splitlines()[-1]
    assert line.startswith("lightmatter:1 does not conform, as its plugin declares: profile 2025-raw is a chip without")
    assert "0.834 of each product" in line
    assert "(structure)" in line


def test_only_the_chip_without_calibration_declares_that_it_does_not_conform() -> None:
    backend = LightmatterBackend()
    declared = {device.id: set(backend.nonconformance(device)) for device in backend.devices()}
    assert declared.pop("lightmatter:1") == {"structure", "stale_keys"}
    assert not any(declared.values())


@pytest.mark.parametrize(
    "device", ["lightmatter:1", "lightmatter:2", "lightmatter:3", "lightmatter:4", "lightmatter:5"]
)
@pytest.mark.parametrize("check", ["contract", "refusals", "repeats", "masks"])
def test_every_profile_passes_the_checks_that_tell_them_apart(device: str, check: str) -> None:
    report = check_backend(device, quick=True, seed=5, checks=[check])
    assert report.passed, str(report)


def test_the_devices_are_the_published_chips_all_simulated() -> None:
    devices = LightmatterBackend().devices()
    assert [d.model for d in devices] == ["2025", "2025-raw", "2025-2ghz", "envise", "mars", "2025-128"]
    assert {d.fidelity for d in devices} == {hal.Fidelity.SIMULATED}
    assert "not calibrated by us" in devices[1].features
    assert [d.features[0] for d in devices] == ["crossbar"] * 4 + ["mesh", "crossbar"]
