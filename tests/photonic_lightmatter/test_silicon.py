"""The 2025 profile against what was measured on that chip, by the protocol of the fit; and against its supplement."""

from __future__ import annotations

import sys
from pathlib import Path

import attrs
import pytest
import torch
from hal_photonic_lightmatter.backend import PROFILES
from hal_photonics.benchmark import GPUS
from hal_photonics.calibrate import calibrate, decibels
from hal_photonics.cost import attention_cost, efficiency, throughput
from hal_photonics.profiles.profile import Profile, ProfileError, load, predicted_zeros
from hal_photonics.simulator.blockfloat import encode
from hal_photonics.simulator.chip import SimulatedDriver
from hal_photonics.simulator.core import Corrections, PhotonicCore, generator

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    from photonics_tasks.silicon import (
        GAIN,
        GAIN_SPREAD,
        LENGTHS,
        RAW_SUMS,
        SNR,
        column_gains,
        observe,
        snr,
        statistics,
    )
finally:
    sys.path.remove(str(BENCHMARKS))

SEEDS = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def chip() -> Profile:
    return load(PROFILES / "2025.toml")


@pytest.mark.parametrize("seed", SEEDS)
def test_signal_to_noise_is_that_of_the_silicon(chip: Profile, seed: int) -> None:
    """Rows 3 to 6, one parameter set."""
    found = statistics(*observe(chip, seed))
    for name, (decibel, tolerance) in SNR.items():
        assert found[name] == pytest.approx(decibel, abs=tolerance), name


def test_the_common_part_of_the_residual_is_that_of_the_silicon(chip: Profile) -> None:
    """16% of it by column; nearly all of that belongs to the four cores, whose own fits leave 5%."""
    found = [statistics(*observe(chip, seed)) for seed in SEEDS]
    mean = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
    assert mean["column, common"] == pytest.approx(0.16, abs=0.03)
    assert mean["core, common"] == pytest.approx(0.05, abs=0.03)


def test_column_gains_are_those_of_the_silicon(chip: Profile) -> None:
    """Row 7: mean 0.834 within 5%, standard deviation 0.037 within 25%."""
    means, spreads = [], []
    for seed in SEEDS:
        gains = column_gains(*observe(chip, seed))
        means.append(float(gains.mean()))
        spreads.append(float(gains.std()))
    assert sum(means) / len(means) == pytest.approx(GAIN, rel=0.05)
    assert sum(spreads) / len(spreads) == pytest.approx(GAIN_SPREAD, rel=0.25)


@pytest.mark.parametrize(
    ("mutation", "caught"),
    [
        ("noise off", {"core"}),
        ("cores alike", {"full"}),
        ("weights exact", {"column"}),
        ("quantisation alone", {"raw"}),
    ],
)
def test_a_model_without_one_of_its_parts_is_caught(chip: Profile, mutation: str, caught: set[str]) -> None:
    changes = {
        "noise off": {},
        "cores alike": {"noise__core_offset": 0, "noise__core_column_offset": 0},
        "weights exact": {"noise__weight_error": 0},
        "quantisation alone": {
            k.replace(".", "__"): 0 for k in chip.figures if k.startswith("noise.") and "gain" not in k
        },
    }[mutation]
    if mutation == "quantisation alone":
        changes |= {"noise__column_gain": 1, "noise__column_gain_spread": 0}
    found = statistics(*observe(chip.replace(**changes), 1, noise=mutation != "noise off"))
    wrong = {name for name, (decibel, tolerance) in SNR.items() if abs(found[name] - decibel) > tolerance}
    assert caught <= wrong


def test_plain_quantisation_is_25_decibels_too_good(chip: Profile) -> None:
    draw = torch.Generator().manual_seed(1)
    weights, inputs = torch.randn(1, 64, 64, generator=draw), torch.randn(1, 1024, 64, generator=draw)
    core = PhotonicCore.of(chip)
    found = decibels(inputs @ weights.mT, core.product(inputs, weights, None, "functional"))
    assert found == pytest.approx(35.6, abs=1.0)


@pytest.mark.parametrize("number", SEEDS)
def test_calibration_holds_on_weights_it_has_not_seen(chip: Profile, number: int) -> None:
    report = calibrate(SimulatedDriver(attrs.evolve(chip, chip=number)), seed=number)[1]
    assert report.after > report.before + 3
    assert report.kept >= 0.8


@pytest.fixture(scope="module", params=["2025", "2025-2ghz", "envise"])
def calibrated(request: pytest.FixtureRequest) -> tuple[SimulatedDriver, Corrections]:
    """The chips whose errors are those of the silicon, calibrated."""
    driver = SimulatedDriver(load(PROFILES / f"{request.param}.toml"))
    return driver, calibrate(driver)[0]


