"""A photonic device as a file: every figure with its value, unit, provenance and source.

    [array]
    cores = { value = 4, unit = "count", provenance = "silicon", source = "Nature 640, 368 (2025)" }

`hal photonics profile FILE` checks such a file, `hal_photonics.register_profile` makes it a device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import ClassVar

import attrs
import hal_simulation
from hal_simulation import Figure as Figure, ProfileError as ProfileError, Schema

from hal_core.plugin_api import Provenance

from .figures import FIGURES, MECHANISMS

#: How far the share of zeros that width, range and gain predict may lie from the measured one, as a ratio.
_ZEROS_WITHIN = 1.25

#: The words of a profile file for provenances, best first.
WORDS = {
    "silicon": Provenance.MEASURED_SILICON,  # measured on a chip, published by others
    "paper": Provenance.PAPER_PROJECTION,  # projected by the authors of a design
    "assumed": Provenance.ASSUMED,  # chosen by this project
}


@attrs.frozen(kw_only=True, eq=False)
class Profile(hal_simulation.Profile):
    """A checked photonic profile.

    Attributes:
        mechanism: "crossbar", "mesh", "ring" or "dot".
        chip: the number of the simulated chip; its static errors are drawn from it.
        linearised: whether the vendor has removed the smooth non-linearity of the inputs.
        calibrated: whether this project's calibration is applied; without it the device is as it was measured.
    """

    SCHEMA: ClassVar[Schema] = FIGURES
    HEAD: ClassVar[Mapping[str, str | tuple[str, ...]]] = {**hal_simulation.Profile.HEAD, "mechanism": MECHANISMS}
    OPTIONS: ClassVar[Mapping[str, type]] = {"notes": str, "chip": int, "linearised": bool, "calibrated": bool}
    VARIANT_KEY: ClassVar[str] = "mechanism"
    PROVENANCES: ClassVar[Mapping[str, Provenance]] = WORDS

    mechanism: str
    chip: int = 1
    linearised: bool = True
    calibrated: bool = True

    @property
    def tile_inputs(self) -> int:
        """Inputs that one readout sums: the width of a tile along the reduction, at most that of the array."""
        return self.count("converters.tile_inputs") or self.count("array.inputs")

    @property
    def range_inputs(self) -> float:
        """Products of full scale that the readout's range holds at gain 1, for a whole tile."""
        return self["converters.range_inputs"] or float(self.tile_inputs)

    def raw(self) -> Profile:
        """The same chip without this project's calibration: its columns' gains and offsets as they were measured."""
        name, title = f"{self.name}-raw", f"{self.title}, uncalibrated"
        return attrs.evolve(self, calibrated=False, name=name, title=title)

    def check(self, where: str) -> None:
        """Shares of the power add up to 1; thermal limits are in order, further apart than the hysteresis; a tile fits
        the array; tile, range and gain predict the zeros that were measured.
        """
        shares = [key for key in self.figures if key.startswith("power.share_")]
        total = math.fsum(self[key] for key in shares)
        if abs(total - 1) > 1e-9:
            raise ProfileError(f"{where}: {', '.join(shares)}: their sum is {total:g}: make it 1")
        limits = ("thermal.working", "thermal.derate", "thermal.throttle", "thermal.trip")
        gap = self["thermal.hysteresis"]
        for lower, upper in itertools.pairwise(limits):
            if not self[upper] - self[lower] > gap:
                wanted = f"more than {lower} ({self[lower]:g}) plus the hysteresis ({gap:g})"
                raise ProfileError(f"{where}: {upper}: {self[upper]:g} was given: use {wanted}")
        if self.tile_inputs > self.count("array.inputs"):
            raise ProfileError(
                f"{where}: converters.tile_inputs: {self.tile_inputs} was given: use array.inputs "
                f"({self.count('array.inputs')}) or fewer"
            )
        self._check_zeros(where)

    def _check_zeros(self, where: str) -> None:
        measured = self["converters.zero_share"]
        if not measured:
            return
        expected = predicted_zeros(self)
        if not 1 / _ZEROS_WITHIN <= expected / measured <= _ZEROS_WITHIN:
            raise ProfileError(
                f"{where}: converters: tile_inputs {self.tile_inputs}, range_inputs {self.range_inputs:g} and gain "
                f"{self['converters.gain']:g} predict {expected:.2%} exact zeros, converters.zero_share says that "
                f"{measured:.2%} were measured: correct these three, or leave zero_share out"
            )


def predicted_zeros(profile: Profile) -> float:
    """The share of exact zeros among readouts of standard normal operands, one tile wide.

    The codes are nearly Gaussian, of variance v = signal + offsets + noise, so a share 1 / sqrt(2 pi v) of them is 0.
    The signal is gain * column gain * sqrt(K) / (step * s_x * s_w), with scales s of the largest of K normal values.
    """
    p, width = profile, profile.tile_inputs
    step = p.range_inputs / ((1 << (p.count("converters.adc_bits") - 1)) - 1)
    largest = _largest_of(width)
    signal = p["converters.gain"] * p["noise.column_gain"] * math.sqrt(width) / (step * largest * largest)
    others = ("readout_noise", "common_noise", "column_offset", "core_offset", "core_column_offset")
    variance = signal**2 + sum(p[f"noise.{name}"] ** 2 for name in others)
    return 1 / math.sqrt(2 * math.pi * variance)


def _largest_of(count: int) -> float:
    """The median of the largest absolute value of `count` standard normal values."""
    return NormalDist().inv_cdf((1 + 0.5 ** (1 / count)) / 2)


def word(provenance: Provenance) -> str:
    """A profile file's word for a provenance."""
    return next(name for name, meant in WORDS.items() if meant is provenance)


def load(path: str | Path) -> Profile:
    """Read and check a profile file.

    Raises:
        ProfileError: the first thing that is wrong, with the file, the key and what is wanted.
    """
    return Profile.load(path)
