"""The hooks of hal-nn. Light: imports neither torch nor transformers."""

from __future__ import annotations

from typing import Any

from hal_core import hookimpl


@hookimpl
def hal_commands(subparsers: Any) -> None:
    """Add `hal compare`."""
    from .compare import command

    command.add_parser(subparsers)
