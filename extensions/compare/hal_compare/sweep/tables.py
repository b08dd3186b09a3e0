"""A sweep as tables and sentences for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hal_core.plugin_api import Table

from ..decisions import DECISIONS, ITEMS
from ..figures import NOT_AVAILABLE, joules, percent, ratio, seconds
from ..result import Figure
from ..tables import Cell as Shown, Column, Grid
from .cells import Cell
from .fronts import Cost, best, by_workload, cost_of
from .run import Plan
from .token_texts import MEANING, Source

_COSTS: dict[Cost, Callable[[float], str]] = {"time": seconds, "energy": joules}
ORIGINS = (
    "Measured: read off a clock, or computed from values that came out of the device. Modelled: by the model of a "
    "device; behind the comma, the worst origin of its figures: measured silicon, a vendor's publication, a paper's "
    "projection, or an assumption. Simulated: the values are a model's too. Emulated: real values in this host's time."
)
_ERROR = "Error: of the worst text's hidden states, relative to a float64 run, median of the draws."


def tables(plan: Plan, cells: Sequence[Cell], sources: dict[int, Source]) -> list[Table]:
    """All results, and below them where their figures are from."""
    return [results(plan, cells, sources).table(), *_origins(cells)]


def results(plan: Plan, cells: Sequence[Cell], sources: dict[int, Source]) -> Grid:
    """A line for each cell, by length and batch."""
    lines: list[tuple[None, list[Shown]]] = []
    for own in by_workload(cells).values():
        time, energy = ({cell.label for cell in best(own, cost)} for cost in _COSTS)
        for cell in own:
            front = _mark(cell.label in time, cell.label in energy)
            sizes = [Shown(f"{cell.length:,}", cell.length), Shown(str(cell.batch), cell.batch)]
            lines.append((None, [Shown(cell.label), *sizes, *_figures(cell), Shown(front)]))
    columns = ["device", "tokens", "batch", "error", "kept", "time", "energy", "front"]
    return Grid(headline(plan), [Column(name) for name in columns], lines, notes(plan, cells, sources))


def _figures(cell: Cell) -> list[Shown]:
    if not cell.ran:
        return [Shown("did not run"), Shown(""), Shown(""), Shown("")]
    shown = ((cell.error, ratio), (cell.kept, percent), (cell.time, seconds), (cell.energy, joules))
    return [
        Shown(NOT_AVAILABLE) if figure is None else Shown(show(figure.middle), figure.middle, figure)
        for figure, show in shown
    ]


def _mark(time: bool, energy: bool) -> str:
    return "both" if time and energy else "time" if time else "energy" if energy else ""


def headline(plan: Plan) -> str:
    """One sentence: model, grid, draws."""
    told = plan.model.describe()
    draws = "1 draw" if plan.draws == 1 else f"{plan.draws} draws"
    batches = ", ".join(map(str, plan.batches))
    return (
        f"{Path(plan.model.name).name}: {told['architecture']}, {told['parameters'] / 1e6:.3g} M parameters, "
        f"{plan.model.dtype}; {len(plan.lanes)} devices, {len(plan.lengths)} lengths, batches of {batches}, {draws}"
    )


def notes(plan: Plan, cells: Sequence[Cell], sources: dict[int, Source]) -> list[str]:
    """How the numbers are to be read."""
    noun = DECISIONS[plan.model.kind][0].format(items=ITEMS["text"])
    lines = [
        f"{_ERROR} Kept: {noun} is the float64 run's.",
        "Time and energy: of the device's part of one batch, attention where the device's name does not say more. The "
        "rest of the model runs on this host, and is not in them. Ranges are in the files.",
        "Front: no other device of the same tokens and batch has both a smaller error and less time, or less energy. "
        "Measured and modelled figures have fronts of their own.",
        *text_notes(sources),
    ]
    if any(cell.ran and cell.energy is None for cell in cells):
        lines.append("Energy is not available where there is neither a meter nor a published power.")
    return lines


def text_notes(sources: dict[int, Source]) -> list[str]:
    """How the texts were made to the lengths."""
    said = []
    for source, meaning in MEANING.items():
        lengths = [f"{length:,}" for length, own in sources.items() if own == source]
        if lengths:
            said.append(f"Texts of {listed(lengths)} tokens: {meaning}.")
    return said


def _origins(cells: Sequence[Cell]) -> list[Table]:
    rows = []
    for label in dict.fromkeys(cell.label for cell in cells if cell.ran):
        cell = next(cell for cell in cells if cell.label == label and cell.ran)
        rows.append(
            [
                label,
                cell.fidelity,
                *(origin(figure) for figure in (cell.error, cell.time, cell.energy)),
                str(cell.draws),
            ]
        )
    columns = ["device", "kind", "error", "time", "energy", "draws"]
    return [Table("Where the numbers are from", columns, rows, [ORIGINS])] if rows else []


def origin(figure: Figure | None) -> str:
    """ "measured", or the basis with its provenance."""
    return NOT_AVAILABLE if figure is None else figure.origin


def refused(cells: Sequence[Cell]) -> list[str]:
    """Why cells did not run, each reason once."""
    by_reason: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        for reason in cell.refusals:
            by_reason.setdefault((cell.label, reason), []).append(cell)
    lines = []
    for (label, reason), own in by_reason.items():
        where = ", ".join(f"{cell.length} x {cell.batch}" for cell in own[:4]) + (", ..." if len(own) > 4 else "")
        lines.append(f"{label} did not run (tokens x batch: {where}): {reason}")
    return lines


def conclusion(cells: Sequence[Cell]) -> str:
    """One sentence on the largest workload: which of the measured, and which of the modelled, needs least."""
    ran = [cell for cell in cells if cell.ran]
    if not ran:
        return "No device ran the model."
    (length, batch), own = list(by_workload(ran).items())[-1]
    parts = []
    for basis in ("measured", "modelled"):
        for cost, show in _COSTS.items():
            known = [
                (figure.middle, cell.label, cell)
                for cell in own
                if (figure := cost_of(cell, cost)) is not None and str(figure.basis) == basis
            ]
            if known:
                value, label, cell = min(known)
                error = "" if cell.error is None else f", error {ratio(cell.error.middle)}"
                parts.append(f"the least {basis} {cost} is that of {label} ({show(value)}{error})")
    return f"At {length:,} tokens in batches of {batch}, {listed(parts)}."


def listed(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last
