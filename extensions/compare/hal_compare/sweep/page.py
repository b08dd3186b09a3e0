"""A sweep as one self-contained HTML page, in the style of the report of `hal compare`: it fetches nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hal_core import Basis

from ..charts import colour
from ..figures import joules, ratio, seconds
from ..pareto import Axis, pareto
from ..report.html_tables import grid_table
from ..report.page import Beside, document, files_beside
from ..result import Figure
from .cells import Cell
from .curves import Curve, curves
from .fronts import COSTS, Cost, by_workload, cost_of, families, points, short
from .run import Plan, sources
from .tables import ORIGINS, conclusion, headline, refused, results

_ERROR = Axis("error of the worst text", ratio)
_COSTS: dict[Cost, tuple[str, Axis]] = {
    "time": ("Error against time", Axis("seconds of a batch, device's part", seconds)),
    "energy": ("Error against energy", Axis("joules of a batch, device's part", joules)),
}


def render(plan: Plan, cells: Sequence[Cell], data: dict[str, Any]) -> str:
    """The whole page. data: what `files.as_dict` gives."""
    colours = families(cells)
    beside = [
        Beside("sweep.csv", "every figure with its range and origin (CSV)"),
        Beside("sweep.json", "the same as data"),
    ]
    parts = [
        _header(plan, cells, data),
        _pareto(cells, colours),
        _curves(plan, cells, colours),
        _table(plan, cells),
        _refused(cells),
        _provenance(data),
        files_beside(beside),
    ]
    return document(f"hal sweep: {data['model']['name']}", "".join(parts))


def _header(plan: Plan, cells: Sequence[Cell], data: dict[str, Any]) -> str:
    created = data["created"].replace("T", " ").replace("+00:00", " UTC")
    lead = headline(plan).partition(": ")[2]
    return (
        f'<header><p class="kicker">hal sweep · {escape(created)}</p>'
        f"<h1>{escape(Path(data['model']['name']).name)}</h1>"
        f'<p class="conclusion">{escape(conclusion(cells))}</p><p>{escape(lead)}.</p></header>'
    )


def _legend(cells: Sequence[Cell], colours: dict[str, int]) -> str:
    keys = "".join(
        f'<li><span class="swatch" style="--tone:{colour(colours[family])}"></span>{escape(family)}</li>'
        for family in dict.fromkeys(cell.family for cell in cells if cell.ran)
    )
    return (
        f'<ul class="legend">{keys}<li>● hardware</li><li>■ emulated</li><li>◆ simulated</li><li>Lower left is better. '
        "Lines are Pareto fronts, solid of measured and dashed of modelled figures; bars are ranges; dotted double "
        "lines stand for empty decades.</li></ul>"
    )


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
    return (
        f'<section><h2>What no other device beats</h2><div class="charts">{figures}</div>{_legend(cells, colours)}'
        "</section>"
    )


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
    return (
        "<section><h2>Over the length of the texts</h2><p>Dashed: modelled.</p>"
        f'<div class="charts">{figures}</div></section>'
    )


def _getter(cost: Cost) -> Callable[[Cell], Figure | None]:
    return lambda cell: cost_of(cell, cost)


def _table(plan: Plan, cells: Sequence[Cell]) -> str:
    grid = results(plan, [cell for cell in cells if cell.ran], sources(plan))
    return f"<section><h2>All numbers</h2>{grid_table(grid)}</section>"


def _refused(cells: Sequence[Cell]) -> str:
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in refused(cells))
    if not reasons:
        return ""
    return f'<section><h2>Did not run</h2><div class="box refused"><ul>{reasons}</ul></div></section>'


def _provenance(data: dict[str, Any]) -> str:
    facts = {**data["machine"], **{f"{name} version": number for name, number in data["versions"].items()}}
    facts |= {f"remark {number}": remark for number, remark in enumerate(data["remarks"], 1)}
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return (
        f'<section><h2>Where it comes from</h2><p>{escape(ORIGINS)}</p><div class="box"><pre>'
        f'{escape(data["command"])}</pre></div><details class="box"><summary>Machine and versions</summary>'
        f'<dl class="terms">{listed}</dl></details></section>'
    )
