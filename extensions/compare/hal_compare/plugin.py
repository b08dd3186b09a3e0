"""The hooks of hal-compare. Light: imports neither torch nor transformers."""

from __future__ import annotations

from typing import Any

from hal_core.plugin_api import hookimpl


@hookimpl
def hal_commands(subparsers: Any) -> None:
    """Add `hal compare`, `hal sweep` and `hal sensitivity`."""
    from . import command
    from .sensitivity import command as sensitivity
    from .sweep import command as sweep

    command.add_parser(subparsers)
    sweep.add_parser(subparsers)
    sensitivity.add_parser(subparsers)
