"""A comparison as tables: one that answers the question, and the details. The terminal and the report print these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hal_core import Fidelity
from hal_core.plugin_api import Table

from .conclusion import conclusion
from .families import title
from .figures import NOT_AVAILABLE, cosine, joules, macs, percent, plain, ratio, seconds, varied
from .result import Comparison, Costs, Figure, Row
from .sentences import (
    energy_notes,
    file_names,
    headline,
    item,
    items,
    notes,
    once,
    origins,
    parts,
    refused,
    statistic,
    task,
)


class Cell(NamedTuple):
    """One cell.

    Attributes:
        text: what is printed. value: what it sorts by; None where there is nothing. figure: behind the text, with its
            origin; None for a text, or a number that was counted.
    """

    text: str
    value: float | None = None
    figure: Figure | None = None


class Column(NamedTuple):
    """A column. `sortable` is False where its numbers say nothing about the devices, so that nobody ranks by them."""

    name: str
    sortable: bool = True


class Grid(NamedTuple):
    """A table before it is printed.

    Attributes:
        title, notes: sentences. columns: the first one names the row. lines: (row of the comparison or None; cells).
    """

    title: str
    columns: Sequence[Column]
    lines: Sequence[tuple[Row | None, Sequence[Cell]]]
    notes: Sequence[str] = ()

    def table(self) -> Table:
        """Its texts."""
        rows = [[cell.text for cell in cells] for _, cells in self.lines]
        return Table(self.title, [column.name for column in self.columns], rows, self.notes)


def summary(comparison: Comparison) -> Table:
    """One row per device: error, what is kept of the task, time and energy of its part, and where they are from."""
    said = [sentence] if (sentence := conclusion(comparison)) else []
    return overview(comparison)._replace(notes=[*said, *notes(comparison)]).table()


def details(comparison: Comparison) -> list[Table]:
    """The texts, and every figure of every row that ran."""
    return [grid.table() for grid in grids(comparison)]


def overview(comparison: Comparison) -> Grid:
    """What `summary` prints, without its notes."""
    lines: list[tuple[Row | None, list[Cell]]] = []
    for row in comparison.rows:
        found, costs = row.accuracy, row.costs
        if found is None or costs is None:
            texts = [title(row), row.fidelity, "did not run", "", "", "", "see below"]
            lines.append((row, [Cell(text) for text in texts]))
            continue
        cells = [Cell(title(row)), Cell(row.fidelity), _varied(found.worst, ratio), _kept(found.agreement)]
        cells += [_varied(costs.on_device, seconds), _varied(costs.energy, joules), Cell(origins(row))]
        lines.append((row, cells))
    names = ["device", "kind", "error", "kept", "time", "energy", "origin"]
    return Grid(headline(comparison), [Column(name) for name in names], lines)


def grids(comparison: Comparison) -> list[Grid]:
    """The texts, and every figure of every row that ran."""
    ran = [row for row in comparison.rows if row.ran]
    texts = [_text(comparison)]
    return [*texts, _accuracy(comparison, ran), _time(comparison, ran), _energy(comparison, ran)] if ran else texts


def _text(comparison: Comparison) -> Grid:
    names = file_names(comparison)
    lines: list[tuple[Row | None, list[Cell]]] = []
    for group in comparison.groups:
        share = group.attention_macs / group.macs
        counts = [Cell(f"{count:,}", count) for count in (group.texts, group.tokens, group.longest)]
        cells = [Cell(names[group.name]), *counts, Cell(macs(group.macs), group.macs), Cell(percent(share), share)]
        lines.append((None, cells))
    cut = [
        f"{names[group.name]}: {group.cut} {items(comparison)} were cut to {group.longest} tokens."
        for group in comparison.groups
        if group.cut
    ]
    columns = ["file", items(comparison), "tokens", "longest", "model's work", "of it attention"]
    return Grid("Text", [Column(name) for name in columns], lines, cut)


def _accuracy(comparison: Comparison, ran: Sequence[Row]) -> Grid:
    causal = any(row.accuracy is not None and row.accuracy.perplexity is not None for row in ran)
    lines: list[tuple[Row | None, list[Cell]]] = []
    for row in ran:
        found = row.accuracy
        assert found is not None
        lowest = Cell(cosine(found.cosine.middle), found.cosine.middle, found.cosine)
        cells = [Cell(title(row)), Cell(row.fidelity), _varied(found.worst, ratio), _varied(found.mean, ratio), lowest]
        cells.append(
            Cell(f"{percent(found.agreement.middle)} of {found.decisions:,}", found.agreement.middle, found.agreement)
        )
        cells += [_varied(found.perplexity, plain)] if causal else []
        lines.append((row, [*cells, Cell(f"{row.repeats}", row.repeats), Cell(found.worst.origin)]))
    said = [f"Figures: {statistic(comparison)}. Draws: the runs, each with new noise where a device is noisy."]
    reference = ran[0].accuracy.reference_perplexity if ran[0].accuracy is not None else None
    if causal and reference is not None:
        said.append(f"The float64 run's perplexity is {plain(reference)}.")
    names = ["device", "kind", "worst", "mean", "lowest cosine", task(comparison)]
    names += ["perplexity", "draws", "origin"] if causal else ["draws", "origin"]
    return Grid(
        f"Error of the hidden states against float64, by {item(comparison)}",
        [Column(name) for name in names],
        lines,
        said,
    )


def _time(comparison: Comparison, ran: Sequence[Row]) -> Grid:
    lines: list[tuple[Row | None, list[Cell]]] = []
    for row in ran:
        costs = _costs(row)
        figures = [_varied(figure, seconds) for figure in (costs.remainder, costs.wall, costs.inside)]
        lines.append(
            (row, [Cell(title(row)), _varied(costs.on_device, seconds), Cell(costs.on_device.origin), *figures])
        )
    said = [
        f"The device's part is {parts(ran).removesuffix(',')}. Figures: {statistic(comparison)}.",
        "The last three columns are this host's clock: the rest of the model, which the host runs, the whole run, and "
        "the device's part of the run. They are no property of a device, and are added to no modelled time.",
    ]
    kinds = {row.fidelity for row in ran}
    if Fidelity.SIMULATED in kinds:
        said.append("Of a simulated device the run is the simulation's, which takes longer than the device would.")
    if Fidelity.EMULATED in kinds:
        said.append("An emulated device's time is this host's, running the device's programs.")
    columns = [Column("device"), Column("device's part"), Column("origin")]
    columns += [Column(name, sortable=False) for name in ("host's part", "run", "its part of the run")]
    return Grid("Time of one pass", columns, lines, [*said, *once(comparison, ran)])


def _energy(comparison: Comparison, ran: Sequence[Row]) -> Grid:
    lines: list[tuple[Row | None, list[Cell]]] = []
    for row in ran:
        costs, found = _costs(row), row.accuracy
        assert found is not None
        share = comparison.share(row)
        origin = costs.energy.origin if costs.energy is not None else ""
        cells = [
            Cell(title(row)),
            Cell(macs(costs.macs), costs.macs),
            Cell(percent(share), share),
            Cell(f"{costs.calls:,}", costs.calls),
        ]
        lines.append((row, [*cells, _varied(costs.energy, joules), Cell(origin), _kept(found.agreement)]))
    names = ["device", "work on it", "share", "calls", "energy on it", "origin", task(comparison)]
    said = [*energy_notes(ran), "Nothing meters the host's part: its energy, and a total, are not available."]
    title_ = "Work and energy of one pass, and what is kept of the task"
    return Grid(title_, [Column(name) for name in names], lines, said)


def _varied(figure: Figure | None, show: Callable[[float], str]) -> Cell:
    if figure is None:
        return Cell(NOT_AVAILABLE)
    return Cell(varied(figure, show), figure.middle, figure)


def _kept(figure: Figure) -> Cell:
    return Cell(percent(figure.middle), figure.middle, figure)


def _costs(row: Row) -> Costs:
    assert row.costs is not None
    return row.costs


__all__ = ["Cell", "Column", "Grid", "details", "grids", "headline", "overview", "refused", "summary", "task"]
