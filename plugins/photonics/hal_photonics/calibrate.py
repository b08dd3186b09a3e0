"""Calibration of a chip: dark codes, a vector sweep, one-hot weights with pre-distortion, random probes.

1. Dark codes: without light, the mean code of each column in each core is its offset.
2. Vector sweep: one input at a time over its range; the inverse of its response, a 7th-order polynomial, corrects it.
3. One-hot weights: one input at a time at full scale over weight codes. Least squares give each cell's gain and offset,
   which correct the weight codes themselves: a digital correction of the products would cost as much as they do.
4. Random probes: ridge regression gives the remaining gains and offsets of the columns.

The result is validated on weights that no step has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from .profiles.profile import Profile
from .runtime.driver import Driver
from .simulator.blockfloat import encode
from .simulator.converters import Converters
from .simulator.core import Corrections, PhotonicCore

Progress = Callable[[str, float], None]
_DARK, _SWEEP, _ONE_HOT = 4096, 1024, 1024  # readouts averaged
_PROBES = 1024


@attrs.frozen(kw_only=True)
class CalibrationReport:
    """What a calibration found.

    Attributes:
        before, after: signal over error in dB on probes and weights that the fit has not seen.
        fitted_before, fitted_after: the same on those that it has. faults: names of what is broken.
        clip_rate: share of the readouts at the rails.
        temperature: degC, clock: s, and laser: power over nominal, when it was made.
    """

    before: float
    after: float
    fitted_before: float
    fitted_after: float
    faults: tuple[str, ...]
    clip_rate: float
    temperature: float
    clock: float
    laser: float

    @property
    def kept(self) -> float:
        """The gain in dB on other weights relative to that on the fitted ones."""
        gain = self.fitted_after - self.fitted_before
        return (self.after - self.before) / gain if gain > 0 else 1.0

    def refusal(self, profile: Profile) -> str:
        """Why a chip with this report does not serve; "" where it does."""
        tolerated, floor = profile.count("calibration.faults_tolerated"), profile["calibration.snr_floor"]
        if len(self.faults) > tolerated:
            return f"{len(self.faults)} faults ({', '.join(self.faults[:3])} ...), {tolerated} are tolerated"
        served = self.after if profile.calibrated else self.before
        if not served >= floor:
            return f"signal-to-noise of {served:.1f} dB after calibration, the floor is {floor:g} dB"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, as `hal calibrate` shows and stores them."""
        return {
            "SNR before, dB": round(self.before, 2),
            "SNR after, dB": round(self.after, 2),
            "bits before": round(bits(self.before), 2),
            "bits after": round(bits(self.after), 2),
            "gain kept on unseen weights": round(self.kept, 3),
            "clip rate": self.clip_rate,
            "before": drawing(self.before),
            "after": drawing(self.after),
            "faults": list(self.faults),
            "temperature, degC": round(self.temperature, 2),
        }


def bits(snr: float) -> float:
    """Effective bits of a signal-to-noise ratio in dB."""
    return (snr - 1.76) / 6.02


def drawing(snr: float) -> str:
    """A bar for a terminal, two marks per dB."""
    return "█" * max(round(2 * snr), 0) + f" {snr:.1f} dB"


def decibels(wanted: Tensor, got: Tensor) -> float:
    """||wanted||^2 / ||got - wanted||^2 in dB."""
    error = float((got - wanted).double().square().sum())
    return 10 * math.log10(float(wanted.double().square().sum()) / error) if error else math.inf


