"""What a device is, and what it says a call would cost: facts, and numbers with their origin."""

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import attrs


class Record:
    """A base of frozen classes without slots that compares, hashes and prints by their fields. Methods that attrs and
    dataclasses generate for every class would be a quarter of the time that the core's import takes.
    """

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


class Ranked(enum.StrEnum):
    """Names in an order, best first."""

    @property
    def rank(self) -> int:
        """0 for the best. What is made of several has the highest rank among them."""
        return list(type(self)).index(self)


class Fidelity(Ranked):
    """How real a device is. Shown beside every result."""

    HARDWARE = "hardware"
    EMULATED = "emulated"  # real values, the host's time (a driver that runs a GPU's programs on the CPU)
    SIMULATED = "simulated"  # values from a model of a device; its time and energy are modelled


@attrs.frozen(kw_only=True, eq=False, repr=False, slots=False)
class Device(Record):
    """One device a backend found.

    Attributes:
        id: "<backend>:<index>", for example "cpu:0". Unique in a process.
        family: the kind of device ("cpu", "cuda", "photonic").
        vendor, model: as the driver reports them.
        fidelity: hardware, emulated or simulated.
        reads: torch device strings whose tensors it reads where they lie; "cuda" matches every index, "cuda:1" one.
        memory: bytes of memory the device works in; None where the driver does not say.
        driver: driver or library name and version.
        features: named hardware features, shown by `hal doctor`.
    """

    id: str
    family: str
    vendor: str
    model: str
    fidelity: Fidelity = attrs.field(converter=Fidelity)
    reads: tuple[str, ...] = ("cpu",)
    memory: int | None = None
    driver: str = ""
    features: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """A key that changes when the device, its model or its driver does; calibrations are stored under it."""
        from hashlib import sha256

        parts = (self.family, self.vendor, self.model, self.driver, *sorted(self.features))
        return sha256("\0".join(parts).encode()).hexdigest()[:16]

    def reads_from(self, torch_device: str) -> bool:
        """Whether tensors on `torch_device` ("cpu", "cuda:0") need no transfer."""
        return torch_device in self.reads or torch_device.partition(":")[0] in self.reads


class Basis(Ranked):
    """How a number was obtained, best first."""

    MEASURED = "measured"
    MODELLED = "modelled"
    DECLARED = "declared"


class Provenance(Ranked):
    """Where the figures behind a number come from, best first."""

    MEASURED_SILICON = "measured-silicon"
    VENDOR_PUBLISHED = "vendor-published"
    PAPER_PROJECTION = "paper-projection"
    ASSUMED = "assumed"


@attrs.frozen(eq=False, repr=False, slots=False)
class Quantity(Record):
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
        if not (0 <= self.low <= self.high < float("inf")):
            raise ValueError(f"an interval of {self.low} to {self.high} was given: use 0 <= low <= high, both finite")

    @property
    def middle(self) -> float:
        """The arithmetic middle of the interval."""
        return (self.low + self.high) / 2

    def plus(self, other: Self) -> Self:
        """The sum of both intervals, with the worst basis and provenance of the two."""
        return type(self)(
            self.low + other.low,
            self.high + other.high,
            max(self.basis, other.basis, key=lambda basis: basis.rank),
            max(self.provenance, other.provenance, key=lambda provenance: provenance.rank),
            self.source if self.source == other.source else "several",
        )

    def overlaps(self, other: Self) -> bool:
        return self.low <= other.high and other.low <= self.high


@attrs.frozen(kw_only=True, eq=False, repr=False, slots=False)
class Estimate(Record):
    """What a request would cost on a device, before it runs.

    Attributes:
        time: seconds. Where the request's tensors lie elsewhere, moving them there and the result back is included.
        energy: joules; None where nothing honest can be said.
        error: ||x - reference|| / ||reference|| of the output; None for the device's declared numerics.
        memory: bytes that the call allocates at its peak, the output included, the inputs not.
        parts: seconds by name, adding up to the middle of `time`, where the device models its parts.
        macs: multiply-accumulates, where a session says what a call did whose block plan it read; None for those that
            the request leaves visible.
    """

    time: Quantity
    energy: Quantity | None = None
    error: Quantity | None = None
    memory: int = 0
    parts: Mapping[str, float] = attrs.field(factory=dict)
    macs: int | None = None


class Calibration(NamedTuple):
    """A device's stored measurements.

    Attributes:
        device: its id when measured. fingerprint: see `Device.fingerprint`.
        created: seconds since the epoch. values: what the backend's `calibrate` returned.
    """

    device: str
    fingerprint: str
    created: float
    values: dict[str, Any]


class MeterRecord(NamedTuple):
    """What ran on one device inside a `meter`.

    Attributes:
        device: the device. calls: attention calls.
        wall: seconds by the host's clock, the device synchronised after each call; measured.
        time: seconds the device itself is said to need, for a simulated device; None where `wall` is the time.
        energy: joules; None where the device states none. Sums over the calls, with the worst origin met.
        macs: multiply-accumulates of the query-key pairs that causal, window and block plan leave visible, of a
            plan as many as a row may list where the session does not say more; a mask's content is not looked at.
            transferred: bytes moved to the device and back.
    """

    device: Device
    calls: int = 0
    wall: float = 0.0
    time: Quantity | None = None
    energy: Quantity | None = None
    macs: int = 0
    transferred: int = 0

    def plus(self, other: "MeterRecord") -> "MeterRecord":
        """Both records together. A call without a figure makes the sum None: a partial sum would look like a total."""
        return MeterRecord(
            self.device,
            self.calls + other.calls,
            self.wall + other.wall,
            self.time.plus(other.time) if self.time and other.time else None,
            self.energy.plus(other.energy) if self.energy and other.energy else None,
            self.macs + other.macs,
            self.transferred + other.transferred,
        )
