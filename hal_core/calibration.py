"""Where measurements of a device are kept between processes."""

from __future__ import annotations

import math
import os
import time
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from .device_info import Device
from .errors import UnsupportedError
from .protocols import Calibrated, Progress
from .registry import registry

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = 1
_MOST_BYTES = 1 << 23


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


_loaded: dict[str, Calibration | None] = {}
registry.on_change.append(_loaded.clear)


def cache_dir() -> Path:
    """HAL_CACHE, or `hal` in the user's cache folder. Holds calibrations and compiled kernels."""
    from pathlib import Path

    if chosen := os.environ.get("HAL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hal"


def _path(device: Device) -> Path:
    return cache_dir() / "calibration" / f"{device.id.replace(':', '-')}-{device.fingerprint}.json"


def load(device: Device) -> Calibration | None:
    """The device's calibration; None where there is none for this model and driver.

    A file that cannot be used (damaged, of another format, with values that are not positive finite numbers where
    numbers stand) counts as none, and is named in one warning. Read once, and again after `refresh`.
    """
    path = _path(device)
    if (key := str(path)) not in _loaded:
        _loaded[key] = None
        try:
            _loaded[key] = _read(path, device)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            why = f"the calibration {path} of {device.id} is not used ({error or type(error).__name__})"
            warnings.warn(f"{why}: run `hal calibrate {device.id}`", RuntimeWarning, stacklevel=2)
    return _loaded[key]


def _read(path: Path, device: Device) -> Calibration:
    import json
    import stat

    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MOST_BYTES:
            raise ValueError("it is not a regular file of at most 8 MiB")
        data = json.loads(file.read())
    if data["format"] != FORMAT:
        raise ValueError(f"its format is {data['format']!r}, this core writes {FORMAT}")
    created, values = float(data["created"]), data["values"]
    if (
        data["fingerprint"] != device.fingerprint
        or not math.isfinite(created)
        or not isinstance(values, dict)
        or not values
    ):
        raise ValueError("it does not hold the measurements of this device")
    _check(values, "values")
    return Calibration(data["device"], data["fingerprint"], created, values)


def _check(value: Any, name: str) -> None:
    """Raise ValueError for a number that is not finite and at least 0, anywhere inside."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check(part, f"{name}.{key}")
    elif isinstance(value, int | float) and not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}")


def save(device: Device, values: dict[str, Any]) -> Calibration:
    """Store measurements, whole or not at all. Raises OSError where the cache cannot be written."""
    import json

    calibration = Calibration(device.id, device.fingerprint, time.time(), values)
    path = _path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"format": FORMAT, **calibration._asdict()}, indent=1))
    return calibration


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all. The temporary file has a random name and follows no link."""
    from contextlib import suppress
    from tempfile import NamedTemporaryFile

    kind = {"mode": "w", "encoding": "utf-8", "newline": "", "delete": False}
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", **kind) as partial:  # type: ignore[call-overload]
        try:
            partial.write(text)
            partial.close()
            os.replace(partial.name, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial.name)


def calibrate(device_name: str, progress: Progress = lambda text, share: None) -> Calibration:
    """Measure a device and store the result; its estimates use it from now on.

    Args:
        device_name: device id or backend name. progress: called with a text and the share done, 0 to 1.

    Raises:
        UnsupportedError: the backend has no calibration. OSError: the cache cannot be written; nothing was measured.
    """
    device = registry.find(device_name)[0]
    backend = registry.backend_of(device)
    if not isinstance(backend, Calibrated):
        raise UnsupportedError(f"{device.id} has no calibration: its estimates are {type(backend).__name__}'s own")
    path = _path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.with_suffix(".try"), "")  # a folder that cannot be written is found before minutes of measuring
    path.with_suffix(".try").unlink()
    calibration = save(device, backend.calibrate(device, progress))
    registry.refresh(device.id)
    return calibration
