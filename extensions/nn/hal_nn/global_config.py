"""`GlobalConfig`: the process's defaults as an object; a face of `hal.configure`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import hal_core as hal
from hal_core import ContractError

_lock = threading.Lock()


@dataclass(frozen=True)
class GlobalConfig:
    """Defaults for every attention call of the process. Applying one replaces all of them, as `hal.configure` does.

    Attributes:
        device: backend or device that runs every call; None leaves it to hal's selection.
        objective: "time", "energy" or "error". allow_simulated: let hal's selection take simulated devices.
        transfer: True allows moving tensors to a device, False forbids it; None allows it to named devices alone.
        memory_limit: bytes, for every device or by device id; None for no limit.
    """

    device: str | None = None
    objective: str | None = None
    allow_simulated: bool | None = None
    transfer: bool | None = None
    memory_limit: int | Mapping[str, int] | None = None

    def apply(self) -> Self:
        """Put these defaults in force.

        Raises:
            ContractError: a malformed value. UnknownBackendError: no such device.
        """
        global _current
        given = {name: value for name, value in asdict(self).items() if value is not None and name != "device"}
        with _lock:
            hal.configure(self.device, **given)
            _current = self
        return self

    @classmethod
    def current(cls) -> GlobalConfig:
        """The configuration that was applied last; the initial one where none was."""
        return _current

    @classmethod
    def reset(cls) -> GlobalConfig:
        """Restore the initial defaults."""
        return cls().apply()

    def updated(self, **changes: Any) -> Self:
        """A copy with some attributes changed, not yet applied.

        Raises:
            ContractError: an unknown attribute.
        """
        if unknown := sorted(set(changes) - set(asdict(self))):
            raise ContractError(f"unknown setting {unknown[0]!r} was given: use {', '.join(asdict(self))}")
        return replace(self, **changes)


_current = GlobalConfig()
