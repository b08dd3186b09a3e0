"""Sensitivities as a self-contained page: tornado charts, or bars of layers, with their tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from hal_core.plugin_api import Table

from ..figures import ratio
from ..report import STYLE, replace_whole
from ..strips import STYLE as STRIPS, Mark, Strip, draw
from .model_layers import LayerEffects
from .tables import SHOW, value_of, varied_by
from .tornado import Tornado

#: Rows of a picture.
MOST = 15


def write(path: Path, title: str, command: str, found: Tornado | LayerEffects, shown: Sequence[Table]) -> None:
    """Write the page; a reader never sees half of it."""
    replace_whole({path: render(title, command, found, shown)})


def render(title: str, command: str, found: Tornado | LayerEffects, shown: Sequence[Table]) -> str:
    """The whole page."""
    pictures = _tornado(found) if isinstance(found, Tornado) else _layers(found)
    head = escape(f"hal sensitivity: {title}")
    body = "".join(map(_table, shown))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{head}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE.read_text(encoding='utf-8')}</style>{STRIPS}</head>"
        f'<body><main><p class="kicker">hal sensitivity</p><h1>{escape(title)}</h1>'
        f'<section><h2>What moves it most</h2><div class="charts">{pictures}</div></section>'
        f"<section><h2>All numbers</h2>{body}</section>"
        f'<section><h2>Where it comes from</h2><div class="box"><pre>{escape(command)}</pre></div></section>'
        "</main></body></html>\n"
    )


def _tornado(found: Tornado) -> str:
    figures = ""
    for result in found.results():
        show, nominal, marks = SHOW[result], getattr(found.nominal, result), []
        ranked = found.ranked(result)[:MOST]
        for bar in ranked:
            ends = getattr(bar.low, result), getattr(bar.high, result)
            text = f"{show(ends[0])} to {show(ends[1])}"
            figure = bar.figure
            tip = f"{figure.key} {value_of(bar)} {varied_by(bar)}: {text}; {figure.provenance}, {figure.source}"
            marks.append(Mark(ends[0], ends[1], text, tip))
        strip = Strip(title=f"{show(nominal)} as it is", marks=marks, middle=nominal)
        picture = draw(
            [bar.figure.key for bar in ranked], [strip], name=f"{result} by figure of {found.device}", first="figure"
        )
        figures += (
            f"<figure><h3>{result.capitalize()}</h3><p>of {escape(found.device)} with one figure at the ends of its "
            f"interval</p>{picture}</figure>"
        )
    return figures


def _layers(found: LayerEffects) -> str:
    ranked = found.ranked()[: 2 * MOST]
    marks = [
        Mark(None, layer.error, ratio(layer.error), f"{layer.name}, {layer.kind}: {ratio(layer.error)}")
        for layer in ranked
    ]
    picture = draw(
        [layer.name for layer in ranked],
        [Strip(title="error", marks=marks, log=True)],
        name="error of the model by layer",
        first="layer",
    )
    return f"<figure><h3>Error of the model</h3><p>with {escape(found.cause)} in one layer</p>{picture}</figure>"


def _table(table: Table) -> str:
    """The table in the report's style, which stacks its cells where there is no room: the roles say what they are."""
    head = "".join(f'<th role="columnheader">{escape(column)}</th>' for column in table.columns)
    body = ""
    for row in table.rows:
        cells = (
            f'<td role="cell" data-label="{escape(column)}">{escape(cell)}</td>'
            for column, cell in zip(table.columns, row, strict=True)
        )
        body += f'<tr role="row">{"".join(cells)}</tr>'
    below = "".join(f"<p>{escape(note)}</p>" for note in table.notes)
    return (
        f'<div class="box scroll"><table role="table"><caption>{escape(table.title)}</caption><thead role="rowgroup">'
        f'<tr role="row">{head}</tr></thead><tbody role="rowgroup">{body}</tbody></table>{below}</div>'
    )
