"""The layers of a comparison as tables for the terminal and as small multiples for the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from hal_core.plugin_api import Table

from .figures import joules, percent, ratio, seconds
from .layers import NOT_APART
from .result import Comparison, Figure, Layer, Row
from .strips import STYLE, Mark, Strip, axis_of, draw

#: Of the tables and the pictures.
EXPLAINED = (
    "Error: of the layer's output against the float64 run's, mean over the inputs, with the errors of the layers "
    "before it. Time and energy: of what ran on the device in the layer, with its share of the device's part of the "
    "same pass. What a device states adds up to its row above; measured times are of a pass of their own, which clocks "
    "each layer, and need not be those of the row."
)


def tables(comparison: Comparison) -> list[Table]:
    """A table for every row whose layers were looked at."""
    found = [_table(row) for row in comparison.rows if row.layers]
    if found:
        missing = [row.name for row in comparison.rows if row.ran and not row.layers]
        notes = [EXPLAINED, *(f"{name} has no layers here: {NOT_APART}." for name in missing)]
        found[-1] = found[-1]._replace(notes=notes)
    return found


def _table(row: Row) -> Table:
    metered = any(layer.energy is not None for layer in row.layers)
    rows = []
    for layer in row.layers:
        cells = [layer.name, ratio(layer.error.middle), *_cost(layer.time, layer.time_share, seconds)]
        rows.append([*cells, *(_cost(layer.energy, layer.energy_share, joules) if metered else [])])
    columns = ["layer", "error", "time", "of time", *(["energy", "of energy"] if metered else [])]
    return Table(f"Layers of {row.name} ({_origins(row)})", columns, rows)


def _cost(figure: Figure | None, share: float | None, show: Callable[[float], str]) -> list[str]:
    """The figure and its share; empty where nothing ran on the device."""
    return ["" if figure is None else show(figure.middle), "" if share is None else percent(share)]


def _origins(row: Row) -> str:
    """Where the row's figures are from."""
    found = {"error": {layer.error.origin for layer in row.layers}}
    found |= {
        name: {figure.origin for layer in row.layers if (figure := getattr(layer, name)) is not None}
        for name in ("time", "energy")
    }
    origins = {name: next(iter(each)) if len(each) == 1 else "several origins" for name, each in found.items() if each}
    if len(set(origins.values())) == 1:
        return next(iter(origins.values()))
    return "; ".join(f"{name} {origin}" for name, origin in origins.items())


def section(comparison: Comparison) -> str:
    """The report's part: a picture for every row, with equal axes. "" where no layers were looked at."""
    rows = [row for row in comparison.rows if row.layers]
    if not rows:
        return ""
    strips = {row.name: _strips(row.layers) for row in rows}
    axes = [axis_of([each[place] for each in strips.values()]) for place in range(3)]
    figures = ""
    for row in rows:
        shown = [
            Strip(title=strip.title, marks=strip.marks, log=strip.log, span=axes[place])
            for place, strip in enumerate(strips[row.name])
            if place == 0 or any(mark is not None for mark in strip.marks)
        ]
        names, said = [layer.name for layer in row.layers], f"error, time and energy of {row.name} by layer"
        picture = draw(names, shown, name=said, first="layer")
        figures += f"<figure><h3>{escape(row.name)}</h3><p>{escape(_origins(row))}</p>{picture}</figure>"
    return (
        f"<section><h2>Layer by layer</h2><p>{escape(EXPLAINED)} The pictures have equal axes.</p>"
        f'{STYLE}<div class="charts">{figures}</div></section>'
    )


def _strips(layers: Sequence[Layer]) -> list[Strip]:
    def cost(name: str, show: Callable[[float], str]) -> list[Mark | None]:
        marks: list[Mark | None] = []
        for layer in layers:
            figure, share = getattr(layer, name), getattr(layer, f"{name}_share")
            if figure is None:
                marks.append(None)
                continue
            text = show(figure.middle)
            of_it = "" if share is None else f", {percent(share)} of the device's part"
            tip = f"{layer.name}: {text} ({show(figure.low)} to {show(figure.high)}){of_it}, {figure.origin}"
            marks.append(Mark(0.0, figure.middle, text if share is None else f"{text} · {percent(share)}", tip))
        return marks

    errors = [
        Mark(None, layer.error.middle, ratio(layer.error.middle), f"{layer.name}: {_spread(layer.error)}")
        for layer in layers
    ]
    return [
        Strip(title="error", marks=errors, log=True),
        Strip(title="time", marks=cost("time", seconds)),
        Strip(title="energy", marks=cost("energy", joules)),
    ]


def _spread(error: Figure) -> str:
    return f"{ratio(error.middle)} ({ratio(error.low)} to {ratio(error.high)}), {error.origin}"
