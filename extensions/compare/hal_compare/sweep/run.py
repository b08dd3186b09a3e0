"""Measuring the cells of a sweep that are not there yet, with what is done and how long the rest takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from .. import measure
from ..models import TOKENIZER_FILES, Model
from ..reference_runs import ReferenceRuns
from .cells import Cell, Key, SweptLane, cell_of
from .records import Records
from .token_texts import Source, TextMaker

Progress = Callable[[str, float], None]


class Plan(NamedTuple):
    """What is measured.

    Attributes:
        model, maker: the model and its texts. lanes: rows of the grid. lengths, batches: its other axes.
        texts: at least so many of each length. draws: timed passes, and draws of noise. budget: seconds, see
            `hal_compare.measure.compare`. command: kept in the comparisons.
    """

    model: Model
    maker: TextMaker
    lanes: Sequence[SweptLane]
    lengths: Sequence[int]
    batches: Sequence[int]
    texts: int
    draws: int
    budget: float
    command: str

    @property
    def workloads(self) -> list[tuple[int, int]]:
        """(length, batch), short texts first, so that early cells tell how long the others take."""
        return [(length, batch) for length in self.lengths for batch in self.batches]

    def count(self, batch: int) -> int:
        """Texts in all: whole batches."""
        return -(-max(self.texts, 1) // batch) * batch


def sweep(plan: Plan, records: Records, progress: Progress, *, resume: bool = True) -> list[Cell]:
    """Measure what is missing, cell by cell; each is written when it is there.

    Args:
        records: of the sweep's folder. progress: called with a text and the share done.
        resume: whether records that are there are used.

    Returns:
        The cells by length, batch and lane.
    """
    version, machine, weights = _version(), _machine(), weights_hash(plan.model.path)
    clock = _Clock(plan, progress)
    source = sources(plan)
    made = {
        (length, batch): plan.maker.make(plan.count(batch), length, source[length]) for length, batch in plan.workloads
    }
    keys = {
        (workload, swept.label): Key(
            model=plan.model.name,
            weights=weights,
            device="torch sdpa" if swept.lane.device is None else swept.lane.device.id,
            profile=swept.profile,
            fingerprint="" if swept.lane.device is None else swept.lane.device.fingerprint,
            scope=str(swept.lane.scope),
            dtype=plan.model.dtype,
            length=workload[0],
            batch=workload[1],
            texts=plan.count(workload[1]),
            text=made[workload].sha256,
            draws=plan.draws,
            version=version,
            machine=machine,
            options=swept.options,
        )
        for workload in plan.workloads
        for swept in plan.lanes
    }
    found = {place: records.read(key) if resume else None for place, key in keys.items()}
    for (workload, label), cell in found.items():
        if cell is not None:
            clock.known(workload, label, cell.took)
    for workload in plan.workloads:
        shared: ReferenceRuns | None = None
        for swept in plan.lanes:
            if found[workload, swept.label] is not None:
                continue
            if shared is None:
                start = plan.model.start if plan.model.kind == "seq2seq" else None
                shared = ReferenceRuns(plan.model, made[workload].tokens(workload[1], start), keep=True)
            key, begun = keys[workload, swept.label], perf_counter()
            comparison = measure.compare(
                plan.model,
                made[workload].described(workload[0]),
                [swept.fresh()],
                repeats=plan.draws,
                batch_size=workload[1],
                max_length=workload[0],
                command=plan.command,
                budget=plan.budget,
                progress=clock.within(workload, swept.label),
                reference_runs=shared,
            )
            cell = cell_of(swept, key, made[workload].source, comparison, perf_counter() - begun)
            found[workload, swept.label] = cell
            if cell.ran or comparison.rows[0].refused_batches:  # a device that broke may do better the next time
                records.write(key, cell)
            clock.known(workload, swept.label, cell.took)
    return [cell for cell in found.values() if cell is not None]


def sources(plan: Plan) -> dict[int, Source]:
    """How the texts of each length are made: in one way for all batch sizes."""
    most = max(plan.count(batch) for batch in plan.batches)
    return {length: plan.maker.source(most, length) for length in plan.lengths}


class _Clock:
    """How much is done, and how long the rest takes, from what the cells of each lane took."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._cells = [(workload, swept.label) for workload in plan.workloads for swept in plan.lanes]
        self._plan, self._progress = plan, progress
        self._took: dict[tuple[tuple[int, int], str], float] = {}

    def known(self, workload: tuple[int, int], label: str, took: float) -> None:
        """A cell is done."""
        self._took[workload, label] = took

    def within(self, workload: tuple[int, int], label: str) -> Progress:
        """The progress of one cell, as that of the sweep."""
        begun = perf_counter()

        def report(text: str, share: float) -> None:
            what = f"{len(self._took)} of {len(self._cells)} done, {label}, {workload[0]} tokens, batch {workload[1]}"
            if not self._took:  # nothing tells yet how long anything takes
                units = sum(self._work(place[0]) for place in self._cells)
                self._progress(what, share * self._work(workload) / units)
                return
            expected = {place: self._expected(*place) for place in self._cells}
            whole, done = sum(expected.values()), sum(self._took.values())
            spent = perf_counter() - begun
            own = max(expected[workload, label], spent, spent / share if share > 0.2 else 0.0)
            whole += own - expected[workload, label]
            left = max(whole - done - spent, 0.0)
            self._progress(f"{what}, about {duration(left)} left", min((done + spent) / whole, 1.0) if whole else 0.0)

        return report

    def _expected(self, workload: tuple[int, int], label: str) -> float:
        """Seconds of a cell: what it took, or what those of its lane, else of all lanes, took for each unit of work."""
        if (workload, label) in self._took:
            return self._took[workload, label]
        own = [(place, took) for place, took in self._took.items() if place[1] == label]
        known = (own or list(self._took.items()))[-2:]
        units = sum(self._work(place[0]) for place, _ in known)
        return self._work(workload) * sum(took for _, took in known) / units if units else 0.0

    def _work(self, workload: tuple[int, int]) -> float:
        """Units of work: what a short text costs too, then in proportion to the tokens, and at last to their square."""
        length, batch = workload
        return self._plan.count(batch) * (64 + length * (1 + length / 512))


def duration(seconds: float) -> str:
    """ "40 s", "3 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def weights_hash(folder: Path) -> str:
    """sha256 of a model's weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    settings = [folder / name for name in ("config.json", *TOKENIZER_FILES)]
    for file in [*sorted(folder.glob("*.safetensors")), *(path for path in settings if path.is_file())]:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _version() -> str:
    return ", ".join(f"{name} {number}" for name, number in measure.versions().items())


def _machine() -> str:
    return ", ".join(measure.machine().values())
