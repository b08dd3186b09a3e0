"""What makes one chip differ from its design: static errors, noise and drift, drawn once from the chip's number.

Offsets and noise are in codes of the readout (LSB), weights and inputs in full scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..profiles.profile import Profile
from . import mesh, ring

ELECTRON, BOLTZMANN = 1.602176634e-19, 1.380649e-23  # C, J/K
#: Balanced detection sees about half of the full-scale light, whatever the signs.
_BIAS = 0.5
#: Two meshes, of whose error the real part is read: fitted to `mesh.realised`, which a test compares.
MESH_PAIR = 1.18


class NoiseParts(NamedTuple):
    """Rms noise of one readout by origin, in codes. `rin` and `common` are shared by all columns of a core."""

    readout: float
    shot: float
    thermal: float
    rin: float
    common: float

    @property
    def own(self) -> float:
        """The parts of a single readout."""
        return math.hypot(self.readout, self.shot, self.thermal)

    @property
    def shared(self) -> float:
        """The parts that all columns of a core have in common."""
        return math.hypot(self.rin, self.common)


def noise_parts(profile: Profile) -> NoiseParts:
    """Shot 2 q I B, thermal 4 k T B / R and relative intensity noise I^2 10^(RIN/10) B, beside what was measured."""
    full, band = profile["light.full_scale_current"], profile["light.bandwidth"]
    codes = (
        profile["converters.gain"] * ((1 << (profile.count("converters.adc_bits") - 1)) - 1) / full
    )  # codes per ampere
    current = _BIAS * full
    shot = math.sqrt(2 * ELECTRON * current * band)
    thermal = math.sqrt(4 * BOLTZMANN * profile["light.temperature"] * band / profile["light.load"])
    rin = current * math.sqrt(10 ** (profile["light.rin"] / 10) * band)
    return NoiseParts(
        profile["noise.readout_noise"], shot * codes, thermal * codes, rin * codes, profile["noise.common_noise"]
    )


def effective_bits(profile: Profile) -> float:
    """log2(full scale / (sqrt(12) sigma)) of one readout, quantisation of the converter included."""
    parts = noise_parts(profile)
    span = 2 * ((1 << (profile.count("converters.adc_bits") - 1)) - 1)
    return math.log2(span / (math.sqrt(12) * math.hypot(parts.own, parts.shared, 1 / math.sqrt(12))))


class Imperfections:
    """One chip's static errors.

    Attributes:
        gain: [outputs], relative. offset: [cores, outputs], codes. noise: [outputs], codes. shared: codes.
        weight: [outputs, inputs] (crossbar and mesh: of full scale; ring: temperature error in K).
        core_weight: [cores, outputs, inputs] of full scale, or None.
        bow: [inputs, 4], coefficients of x, x^3, x^5, x^7; ripple: [inputs], amplitude; both of full scale.
    """

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        draw = torch.Generator().manual_seed(profile.chip * 7919 + 17)
        cores, outputs, inputs = (profile.count(f"array.{n}") for n in ("cores", "outputs", "inputs"))
        tile = profile.tile_inputs  # every tile of the array's inputs is simulated by the first one's cells
        n = {key.partition(".")[2]: f.value for key, f in profile.figures.items() if key.startswith("noise.")}

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        def by_column(mean: float, spread: float) -> Tensor:
            return mean * (1 + spread * normal(outputs)).clamp_min(0.1)

        parts = noise_parts(profile)
        self.gain = n["column_gain"] * (1 + n["column_gain_spread"] / n["column_gain"] * normal(outputs))
        shared = normal(cores, 1)
        if cores > 1:  # the mean over the cores is part of the column's offset
            shared = (shared - shared.mean()) / shared.std(correction=0)
        self.offset = n["core_offset"] * shared + n["core_column_offset"] * normal(cores, outputs)
        self.offset = self.offset + n["column_offset"] * normal(outputs)
        self.noise, self.shared = by_column(parts.own, n["readout_noise_spread"]), parts.shared
        cells = n["weight_error"] if profile.mechanism != "ring" else profile["ring.temperature_error"]
        # The spread is lognormal and kept at the stated rms: single bad columns, as on silicon.
        width = math.sqrt(math.log1p(n["weight_error_spread"] ** 2))
        columns = torch.exp(width * normal(outputs))
        columns = columns / columns.square().mean().sqrt()
        self.weight = (cells * columns.unsqueeze(1) * normal(outputs, inputs))[:, :tile]
        self.core_weight = None
        if n["core_weight_error"]:
            self.core_weight = (n["core_weight_error"] * normal(cores, outputs, inputs))[..., :tile]
        levels = (1 << (profile.count("converters.input_bits") - 1)) - 1
        self.bow = _bow(normal(inputs, 4))[:tile] * (n["input_bow"] / levels)
        self.ripple = normal(inputs)[:tile] * (math.sqrt(2) * n["input_ripple"] / levels)
        self.crosstalk = n["crosstalk"]

    def bent(self, inputs: Tensor, linearised: bool) -> Tensor:
        """The light that inputs [..., K] in full scale become, by non-linearity and crosstalk.

        Returns `inputs` itself where there is neither.
        """
        width = inputs.shape[-1]
        ripple = self.ripple[:width]
        light = inputs
        if bool(ripple.any()):
            light = (inputs * (8 * math.pi)).sin_().mul_(ripple).add_(inputs)
        if not linearised and bool(self.bow.any()):
            light = odd_polynomial(self.bow[:width], inputs).add_(light)
        if self.crosstalk:
            leaked = torch.zeros_like(light)
            leaked[..., 1:] += light[..., :-1]
            leaked[..., :-1] += light[..., 1:]
            light = leaked.mul_(self.crosstalk).add_(light)
        return light

    def realised(self, weights: Tensor, columns: Tensor) -> Tensor:
        """The weights that the cells hold when they are set to weights [..., N, K] in full scale; a new tensor.

        Args:
            columns: [N], the physical column of each row.
        """
        width, profile = weights.shape[-1], self.profile
        error = self.weight[columns, :width]
        if profile.mechanism == "ring":
            return ring.realised(
                weights,
                span=profile["ring.span"],
                fwhm=profile["ring.fwhm"],
                shift=profile["ring.shift"],
                temperature_error=error,
                crosstalk=profile["ring.thermal_crosstalk"],
            )
        if profile.mechanism == "mesh":
            size = max(profile.count("array.outputs"), profile.tile_inputs)
            share = MESH_PAIR * mesh.relative_error(size, profile["mesh.phase_error"])
            rms = weights.square().mean((-1, -2), keepdim=True).sqrt()
            return weights + error + share * rms * self._mesh_direction(weights, columns)
        return weights + error

    def _mesh_direction(self, weights: Tensor, columns: Tensor) -> Tensor:
        """The direction of the meshes' error: mean 0, variance 1; equal for equal weights, unrelated for others.

        The errors of the phases are fixed, but each weight matrix uses other phases, so a calibration of cells cannot
        remove them.
        """
        width = weights.shape[-1]
        turns = self._turns[columns, :width]
        mark = (weights.double() * turns).sum((-1, -2), keepdim=True)
        return (math.sqrt(2) * torch.cos(2 * math.pi * (1e4 * mark * turns).frac())).float()

    @cached_property
    def _turns(self) -> Tensor:
        draw = torch.Generator().manual_seed(self.profile.chip * 7919 + 18)
        return torch.rand(self.weight.shape, generator=draw, dtype=torch.float64)


def odd_polynomial(coefficients: Tensor, x: Tensor) -> Tensor:
    """sum of c_i x^(2 i + 1) for i = 0 to 3; coefficients [K, 4], x [..., K]."""
    square = x * x
    total = coefficients[:, 3] * square
    for power in (2, 1):
        total.add_(coefficients[:, power]).mul_(square)
    return total.add_(coefficients[:, 0]).mul_(x)


def _bow(coefficients: Tensor) -> Tensor:
    """Polynomials [inputs, 4] scaled to an rms of 1 over [-1, 1]."""
    grid = torch.linspace(-1, 1, 401).unsqueeze(1)
    rms = odd_polynomial(coefficients, grid.expand(-1, len(coefficients))).square().mean(0).sqrt()
    return coefficients / rms.unsqueeze(1)


def by_core(codes: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views that broadcast: readouts, and the values of the cores that they came from.

    Args:
        codes: [batch, rows, N], contiguous; row r comes from core r mod cores. values: [cores, N].
    """
    cores, rows = len(values), codes.shape[1]
    whole = rows - rows % cores
    if whole:
        yield codes[:, :whole].unflatten(1, (-1, cores)), values
    if whole < rows:
        yield codes[:, whole:], values[: rows - whole]


