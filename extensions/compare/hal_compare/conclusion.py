"""What a comparison comes to, in one sentence: the most accurate, the fastest and the cheapest device.

Measured and modelled figures are never ranked against each other, and neither are rows that run different parts of the
model: the sentence is about the rows that run attention alone, where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hal_core import Basis, Fidelity

from .figures import joules, ratio, seconds, varied
from .result import Comparison, Figure, Row


def conclusion(comparison: Comparison) -> str:
    """One sentence with numbers and their origin; "" where nothing ran.

    Rows whose intervals overlap the best one's, or which read the same, are named as level with it.
    """
    ran = [row for row in comparison.rows if row.ran]
    rows = [row for row in ran if row.scope == "attention"] or ran
    part = rows[0].scope if rows and len({row.scope for row in rows}) == 1 else "its part"
    measured = [row for row in rows if not _simulated(row)]
    modelled = [row for row in rows if _simulated(row)]
    clauses = []
    if measured:
        clauses.append(f"measured: {_of(measured, part)}")
    if modelled:
        clauses.append(f"simulated ({' or '.join(_origins(modelled))}): {_of(modelled, part)}")
    if assumed := _assumed(rows):
        clauses.append(assumed)
    said = "; ".join(clauses)
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def _origins(rows: Sequence[Row]) -> list[str]:
    """The origins of all figures that are ranked."""
    figures = [_figures(row) for row in rows]
    return sorted({figure.origin for each in figures for figure in each if figure is not None})


def _figures(row: Row) -> tuple[Figure | None, Figure | None, Figure | None]:
    """Error, time and energy."""
    if row.accuracy is None or row.costs is None:
        return None, None, None
    return row.accuracy.worst, row.costs.on_device, row.costs.energy


def _simulated(row: Row) -> bool:
    return row.device is not None and row.device.fidelity == Fidelity.SIMULATED


def _of(rows: Sequence[Row], part: str) -> str:
    """ "kpu:0 is the most accurate (error 9.6e-07) and the fastest (21.2 ms ±50% of attention)", row by row."""
    claims: tuple[tuple[str, Callable[[float], str], str, str], ...] = (
        ("the most accurate", ratio, "error ", ""),
        ("the fastest", seconds, "", f" of {part}"),
        ("the cheapest", joules, "", ""),
    )
    said: dict[str, list[str]] = {}
    for place, (claim, show, before, after) in enumerate(claims):
        found = [(row, figure) for row in rows if (figure := _figures(row)[place]) and figure.basis != Basis.DECLARED]
        if found:
            best, figure = min(found, key=lambda pair: pair[1].middle)
            level = [_named(row) for row, other in found if row is not best and _level(figure, other, show)]
            beside = f", level with {_listed(level)}" if level else ""
            said.setdefault(_named(best), []).append(f"{claim} ({before}{varied(figure, show)}{after}{beside})")
    clauses = [f"{name} is {_listed(claimed)}" for name, claimed in said.items()]
    metered = any((energy := _figures(row)[2]) and energy.basis != Basis.DECLARED for row in rows)
    return _listed([*clauses, *([] if metered else ["no energy was metered"])], ", ")


def _named(row: Row) -> str:
    return f"{row.name} (emulated)" if row.fidelity == Fidelity.EMULATED else row.name


def _level(best: Figure, other: Figure, show: Callable[[float], str]) -> bool:
    return other.low <= best.high or show(other.middle) == show(best.middle)


def _assumed(rows: Sequence[Row]) -> str:
    found = [
        (row.name, row.costs.energy)
        for row in rows
        if row.costs is not None and row.costs.energy is not None and row.costs.energy.basis == Basis.DECLARED
    ]
    if not found:
        return ""
    return f"at an assumed power, {_listed([f'{name} takes {varied(energy, joules)}' for name, energy in found])}"


def _listed(words: Sequence[str], comma: str = "") -> str:
    """ "a, b and c"; with a comma before the "and" where the words have one of their own."""
    return f"{comma.strip()} and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
