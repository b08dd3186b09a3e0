"""The hooks of hal-telemetry. Light: imports no torch, and nothing more where nothing is switched on."""

from __future__ import annotations

import os
from typing import Any

from hal_core.plugin_api import hookimpl, registry


@hookimpl
def hal_commands(subparsers: Any) -> None:
    """Add `hal top`, `hal audit` and `hal access`."""
    from . import command

    command.add_parsers(subparsers)


if os.environ.keys() & {"HAL_METRICS", "HAL_AUDIT"} or "audit" in registry.access.rules:
    from . import control

    if control.from_environment():
        globals().update(vars(control.hooks()))  # pluggy looks at this module once it is loaded
