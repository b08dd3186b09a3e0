"""Running a model once per device: the reference, the devices in turn, and what came out as a `Comparison`."""

from __future__ import annotations

import math
import os
import platform
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import attrs
import torch
from torch.utils.flop_counter import FlopCounterMode

import hal_core as hal
from hal_core import Basis, Device, DeviceUnavailableError, Fidelity, HalError, Provenance, UnsupportedError
from hal_core.console import progress
from hal_core.registry import registry

from .. import huggingface
from . import attention_clock
from .attention_clock import Clock, clocked
from .batches import Batch, Tokens, tokenize
from .metrics import Outputs, Tally, read_outputs
from .models import Float64Throughout, Model, in_float64, variant
from .result import Accuracy, Comparison, Costs, Figure, Group, Row
from .texts import TextFile

BASELINE = "torch sdpa"


@attrs.define
class Lane:
    """One row while it is being measured.

    Attributes:
        name, device, place, baseline: as in `Row`. network: the model's variant. refusals: reasons met, in order.
        refused_batches: how many. tallies: accuracy by repeat. walls, attention: seconds by group, a value a repeat.
        macs, calls: by group. meters: the device's own seconds and joules by group.
    """

    name: str
    device: Device | None
    place: str
    baseline: bool = False
    network: Any = None
    refusals: list[str] = attrs.field(factory=list)
    refused_batches: int = 0
    tallies: list[Tally] = attrs.field(factory=list)
    walls: dict[int, list[float]] = attrs.field(factory=dict)
    attention: dict[int, list[float]] = attrs.field(factory=dict)
    macs: dict[int, int] = attrs.field(factory=dict)
    calls: dict[int, int] = attrs.field(factory=dict)
    records: dict[int, list[Any]] = attrs.field(factory=dict)


def rows_for(names: Sequence[str]) -> list[Lane]:
    """A lane for torch's attention on each place where tensors lie, and one for each device.

    Args:
        names: device ids or backend names; none stands for every device there is.

    Raises:
        UnknownBackendError: no installed plugin offers a name. HalError: no device at all.
    """
    lanes: list[Lane] = []
    for name in names or [device.id for device in hal.devices()]:
        try:
            found = registry.find(name)
        except DeviceUnavailableError as error:
            lanes.append(Lane(name, None, "", refusals=[str(error)]))
            continue
        new = [device for device in found if device.id not in {lane.name for lane in lanes}]
        lanes += [Lane(device.id, device, "cpu" if device.reads_from("cpu") else device.reads[0]) for device in new]
    if not lanes:
        raise HalError(
            "no device was found: install a plugin, for example pip install hal-cpu; `hal doctor` shows more"
        )
    places = sorted({lane.place for lane in lanes if lane.place} | {"cpu"})
    baselines = {place: BASELINE if place == "cpu" else f"{BASELINE} ({place})" for place in places}
    return [*(Lane(name, None, place, baseline=True) for place, name in baselines.items()), *lanes]


def compare(
    model: Model, files: Sequence[TextFile], lanes: list[Lane], *, repeats: int, batch_size: int,
    max_length: int | None, command: str, budget: float = math.inf,
) -> Comparison:  # fmt: skip
    """Run the model on the text once per lane and repeat, in turn, and gather what came out.

    Each batch runs through the float64 reference, then once through every lane to warm up (metered, so that devices state
    their own time and energy), then `repeats` times through every lane, the order rotated: slow drifts of the machine
    reach all alike. Noise is seeded by repeat and batch, equally for all devices. A lane whose repeats would take longer
    than `budget` seconds, judged by its first warm-up, is timed once.

    Raises:
        HalError: the text does not fit the model.
    """
    limits = [limit for limit in (model.positions, max_length) if limit is not None]
    tokens = tokenize(files, model.tokenizer, batch_size, min(limits) if limits else None)
    texts = len(tokens.lengths)
    reference_network = in_float64(model.network)
    _make_variants(model.network, lanes)
    reference = Tally(texts)
    macs: dict[int, int] = {}
    for lane in lanes:
        lane.tallies = [Tally(texts) for _ in range(repeats)]
    steps = len(tokens.batches) * (1 + len(lanes) * (1 + repeats))
    with progress("comparing") as show:
        done = iter(range(steps))

        def step(what: str) -> None:
            show(what, next(done) / steps)

        for number, batch in enumerate(tokens.batches):
            step("float64 reference")
            truth, work = _reference(model, reference_network, batch)
            macs[batch.group] = macs.get(batch.group, 0) + work
            reference.add(batch, truth, truth)
            for lane in lanes:
                step(f"{lane.name}, warming up")
                start = perf_counter()
                _warm_up(lane, batch)
                if number == 0 and _length_of(tokens, batch, perf_counter() - start) * repeats > budget:
                    del lane.tallies[1:]
            for repeat in range(repeats):
                turn = (repeat + number) % len(lanes)
                for lane in lanes[turn:] + lanes[:turn]:
                    step(lane.name)
                    if not lane.refusals and repeat < len(lane.tallies):
                        torch.manual_seed(repeat * len(tokens.batches) + number)
                        lane.tallies[repeat].add(batch, _timed(model, lane, batch, repeat), truth)
    return _gathered(model, files, tokens, lanes, reference, macs, repeats, batch_size, command)


