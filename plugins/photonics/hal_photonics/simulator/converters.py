"""The converters of a chip: their resolutions, and the range of a readout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..profiles.profile import Profile

#: Inputs for which the readout's range is set at least.
NARROWEST = 32


class Converters(NamedTuple):
    """Resolutions in bits, sign included, the analogue gain, and the longest tile along the reduction.

    `range_inputs`: products of full scale that the readout's range holds at gain 1, for a whole tile; 0 for `inputs`.
    """

    input_bits: int
    weight_bits: int
    adc_bits: int
    gain: float
    inputs: int
    range_inputs: float = 0.0

    @classmethod
    def of(cls, profile: Profile) -> Converters:
        """The converters of a profile."""
        return cls(
            input_bits=profile.count("converters.input_bits"),
            weight_bits=profile.count("converters.weight_bits"),
            adc_bits=profile.count("converters.adc_bits"),
            gain=profile["converters.gain"],
            inputs=profile.tile_inputs,
            range_inputs=profile["converters.range_inputs"],
        )

    @property
    def input_levels(self) -> int:
        """The largest input code."""
        return (1 << (self.input_bits - 1)) - 1

    @property
    def weight_levels(self) -> int:
        """The largest weight code."""
        return (1 << (self.weight_bits - 1)) - 1

    @property
    def adc_levels(self) -> int:
        """The largest readout code."""
        return (1 << (self.adc_bits - 1)) - 1

    def lsb(self, width: int) -> float:
        """The step of one readout code, in products of full scale, for a tile of `width` inputs.

        The readout's range follows the width of the tile down to `NARROWEST` inputs; below that, a few aligned products
        of full scale would clip.
        """
        share = self.range_inputs / self.inputs if self.range_inputs else 1.0
        return share * max(width, min(NARROWEST, self.inputs)) / self.adc_levels

    def tiles(self, length: int, width: int | None = None) -> Iterator[slice]:
        """The tiles of a reduction of `length`: `width` wide, and no wider than the array."""
        step = min(width or self.inputs, self.inputs)
        for start in range(0, length, step):
            yield slice(start, min(start + step, length))

    @property
    def may_clip(self) -> bool:
        """True if the largest sum, K products of full scale, lies above the largest code (it is `gain` times it)."""
        return self.gain > 1
