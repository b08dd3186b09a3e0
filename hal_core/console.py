"""Deprecated: commands return a `CommandResult`, which hal-cli prints, and report progress by `args.progress`.

This module serves plugins whose commands still print, for one minor version. It needs hal-cli.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from .hooks import Table


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table to standard output; see `hal_core.hooks.Table`."""
    importlib.import_module("hal_cli.output").show_table(Table(title, columns, rows, notes))


def progress(title: str) -> AbstractContextManager[Callable[[str, float], None]]:
    """A context manager; what it gives is called with a text and the share done, 0 to 1."""
    made: Any = importlib.import_module("hal_cli.progress").Progress(title)
    result: AbstractContextManager[Callable[[str, float], None]] = made
    return result
