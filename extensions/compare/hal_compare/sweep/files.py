"""A sweep as CSV and as plain values for JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from .. import measure
from ..result import Figure
from .cells import Cell
from .fronts import COSTS, best, by_workload
from .run import Plan, sources

#: Figures of a cell, and the unit in their column's name.
_FIGURES = (
    ("error", "error"),
    ("mean_error", "mean_error"),
    ("kept", "kept"),
    ("time", "time_s"),
    ("host", "host_s"),
    ("energy", "energy_j"),
)
_FACTS = (
    "label",
    "family",
    "profile",
    "scope",
    "fidelity",
    "length",
    "batch",
    "texts",
    "source",
    "draws",
    "decisions",
    "macs",
)


def as_dict(plan: Plan, cells: Sequence[Cell], remarks: Sequence[str]) -> dict[str, Any]:
    """The whole sweep as plain values."""
    front = _front(cells)
    return {
        "format": 1,
        "command": plan.command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": measure.versions(),
        "machine": measure.machine(),
        "model": plan.model.describe(),
        "lengths": list(plan.lengths),
        "batches": list(plan.batches),
        "draws": plan.draws,
        "texts": {str(length): source for length, source in sources(plan).items()},
        "remarks": list(remarks),
        "cells": [cell.to_dict() | {"front": front[id(cell)]} for cell in cells],
    }


def as_csv(cells: Sequence[Cell]) -> str:
    """A line for each cell; figures that are not available are empty."""
    front, out = _front(cells), io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    measured = [f"{name}{end}" for _, name in _FIGURES for end in ("", "_low", "_high", "_origin", "_source")]
    writer.writerow([*_FACTS, *measured, "front", "refusals"])
    for cell in cells:
        row: list[Any] = [getattr(cell, name) for name in _FACTS]
        for name, _ in _FIGURES:
            row += _columns(getattr(cell, name))
        writer.writerow([*row, " ".join(front[id(cell)]), "; ".join(cell.refusals)])
    return out.getvalue()


def _columns(figure: Figure | None) -> list[Any]:
    if figure is None:
        return [""] * 5
    return [figure.middle, figure.low, figure.high, figure.origin, figure.source]


def _front(cells: Sequence[Cell]) -> dict[int, list[str]]:
    """The fronts that each cell is on, by its identity."""
    found: dict[int, list[str]] = {id(cell): [] for cell in cells}
    for own in by_workload(cells).values():
        for cost in COSTS:
            for cell in best(own, cost):
                found[id(cell)].append(cost)
    return found
