"""Tables of the page: sortable from the keyboard, and blocks of labelled cells where the page is narrow."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hal_core import Basis

from .. import tables
from ..charts import colour
from ..families import Family, families, title
from ..figures import NOT_AVAILABLE
from ..result import Comparison, Row
from ..sentences import notes
from ..tables import Cell, Column, Grid

_SORT_HINT = (
    "Columns are sorted by their headings. Modelled figures stay below measured ones: they are not ranked together."
)


def families_table(comparison: Comparison) -> str:
    """A row per family of devices, with its variants folded in."""
    grid = tables.overview(comparison)
    cells = {id(row): line for row, line in grid.lines}
    bodies = ""
    for number, family in enumerate(families(comparison.rows)):
        lead, *variants = family.rows
        ids = [f"family-{number}-{place}" for place in range(len(variants))]
        bodies += '<tbody role="rowgroup">'
        bodies += _line(grid.columns, cells[id(lead)], _name(lead, family) + _fold(family, ids))
        for row, name in zip(variants, ids, strict=True):
            bodies += _line(grid.columns, cells[id(row)], _name(row, family), f' class="variant" id="{name}"')
        bodies += "</tbody>"
    said = "".join(f"<li>{escape(note)}</li>" for note in notes(comparison))
    table = _table("Each family of devices, with its variants", grid.columns, bodies)
    return f'<section><h2>By family</h2>{table}<ul class="notes">{said}<li>{_SORT_HINT}</li></ul></section>'


def grid_table(grid: Grid) -> str:
    """A table with its notes."""
    bodies = "".join(
        f'<tbody role="rowgroup">{_line(grid.columns, cells, escape(cells[0].text))}</tbody>' for _, cells in grid.lines
    )
    said = "".join(f"<li>{escape(note)}</li>" for note in grid.notes)
    return _table(grid.title, grid.columns, bodies) + (f'<ul class="notes">{said}</ul>' if said else "")


def _table(caption: str, columns: Sequence[Column], bodies: str) -> str:
    heads = "".join(_head(column) for column in columns)
    return (
        f'<div class="box"><table role="table" class="sortable"><caption>{escape(caption)}</caption>'
        f'<thead role="rowgroup"><tr role="row">{heads}</tr></thead>{bodies}</table></div>'
    )


def _head(column: Column) -> str:
    if not column.sortable:
        return f'<th scope="col" role="columnheader" class="plain">{escape(column.name)}</th>'
    button = f'<button type="button">{escape(column.name)}<span class="arrow" aria-hidden="true"></span></button>'
    return f'<th scope="col" role="columnheader" aria-sort="none">{button}</th>'


def _line(columns: Sequence[Column], cells: Sequence[Cell], name: str, attributes: str = "") -> str:
    drawn = f'<th scope="row" role="rowheader">{name}</th>'
    drawn += "".join(_cell(column, cell) for column, cell in zip(columns[1:], cells[1:], strict=True))
    return f'<tr role="row"{attributes}>{drawn}</tr>'


def _cell(column: Column, cell: Cell) -> str:
    sort = f' data-value="{cell.value!r}"' if cell.value is not None else ""
    kind, tip = "", ""
    if cell.figure is not None:
        measured = cell.figure.basis is Basis.MEASURED
        sort += "" if measured else ' data-group="1"'
        tip = f' title="{escape(f"{cell.figure.origin}: {cell.figure.source}")}"'
        kind = f' class="{cell.figure.basis}"'
    elif cell.text in ("hardware", "emulated", "simulated", "absent"):
        badge = f'<span class="badge {cell.text}">{cell.text}</span>'
        return f'<td role="cell" data-label="{escape(column.name)}">{badge}</td>'
    elif cell.text == NOT_AVAILABLE:
        kind = ' class="none"'
    if not cell.text:
        return f'<td role="cell" class="empty" data-label="{escape(column.name)}"></td>'
    return f'<td role="cell" data-label="{escape(column.name)}"{sort}{tip}><span{kind}>{escape(cell.text)}</span></td>'


def _name(row: Row, family: Family) -> str:
    vendor = "scaled_dot_product_attention" if row.baseline else "not here"
    if row.device is not None:
        vendor = f"{row.device.vendor} {row.device.model}".strip()
    swatch = f'<span class="swatch" style="--tone:{colour(family.colour)}"></span>'
    return f"{swatch}{escape(title(row))}<small>{escape(vendor)}</small>"


def _fold(family: Family, ids: Sequence[str]) -> str:
    if not ids:
        return ""
    count = f"{len(ids)} variant{'s' if len(ids) > 1 else ''}"
    return (
        f'<button type="button" class="fold" aria-expanded="true" aria-controls="{" ".join(ids)}">{count} of '
        f"{escape(family.name)}</button>"
    )
