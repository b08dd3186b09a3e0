"""Where measurements of a device are kept between processes."""

import json
import math
import os
import stat
import time
import warnings
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from .device_info import Calibration, Device
from .errors import UnsupportedError
from .protocols import Progress
from .registry import registry

FORMAT = 1
_MOST_BYTES = 1 << 23


def cache_dir() -> Path:
    """HAL_CACHE, or `hal` in the user's cache folder. Holds calibrations and compiled kernels."""
    return Path(os.environ.get("HAL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hal"))


def _path(device: Device) -> Path:
    return cache_dir() / "calibration" / f"{device.id.replace(':', '-')}-{device.fingerprint}.json"


def load_calibration(device: Device) -> Calibration | None:
    """The device's calibration; None where there is none for this model and driver.

    A file that cannot be used (damaged, of another format, with values that are not positive finite numbers where
    numbers stand) counts as none, and is named in one warning. Read once, and again after `refresh`.
    """
    return _load(_path(device), device)


@cache
def _load(path: Path, device: Device) -> Calibration | None:
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MOST_BYTES:
                raise ValueError("it is not a regular file of at most 8 MiB")
            data = json.loads(file.read())
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']!r}, this core writes {FORMAT}")
        found = Calibration(data["device"], data["fingerprint"], float(data["created"]), data["values"])
        measured = isinstance(found.values, dict) and found.values and math.isfinite(found.created)
        if not measured or found.fingerprint != device.fingerprint:
            raise ValueError("it does not hold the measurements of this device")
        _check(found.values, "values")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        warnings.warn(
            f"the calibration {path} of {device.id} is not used ({error or type(error).__name__}): "
            f"run `hal calibrate {device.id}`",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


registry.on_change.append(_load.cache_clear)


def _check(value: Any, name: str) -> None:
    """Raise ValueError for a number that is not finite and at least 0, anywhere inside."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check(part, f"{name}.{key}")
    elif isinstance(value, int | float) and not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}")


def save(device: Device, values: dict[str, Any]) -> Calibration:
    """Store measurements, whole or not at all. Raises OSError where the cache cannot be written."""
    calibration = Calibration(device.id, device.fingerprint, time.time(), values)
    write_whole(_path(device), json.dumps({"format": FORMAT, **calibration._asdict()}, indent=1))
    return calibration


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all; its folder is made. The temporary file has a random name and follows no
    link.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(
        "w", encoding="utf-8", newline="", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as partial:
        try:
            partial.write(text)
            partial.close()
            os.replace(partial.name, path)
        finally:
            Path(partial.name).unlink(missing_ok=True)


def calibrate(device_name: str, progress: Progress = lambda text, share: None) -> Calibration:
    """Measure a device and store the result; its estimates use it from now on.

    Args:
        device_name: device id or backend name. progress: called with a text and the share done, 0 to 1.

    Raises:
        UnsupportedError: the backend has no calibration. OSError: the cache cannot be written; nothing was measured.
    """
    device = registry.find(device_name)[0]
    registry.session(device.id)  # which the access policy may deny
    backend = registry.backend_of(device)
    if not hasattr(backend, "calibrate"):
        raise UnsupportedError(f"{device.id} has no calibration: its estimates are {type(backend).__name__}'s own")
    trial = _path(device).with_suffix(".try")
    write_whole(trial, "")  # a folder that cannot be written is found before minutes of measuring
    trial.unlink()
    calibration = save(device, backend.calibrate(device, progress))
    registry.refresh(device.id)
    return calibration
