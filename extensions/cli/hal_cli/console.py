"""Deprecated: what `hal_core.console` was. Commands return a `CommandResult`, and report by `args.progress`."""

from __future__ import annotations

from collections.abc import Sequence

from hal_core.plugin_api import Table

from . import output
from .progress import Progress as progress  # noqa: N813 - the old name

__all__ = ["progress", "show_table"]


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table to standard output."""
    output.show_table(Table(title, columns, rows, notes))
