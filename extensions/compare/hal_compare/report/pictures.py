"""The pictures of the page: the comparison, errors by layer, and one chart for each kind of figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Literal

from hal_core import Basis, Fidelity

from .. import charts
from ..charts import Mark, colour
from ..families import families, short_title, title
from ..figures import joules, ratio, seconds, varied
from ..pareto import Axis, Point, pareto
from ..result import Comparison, Figure, Row
from ..sentences import file_names, item, items

_SHAPES: dict[str, Literal["circle", "square", "diamond"]] = {"emulated": "square", "simulated": "diamond"}
_PANELS: tuple[tuple[str, Axis, Callable[[Row], Figure | None]], ...] = (
    (
        "Error against time",
        Axis("time of the device's part", seconds, lambda exponent: seconds(10.0**exponent)),
        lambda row: row.costs.on_device if row.costs else None,
    ),
    (
        "Error against energy",
        Axis("energy of the device's part", joules, lambda exponent: joules(10.0**exponent)),
        lambda row: row.costs.energy if row.costs else None,
    ),
)


def tones(rows: Sequence[Row]) -> dict[str, int]:
    """The colour of each row's family, by the row's name."""
    return {row.name: family.colour for family in families(rows) for row in family.rows}


def comparison(result: Comparison, ran: Sequence[Row]) -> str:
    """Error against time and energy, apart for each part of the model that rows give to their devices."""
    parts = list(dict.fromkeys(row.scope for row in ran))
    error = Axis(f"error of the worst {item(result)}", ratio)
    drawn = ""
    for part in parts:
        rows = [row for row in ran if row.scope == part]
        if len(rows) > 1 or len(parts) == 1:
            name = f" of {part}" if len(parts) > 1 else ""
            drawn += "".join(_panel(rows, tones(result.rows), f"{head}{name}", x, error, of) for head, x, of in _PANELS)
    if not drawn:
        return ""
    return f'<section><h2>The comparison</h2><div class="charts">{drawn}</div>{_legend(result, ran)}</section>'


def _panel(
    rows: Sequence[Row], colours: dict[str, int], head: str, x: Axis, error: Axis, of: Callable[[Row], Figure | None]
) -> str:
    short = [short_title(row) for row in rows]
    points, lacking = [], []
    for row, name in zip(rows, short, strict=True):
        figure = of(row)
        if figure is None or row.accuracy is None:
            lacking.append(row.name)
            continue
        points.append(
            Point(
                label=name if short.count(name) == 1 else title(row),
                x=figure,
                y=row.accuracy.worst,
                colour=colours[row.name],
                shape=_SHAPES.get(row.fidelity, "circle"),
                modelled=Basis.MODELLED in (figure.basis, row.accuracy.worst.basis),
                ranked=figure.basis is not Basis.DECLARED,
            )
        )
    said = f"No figure to show here: {', '.join(lacking)}." if lacking else ""
    return _figure(head, "", pareto(points, x, error), escape(said))


def _legend(result: Comparison, ran: Sequence[Row]) -> str:
    names = {row.name for row in ran}
    keys = "".join(
        f'<li><span class="swatch" style="--tone:{colour(family.colour)}"></span>{escape(family.name)}</li>'
        for family in families(result.rows)
        if any(row.name in names for row in family.rows)
    )
    shapes = {"hardware": "●", "emulated": "■", "simulated": "◆"}
    kinds = {row.fidelity for row in ran}
    keys += "".join(f"<li>{sign} {kind}</li>" for kind, sign in shapes.items() if kind in kinds)
    if any(_is_assumed(row) for row in ran):
        keys += "<li>○ at an assumed power, in no front</li>"
    return (
        f'<ul class="legend">{keys}<li>Lower left is better. Lines are Pareto fronts, solid of measured and dashed of '
        "modelled figures; bars are intervals; dotted double lines stand for empty decades.</li></ul>"
    )


def _is_assumed(row: Row) -> bool:
    return row.costs is not None and row.costs.energy is not None and row.costs.energy.basis is Basis.DECLARED


def _figure(head: str, text: str, picture: str, caption: str = "") -> str:
    above = f"<p>{text}</p>" if text else ""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure><h3>{escape(head)}</h3>{above}{picture}{below}</figure>"


def layers(result: Comparison, ran: Sequence[Row]) -> str:
    """A small chart a device, with all others in grey behind it."""
    every = [row.accuracy.layers for row in ran if row.accuracy is not None]
    if not every or max(len(row) for row in every) < 2:
        return ""
    colours, styles = tones(result.rows), list(dict.fromkeys(row.scope for row in ran))
    devices: dict[str, list[Row]] = {}
    for row in ran:
        devices.setdefault(row.device.id if row.device is not None else row.name, []).append(row)
    panels = ""
    for rows in devices.values():
        series = [
            (Mark(label=title(row), colour=colours[row.name], dash=styles.index(row.scope)), row.accuracy.layers)
            for row in rows
            if row.accuracy is not None
        ]
        behind = [row.accuracy.layers for row in ran if row not in rows and row.accuracy is not None]
        name = title(min(rows, key=lambda row: len(row.name)))
        end = ", ".join(f"{mark.label} ends at {ratio(found[-1])}" for mark, found in series)
        picture = charts.lines(series, f"error by layer: {end}", behind=behind)
        panels += f"<figure><h3>{escape(name)}</h3>{picture}</figure>"
    signs = ("solid", "dashed", "dotted")
    named = "; ".join(f"{signs[place % 3]}: {style}" for place, style in enumerate(styles))
    drawn = f" Lines: {named}." if len(styles) > 1 else ""
    return (
        '<section><h2>Error by layer</h2><p class="lead">'
        f'Mean over {items(result)}, median of the runs, after the embeddings ("in") and after each layer; all other '
        f"rows in grey.{escape(drawn)}</p>"
        f'<div class="panels">{panels}</div></section>'
    )


def errors(result: Comparison, ran: Sequence[Row]) -> str:
    """The mean and the worst text's, image's or clip's error."""
    colours, marks, one = tones(ran), [], item(result)
    for row in sorted(ran, key=lambda row: row.accuracy.worst.middle if row.accuracy else 0.0):
        if (found := row.accuracy) is None:
            continue
        marks.append(
            Mark(
                label=title(row),
                colour=colours[row.name],
                modelled=found.worst.basis is not Basis.MEASURED,
                parts=(found.mean, found.worst),
                text=varied(found.worst, ratio),
            )
        )
    return _figure(
        "Error",
        f"‖h - reference‖ / ‖reference‖ of {'an' if one == 'image' else 'a'} {one}'s last hidden states, "
        "against the float64 run",
        charts.dots(marks, "relative error of the hidden states by device"),
        f"Hollow: mean over {items(result)}. Filled, and the number: worst {one}.",
    )


