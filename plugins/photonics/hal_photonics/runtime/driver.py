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


class Driver(Protocol):
    """One chip. `read` may be called from any thread; it depends on its arguments and the chip's state alone."""

    profile: Profile

    def read(
        self,
        inputs: Tensor,
        weights: Tensor,
        *,
        noise: torch.Generator | None,
        averages: int = 1,
        gain: float | None = None,
    ) -> Reading:
        """Load weight codes and stream input codes.

        Args:
            inputs: whole numbers as float32, [batch, rows, K]; row r runs on core r mod cores.
            weights: likewise, [batch, outputs, K]; output i runs on column i mod columns, in as many loads as it takes.
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
