"""What a command returned, as JSON or as tables and sentences that fit the terminal."""

from __future__ import annotations

import json
import math
import os
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from hal_core.plugin_api import CommandResult, Table

#: Columns of text where standard output is no terminal and COLUMNS is not set.
WIDTH = 100
_GAP = 2
#: Characters of a cell that is never broken between its words, and of one that has a line of its own in a block.
_SHORT, _LONG = 16, 60


def show(result: CommandResult, as_json: bool) -> None:
    """Print a command's result to standard output."""
    if as_json:
        print(to_json(result.data))
        return
    for table in result.tables:
        show_table(table)
    for sentence in result.text:
        print(wrapped(sentence, terminal_width()))


def to_json(data: Any) -> str:
    """JSON that every parser reads: NaN and infinities, which JSON does not have, become null.

    Objects that are neither of JSON's types nor mappings and sequences are written as their `str`.
    """
    return json.dumps(_finite(data), indent=2, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, frozenset | set):
        return sorted(_finite(item) for item in value)
    return value


def terminal_width() -> int:
    """Columns of the terminal, or COLUMNS where it is set."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def wrapped(text: str, width: int) -> str:
    """Text in lines of at most `width` columns, broken between words alone; continued lines are indented."""
    lines = []
    for line in text.splitlines() or [""]:
        indent = " " * (len(line) - len(line.lstrip()))
        broken = textwrap.wrap(
            line,
            width,
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += broken or [""]
    return "\n".join(lines)


def show_table(table: Table) -> None:
    """Print a table to standard output. Where its columns do not fit side by side, each row becomes a small block."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    room = terminal_width()
    console = Console(width=room, highlight=False)
    rows = [[str(cell) for cell in row] for row in table.rows]
    widths = column_widths([list(table.columns), *rows], room)
    if widths is None or _broken_up(rows, widths):
        if table.title:
            print(wrapped(table.title, room))
        print(_blocks(table.columns, rows, room))
    else:
        drawn = Drawn(
            title=Text(table.title) if table.title else None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            title_style="bold",
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for column, width in zip(table.columns, widths, strict=True):
            drawn.add_column(Text(column), width=width, overflow="fold")
        for row in rows:
            drawn.add_row(*(Text(cell) for cell in row))
        console.print(drawn)
    for note in ("", *table.notes):
        print(wrapped(note, room))
    if table.notes:
        print()


def column_widths(lines: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """A width for each column, so that all of them fit in `room` and no word is broken.

    The widest column that still has a space to break at is narrowed until the columns fit.

    Args:
        lines: the head and the rows, as texts. room: columns of the terminal.

    Returns:
        The widths; None where the longest words alone are wider than `room`.
    """
    columns = list(zip(*lines, strict=True))
    widths = [max((_width(line) for cell in column for line in cell.splitlines()), default=0) for column in columns]
    least = [max((_width(word) for cell in column for word in cell.split()), default=0) for column in columns]
    over = sum(widths) + _GAP * max(len(widths) - 1, 0) - room
    while over > 0:
        able = [place for place, width in enumerate(widths) if width > least[place]]
        if not able:
            return None
        widths[max(able, key=widths.__getitem__)] -= 1
        over -= 1
    return widths


def _broken_up(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> bool:
    """Whether a short cell, as numbers with their units are, would go over several lines."""
    return any(width < _width(cell) <= _SHORT for row in rows for cell, width in zip(row[1:], widths[1:], strict=True))


def _blocks(columns: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> str:
    """Rows as blocks: the first cell, and below it the others with their columns' names, as many in a line as fit.

    A table with a long cell has a line for each, so that its texts stand below each other.
    """
    if any(_width(cell) > _LONG for row in rows for cell in row[1:]):
        return _paragraphs(columns, rows, room)
    lines = []
    for first, *others in rows:
        lines.append(first)
        line = ""
        for piece in (f"{name}: {cell}" for name, cell in zip(columns[1:], others, strict=True) if cell):
            longer = f"{line}   {piece}" if line else f"  {piece}"
            if line and _width(longer) > room:
                lines += wrapped(line, room).splitlines()
                longer = f"  {piece}"
            line = longer
        lines += wrapped(line, room).splitlines() if line else []
    return "\n".join(lines)


def _paragraphs(columns: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> str:
    """Rows as paragraphs: the first cell, and below it a line or more for each of the others."""
    lines = []
    margin = max(map(_width, columns[1:]), default=0)
    for first, *others in rows:
        lines.append(first)
        for name, cell in zip(columns[1:], others, strict=True):
            if cell:
                head = f"  {name.ljust(margin)}  "
                lines += textwrap.wrap(
                    cell,
                    room,
                    initial_indent=head,
                    subsequent_indent=" " * len(head),
                    break_long_words=False,
                    break_on_hyphens=False,
                )
    return "\n".join(lines)


def _width(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)


def quiet_output() -> None:
    """Send what is still in the buffers of standard output nowhere: its reader went away, as `head` does."""
    import sys

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
