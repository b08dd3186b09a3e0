"""Micro-ring resonators as weights: the drop port's Lorentzian, and what temperature does to it.

A weight w in [-1, 1] is the difference of drop and through port, w = 2 T - 1, T = 1 / (1 + (2 D / FWHM)^2), with the
detuning

    D = D0 + shift * dT + sum over neighbours of c_k * P_k        (shift 8.6 GHz/K, 0.069 nm/K)

Sources: Tait et al. 2017, Sci. Rep. 7, 7430 (broadcast and weight); Zhang et al. 2022, Optica 9, 579 (8.5 bit by
dithering).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def transmission(detuning: Tensor) -> Tensor:
    """Drop-port transmission; the detuning is in units of the full width at half maximum."""
    return 1 / (1 + (2 * detuning) ** 2)


def detuning_of(weights: Tensor, span: float) -> Tensor:
    """The detuning, in FWHM, that gives a weight in [-1, 1]; at most `span`, where the ring counts as off resonance."""
    share = ((weights + 1) / 2).clamp(float(transmission(torch.tensor(span))), 1)
    return (1 / share - 1).clamp_min_(0).sqrt_().div_(2)


def weights_of(detuning: Tensor) -> Tensor:
    return 2 * transmission(detuning) - 1


def realised(
    weights: Tensor, *, span: float, fwhm: float, shift: float, temperature_error: Tensor, crosstalk: float
) -> Tensor:
    """What rings make of weights.

    Args:
        weights: [..., rings], -1 to 1; neighbours along the last dimension share a heater's warmth.
        span: see `detuning_of`. fwhm: Hz. shift: Hz/K.
        temperature_error: K, broadcastable to weights. crosstalk: share of a neighbour's detuning that reaches a ring.

    Returns:
        weights' shape.
    """
    wanted = detuning_of(weights, span)
    detuning = wanted + temperature_error * (shift / fwhm)
    if crosstalk:
        neighbours = torch.zeros_like(wanted)
        neighbours[..., 1:] += wanted[..., :-1]
        neighbours[..., :-1] += wanted[..., 1:]
        detuning = detuning + crosstalk * neighbours
    return weights_of(detuning)


def precision_bits(detuning_noise: float, samples: int = 201) -> float:
    """log2(range / (sqrt(12) sigma)) of a weight whose detuning has noise of rms `detuning_noise` FWHM.

    sigma is the mean over the weight range of the weight's error, from the Lorentzian's slope.
    """
    weights = torch.linspace(-0.95, 0.95, samples, dtype=torch.float64)
    detuning = detuning_of(weights, 1e6)
    slope = 16 * detuning * transmission(detuning) ** 2
    sigma = float((slope * detuning_noise).square().mean().sqrt())
    return math.log2(2 / (math.sqrt(12) * sigma))
