"""Where measurements of a device are kept between processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from .device import Device
from .errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 1


@attrs.frozen
class Calibration:
    """A device's stored measurements.

    Attributes:
        device: its id when measured. fingerprint: see `Device.fingerprint`.
        created: seconds since the epoch. values: what the backend's `calibrate` returned.
    """

    device: str
    fingerprint: str
    created: float
    values: dict[str, Any]


def cache_dir() -> Path:
    """HAL_CACHE, or `hal` in the user's cache folder. Holds calibrations and compiled kernels."""
    from pathlib import Path

    if chosen := os.environ.get("HAL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hal"


def _path(device: Device) -> Path:
    return cache_dir() / "calibration" / f"{device.id.replace(':', '-')}-{device.fingerprint}.json"


def load(device: Device) -> Calibration | None:
    """The device's calibration; None where there is none for this model and driver, or the file cannot be read."""
    import json

    try:
        data = json.loads(_path(device).read_text(encoding="utf-8"))
        if data.get("format") == FORMAT and data["fingerprint"] == device.fingerprint:
            return Calibration(data["device"], data["fingerprint"], float(data["created"]), dict(data["values"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # a damaged file counts as none: the next calibration replaces it
    return None


def save(device: Device, values: dict[str, Any]) -> Calibration:
    """Store measurements, whole or not at all. Raises OSError where the cache cannot be written."""
    import json

    calibration = Calibration(device.id, device.fingerprint, time.time(), values)
    path = _path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"format": FORMAT, **attrs.asdict(calibration)}, indent=1))
    return calibration


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def calibrate(device_name: str, progress: Callable[[str, float], None] = lambda text, share: None) -> Calibration:
    """Measure a device and store the result; its estimates use it from now on.

    Args:
        device_name: device id or backend name. progress: called with a text and the share done, 0 to 1.

    Raises:
        UnsupportedError: the backend has no calibration.
    """
    from .protocols import Calibrated
    from .registry import registry

    device = registry.find(device_name)[0]
    backend = registry.backend_of(device)
    if not isinstance(backend, Calibrated):
        raise UnsupportedError(f"{device.id} has no calibration: its estimates are {type(backend).__name__}'s own")
    calibration = save(device, backend.calibrate(device, progress))
    registry.refresh(device.id)
    return calibration
