"""`hal devices`: the devices that are present and, in JSON, everything they can do."""

from __future__ import annotations

import argparse
import enum
from typing import Any

import attrs

import hal_core as hal
from hal_core.plugin_api import CommandResult, Device, Table


def run(options: argparse.Namespace) -> CommandResult:
    """List the devices that are present."""
    found = hal.devices()
    rows = [[d.id, str(d.fidelity), d.vendor, d.model, _memory(d), ", ".join(d.reads)] for d in found]
    notes = [] if found else ["No device: `hal doctor` says why."]
    table = Table("", ["device", "fidelity", "vendor", "model", "memory", "reads"], rows, notes)
    return CommandResult([record(device) for device in found] if options.json else None, [table])


def _memory(device: Device) -> str:
    return "not said" if device.memory is None else f"{device.memory / 2**30:.1f} GiB"


def record(device: Device) -> dict[str, Any]:
    """A device and its capabilities as plain values: dtypes, head sizes, masks, features, block sizes, error bounds."""
    facts: dict[str, Any] = attrs.asdict(device, value_serializer=_plain)
    facts["fingerprint"] = device.fingerprint
    try:
        capabilities = hal.capabilities(device.id)
    except Exception as error:  # a backend that fails here must not hide the other devices
        return facts | {"capabilities": None, "failure": f"{type(error).__name__}: {error}"}
    return facts | {"capabilities": attrs.asdict(capabilities, value_serializer=_plain)}


def _plain(_: Any, __: Any, value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, hal.Choice):
        return {"values": sorted(value)}
    if isinstance(value, frozenset | set):
        return sorted(_plain(None, None, item) for item in value)
    if attrs.has(type(value)) and not isinstance(value, type):
        return attrs.asdict(value, value_serializer=_plain)
    return value
