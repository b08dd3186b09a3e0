"""Numbers with their origin."""

from __future__ import annotations

import math

import pytest
from fakes import quantity

from hal_core import Basis, Device, Estimate, Fidelity, Provenance, Quantity


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (0.0, math.nan), (0.0, math.inf)])
def test_an_interval_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="interval"):
        Quantity(low, high, "measured", "assumed")


def test_a_number_cannot_be_made_without_its_origin() -> None:
    with pytest.raises(TypeError):
        Quantity(1.0, 2.0)  # type: ignore[call-arg]
    with pytest.raises(ValueError):
        Quantity(1.0, 2.0, "guessed", "assumed")
    with pytest.raises(ValueError):
        Quantity(1.0, 2.0, "measured", "hearsay")


def test_intervals_overlap_where_they_touch() -> None:
    assert quantity(1, 2).overlaps(quantity(2, 3))
    assert quantity(2, 3).overlaps(quantity(1, 2))
    assert quantity(0, 9).overlaps(quantity(4, 5))
    assert not quantity(1, 2).overlaps(quantity(2.01, 3))
    assert quantity(1, 2).middle == 1.5


def test_origins_are_ranked_best_first() -> None:
    assert sorted(Basis, key=lambda b: b.rank) == [Basis.MEASURED, Basis.MODELLED, Basis.DECLARED]
    assert sorted(Provenance, key=lambda p: p.rank) == [
        Provenance.MEASURED_SILICON,
        Provenance.VENDOR_PUBLISHED,
        Provenance.PAPER_PROJECTION,
        Provenance.ASSUMED,
    ]
    assert sorted(Fidelity, key=lambda f: f.rank) == [Fidelity.HARDWARE, Fidelity.EMULATED, Fidelity.SIMULATED]


def test_no_energy_is_none_and_not_zero() -> None:
    estimate = Estimate(time=quantity(1))
    assert estimate.energy is None
    assert estimate.error is None


def a_device(**changes: object) -> Device:
    given = {"id": "x:0", "family": "x", "vendor": "v", "model": "m", "fidelity": Fidelity.HARDWARE, "driver": "1"}
    return Device(**(given | changes))  # type: ignore[arg-type]


def test_a_fingerprint_changes_with_model_and_driver_and_not_with_the_index() -> None:
    prints = {
        a_device(**c).fingerprint for c in ({}, {"model": "n"}, {"driver": "2"}, {"vendor": "w"}, {"features": ("f",)})
    }
    assert len(prints) == 5
    assert a_device(id="x:1").fingerprint == a_device().fingerprint


def test_a_device_reads_every_index_of_a_kind_or_the_one_named() -> None:
    assert a_device(reads=("cuda",)).reads_from("cuda:3")
    assert a_device(reads=("cuda:1", "cpu")).reads_from("cuda:1")
    assert not a_device(reads=("cuda:1",)).reads_from("cuda:0")
    assert not a_device(reads=("cuda:1",)).reads_from("cuda")
