"""The driver protocol: what the device code asks of a chip.

The one driver here is that of a simulated chip, `hal_photonics.simulator.chip.SimulatedDriver`. A card with a public
driver would bring its own `Driver`; nothing else would change.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..profiles.profile import Profile


class Telemetry(NamedTuple):
    """What the sensors say.

    Attributes:
        temperature: of the array, degC; NaN from a broken sensor. reading_age: seconds since that was measured.
        laser: optical power relative to nominal. clock: seconds the device has been on.
    """

    temperature: float
    reading_age: float
    laser: float
    clock: float


class Reading(NamedTuple):
    """Readouts [batch, rows, outputs], whole codes as float32, and how many of them were at the rails."""

    codes: Tensor
    clipped: int


class Cells(NamedTuple):
    """Weights as a chip holds them.

    Attributes:
        values: [batch, outputs, K], what the driver makes of weight codes; for a simulated chip the full-scale values
            of its cells, with their static errors.
    """

    values: Tensor


class Driver(Protocol):
    """One chip. `read` may be called from any thread; it depends on its arguments and the chip's state alone."""

    profile: Profile

    def load(self, weights: Tensor) -> Cells:
        """Program weight codes, which any number of reads then use.

        Args:
            weights: whole numbers as float32, [batch, outputs, K]; output i lies on column i mod columns, in as many
                loads as it takes.
        """
        ...

    def read(
        self,
        inputs: Tensor,
        weights: Tensor | Cells,
        *,
        noise: torch.Generator | None,
        averages: int = 1,
        gain: float | None = None,
    ) -> Reading:
        """Stream input codes through weights.

        Args:
            inputs: whole numbers as float32, [batch, rows, K]; row r runs on core r mod cores.
            weights: of `load`, or codes to load for this read.
            noise: the generator of the readout noise; None for the chip's own noise (a simulated chip: no noise).
            averages: readouts to average over. gain: in front of the readout; None for the profile's.
        """
        ...

    def telemetry(self) -> Telemetry:
        """The sensors' present readings."""
        ...

    def laser(self, on: bool) -> None:
        """Switch the laser on or off."""
        ...

    def close(self) -> None:
        """Release the chip."""
        ...
