"""The conclusion in one sentence: who is best, by which number, and from where; and who is not ranked with whom."""

from __future__ import annotations

import attrs
import pytest
from hal_compare.assumed import with_assumed_power
from hal_compare.conclusion import conclusion
from hal_compare.families import families, short_title, title

from hal_core import Basis, Fidelity, Provenance

from . import comparisons
from .comparisons import LINEAR, comparison, row

SIMULATED = Fidelity.SIMULATED


def test_measured_and_simulated_devices_are_ranked_apart_with_their_origin():
    said = conclusion(
        comparison(
            row("torch sdpa", 9e-7, 0.3, baseline=True),
            row("cpu:0", 8e-7, 0.2),
            row("kpu:0", 7e-7, 0.02, 0.035, kind=SIMULATED),
            row("photonic:0", 0.3, 0.9, 1.5, kind=SIMULATED),
        )
    )
    assert said == (
        "Measured: cpu:0 is the most accurate (error 8.0e-07) and the fastest (200 ms ±3% of attention), and no energy "
        "was metered; simulated (modelled, assumed): kpu:0 is the most accurate (error 7.0e-07), the fastest (20 ms "
        "±50% of attention) and the cheapest (35 mJ ±50%)."
    )


def test_it_is_one_sentence():
    said = conclusion(comparisons.every_family())
    assert said.endswith(".")
    assert ". " not in said
    assert said[0].isupper()


def test_rows_whose_intervals_overlap_the_best_are_level_with_it():
    said = conclusion(comparison(row("cpu:0", 8e-7, 0.200), row("opencl:0", 9e-7, 0.205, kind=Fidelity.EMULATED)))
    assert "the fastest (200 ms ±3% of attention, level with opencl:0 (emulated))" in said
    assert "the most accurate (error 8.0e-07)" in said


def test_errors_that_read_the_same_are_level():
    said = conclusion(comparison(row("cpu:0", 8.01e-7, 0.2), row("cuda:0", 8.02e-7, 0.3)))
    assert "error 8.0e-07, level with cuda:0" in said


def test_rows_that_run_more_of_the_model_are_not_ranked_with_attention():
    narrow, wide = row("kpu:0", 7e-7, 0.02, 0.03, kind=SIMULATED), row("npu:0 +linear", 1e-9, 1e-9, 1e-9, scope=LINEAR)
    assert "npu" not in conclusion(comparison(narrow, wide))
    assert "of attention and linear layers" in conclusion(comparison(wide))


def test_where_nothing_ran_nothing_is_concluded():
    assert conclusion(comparison(comparisons.absent("cuda:0"))) == ""


def test_an_assumed_power_is_named_and_ranked_with_nothing():
    cheap = row("cpu:0", 8e-7, 1e-6)
    result = with_assumed_power(comparison(cheap, row("kpu:0", 7e-7, 0.02, 5.0, kind=SIMULATED)), 65)
    said = conclusion(result)
    assert "kpu:0 is the most accurate (error 7.0e-07), the fastest (20 ms ±50% of attention) and the cheapest" in said
    assert "no energy was metered" in said
    assert said.endswith("at an assumed power, cpu:0 takes 65 µJ ±3%.")


def test_assumed_energy_is_power_times_time_for_hardware_without_a_meter_alone():
    metered, emulated = row("gpu:0", 1e-6, 0.5, 7.0), row("vulkan:0", 1e-6, 0.4, kind=Fidelity.EMULATED)
    far = attrs.evolve(row("cuda:0", 1e-6, 0.1), place="cuda")
    rows = (row("torch sdpa", 1e-6, 0.25, baseline=True), row("cpu:0", 1e-6, 0.2), metered, emulated, far)
    result = with_assumed_power(comparison(*rows), 60)
    energies = {each.name: each.costs.energy for each in result.rows}
    assert energies["torch sdpa"].middle == pytest.approx(15)
    assert energies["cpu:0"].low == pytest.approx(60 * 0.2 * 0.97)
    for name in ("torch sdpa", "cpu:0"):
        assert (energies[name].basis, energies[name].provenance) == (Basis.DECLARED, Provenance.ASSUMED)
        assert energies[name].origin == "declared, assumed"
        assert "60 W assumed" in energies[name].source
    assert energies["gpu:0"] == metered.costs.energy
    assert energies["vulkan:0"] is None, "an emulation's time is not the device's"
    assert energies["cuda:0"] is None, "it does not run on this host's processor"
    assert result.rows[1].groups["texts.txt"].energy == energies["cpu:0"]
    assert result.to_dict()["assumed_power"] == 60


def test_families_hold_their_variants_and_name_their_profiles():
    found = families(comparisons.every_family().rows)
    assert [family.name for family in found] == [
        "torch",
        "cpu",
        "kpu",
        "lightmatter",
        "luminous",
        "opencl",
        "photonic",
        "vulkan",
        "cuda",
    ]
    lightmatter = found[3]
    assert len(lightmatter.rows) == 12
    assert [row.scope for row in lightmatter.rows[:6]] == ["attention"] * 6
    assert title(lightmatter.rows[3]) == "lightmatter:3 envise"
    assert title(lightmatter.rows[-1]) == "lightmatter:5 2025-128 +linear"
    assert short_title(lightmatter.rows[3]) == "envise"
    assert short_title(found[1].rows[0]) == "cpu:0"
    ran = [family.colour for family in found if family.rows[0].ran and family.name != "torch"]
    assert len(set(ran)) == 7, "a colour for each family that ran"
    assert found[0].colour == found[-1].colour == 0
