"""The 2025 chip's public measurements, and the same statistics of a simulated chip by the same protocol.

Protocol: 4096 vectors times one 64 x 64 matrix, all standard normal, row i on core i mod 4. In alternate blocks of four
rows one half is fitted and the other judged: raw (wanted against observed), then observed = a wanted + b by column, by
a full 64 x 64 affine map, and by one such map for each core; signal is the fitted part's power, noise the rest's.
"""

from __future__ import annotations

import attrs
import torch
from hal_photonics.calibrate import decibels
from hal_photonics.profiles.profile import Profile
from hal_photonics.simulator.chip import SimulatedDriver
from hal_photonics.simulator.core import PhotonicCore, generator
from torch import Tensor

#: By kind of fit: SNR of the silicon in dB, and how far a model may lie from it.
SNR = {"raw": (10.94, 0.5), "column": (11.61, 0.5), "full": (15.46, 0.7), "core": (17.33, 1.0)}
#: Gain of a column, mean and standard deviation over the columns.
GAIN, GAIN_SPREAD = 0.834, 0.037
#: Of the public readouts, before any fit: SNR in dB of sums of 1, 2, 4 ... rows of one core, 64 inputs each.
RAW_SUMS = {64: 10.89, 128: 10.25, 256: 9.28, 512: 7.75, 1024: 5.69}
#: Lengths K of a product.
LENGTHS = (64, 128, 256, 512, 1024)


def observe(profile: Profile, seed: int, noise: bool = True) -> tuple[Tensor, Tensor]:
    """(wanted, observed) [4096, 64] in float64, of the chip with this number."""
    draw = torch.Generator().manual_seed(seed)
    weights, inputs = torch.randn(1, 64, 64, generator=draw), torch.randn(1, 4096, 64, generator=draw)
    core = PhotonicCore(SimulatedDriver(attrs.evolve(profile, chip=seed)))
    observed = core.product(inputs, weights, generator((seed, 0)) if noise else None)
    return (inputs.double() @ weights.double().mT)[0], observed[0].double()


def statistics(wanted: Tensor, observed: Tensor) -> dict[str, float]:
    """SNR in dB by kind of fit, and the share of the residual that all columns have in common."""
    row = torch.arange(len(wanted))
    fitted, judged = (row // 4) % 2 == 0, (row // 4) % 2 == 1
    ones = torch.ones(len(wanted), 1, dtype=torch.float64)

    def affine(columns: Tensor, fit: Tensor, apply: Tensor, target: Tensor) -> Tensor:
        solved = torch.linalg.lstsq(torch.cat([columns, ones], 1)[fit], target[fit]).solution
        return torch.cat([columns, ones], 1)[apply] @ solved

    by_column = torch.cat([affine(wanted[:, [c]], fitted, judged, observed[:, [c]]) for c in range(64)], 1)
    full = affine(wanted, fitted, judged, observed)
    by_core = torch.zeros_like(observed)
    for core in range(4):
        mine = row % 4 == core
        by_core[judged & mine] = affine(wanted, fitted & mine, judged & mine, observed)
    seen = observed[judged]
    found = {"raw": decibels(wanted[judged], seen)}
    for name, predicted in (("column", by_column), ("full", full), ("core", by_core[judged])):
        residual = seen - predicted
        found[name] = 10 * float(torch.log10(predicted.square().mean() / residual.square().mean()))
        found[f"{name}, common"] = float(residual.mean(1).var() / residual.var())
    return found


def column_gains(wanted: Tensor, observed: Tensor) -> Tensor:
    """[64]: the slope of each column's readouts over what was wanted."""
    middle = wanted - wanted.mean(0)
    return (middle * observed).sum(0) / middle.square().sum(0)


def snr(core: PhotonicCore, length: int, passes: int = 1) -> float:
    """SNR in dB of a product [512, length] @ [length, 128] of standard normal operands."""
    draw = torch.Generator().manual_seed(length)
    x, w = torch.randn(1, 512, length, generator=draw), torch.randn(1, 128, length, generator=draw)
    return decibels(x @ w.mT, core.product(x, w, generator((1, length)), passes=passes))
