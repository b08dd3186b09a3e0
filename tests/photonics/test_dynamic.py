"""The dynamically operated design: its published latency and energy, and its figures from the device library."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hal_photonics.backend import BUNDLED
from hal_photonics.cost import attention_cost, efficiency, encoder_cost, throughput
from hal_photonics.profiles.profile import load
from hal_photonics.simulator.components import LIGHTENING_BASE, component_power
from hal_photonics.simulator.dynamic import PARTS

from hal_core import AttentionRequest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    from photonics_tasks.encoders import PUBLISHED, PUBLISHED_PARTS, Encoder, modelled
finally:
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(("encoder", "bits"), PUBLISHED, ids=lambda value: str(getattr(value, "name", value)))
def test_latency_and_energy_are_the_published_ones(encoder: Encoder, bits: int) -> None:
    joules, seconds, _ = modelled(encoder, bits)
    assert (joules, seconds) == pytest.approx(PUBLISHED[encoder, bits], rel=0.02)


@pytest.mark.parametrize(("encoder", "bits"), PUBLISHED_PARTS, ids=lambda value: str(getattr(value, "name", value)))
def test_every_part_of_the_energy_is_the_published_one(encoder: Encoder, bits: int) -> None:
    assert modelled(encoder, bits)[2] == pytest.approx(PUBLISHED_PARTS[encoder, bits], rel=0.03)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_profiles_events_are_those_of_the_device_library(bits: int) -> None:
    profile, library = load(BUNDLED / f"lightening-{bits}.toml"), LIGHTENING_BASE
    watts = component_power(library, bits)
    inputs = library.wavelengths * library.cores * (library.height * library.tiles + library.width)
    readouts = library.tiles * library.height * library.width
    each = {"laser": library.tiles * library.cores, "DAC": inputs, "modulators": inputs, "ADC": readouts}
    keys = {"laser": "laser", "DAC": "dac", "modulators": "modulator", "ADC": "adc"}
    for part, count in each.items():
        wanted = watts[part] / count / library.clock
        assert profile[f"dot.{keys[part]}_energy"] == pytest.approx(wanted, rel=1e-3), part
    total = profile["power.electrical"] + profile["power.laser"] / profile["power.laser_efficiency"]
    assert total == pytest.approx({4: 14.75, 8: 50.94}[bits], rel=0.01)


def test_every_part_is_listed_and_they_add_up() -> None:
    profile = load(BUNDLED / "lightening-8.toml")
    cost = encoder_cost(profile, tokens=128, dim=768, heads=12, layers=12)
    assert set(PARTS) <= set(cost.joules)
    assert all(cost.joules[part] > 0 for part in PARTS)
    assert cost.energy == pytest.approx(sum(cost.joules.values()))
    assert cost.macs == 12 * (128 * 12 * 768 * 768 + 2 * 128 * 128 * 768)


def test_passes_multiply_the_optics_of_a_dynamic_design() -> None:
    profile = load(BUNDLED / "lightening-8.toml")
    request = AttentionRequest(1, 4, 4, 96, 96, 48, 48, "float32", options=(("passes", 3),))
    once = attention_cost(profile, request.__class__(1, 4, 4, 96, 96, 48, 48, "float32"), host=False)
    thrice = attention_cost(profile, request, host=False)
    assert thrice.time == pytest.approx(3 * once.time)
    assert thrice.energy == pytest.approx(3 * once.energy)


def test_the_measured_analog_chip_has_its_published_throughput_and_efficiency() -> None:
    profile = load(BUNDLED / "hermes.toml")
    assert throughput(profile) == pytest.approx(16.1e12, rel=0.01)
    assert efficiency(profile) == pytest.approx(2.48e12, rel=0.01)