def times(result: Comparison, ran: Sequence[Row]) -> str:
    """The time of the device's part, measured rows first."""
    return _figure(
        "Time of the device's part",
        f"Of one pass over all {items(result)}",
        _ranked(ran, lambda row: row.costs.on_device if row.costs else None, seconds, "time of the device's part"),
        "Measured rows first, then modelled ones (square); rows with other parts of the model below: none are ranked "
        "together.",
    )


def energies(result: Comparison, ran: Sequence[Row]) -> str:
    """The energy of the device's part."""
    return _figure(
        "Energy of the device's part",
        f"Of one pass over all {items(result)}",
        _ranked(ran, lambda row: row.costs.energy if row.costs else None, joules, "energy of the device's part"),
        "Nothing meters the host's part, so there is no total.",
    )


def _ranked(ran: Sequence[Row], of: Callable[[Row], Figure | None], show: Callable[[float], str], name: str) -> str:
    colours, marks = tones(ran), []

    parts = list(dict.fromkeys(row.scope for row in ran))

    def place(row: Row) -> tuple[int, bool, bool, float]:
        figure, part = of(row), parts.index(row.scope)
        if figure is None:
            return part, True, True, 0.0
        return part, False, figure.basis is not Basis.MEASURED, figure.middle

    for row in sorted(ran, key=place):
        figure = of(row)
        marks.append(
            Mark(
                label=title(row),
                colour=colours[row.name],
                modelled=figure is not None and figure.basis is not Basis.MEASURED,
                parts=() if figure is None else (figure,),
                text="" if figure is None else varied(figure, show),
                note="not available",
            )
        )
    return charts.dots(marks, name, show, lambda exponent: show(10.0**exponent))


def host(ran: Sequence[Row]) -> str:
    """The host's part, apart, in the order of the rows."""
    marks = [
        Mark(label=title(row), parts=(row.costs.remainder,), text=varied(row.costs.remainder, seconds))
        for row in ran
        if row.costs is not None
    ]
    return _figure(
        "The host's part",
        "The rest of the model, on this host's clock",
        charts.bars(marks, seconds, "seconds of the host's part by row"),
        "It belongs to this host and not to the devices: rows are not ranked by it, and no modelled time is added.",
    )


def attention_shares(result: Comparison, ran: Sequence[Row]) -> str:
    """How much of the model is attention, in work and in measured time."""
    colours = tones(ran)
    rows: list[tuple[str, int | str, float]] = []
    names = file_names(result)
    for group in result.groups:
        rows.append((names[group.name], "neutral", group.attention_macs / group.macs))
        for row in ran:
            measured = row.baseline or (row.device is not None and row.device.fidelity != Fidelity.SIMULATED)
            if measured and row.scope == "attention":
                costs = row.groups[group.name]
                rows.append((title(row), colours[row.name], costs.inside.middle / costs.wall.middle))
    return _figure(
        "How much of the model is attention",
        "Its share of the multiply-accumulates (grey), and of the measured time (coloured), by file",
        charts.shares(rows, "attention's share of work and time"),
    )
