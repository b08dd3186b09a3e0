"""`hal calibrate`: measure a device and store the result. Whether it can be stored is checked before anything runs."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hal_core.plugin_api import Calibration, CommandResult, HalError, Table, cache_dir, calibrate

#: Other processes' load per core above which a measurement is called disturbed.
_BUSY = 0.5


def run(options: argparse.Namespace) -> CommandResult:
    """Measure, store, and show what was measured."""
    check_cache(cache_dir())
    busy = busy_host()
    calibration = calibrate(options.device, options.progress)
    return shown(calibration, [busy] if busy else [])


def shown(calibration: Calibration, warnings: list[str]) -> CommandResult:
    """A calibration as a table with one row for each number or short list of numbers."""
    rows = [[name, value] for name, value in flattened(calibration.values)]
    table = Table(f"Calibration of {calibration.device}", ["measured", "value"], rows)
    data: dict[str, Any] = calibration._asdict() | ({"warnings": warnings} if warnings else {})
    return CommandResult(data, [table], warnings)


def check_cache(folder: Path) -> None:
    """Raise HalError where a calibration could not be written to `folder`."""
    place = folder / "calibration"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place):
            pass
    except OSError as error:
        raise HalError(
            f"the cache {folder} cannot be written ({error.strerror}), so nothing was measured: make it writable, "
            "or set HAL_CACHE to another folder"
        ) from error


def busy_host() -> str:
    """A sentence where other processes disturb the measurement; "" where the host is idle or does not say."""
    try:
        load = os.getloadavg()[0]
    except OSError:
        return ""
    cores = os.cpu_count() or 1
    if load <= _BUSY * cores:
        return ""
    return (
        f"The host was busy (a load of {load:.1f} on {cores} cores before the first measurement): times and their "
        "intervals may be too long. Calibrate again when nothing else runs."
    )


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of every number, text and short list in nested measurements; names are joined by dots."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flattened(value, f"{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping | list | tuple) for item in value):
            yield name, f"{len(value)} measurements (`--json` shows them)"
        elif isinstance(value, list | tuple):
            yield name, ", ".join(map(_text, value)) or "none"
        else:
            yield name, _text(value)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
