"""Running a model once per device: the reference, the devices in turn, and what came out as a `Comparison`."""

from __future__ import annotations

import functools
import math
import os
import platform
import statistics
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from time import perf_counter
from typing import Any

import attrs
import torch

import hal_core as hal
from hal_core import Basis, Decision, Fidelity, HalError, Provenance, UnsupportedError

from . import attention_clock, media
from .attention_clock import Clock, clocked
from .batches import Batch, Tokens, tokenize
from .lanes import Lane, Scope, is_noisy, make_networks
from .metrics import Outputs, Tally, read_outputs
from .models import Model
from .reference_runs import ReferenceRuns
from .result import Accuracy, Comparison, Costs, Figure, Group, Row
from .texts import TextFile


def compare(
    model: Model,
    files: Sequence[TextFile],
    lanes: list[Lane],
    *,
    repeats: int,
    batch_size: int,
    max_length: int | None,
    command: str,
    budget: float = math.inf,
    progress: Callable[[str, float], None] = lambda text, share: None,
    reference_runs: ReferenceRuns | None = None,
) -> Comparison:
    """Run the model on the text once per lane and repeat, in turn, and gather what came out.

    Each batch runs through the float64 reference, then once through every lane to warm up (metered, so that devices
    state their own time and energy), then `repeats` times through every lane, the order rotated: slow drifts of the
    machine reach all alike. Noise is seeded by repeat and batch, equally for all devices. A lane whose repeats would
    take longer than `budget` seconds, judged by its first warm-up, is timed in the metered pass of the other batches
    (but for a compiled model, which compiles and plans for new lengths there), and once alone unless its device is
    noisy: every noisy device has `repeats` draws, however fast the host is. A simulated device has no warm-up: its time
    is modelled, so its metered pass is the first draw of every batch, and the only pass of one without noise.

    Args:
        repeats: timed passes, and draws of noise. batch_size: texts in a batch. max_length: tokens of a text; None for
            the model's own limit. command: kept in the result. budget: seconds. progress: called with a text and the
            share done.
        reference_runs: the batches with their float64 runs, where several comparisons share them; `files`, `batch_size`
            and `max_length` then only describe them.

    Raises:
        HalError: the text does not fit the model.
    """
    truths = reference_runs or ReferenceRuns(model, batches_of(model, files, batch_size, max_length))
    tokens = truths.tokens
    texts = len(tokens.lengths)
    make_networks(model.network, lanes)
    reference = Tally(texts)
    macs: dict[int, int] = {}
    for lane in lanes:
        lane.noisy = lane.device is not None and is_noisy(lane.device, model.dtype)
        lane.slow = lane.slow or lane.simulated
        lane.tallies = [Tally(texts) for _ in range(repeats if lane.noisy or not lane.slow else 1)]
    without_warm_up = [lane.slow for lane in lanes]
    step = _Progress(tokens, lanes, progress)
    for number, batch in enumerate(tokens.batches):
        step.begin(number)
        step("float64 reference")
        truth, work = truths.run(number)
        macs[batch.group] = macs.get(batch.group, 0) + work
        reference.add(batch, truth, truth)
        for lane in lanes:
            step(lane.name if lane.simulated else f"{lane.name}, warming up")
            start = perf_counter()
            torch.manual_seed(number)
            outputs = _metered(model, lane, batch)
            long = _length_of(tokens, batch, perf_counter() - start) * repeats > budget
            if number == 0 and long and not lane.slow:
                lane.slow = True
                if not lane.noisy:
                    del lane.tallies[1:]
            elif lane.timed_in_metered_pass and outputs is not None:
                lane.tallies[0].add(batch, outputs, truth)
        for repeat in range(repeats):
            turn = (repeat + number) % len(lanes)
            order = list(zip(lanes, without_warm_up, strict=True))
            for lane, cold in order[turn:] + order[:turn]:
                timed_before = (number > 0 or cold) and repeat == 0 and lane.timed_in_metered_pass
                if not lane.refusals and not timed_before and repeat < len(lane.tallies):
                    step(lane.name)
                    torch.manual_seed(repeat * len(tokens.batches) + number)
                    lane.tallies[repeat].add(batch, _timed(model, lane, batch, repeat), truth)
    return _gathered(model, files, tokens, lanes, reference, macs, repeats, batch_size, command)


class _Progress:
    """Tells a caller what runs, with the share that is done: passes in proportion to the tokens of their batch."""

    def __init__(self, tokens: Tokens, lanes: Sequence[Lane], tell: Callable[[str, float], None]) -> None:
        self._cells = [batch.mask.numel() for batch in tokens.batches]
        self._lanes, self._tell = lanes, tell
        self._number = self._done = 0

    def begin(self, number: int) -> None:
        """The next batch."""
        self._number, self._done = number, 0

    def __call__(self, what: str) -> None:
        passes = 1 + sum(len(lane.tallies) + (not lane.timed_in_metered_pass) for lane in self._lanes)
        cells, part = self._cells, min(self._done / passes, 1.0)
        self._done += 1
        share = (sum(cells[: self._number]) + part * cells[self._number]) / max(sum(cells), 1)
        self._tell(what, share)