class Drift:
    """Drift of the columns' gains and offsets: an Ornstein-Uhlenbeck process in time, and a part by temperature.

    theta(t + dt) = theta(t) exp(-dt / tau) + sigma sqrt(1 - exp(-2 dt / tau)) xi
    """

    def __init__(self, profile: Profile, temperature: float) -> None:
        self._profile, self._reference, self.temperature = profile, temperature, temperature
        self._draw = torch.Generator().manual_seed(profile.chip * 7919 + 19)
        columns = profile.count("array.outputs")
        self._gain, self._offset = torch.zeros(columns), torch.zeros(columns)

    def advance(self, seconds: float, temperature: float) -> None:
        """Let time pass, at the end of which the array has this temperature, degC."""
        p, self.temperature = self._profile, temperature
        keep = math.exp(-seconds / p["drift.relaxation"])
        kick = math.sqrt(1 - keep * keep)
        for state, sigma in ((self._gain, p["drift.gain_drift"]), (self._offset, p["drift.offset_drift"])):
            state.mul_(keep).add_(sigma * kick * torch.randn(state.shape, generator=self._draw))

    @property
    def gain(self) -> Tensor:
        """[outputs], a factor."""
        change = self.temperature - self._reference
        return 1 + self._gain + self._profile["drift.gain_temperature"] * change

    @property
    def offset(self) -> Tensor:
        """[outputs], codes."""
        return self._offset + self._profile["drift.offset_temperature"] * (self.temperature - self._reference)
