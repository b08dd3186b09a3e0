"""The device level: noise by seed, its statistics at five sigma, and its physical parts."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hal_photonics.profiles.profile import Profile
from hal_photonics.simulator.chip import SimulatedDriver
from hal_photonics.simulator.core import PhotonicCore, generator
from hal_photonics.simulator.imperfections import BOLTZMANN, ELECTRON, effective_bits, noise_parts

from hal_core import ContractError


def test_the_same_rng_gives_the_same_noise_in_any_thread(generic: Profile, draw: torch.Generator) -> None:
    core = PhotonicCore.of(generic)
    a, b = torch.randn(40, 100, generator=draw), torch.randn(100, 30, generator=draw)
    want, found = core.multiply(a, b, rng=(3, 4)), []
    threads = [threading.Thread(target=lambda: found.append(core.multiply(a, b, rng=(3, 4)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(want, each) for each in found)
    assert not torch.equal(want, core.multiply(a, b, rng=(3, 5)))
    assert not torch.equal(want, core.multiply(a, b, rng=(4, 4)))


def test_nearby_seeds_are_unrelated() -> None:
    first = {int(torch.randint(0, 2**40, (1,), generator=generator((s, o)))) for s in range(30) for o in range(30)}
    assert len(first) == 900


def test_noise_has_the_stated_size_at_five_sigma(generic: Profile) -> None:
    """A column's readouts of nothing have the noise of its profile; the estimate of n readouts is off by sigma / sqrt(2
    n).
    """
    plain = generic.replace(
        noise__readout_noise_spread=0,
        noise__common_noise=2,
        noise__column_offset=0,
        noise__core_offset=0,
        noise__core_column_offset=0,
    )
    driver, parts, rows = SimulatedDriver(plain), noise_parts(plain), 4000
    codes = driver.read(torch.zeros(1, rows, 64), torch.zeros(1, 64, 64), noise=generator((7, 0))).codes[0]
    shared = codes.mean(1)
    own = (codes - shared.unsqueeze(1)).std() * math.sqrt(64 / 63)
    stated = math.hypot(parts.own, 1 / math.sqrt(12))  # rounding to whole codes
    assert float(own) == pytest.approx(stated, rel=5 / math.sqrt(2 * rows * 63))
    together = math.sqrt(parts.shared**2 + stated**2 / 64)
    assert float(shared.std()) == pytest.approx(together, rel=5 / math.sqrt(2 * rows))
    assert abs(float(codes.mean())) < 5 * together / math.sqrt(rows)


def test_noise_parts_are_their_equations(generic: Profile) -> None:
    parts, band = noise_parts(generic), generic["light.bandwidth"]
    codes = generic["converters.gain"] * 511 / generic["light.full_scale_current"]
    current = generic["light.full_scale_current"] / 2
    assert parts.shot == pytest.approx(math.sqrt(2 * ELECTRON * current * band) * codes)
    thermal = math.sqrt(4 * BOLTZMANN * generic["light.temperature"] * band / generic["light.load"])
    assert parts.thermal == pytest.approx(thermal * codes)
    assert parts.rin == pytest.approx(current * math.sqrt(10 ** (generic["light.rin"] / 10) * band) * codes)
    more_light = generic.replace(light__full_scale_current=4 * generic["light.full_scale_current"])
    assert noise_parts(more_light).shot == pytest.approx(parts.shot / 2)
    assert noise_parts(more_light).rin == pytest.approx(parts.rin)
    quiet = generic.replace(noise__readout_noise=0, noise__common_noise=0, light__rin=-250, light__full_scale_current=1)
    assert effective_bits(quiet) == pytest.approx(10, abs=0.02)


def test_crosstalk_and_cores_have_their_structure(generic: Profile) -> None:
    leaky = generic.replace(
        noise__crosstalk=0.1, noise__weight_error=0, noise__column_gain_spread=0, noise__input_ripple=0
    )
    driver = SimulatedDriver(leaky)
    one = torch.zeros(1, 2, 64)
    one[0, :, 5] = 127
    weights = torch.zeros(1, 64, 64)
    weights[0, 8, 6] = 127  # only the neighbour's cell is open
    codes = driver.read(one, weights, noise=None).codes[0]
    dark = driver.read(torch.zeros(1, 2, 64), weights, noise=None).codes[0]
    assert float(codes[0, 8] - dark[0, 8]) == pytest.approx(0.1 * 0.95 * 2 * 511 / 64, abs=1.01)
    rows = driver.read(torch.zeros(1, 8, 64), torch.zeros(1, 64, 64), noise=None).codes[0]
    assert torch.equal(rows[0::2], rows[:1].expand(4, -1)), "rows repeat by the number of cores"
    assert not torch.equal(rows[0], rows[1])


def test_drift_wanders_to_its_stated_size_and_follows_temperature(generic: Profile) -> None:
    wandering = generic.replace(drift__gain_drift=0.05, drift__gain_temperature=0.01, drift__offset_temperature=1)
    driver = SimulatedDriver(wandering)
    driver.heat_to(driver.working_temperature)
    assert torch.equal(driver.drift.gain, torch.ones(64))
    driver.heat_to(driver.working_temperature + 3)
    assert float(driver.drift.gain[0]) == pytest.approx(1.03)
    assert float(driver.drift.offset[0]) == pytest.approx(3)
    seen = []
    driver.advance(1e7, load=1.0)
    for _ in range(400):  # steps of half a relaxation: neighbours are alike, the size is the stated one all the same
        driver.advance(0.5 * wandering["drift.relaxation"], load=1.0)
        seen.append(driver.drift.gain - 1)
    walk = torch.stack(seen)
    assert float(walk.std()) == pytest.approx(0.05, rel=5 * 2 / math.sqrt(2 * 400 * 64))
    alike = float((walk[1:] * walk[:-1]).mean() / walk.square().mean())
    assert alike == pytest.approx(math.exp(-0.5), abs=0.05)
    driver.advance(0.0)
    with pytest.raises(ContractError, match="time of 0 or more"):
        driver.advance(-1.0)


def test_levels_agree_where_a_chip_is_perfect(generic: Profile, draw: torch.Generator) -> None:
    perfect = {key.replace(".", "__"): 0 for key in generic.figures if key.startswith("noise.")} | {
        "noise__column_gain": 1
    }
    core = PhotonicCore.of(generic.replace(**perfect))
    a, b = torch.randn(2, 20, 150, generator=draw), torch.randn(2, 150, 30, generator=draw)
    functional, device = core.multiply(a, b, level="functional"), core.multiply(a, b)
    # The device level multiplies fractions in float32, so a sum at a tie between two codes may go either way.
    assert float((functional - device).norm() / functional.norm()) < 2e-3


def test_one_row_that_is_not_finite_leaves_the_clipping_of_others_alone(generic: Profile) -> None:
    driver = SimulatedDriver(generic)
    inputs, weights = torch.full((1, 4, 64), 127.0), torch.full((1, 64, 64), 127.0)
    clean = driver.read(inputs, weights, noise=None)
    assert clean.clipped > 0
    inputs[0, 2, 5] = math.nan
    codes = driver.read(inputs, weights, noise=None).codes[0]
    assert torch.equal(codes[[0, 1, 3]], clean.codes[0, [0, 1, 3]])