def batches_of(model: Model, files: Sequence[TextFile], batch_size: int, max_length: int | None) -> Tokens:
    """The files as batches of what the model reads."""
    if model.task.modality != "text":
        return media.batches(files, model, batch_size)
    limits = [limit for limit in (model.positions, max_length) if limit is not None]
    start = model.start if model.kind == "seq2seq" else None
    return tokenize(files, model.tokenizer, batch_size, min(limits) if limits else None, start)


def _length_of(tokens: Tokens, batch: Batch, seconds: float) -> float:
    """Seconds of a whole pass, from those of one batch, in proportion to the tokens."""
    cells = [each.mask.numel() for each in tokens.batches]
    return seconds * sum(cells) / max(batch.mask.numel(), 1)


def _metered(model: Model, lane: Lane, batch: Batch) -> Outputs | None:
    """One metered pass, timed where the lane is timed once; refusals are kept, also those of later batches, which
    differ.
    """
    if lane.network is None or (lane.refusals and not lane.refused_batches):
        return None
    try:
        with hal.meter() as meter:
            outputs, wall, clock = _pass(model, lane, batch)
    except HalError as error:
        lane.refused_batches += 1
        lane.refusals += [reason for reason in _reasons(error) if reason not in lane.refusals]
        return None
    except Exception as error:  # one device that breaks must not cost the others their rows
        if lane.baseline or os.environ.get("HAL_DEBUG") == "1":
            raise
        message = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        lane.refusals.append(f"it failed with {message}: HAL_DEBUG=1 shows the traceback")
        return None
    if lane.device is not None and list(meter.records) != [lane.device.id]:
        raise HalError(
            f"{type(lane.network).__name__} ran attention on {', '.join(meter.records) or 'no hal device'} instead of "
            f"{lane.device.id}: its code does not follow transformers' attention interface, so it cannot be compared"
        )
    group, records = batch.group, list(meter.records.values())
    compiled = lane.scope is Scope.COMPILED  # its part is what the device's compiler put there
    lane.macs[group] = lane.macs.get(group, 0) + (sum(r.macs for r in records) if compiled else clock.macs)
    lane.calls[group] = lane.calls.get(group, 0) + (sum(r.calls for r in records) if compiled else clock.calls)
    lane.records.setdefault(group, []).extend(records)
    if lane.timed_in_metered_pass:
        _keep(lane, group, 0, wall, sum(r.wall for r in records) if compiled else clock.seconds)
    return outputs


def _reasons(error: HalError) -> list[str]:
    """Every reason of a refusal as a sentence of its own."""
    if isinstance(error, UnsupportedError) and isinstance(error.decision, Decision):
        reasons = [str(refusal) for c in error.decision.candidates for refusal in c.refusals]
        return reasons or [str(error)]
    return [str(error)]


def _timed(model: Model, lane: Lane, batch: Batch, repeat: int) -> Outputs:
    """One timed pass. On an accelerator the device's part is timed in a second pass, which waits around each call."""
    if lane.scope is Scope.COMPILED:  # what runs on the device is known to the meter alone
        with hal.meter() as meter:
            outputs, wall, _ = _pass(model, lane, batch)
        seconds = sum(record.wall for record in meter.records.values())
    elif torch.device(lane.place).type == "cpu":
        outputs, wall, clock = _pass(model, lane, batch)
        seconds = clock.seconds
    else:
        with torch.no_grad():
            attention_clock.synchronize(lane.place)
            start = perf_counter()
            lane.forward(batch)
            attention_clock.synchronize(lane.place)
            wall = perf_counter() - start
        outputs, _, clock = _pass(model, lane, batch)
        seconds = clock.seconds
    _keep(lane, batch.group, repeat, wall, seconds)
    return outputs


def _pass(model: Model, lane: Lane, batch: Batch) -> tuple[Outputs, float, Clock]:
    """(outputs, seconds of the whole, the clock of the device's part) of one pass."""
    clock = Clock(lane.place)
    with torch.no_grad(), clocked(clock):
        clock.synchronize()
        start = perf_counter()
        outputs = lane.forward(batch)
        clock.synchronize()
        wall = perf_counter() - start
    return read_outputs(outputs, batch, model.kind, model.pooling), wall, clock


def _keep(lane: Lane, group: int, repeat: int, wall: float, inside: float) -> None:
    for sums, seconds in ((lane.walls, wall), (lane.inside, inside)):
        by_repeat = sums.setdefault(group, [])
        if len(by_repeat) <= repeat:
            by_repeat.append(0.0)
        by_repeat[repeat] += seconds


