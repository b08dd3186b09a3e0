"""Which results no other one beats, and what they are in a scatter chart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hal_core import Basis

from ..pareto import Point, front
from ..result import Figure
from .cells import Cell

Cost = Literal["time", "energy"]
COSTS: tuple[Cost, ...] = ("time", "energy")
_SHAPES: dict[str, Literal["circle", "square", "diamond"]] = {"emulated": "square", "simulated": "diamond"}


def cost_of(cell: Cell, cost: Cost) -> Figure | None:
    """The time or energy of a batch; None where it did not run, or states none."""
    return cell.time if cost == "time" else cell.energy


def families(cells: Sequence[Cell]) -> dict[str, int]:
    """A colour for each family: grey for torch's own attention."""
    named = list(dict.fromkeys(cell.family for cell in cells if cell.family != "torch"))
    return {"torch": 0} | {family: 1 + number % 7 for number, family in enumerate(named)}


def points(cells: Sequence[Cell], cost: Cost, colours: dict[str, int]) -> list[tuple[Cell, Point]]:
    """The cells that have the figures, as points of error against time or energy."""
    found = []
    for cell in cells:
        figure = cost_of(cell, cost)
        if figure is None or cell.error is None:
            continue
        point = Point(
            label=short(cell),
            x=figure,
            y=cell.error,
            colour=colours[cell.family],
            shape=_SHAPES.get(cell.fidelity, "circle"),
            modelled=any(one.basis is not Basis.MEASURED for one in (figure, cell.error)),
            note=f"; {cell.label}, {cell.fidelity}, {cell.scope}",
        )
        found.append((cell, point))
    return found


def short(cell: Cell) -> str:
    """The name in a chart, whose colour tells the family: the profile with the scope's mark, where there is one."""
    return cell.label.removeprefix(f"{cell.family} ") if cell.profile else cell.label


def best(cells: Sequence[Cell], cost: Cost) -> list[Cell]:
    """The cells of one workload that no other one beats in error and cost together.

    Measured and modelled cells have a front each, because a model's figures are no measurements.
    """
    pairs = points(cells, cost, families(cells))
    found = []
    for modelled in (False, True):
        own = [(cell, point) for cell, point in pairs if point.modelled is modelled]
        unbeaten = front([point for _, point in own])
        found += [cell for point in unbeaten for cell, other in own if other is point]
    return found


def by_workload(cells: Sequence[Cell]) -> dict[tuple[int, int], list[Cell]]:
    """Cells by (length, batch), in ascending order."""
    workloads = sorted({cell.workload for cell in cells})
    return {workload: [cell for cell in cells if cell.workload == workload] for workload in workloads}
