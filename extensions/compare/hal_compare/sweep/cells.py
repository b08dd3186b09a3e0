"""One result of a sweep: a lane at a length and a batch size."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import attrs

from hal_core import Basis, Provenance

from ..lanes import Lane
from ..result import Comparison, Figure, Row


@attrs.frozen
class SweptLane:
    """One row of the grid: what runs the model's attention, or more of it.

    Attributes:
        lane: never measured itself; every cell has a copy. label: what it is called ("cpu:0", "kpu t256 +linear",
            "photonic:0 passes=4").
        family: the backend; "torch" for torch's own attention. profile: "" for a device as it is present.
    """

    lane: Lane
    label: str
    family: str
    profile: str = ""

    @property
    def options(self) -> str:
        """Those of the device, "passes=4"; "" for none."""
        return " ".join(f"{name}={value}" for name, value in sorted(self.lane.options.items()))

    def fresh(self) -> Lane:
        """A lane to measure."""
        lane = self.lane
        options = dict(lane.options)
        return Lane(self.label, lane.device, lane.place, baseline=lane.baseline, scope=lane.scope, options=options)


@attrs.frozen(kw_only=True)
class Key:
    """What a result belongs to. A record is used again if its whole key is the one that is asked for.

    Attributes:
        model: as given. weights: sha256 of the model's files. device: id, or "torch sdpa". profile: its name, or "".
        fingerprint: of the device, see `hal_core.Device`. scope, dtype: what ran on it, and in which dtype.
        length, batch, texts: tokens of a text, texts of a batch, texts in all. text: sha256 of their tokens.
        draws: timed passes, and draws of noise. version: of all that has a part in the numbers. machine: the host.
        options: of the device, "passes=4"; "" for none.
    """

    model: str
    weights: str
    device: str
    profile: str
    fingerprint: str
    scope: str
    dtype: str
    length: int
    batch: int
    texts: int
    text: str
    draws: int
    version: str
    machine: str
    options: str = ""

    #: Fields of what was asked for; the others change under it.
    ASKED = ("model", "device", "profile", "scope", "dtype", "length", "batch", "texts", "draws", "options")

    @property
    def name(self) -> str:
        """A file name: one for each thing that may be asked for."""
        asked = json.dumps([getattr(self, name) for name in self.ASKED])
        words = "".join(c if c.isalnum() else "-" for c in f"{self.device} {self.profile}".strip())
        return f"{words}-{self.length}x{self.batch}-{hashlib.sha256(asked.encode()).hexdigest()[:10]}.json"

    def differs(self, other: dict[str, Any]) -> list[str]:
        """Names of the fields in which the key of a record is another one."""
        return [name for name, value in attrs.asdict(self).items() if other.get(name) != value]


@attrs.frozen(kw_only=True)
class Cell:
    """What was found at one point of the grid.

    Attributes:
        label, family, profile, scope, fidelity: of the lane. length, batch, texts: see `Key`. source: of the texts.
        draws: passes that the figures are over.
        error: ||h - reference|| / ||reference|| of the worst text's last hidden states. mean_error: mean over texts.
        kept: share of the reference's decisions. decisions: how many there are.
        time: seconds that the device needs for its part of one batch. host: what this host needs for the rest of it.
        energy: joules of the device's part of one batch; None where it states none.
        macs: multiply-accumulates of one batch on the device. took: seconds that measuring it took.
        refusals: why it did not run; the figures are None then.
    """

    label: str
    family: str
    profile: str
    scope: str
    fidelity: str
    length: int
    batch: int
    texts: int
    source: str
    draws: int = 0
    error: Figure | None = None
    mean_error: Figure | None = None
    kept: Figure | None = None
    decisions: int = 0
    time: Figure | None = None
    host: Figure | None = None
    energy: Figure | None = None
    macs: int = 0
    took: float = 0.0
    refusals: tuple[str, ...] = ()

    @property
    def ran(self) -> bool:
        return self.error is not None

    @property
    def tokens(self) -> int:
        """Tokens of one batch."""
        return self.length * self.batch

    @property
    def workload(self) -> tuple[int, int]:
        """(length, batch): only cells of one workload are ranked against each other."""
        return self.length, self.batch

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which `from_dict` reads."""
        plain = attrs.asdict(self, value_serializer=lambda _, __, value: str(value) if _is_enum(value) else value)
        return plain | {"refusals": list(self.refusals), "ran": self.ran}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Cell:
        """The cell of what `to_dict` gave. Raises KeyError, TypeError or ValueError where it is something else."""
        values = {name: value for name, value in plain.items() if name != "ran"}
        for name in ("error", "mean_error", "kept", "time", "host", "energy"):
            if values[name] is not None:
                values[name] = _figure(values[name])
        return cls(**values | {"refusals": tuple(values["refusals"])})


def _is_enum(value: Any) -> bool:
    return isinstance(value, Basis | Provenance)


def _figure(plain: dict[str, Any]) -> Figure:
    numbers = {name: float(plain[name]) for name in ("middle", "low", "high")}
    return Figure(
        **numbers, basis=Basis(plain["basis"]), provenance=Provenance(plain["provenance"]), source=str(plain["source"])
    )


def cell_of(swept: SweptLane, key: Key, source: str, comparison: Comparison, took: float) -> Cell:
    """The cell of a comparison of one lane."""
    (row,) = comparison.rows
    cell = Cell(
        label=swept.label,
        family=swept.family,
        profile=swept.profile,
        scope=key.scope,
        fidelity=row.fidelity,
        length=key.length,
        batch=key.batch,
        texts=key.texts,
        source=source,
        took=took,
        refusals=row.refusals,
    )
    return _with_figures(cell, row, key.texts // key.batch)


def _with_figures(cell: Cell, row: Row, batches: int) -> Cell:
    found, costs = row.accuracy, row.costs
    if found is None or costs is None:
        return cell
    return attrs.evolve(
        cell,
        draws=row.repeats,
        error=found.worst,
        mean_error=found.mean,
        kept=found.agreement,
        decisions=found.decisions,
        time=share(costs.on_device, batches),
        host=share(costs.remainder, batches),
        energy=None if costs.energy is None else share(costs.energy, batches),
        macs=costs.macs // batches,
    )


def share(figure: Figure, parts: int) -> Figure:
    """One of equal parts of a figure."""
    return attrs.evolve(figure, middle=figure.middle / parts, low=figure.low / parts, high=figure.high / parts)
