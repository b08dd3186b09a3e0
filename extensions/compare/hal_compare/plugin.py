"""The hooks of hal-compare. Light: imports neither torch nor transformers."""

from __future__ import annotations

from typing import Any

from hal_core.plugin_api import hookimpl


@hookimpl
def hal_commands(subparsers: Any) -> None:
    """Add `hal compare` and `hal sweep`."""
    from . import command
    from .sweep import command as sweep

    command.add_parser(subparsers)
    sweep.add_parser(subparsers)
