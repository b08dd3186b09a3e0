"""What a device is: identity and facts, no behaviour."""

from __future__ import annotations

import enum

import attrs


class Fidelity(enum.StrEnum):
    """How real a device is. Shown beside every result."""

    HARDWARE = "hardware"
    EMULATED = "emulated"  # real values, the host's time (a driver that runs a GPU's programs on the CPU)
    SIMULATED = "simulated"  # values from a model of a device; its time and energy are modelled

    @property
    def rank(self) -> int:
        """0 for hardware, 2 for simulated: a composite has the highest rank of what it holds."""
        return list(Fidelity).index(self)


@attrs.frozen(kw_only=True)
class Device:
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
