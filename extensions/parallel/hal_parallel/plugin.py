"""The hooks of hal-parallel. Light: imports no torch."""

from typing import Any

from hal_core.plugin_api import hookimpl


@hookimpl
def hal_commands(subparsers: Any) -> None:
    """Add `hal plan`, and the links between ranks to `hal calibrate`."""
    from . import command

    command.add_parser(subparsers)
    command.add_links(subparsers)
