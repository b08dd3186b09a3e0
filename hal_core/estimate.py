"""Numbers with their origin: an interval, how it was obtained, and where it comes from."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping

import attrs


class Basis(enum.StrEnum):
    """How a number was obtained, best first."""

    MEASURED = "measured"
    MODELLED = "modelled"
    DECLARED = "declared"

    @property
    def rank(self) -> int:
        return list(Basis).index(self)


class Provenance(enum.StrEnum):
    """Where the figures behind a number come from, best first."""

    MEASURED_SILICON = "measured-silicon"
    VENDOR_PUBLISHED = "vendor-published"
    PAPER_PROJECTION = "paper-projection"
    ASSUMED = "assumed"

    @property
    def rank(self) -> int:
        return list(Provenance).index(self)


@attrs.frozen
class Quantity:
    """An interval in SI units (seconds, joules, or a ratio for errors).

    Attributes:
        low, high: the interval, both finite, 0 <= low <= high.
        basis, provenance: see `Basis` and `Provenance`.
        source: a citation or a calibration's name, for people.
    """

    low: float
    high: float
    basis: Basis = attrs.field(converter=Basis)
    provenance: Provenance = attrs.field(converter=Provenance)
    source: str = ""

    def __attrs_post_init__(self) -> None:
        if not (0 <= self.low <= self.high < math.inf):
            raise ValueError(f"an interval of {self.low} to {self.high} was given: use 0 <= low <= high, both finite")

    @property
    def middle(self) -> float:
        """The arithmetic middle of the interval."""
        return (self.low + self.high) / 2

    def overlaps(self, other: Quantity) -> bool:
        return self.low <= other.high and other.low <= self.high


@attrs.frozen(kw_only=True)
class Estimate:
    """What a request would cost on a device, before it runs.

    Attributes:
        time: seconds. Where the request's tensors lie elsewhere, moving them there and the result back is included.
        energy: joules; None where nothing honest can be said.
        error: ||x - reference|| / ||reference|| of the output; None for the device's declared numerics.
        memory: bytes that the call allocates at its peak, the output included, the inputs not.
        parts: seconds by name, adding up to the middle of `time`, where the device models its parts.
    """

    time: Quantity
    energy: Quantity | None = None
    error: Quantity | None = None
    memory: int = 0
    parts: Mapping[str, float] = attrs.field(factory=dict)
