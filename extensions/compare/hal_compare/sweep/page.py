"""A sweep as one self-contained HTML page: no script, no font, no request to anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hal_core import Basis

from ..charts import colour
from ..figures import NOT_AVAILABLE, interval, joules, percent, ratio, seconds
from ..pareto import Axis, pareto
from ..report import STYLE
from ..result import Figure
from .cells import Cell
from .curves import Curve, curves
from .fronts import COSTS, Cost, best, by_workload, cost_of, families, points, short
from .run import Plan, sources
from .tables import conclusion, headline, notes, refused

_ERROR = Axis("error of the worst text", ratio)
_COSTS: dict[Cost, tuple[str, Axis]] = {
    "time": ("Error against time", Axis("seconds of a batch, device's part", seconds)),
    "energy": ("Error against energy", Axis("joules of a batch, device's part", joules)),
}


def render(plan: Plan, cells: Sequence[Cell], data: dict[str, Any]) -> str:
    """The whole page. data: what `files.as_dict` gives."""
    colours = families(cells)
    parts = [
        _header(plan, cells, data),
        _pareto(cells, colours),
        _curves(plan, cells, colours),
        _table(cells),
        _refused(cells),
        _terms(plan, cells),
        _origins(data),
    ]
    title = escape(f"hal sweep: {data['model']['name']}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE.read_text()}</style></head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _header(plan: Plan, cells: Sequence[Cell], data: dict[str, Any]) -> str:
    created = data["created"].replace("T", " ").replace("+00:00", " UTC")
    lead = headline(plan).partition(": ")[2]
    return (
        f'<p class="kicker">hal sweep · {escape(created)}</p><h1>{escape(Path(data["model"]["name"]).name)}</h1>'
        f'<p class="lead">{escape(conclusion(cells))}</p><p>{escape(lead)}. Every number is marked with its origin.</p>'
    )


def _legend(cells: Sequence[Cell], colours: dict[str, int]) -> str:
    keys = "".join(
        f'<span class="key" style="background:{colour(colours[family])}"></span>{escape(family)} '
        for family in dict.fromkeys(cell.family for cell in cells if cell.ran)
    )
    return f"{keys} Circle: hardware, square: emulated, diamond: simulated."


def _pareto(cells: Sequence[Cell], colours: dict[str, int]) -> str:
    figures = ""
    for (length, batch), own in by_workload(cells).items():
        for cost, (title, axis) in _COSTS.items():
            picture = pareto([point for _, point in points(own, cost, colours)], axis, _ERROR)
            if picture:
                text = f"{length:,} tokens, batches of {batch}"
                figures += f"<figure><h3>{title}</h3><p>{text}</p>{picture}</figure>"
    if not figures:
        return ""
    caption = (
        f"{_legend(cells, colours)} Lines: the Pareto fronts, dashed that of modelled figures. Bars: the range over "
        "draws, or of a model's figure."
    )
    return f'<h2>What no other device beats</h2><p>{caption}</p><div class="charts">{figures}</div>'


def _curves(plan: Plan, cells: Sequence[Cell], colours: dict[str, int]) -> str:
    if len(plan.lengths) < 2:
        return ""
    shown: tuple[tuple[str, Axis, Callable[[Cell], Figure | None]], ...] = (
        ("Error over the length", _ERROR, lambda cell: cell.error),
        *((f"{cost.capitalize()} over the length", _COSTS[cost][1], _getter(cost)) for cost in COSTS),
    )
    figures = ""
    for batch in plan.batches:
        for title, axis, figure_of in shown:
            series = []
            for label in dict.fromkeys(cell.label for cell in cells):
                own = [cell for cell in cells if cell.label == label and cell.batch == batch]
                found = [(cell.length, figure) for cell in own if (figure := figure_of(cell)) is not None]
                modelled = any(figure.basis is not Basis.MEASURED for _, figure in found)
                if found:
                    tone = colours[own[0].family]
                    series.append(Curve(label=short(own[0]), colour=tone, modelled=modelled, points=found))
            picture = curves(series, plan.lengths, axis)
            if picture:
                figures += f"<figure><h3>{title}</h3><p>Batches of {batch}</p>{picture}</figure>"
    return f'<h2>Over the length of the texts</h2><p>Dashed: modelled.</p><div class="charts">{figures}</div>'


def _getter(cost: Cost) -> Callable[[Cell], Figure | None]:
    return lambda cell: cost_of(cell, cost)


def _value(figure: Figure | None, show: Callable[[float], str]) -> str:
    if figure is None:
        return f'<span class="none">{NOT_AVAILABLE}</span>'
    between = f"<small>{escape(range_)}</small>" if (range_ := interval(figure, show)) else ""
    return (
        f'<span title="{escape(figure.source)}"><b>{escape(show(figure.middle))}</b>{between}'
        f'<small class="{figure.basis}">{escape(figure.origin)}</small></span>'
    )


def _table(cells: Sequence[Cell]) -> str:
    columns = [
        "tokens",
        "batch",
        "device",
        "error",
        "kept",
        "time",
        "the rest, on this host",
        "energy",
        "front",
        "draws",
    ]
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = ""
    for own in by_workload([cell for cell in cells if cell.ran]).values():
        front = {cost: {id(cell) for cell in best(own, cost)} for cost in COSTS}
        for cell in own:
            badge = f'<span class="badge {cell.fidelity}">{cell.fidelity}</span>'
            values = [
                f"{cell.length:,}",
                str(cell.batch),
                f"{escape(cell.label)} {badge}<small>{escape(cell.scope)}</small>",
                _value(cell.error, ratio),
                _value(cell.kept, percent),
                _value(cell.time, seconds),
                _value(cell.host, seconds),
                _value(cell.energy, joules),
                ", ".join(cost for cost in COSTS if id(cell) in front[cost]),
                str(cell.draws),
            ]
            body += f"<tr>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
    return (
        '<h2>All numbers</h2><div class="box scroll" tabindex="0" role="region" aria-label="all numbers"><table>'
        f"<caption>Of one batch; the same are in sweep.csv and sweep.json</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _refused(cells: Sequence[Cell]) -> str:
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in refused(cells))
    return f'<h2>Did not run</h2><div class="box refused"><ul>{reasons}</ul></div>' if reasons else ""


def _terms(plan: Plan, cells: Sequence[Cell]) -> str:
    said = [*notes(plan, cells, sources(plan))]
    listed = "".join(f"<p>{escape(sentence)}</p>" for sentence in said)
    origins = (
        "Measured: read off a clock, or computed from values that came out of the device. Modelled: what a device's "
        "model says; behind it, the worst origin of its figures: measured silicon, a vendor's publication, a paper's "
        "projection, or an assumption. Simulated: the values are a model's too. Emulated: real values in this host's "
        "time."
    )
    return f'<h2>How to read it</h2><div class="box">{listed}<p>{escape(origins)}</p></div>'


def _origins(data: dict[str, Any]) -> str:
    facts = {**data["machine"], **{f"{name} version": number for name, number in data["versions"].items()}}
    facts |= {f"remark {number}": remark for number, remark in enumerate(data["remarks"], 1)}
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return (
        f'<h2>Where it comes from</h2><div class="box"><pre>{escape(data["command"])}</pre></div>'
        f'<div class="box"><dl class="terms">{listed}</dl></div>'
    )