def _gathered(
    model: Model,
    files: Sequence[TextFile],
    tokens: Tokens,
    lanes: list[Lane],
    reference: Tally,
    macs: dict[int, int],
    repeats: int,
    batch_size: int,
    command: str,
) -> Comparison:
    groups, first = [], 0
    attention = next((lane.macs for lane in lanes if not lane.refusals and lane.scope is Scope.ATTENTION), {})
    for index, file in enumerate(files):
        lengths = tokens.lengths[first : first + len(file.texts)]
        first += len(file.texts)
        groups.append(
            Group(
                name=file.name,
                sha256=file.sha256,
                texts=len(file.texts),
                tokens=sum(lengths),
                longest=max(lengths),
                cut=tokens.cut[index],
                macs=macs[index],
                attention_macs=attention.get(index, 0),
            )
        )
    return Comparison(
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        machine=machine(),
        model=model.describe(),
        groups=tuple(groups),
        batches=len(tokens.batches),
        batch_size=batch_size,
        repeats=repeats,
        rows=tuple(_row(lane, files, reference) for lane in lanes),
    )


def _row(lane: Lane, files: Sequence[TextFile], reference: Tally) -> Row:
    row = Row(
        name=lane.name,
        device=lane.device,
        place=lane.place,
        baseline=lane.baseline,
        scope=str(lane.scope),
        refusals=tuple(lane.refusals),
        refused_batches=lane.refused_batches,
    )
    if lane.refusals:
        return row
    every = range(len(files))
    groups = {file.name: _costs(lane, [index]) for index, file in enumerate(files)}
    return attrs.evolve(
        row, repeats=len(lane.tallies), accuracy=_accuracy(lane, reference), costs=_costs(lane, every), groups=groups
    )


def _accuracy(lane: Lane, reference: Tally) -> Accuracy:
    basis, provenance, source = error_origin(lane)

    def figure(of: Callable[[Tally], float]) -> Figure:
        return Figure.over([of(tally) for tally in lane.tallies], basis, provenance, source)

    return Accuracy(
        worst=figure(lambda tally: max(tally.errors.values())),
        mean=figure(lambda tally: sum(tally.errors.values()) / len(tally.errors)),
        cosine=figure(lambda tally: min(tally.cosines.values())),
        cosine_mean=figure(lambda tally: sum(tally.cosines.values()) / len(tally.cosines)),
        layers=tuple(map(statistics.median, zip(*(tally.layer_means for tally in lane.tallies), strict=True))),
        agreement=figure(lambda tally: tally.agreement(reference)),
        decisions=reference.decisions,
        perplexity=None if reference.perplexity is None else figure(lambda tally: tally.perplexity or 0.0),
        reference_perplexity=reference.perplexity,
    )


def error_origin(lane: Lane) -> tuple[Basis, Provenance, str]:
    """A simulated device's error is what its model gives; that of any other was measured on its real values."""
    if lane.device is None or lane.device.fidelity != Fidelity.SIMULATED:
        return Basis.MEASURED, Provenance.MEASURED_SILICON, "compared with the float64 run"
    stated = [record.time for records in lane.records.values() for record in records if record.time is not None]
    provenance = max((time.provenance for time in stated), key=lambda p: p.rank, default=Provenance.ASSUMED)
    return Basis.MODELLED, provenance, "the simulator's values, compared with the float64 run"


def _costs(lane: Lane, groups: Sequence[int]) -> Costs:
    repeats = range(len(lane.tallies))
    walls = [sum(lane.walls[group][repeat] for group in groups) for repeat in repeats]
    parts = [sum(lane.inside[group][repeat] for group in groups) for repeat in repeats]
    wall, inside = Figure.over(walls), Figure.over(parts)
    remainder = Figure.over([whole - part for whole, part in zip(walls, parts, strict=True)])
    records = [record for group in groups for record in lane.records[group]]
    on_device = None if lane.baseline else _summed([record.time for record in records])
    return Costs(
        wall=wall,
        inside=inside,
        remainder=remainder,
        on_device=on_device or inside,
        total=remainder.plus(on_device) if on_device else wall,
        energy=None if lane.baseline else _summed([record.energy for record in records]),
        macs=sum(lane.macs[group] for group in groups),
        calls=sum(lane.calls[group] for group in groups),
    )


def _summed(quantities: Sequence[Any]) -> Figure | None:
    """The sum; None where one part is unknown, because a partial sum would look like a total."""
    if not quantities or any(quantity is None for quantity in quantities):
        return None
    total = Figure.of(quantities[0])
    for quantity in quantities[1:]:
        total = total.plus(Figure.of(quantity))
    return total


def versions() -> dict[str, str]:
    """Versions of what had a part in the numbers."""
    return dict(_versions())


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    """Read once: a process cannot change what is installed under it."""
    named = [
        "hal-core",
        "hal-nn",
        "hal-compare",
        *sorted({point.dist.name for point in entry_points(group="hal.plugins") if point.dist is not None}),
    ]
    found = {"python": platform.python_version()}
    for name in dict.fromkeys([*named, "torch", "transformers", "safetensors"]):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a distribution"
    return tuple(found.items())


def machine() -> dict[str, str]:
    """The host: operating system, processor, threads."""
    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
    }
