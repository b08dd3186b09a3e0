"""Tables and progress on a terminal: with rich where it is installed, as plain text where it is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table to standard output. `notes` are lines below it."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        lines = [list(columns), *([str(cell) for cell in row] for row in rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        if title:
            print(title)
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    else:
        table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120).print(table)
    for note in notes:
        print(note)


@contextmanager
def progress(title: str) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on standard error: call it with a text and the share done, 0 to 1. Quiet where stderr is no
    terminal.
    """
    if not sys.stderr.isatty():
        yield lambda text, share: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda text, share: print(f"\r{title}: {share:4.0%} {text[:60]:60}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda text, share: bar.update(task, completed=share, description=f"{title}: {text}")
