"""The rows of a comparison by family of devices, and what to call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hal_core import Fidelity

from .result import Row


class Family(NamedTuple):
    """The rows of one backend's devices, or of torch itself.

    Attributes:
        name: the backend's name, or "torch". rows: the first one stands for the family, the others are its variants:
            further devices and profiles, and rows in which a device runs more of the model.
        colour: index of its colour in the style sheet; 0, grey, for torch and for a family that did not run.
    """

    name: str
    rows: tuple[Row, ...]
    colour: int


def families(rows: Sequence[Row]) -> list[Family]:
    """Rows by family, in the order of the rows; of each family the rows that ran and run attention alone come first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(family_name(row), []).append(row)
    made, number = [], 0
    for name, members in found.items():
        coloured = name != "torch" and any(row.ran for row in members)
        members.sort(key=lambda row: (not row.ran, row.scope != "attention"))
        made.append(Family(name, tuple(members), 1 + number % 7 if coloured else 0))
        number += coloured
    return made


def family_name(row: Row) -> str:
    """The backend's name; "torch" for torch's own attention."""
    if row.baseline:
        return "torch"
    return (row.device.id if row.device is not None else row.name).partition(":")[0]


def profile(row: Row) -> str:
    """The name of a simulated device's profile ("envise"); "" for a device that is not simulated."""
    return row.device.model if row.device is not None and row.device.fidelity == Fidelity.SIMULATED else ""


def title(row: Row) -> str:
    """The row's name with its profile: "lightmatter:3 envise +linear"."""
    if not (named := profile(row)) or row.device is None:
        return row.name
    mark = row.name.removeprefix(row.device.id)
    return f"{row.device.id} {named}{mark}"


def short_title(row: Row) -> str:
    """What to call a row where its family is plain from its colour: "envise", or its name without a profile."""
    return profile(row) or row.name