def _length_of(tokens: Tokens, batch: Batch, seconds: float) -> float:
    """Seconds of a whole pass, from those of one batch, in proportion to the tokens."""
    cells = [each.mask.numel() for each in tokens.batches]
    return seconds * sum(cells) / max(batch.mask.numel(), 1)


def _make_variants(network: Any, lanes: list[Lane]) -> None:
    """Give each lane its own copy of the model; weights are shared between lanes of one place."""
    placed = {"cpu": network}
    for lane in lanes:
        if lane.refusals:
            continue
        if lane.place not in placed:
            placed[lane.place] = variant(network, "eager").to(lane.place)
        lane.network = variant(placed[lane.place], attention_clock.TORCH if lane.baseline else attention_clock.HAL)
        if not lane.baseline:
            try:
                huggingface.set_device(lane.network, lane.name)
            except DeviceUnavailableError as error:
                lane.refusals.append(str(error))


def _reference(model: Model, network: Any, batch: Batch) -> tuple[Outputs, int]:
    """The float64 run of a batch and the multiply-accumulates of its matrix products."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, Float64Throughout():
        outputs = network(**batch.inputs("cpu"), output_hidden_states=True)
    return read_outputs(outputs, batch, model.kind, model.pooling), counter.get_total_flops() // 2


def _forward(lane: Lane, batch: Batch) -> Any:
    return lane.network(**batch.inputs(lane.place), output_hidden_states=True, use_cache=False)


def _warm_up(lane: Lane, batch: Batch) -> None:
    """One metered pass; refusals are kept, also those of later batches, whose requests differ."""
    if lane.network is None or (lane.refusals and not lane.refused_batches):
        return
    clock = Clock(lane.place)
    try:
        with torch.no_grad(), hal.meter() as meter, clocked(clock):
            _forward(lane, batch)
    except HalError as error:
        lane.refused_batches += 1
        lane.refusals += [reason for reason in _reasons(error) if reason not in lane.refusals]
        return
    except Exception as error:  # one device that breaks must not cost the others their rows
        if lane.baseline or os.environ.get("HAL_DEBUG") == "1":
            raise
        message = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        lane.refusals.append(f"it failed with {message}: HAL_DEBUG=1 shows the traceback")
        return
    if not lane.baseline and list(meter.records) != [lane.name]:
        raise HalError(
            f"{type(lane.network).__name__} ran attention on {', '.join(meter.records) or 'no hal device'} instead of "
            f"{lane.name}: its code does not follow transformers' attention interface, so it cannot be compared"
        )
    group = batch.group
    lane.macs[group] = lane.macs.get(group, 0) + clock.macs
    lane.calls[group] = lane.calls.get(group, 0) + clock.calls
    lane.records.setdefault(group, []).extend(meter.records.values())


def _reasons(error: HalError) -> list[str]:
    """Every reason of a refusal as a sentence of its own."""
    if isinstance(error, UnsupportedError) and error.decision is not None:
        reasons = [str(refusal) for c in error.decision.candidates for refusal in c.refusals]
        return reasons or [str(error)]
    return [str(error)]


def _timed(model: Model, lane: Lane, batch: Batch, repeat: int) -> Outputs:
    """One timed pass. On an accelerator attention is timed in a second pass, which waits around each call."""
    clock = Clock(lane.place)
    with torch.no_grad():
        on_host = torch.device(lane.place).type == "cpu"
        attention_clock.synchronize(lane.place)
        start = perf_counter()
        if on_host:
            with clocked(clock):
                outputs = _forward(lane, batch)
        else:
            outputs = _forward(lane, batch)
        attention_clock.synchronize(lane.place)
        wall = perf_counter() - start
        if not on_host:
            with clocked(clock):
                _forward(lane, batch)
    for sums, seconds in ((lane.walls, wall), (lane.attention, clock.seconds)):
        by_repeat = sums.setdefault(batch.group, [])
        if len(by_repeat) <= repeat:
            by_repeat.append(0.0)
        by_repeat[repeat] += seconds
    return read_outputs(outputs, batch, model.kind, model.pooling)


def _gathered(
    model: Model, files: Sequence[TextFile], tokens: Tokens, lanes: list[Lane], reference: Tally, macs: dict[int, int],
    repeats: int, batch_size: int, command: str,
) -> Comparison:  # fmt: skip
    groups, first = [], 0
    attention = next((lane.macs for lane in lanes if not lane.refusals), {})
    for index, file in enumerate(files):
        lengths = tokens.lengths[first : first + len(file.texts)]
        first += len(file.texts)
        groups.append(Group(
            name=file.name, sha256=file.sha256, texts=len(file.texts), tokens=sum(lengths), longest=max(lengths),
            cut=tokens.cut[index], macs=macs[index], attention_macs=attention.get(index, 0),
        ))  # fmt: skip
    return Comparison(
        command=command, created=datetime.now(UTC).isoformat(timespec="seconds"), versions=versions(), machine=machine(),
        model=model.describe(), groups=tuple(groups), batches=len(tokens.batches), batch_size=batch_size,
        repeats=repeats, rows=tuple(_row(lane, files, reference) for lane in lanes),
    )  # fmt: skip


def _row(lane: Lane, files: Sequence[TextFile], reference: Tally) -> Row:
    row = Row(
        name=lane.name, device=lane.device, place=lane.place, baseline=lane.baseline, refusals=tuple(lane.refusals),
        refused_batches=lane.refused_batches,
    )  # fmt: skip
    if lane.refusals:
        return row
    every = range(len(files))
    groups = {file.name: _costs(lane, [index]) for index, file in enumerate(files)}
    return attrs.evolve(
        row, repeats=len(lane.tallies), accuracy=_accuracy(lane, reference), costs=_costs(lane, every), groups=groups
    )


def _accuracy(lane: Lane, reference: Tally) -> Accuracy:
    basis, provenance, source = _error_origin(lane)

    def figure(of: Callable[[Tally], float]) -> Figure:
        return Figure.over([of(tally) for tally in lane.tallies], basis, provenance, source)

    return Accuracy(
        worst=figure(lambda tally: max(tally.errors.values())),
        mean=figure(lambda tally: sum(tally.errors.values()) / len(tally.errors)),
        cosine=figure(lambda tally: min(tally.cosines.values())),
        cosine_mean=figure(lambda tally: sum(tally.cosines.values()) / len(tally.cosines)),
        layers=tuple(lane.tallies[0].layer_means),
        agreement=figure(lambda tally: tally.agreement(reference)),
        decisions=reference.decisions,
        perplexity=None if reference.perplexity is None else figure(lambda tally: tally.perplexity or 0.0),
        reference_perplexity=reference.perplexity,
    )  # fmt: skip


def _error_origin(lane: Lane) -> tuple[Basis, Provenance, str]:
    """A simulated device's error is what its model gives; that of any other was measured on its real values."""
    if lane.device is None or lane.device.fidelity != Fidelity.SIMULATED:
        return Basis.MEASURED, Provenance.MEASURED_SILICON, "compared with the float64 run"
    stated = [record.time for records in lane.records.values() for record in records if record.time is not None]
    provenance = max((time.provenance for time in stated), key=lambda p: p.rank, default=Provenance.ASSUMED)
    return Basis.MODELLED, provenance, "the simulator's values, compared with the float64 run"


def _costs(lane: Lane, groups: Sequence[int]) -> Costs:
    repeats = range(len(lane.tallies))
    walls = [sum(lane.walls[group][repeat] for group in groups) for repeat in repeats]
    inside = [sum(lane.attention[group][repeat] for group in groups) for repeat in repeats]
    wall, attention = Figure.over(walls), Figure.over(inside)
    remainder = Figure.over([whole - part for whole, part in zip(walls, inside, strict=True)])
    records = [record for group in groups for record in lane.records[group]]
    on_device = None if lane.baseline else _summed([record.time for record in records])
    return Costs(
        wall=wall, attention=attention, remainder=remainder,
        on_device=on_device or attention,
        total=remainder.plus(on_device) if on_device else wall,
        energy=None if lane.baseline else _summed([record.energy for record in records]),
        macs=sum(lane.macs[group] for group in groups), calls=sum(lane.calls[group] for group in groups),
    )  # fmt: skip


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
    named = ["hal-core", "hal-nn", *sorted({e.distribution.split()[0] for e in registry.entries() if e.distribution})]
    found = {"python": platform.python_version()}
    for name in dict.fromkeys([*named, "torch", "transformers", "safetensors"]):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a distribution"
    return found


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
