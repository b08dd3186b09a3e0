"""The generic device, held to everything it claims."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hal_photonics import register_profile
from hal_photonics.backend import BUNDLED

import hal_core as hal
from hal_core.testing import ConformanceSuite, check_backend


class TestGeneric(ConformanceSuite):
    backend = "photonic:0"
    quick = True


@pytest.fixture
def chip() -> Iterator[str]:
    yield register_profile(BUNDLED / "generic.toml", "mychip", straight_through=True).id
    hal.unregister("mychip")


@pytest.mark.parametrize("check", ["gradients", "mask_gradient", "lse_gradient", "refusals", "threads"])
def test_straight_through_gradients_conform(chip: str, check: str) -> None:
    report = check_backend(chip, quick=True, seed=5, checks=[check])
    assert report.passed, str(report)