def calibrate(
    driver: Driver, *, seed: int = 1, progress: Progress = lambda text, share: None
) -> tuple[Corrections, CalibrationReport]:
    """Measure a chip through its driver.

    Args:
        seed: of the probes and of the simulated readout noise. progress: called with a step's name and the share done.
    """
    noise = torch.Generator().manual_seed(seed)
    profile = driver.profile
    corrections = Corrections.none(profile)
    progress("dark codes", 0.0)
    corrections = corrections._replace(offset=_dark(driver, noise))
    progress("vector sweep", 0.15)
    corrections = corrections._replace(inverse=_vector_sweep(driver, corrections, noise))
    progress("one-hot weights", 0.4)
    gain, offset = _one_hot(driver, corrections, noise)
    faults = find_faults(gain)
    column_gain = gain.median(dim=1).values
    column_gain = torch.where(column_gain.abs() < 0.1, 1.0, column_gain)
    cell_gain = gain / column_gain.unsqueeze(1)
    # A mesh's weights share their phases: there is no error of a single cell to take out.
    healthy = (cell_gain.abs() > 0.3) & (profile.mechanism != "mesh")
    corrections = corrections._replace(
        column_gain=column_gain,
        cell_gain=torch.where(healthy, cell_gain, 1.0),
        cell_offset=torch.where(healthy, offset / column_gain.unsqueeze(1), 0.0),
    )
    progress("random probes", 0.7)
    corrections = _random_probes(driver, corrections, noise, seed + 1)
    progress("validation", 0.85)
    raw, core = PhotonicCore(driver), PhotonicCore(driver, corrections)
    figures = {
        "fitted_before": probe_snr(raw, seed + 1, noise),
        "fitted_after": probe_snr(core, seed + 1, noise),
        "before": probe_snr(raw, seed + 2, noise),
        "after": probe_snr(core, seed + 2, noise),
    }
    sensed = driver.telemetry()
    report = CalibrationReport(
        **figures,
        faults=faults,
        clip_rate=core.clip_rate,
        temperature=sensed.temperature,
        clock=sensed.clock,
        laser=sensed.laser,
    )
    progress("done", 1.0)
    return corrections, report


def probes(profile: Profile, seed: int, rows: int = _PROBES) -> tuple[Tensor, Tensor]:
    """Standard normal inputs [1, rows, K] and weights [1, N, K] of a whole tile."""
    draw = torch.Generator().manual_seed(seed)
    width = profile.tile_inputs
    weights = torch.randn(1, profile.count("array.outputs"), width, generator=draw)
    return torch.randn(1, rows, width, generator=draw), weights


def probe_snr(core: PhotonicCore, seed: int, noise: torch.Generator, rows: int = _PROBES) -> float:
    """Signal over error in dB of a product of fresh probes with weights drawn from `seed`."""
    inputs, weights = probes(core.driver.profile, seed, rows)
    return decibels(inputs @ weights.transpose(-1, -2), core.product(inputs, weights, noise))


def _dark(driver: Driver, noise: torch.Generator) -> Tensor:
    cores, columns = (driver.profile.count(f"array.{n}") for n in ("cores", "outputs"))
    inputs = driver.profile.tile_inputs
    codes = driver.read(
        torch.zeros(1, cores, inputs), torch.zeros(1, columns, inputs), noise=noise, averages=_DARK
    ).codes
    return codes[0]


def _straight(driver: Driver, corrections: Corrections, codes: Tensor, width: int) -> Tensor:
    """Codes [batch, rows, N] as products of full scale, offsets out."""
    c = Converters.of(driver.profile)
    rows = torch.arange(codes.shape[-2]) % len(corrections.offset)
    columns = torch.arange(codes.shape[-1]) % corrections.offset.shape[1]
    return (codes - corrections.offset[:, columns][rows]) * (c.lsb(width) / c.gain)


