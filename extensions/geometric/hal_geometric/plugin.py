"""The hook of hal-geometric. Light: imports no torch."""

from __future__ import annotations

from typing import Any

from hal_core.plugin_api import hookimpl


@hookimpl
def hal_commands(subparsers: Any) -> None:
    """Add `hal geometric`."""
    from . import command

    command.add_parser(subparsers)
