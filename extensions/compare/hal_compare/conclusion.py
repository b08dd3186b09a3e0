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
    measured = [row for row in rows if _simulated(row) is False]
    modelled = [row for row in rows if _simulated(row)]
    clauses = []
    if measured:
        clauses.append(f"Measured: {_of(measured)}")
    if modelled:
        origins = sorted({row.costs.on_device.origin for row in modelled if row.costs is not None})
        word = (
            "simulated, with times and energies that are" if measured else "Simulated, with times and energies that are"
        )
        clauses.append(f"{word} {' or '.join(origins)}: {_of(modelled)}")
    if assumed := _assumed(rows):
        clauses.append(assumed)
    return f"{'; '.join(clauses)}." if clauses else ""


def _simulated(row: Row) -> bool:
    return row.device is not None and row.device.fidelity == Fidelity.SIMULATED


def _of(rows: Sequence[Row]) -> str:
    """ "kpu:0 is the most accurate (error 9.6e-07) and the fastest (21.2 ms ±50%)", row by row."""
    figures: list[tuple[str, Callable[[Row], Figure | None], Callable[[float], str], str]] = [
        ("the most accurate", lambda row: row.accuracy.worst if row.accuracy else None, ratio, "error "),
        ("the fastest", lambda row: row.costs.on_device if row.costs else None, seconds, ""),
        ("the cheapest", lambda row: row.costs.energy if row.costs else None, joules, ""),
    ]
    said: dict[str, list[str]] = {}
    missing = False
    for what, of, show, word in figures:
        found = [(row, figure) for row in rows if (figure := of(row)) is not None and figure.basis != Basis.DECLARED]
        if not found:
            missing = True
            continue
        best, figure = min(found, key=lambda pair: pair[1].middle)
        level = [row.name for row, other in found if row is not best and _level(figure, other, show)]
        beside = f", level with {_listed(level)}" if level else ""
        said.setdefault(best.name, []).append(f"{what} ({word}{varied(figure, show)}{beside})")
    clauses = [f"{name} is {_listed(claims)}" for name, claims in said.items()]
    return _listed([*clauses, "no energy was metered" if missing else ""])


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


def _listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    words = [word for word in words if word]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