def _vector_sweep(driver: Driver, corrections: Corrections, noise: torch.Generator, points: int = 41) -> Tensor:
    """Inverse responses [inputs, 7]: powers 1 to 7 of the wanted input give the input to send."""
    c = Converters.of(driver.profile)
    columns, width = driver.profile.count("array.outputs"), driver.profile.tile_inputs
    steps = torch.linspace(-1, 1, points).mul(c.input_levels).round()
    inputs = torch.diag_embed(steps.unsqueeze(1).expand(points, width))  # [points, width, width]: one input at a time
    weights = torch.full((1, columns, width), float(c.weight_levels)).expand(points, -1, -1)
    reading = driver.read(inputs, weights, noise=noise, averages=_SWEEP)
    response = _straight(driver, corrections, reading.codes, width).mean(-1).double()  # [points, width]
    sent = (steps / c.input_levels).double()
    slope = (response * sent.unsqueeze(1)).sum(0) / sent.square().sum()
    slope = torch.where(slope.abs() < 0.05, 1.0, slope)  # a dead input is named by the next step
    straightened = response / slope
    powers = torch.stack([straightened**k for k in range(1, 8)], -1).transpose(0, 1)  # [width, points, 7]
    ridge = 1e-6 * torch.eye(7, dtype=torch.float64)
    moments = powers.transpose(1, 2) @ powers + ridge
    target = (powers * sent.view(1, -1, 1)).sum(1) + ridge[0]
    inverse = torch.linalg.solve(moments, target)
    residual = (powers @ inverse.unsqueeze(-1)).squeeze(-1) - sent
    straight = residual.square().mean(1).sqrt() < 0.1
    identity = torch.zeros(7, dtype=torch.float64)
    identity[0] = 1
    return torch.where(straight.unsqueeze(1), inverse, identity).float()


def _one_hot(driver: Driver, corrections: Corrections, noise: torch.Generator, steps: int = 9) -> tuple[Tensor, Tensor]:
    """(gain, offset) of every cell [columns, inputs], in full scale, by least squares over weight codes."""
    c = Converters.of(driver.profile)
    columns, width = driver.profile.count("array.outputs"), driver.profile.tile_inputs
    codes = torch.linspace(-0.9, 0.9, steps).mul(c.weight_levels).round()
    one_hot = corrections.sent_inputs(torch.eye(width) * c.input_levels, c.input_levels)
    weights = codes.view(-1, 1, 1).expand(steps, columns, width)
    reading = driver.read(one_hot.expand(steps, -1, -1), weights, noise=noise, averages=_ONE_HOT)
    seen = _straight(driver, corrections, reading.codes, width)  # [steps, inputs, columns]
    set_to = (codes / c.weight_levels).view(-1, 1, 1)
    middle = set_to.mean()
    gain = ((set_to - middle) * seen).sum(0) / (set_to - middle).square().sum()
    return gain.T.contiguous(), (seen.mean(0) - gain * middle).T.contiguous()


def find_faults(gain: Tensor) -> tuple[str, ...]:
    """Names of dead columns, dead inputs and stuck cells, from the cells' gains [columns, inputs]."""
    silent = gain.abs() < 0.25 * gain.abs().median()
    dead_columns, dead_inputs = silent.float().mean(1) > 0.9, silent.float().mean(0) > 0.9
    alone = silent & ~dead_columns.unsqueeze(1) & ~dead_inputs.unsqueeze(0)
    found = [f"dead column {i}" for i in dead_columns.nonzero().flatten().tolist()]
    found += [f"dead input {i}" for i in dead_inputs.nonzero().flatten().tolist()]
    return tuple(found + [f"stuck weight ({i}, {j})" for i, j in alone.nonzero().tolist()])


def _random_probes(driver: Driver, corrections: Corrections, noise: torch.Generator, seed: int) -> Corrections:
    """Gains and offsets once more, by ridge regression on products of random operands."""
    core = PhotonicCore(driver, corrections)
    c = core.converters
    inputs, weights = probes(driver.profile, seed)
    x, _ = encode(inputs, c.input_levels)
    w, _ = encode(weights, c.weight_levels)
    factor = c.gain / (c.input_levels * c.weight_levels * c.lsb(x.shape[-1]))
    wanted = (x @ w.transpose(-1, -2) * factor)[0]  # [rows, N], codes
    seen = core.read(x, w, noise).codes[0]
    cores = len(corrections.offset)
    pull = 0.01 * wanted.square().sum(0)  # towards a gain of 1
    middle = wanted - wanted.mean(0)
    gain = ((middle * (seen - seen.mean(0))).sum(0) + pull) / (middle.square().sum(0) + pull)
    gain = gain.clamp(0.5, 2)
    left = seen - gain * wanted
    by_core = torch.stack([left[core::cores].mean(0) for core in range(cores)]) if len(left) >= cores else left[:0]
    offset = corrections.offset + by_core * corrections.column_gain
    return corrections._replace(column_gain=corrections.column_gain * gain, offset=offset)
