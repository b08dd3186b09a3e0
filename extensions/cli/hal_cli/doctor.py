"""`hal doctor`: what became of every plugin, backend and device, and what to do about what failed."""

from __future__ import annotations

import argparse
from contextlib import suppress
from typing import Any

import attrs

import hal_core as hal
from hal_core.plugin_api import (
    AttentionRequest,
    CommandResult,
    Device,
    DeviceUnavailableError,
    Table,
    decide,
    load_calibration,
    merged_policy,
    registry,
)


def run(options: argparse.Namespace) -> CommandResult:
    """Load every plugin, open every device, and ask each about a small call."""
    for entry in registry.entries():
        for device in registry.devices_of(entry):
            options.progress(f"opening {device.id}", 0.0)
            _probe(device)
    data = {
        "plugins": [attrs.asdict(plugin) for plugin in registry.plugin_list()],
        "backends": [_backend(entry) for entry in registry.entries()],
    }
    plugins = Table("Plugins", ["plugin", "distribution", "state", "why, and what to do"], _plugin_rows())
    devices = Table("Devices", ["device", "fidelity", "model", "driver", "details"], _device_rows())
    added = [table for _, tables in registry.call_each("hal_doctor") for table in tables]
    data["added"] = [table._asdict() for table in added]
    return CommandResult(data, [plugins, devices, *added])


def _probe(device: Device) -> None:
    """Open a device and ask it about a small call, so that what fails there is known; the registry keeps it."""
    with suppress(DeviceUnavailableError):
        hal.session(device.id)
    for dtype in ("float32", "float16", "bfloat16"):
        decide(AttentionRequest(1, 1, 1, 64, 64, 64, 64, dtype, device.reads[0]), merged_policy(device.id))


def _plugin_rows() -> list[list[str]]:
    rows = []
    for plugin in registry.plugin_list():
        bad = plugin.failure or _backend_failure(plugin)
        state = "loaded" if bad is None else "disabled" if bad.stage == "disabled" else f"failed ({bad.stage})"
        rows.append([plugin.name, plugin.distribution, state, "" if bad is None else f"{bad.message} -> {bad.fix}"])
    return rows


def _backend_failure(plugin: Any) -> Any:
    """Why a backend of the plugin's distribution is out of service; None where each can be used."""
    entries = [
        entry for entry in registry.entries() if plugin.distribution and entry.distribution == plugin.distribution
    ]
    return next((entry.failure for entry in entries if entry.failure is not None), None)


def _device_rows() -> list[list[str]]:
    rows = []
    for entry in registry.entries():
        for device in entry.found or ():
            state = "calibrated" if load_calibration(device) else f"not calibrated (hal calibrate {device.id})"
            broken = entry.broken.get(device.id) or entry.request_failures.get(device.id)
            avoided = registry.avoided.get(device.id)
            details = (
                [*device.features, state] if broken is None else [f"cannot be opened, {broken.message} -> {broken.fix}"]
            )
            details += [] if avoided is None else [f"passed over, {avoided.message} -> {avoided.fix}"]
            rows.append([device.id, str(device.fidelity), device.model, device.driver, "; ".join(details)])
        if not entry.found:
            rows.append([entry.spec.name, "absent", "", "", registry.why_absent(entry)])
    return rows


def _failure(entry: Any) -> Any:
    """Why a backend is out of service, or what its check or estimate last failed with."""
    return entry.failure or next(iter(entry.request_failures.values()), None)


def _backend(entry: Any) -> dict[str, Any]:
    return {
        "name": entry.spec.name,
        "distribution": entry.distribution,
        "requirements": entry.spec.requirements,
        "devices": [attrs.asdict(device) for device in entry.found or ()],
        "broken": {device: attrs.asdict(failure) for device, failure in entry.broken.items()},
        "failure": None if (failure := _failure(entry)) is None else attrs.asdict(failure),
        "absent": None if entry.found else registry.why_absent(entry),
    }