@pytest.mark.parametrize("length", LENGTHS)
def test_the_calibrated_chip_is_as_good_at_every_length_as_the_silicon_at_64(
    calibrated: tuple[SimulatedDriver, Corrections], length: int
) -> None:
    """Within 1 dB of the silicon after the best affine fit of each core."""
    assert snr(PhotonicCore(*calibrated), length) == pytest.approx(SNR["core"][0], abs=1)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_uncalibrated_chip_loses_with_the_length_what_the_silicon_loses(chip: Profile, length: int) -> None:
    """A column's offset is the same in every tile, so it adds coherently: the silicon's own rows say so."""
    found = [snr(PhotonicCore(SimulatedDriver(attrs.evolve(chip, chip=seed))), length) for seed in SEEDS]
    assert sum(found) / len(found) == pytest.approx(RAW_SUMS[length], abs=0.7)


def test_width_range_and_gain_give_the_zeros_of_the_silicon(chip: Profile) -> None:
    draw = torch.Generator().manual_seed(1)
    x, w = torch.randn(1, 4096, 64, generator=draw), torch.randn(1, 64, 64, generator=draw)
    zeros = float((PhotonicCore(SimulatedDriver(chip)).product(x, w, generator((1, 1))) == 0).double().mean())
    assert zeros == pytest.approx(chip["converters.zero_share"], rel=0.1)
    assert predicted_zeros(chip) == pytest.approx(zeros, rel=0.1)


def test_a_profile_that_contradicts_its_measured_zeros_is_refused_with_the_three_numbers(tmp_path: Path) -> None:
    file = tmp_path / "chip.toml"
    text = (PROFILES / "2025.toml").read_text()
    file.write_text(text.replace("range_inputs = { value = 64", "range_inputs = { value = 128"))
    with pytest.raises(ProfileError, match=r"tile_inputs 64, range_inputs 128 and gain 1.86 predict 2.48% .* 1.26%"):
        load(file)


def test_the_other_reading_is_a_profile_that_states_no_zeros_and_is_4_decibels_worse(chip: Profile) -> None:
    other = load(PROFILES / "2025-128.toml")
    assert (other.tile_inputs, other.range_inputs, other["converters.zero_share"]) == (128, 128, 0)
    assert predicted_zeros(other) > 1.5 * chip["converters.zero_share"]
    driver = SimulatedDriver(other)
    assert snr(PhotonicCore(driver, calibrate(driver)[0]), 256) == pytest.approx(13.3, abs=0.5)


def test_pre_distortion_is_worth_its_place(chip: Profile) -> None:
    """Mutation: the one-hot step's result taken away."""
    driver, plain = SimulatedDriver(chip), Corrections.none(chip)
    corrections, report = calibrate(driver)
    without = corrections._replace(cell_gain=plain.cell_gain, cell_offset=plain.cell_offset)
    draw = torch.Generator().manual_seed(3)
    x, w = torch.randn(1, 512, 64, generator=draw), torch.randn(1, 128, 64, generator=draw)
    found = decibels(x @ w.mT, PhotonicCore(driver, without).product(x, w, generator((1, 1))))
    assert report.after - found > 1


def test_one_core_without_its_structure_is_caught(chip: Profile) -> None:
    """Mutation: core 0 made like the mean of the others; its rows then lack the offset that the dark codes found."""
    driver = SimulatedDriver(chip)
    corrections, _ = calibrate(driver)
    driver.chip.offset[0] = driver.chip.offset[1:].mean(0)
    x, _ = encode(torch.zeros(1, 64, 64), 511)
    w, _ = encode(torch.zeros(1, 128, 64), 63)
    codes = corrections.read_outputs(driver.read(x, w, noise=generator((1, 1)), averages=256).codes)[0]
    by_core = [float(codes[core::4].mean(0).square().mean().sqrt()) for core in range(4)]
    assert by_core[0] > 3 * max(by_core[1:])


def test_throughput_and_efficiency_are_the_supplements(chip: Profile) -> None:
    """Rows 1 and 2, arithmetic checks of the profile."""
    assert throughput(chip) == pytest.approx(65.5e12, rel=0.01)
    assert throughput(load(PROFILES / "2025-2ghz.toml")) == pytest.approx(262e12, rel=0.01)
    assert chip["power.electrical"] == 78
    assert efficiency(chip) == pytest.approx(0.84e12, rel=0.02)


@pytest.mark.parametrize(
    ("profile", "length", "speed", "energy"),
    [
        ("2025", 2048, 0.06, 0.89),
        ("2025", 8192, 0.10, 0.17),
        ("2025", 32768, 0.12, -0.04),
        ("2025-2ghz", 2048, 0.54, -0.60),
        ("2025-2ghz", 8192, 0.51, -0.58),
        ("2025-2ghz", 32768, 0.51, -0.58),
    ],
)
def test_against_an_h200_there_is_no_crossover_in_time(profile: str, length: int, speed: float, energy: float) -> None:
    """Attention of 32 heads of 128, optics alone, against 65% of 790 TFLOP/s and 700 W."""
    from hal_core import AttentionRequest

    request = AttentionRequest(1, 32, 32, length, length, 128, 128, "bfloat16")
    found = attention_cost(load(PROFILES / f"{profile}.toml"), request, host=False)
    gpu = GPUS["h200"]
    seconds = 4 * 32 * length**2 * 128 / (gpu.share * gpu.peak) + gpu.start
    assert seconds / found.time == pytest.approx(speed, abs=0.01)
    assert found.energy / (seconds * gpu.power) - 1 == pytest.approx(energy, abs=0.015)
