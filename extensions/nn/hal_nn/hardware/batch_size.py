"""The largest batch that fits: predicted from simulated steps, then confirmed by running it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hal_core import ContractError, MemoryLimitError
from hal_core.testing import allocator_peak

from ..arguments import is_number, need_module, need_whole, shown
from .devices import available_memory
from .memory_estimate import Inputs, MemoryEstimate, batched, estimate_memory, sample_of
from .simulated_memory import loss_of

#: Runs a batch and gives its peak in bytes, beside what was held before; raises where memory is short.
Probe = Callable[[int], int]
MOST_PROBES = 3
#: Share of the memory that is planned with: the rest is fragmentation, and what others allocate.
USABLE = 0.9
#: Share of what the system calls available that is taken on the CPU: other programs live in the same memory.
CPU_SHARE = 0.5
#: Seconds that running sizes may take by default. A step on a CPU may take minutes long before memory is short.
SECONDS = 30.0
#: A trial run takes at most this share of the seconds that are left, so that the size it leads to can be run.
TRIAL_SHARE = 1 / 8
#: How much longer an entry may take in the size than it took in the trial run.
SLOWER = 1.5
_SHORT = (MemoryError, MemoryLimitError, torch.OutOfMemoryError)


class BatchSize(int):
    """A batch size, a number, with how it was found.

    Attributes:
        accumulation: batches of this size whose gradients are added up to one step of the global batch.
        estimate: the memory of a step. available: bytes that it was planned for.
        probes: (batch size, peak in bytes or None, why it failed or "") of each run, in order; trial runs, which only
            time a few entries, are left out.
        limited_by: a sentence that says what a larger size would exceed: memory, time, `most` or the global batch.
    """

    accumulation: int
    estimate: MemoryEstimate
    available: int
    probes: list[tuple[int, int | None, str]]
    limited_by: str

    @classmethod
    def of(
        cls,
        size: int,
        accumulation: int,
        estimate: MemoryEstimate,
        available: int,
        probes: list[tuple[int, int | None, str]],
        limited_by: str,
    ) -> Self:
        self = cls(size)
        self.accumulation, self.estimate, self.available, self.probes = accumulation, estimate, available, probes
        self.limited_by = limited_by
        return self


def optimal_batch_size(
    model: nn.Module,
    *,
    sample: Any = None,
    sequence_length: int | None = None,
    training: bool = True,
    available: int | None = None,
    global_batch: int | None = None,
    most: int = 1 << 16,
    probe: Probe | bool = True,
    memory_share: float | None = None,
    seconds: float | None = SECONDS,
) -> BatchSize:
    """The largest batch whose step fits into memory, and into the time that is given to run it.

    Simulated steps of a few sizes say what fits; what is predicted is run, at most three times: a size that fails is
    given up with its reason, its references are freed, and the next one is predicted from what was measured.

    Args:
        sample, sequence_length, training: see `estimate_memory`. The longest sequence decides: give that.
        available: bytes for the whole step, weights included; None: `memory_share` of what the model's device has left
            now, with the weights that are there already.
        memory_share: in (0, 1]; None: half on the CPU, whose memory other programs use too, and all on an accelerator.
        seconds: that trial runs and the run of the size may take together, None for no limit. A size whose step would
            take longer is not returned, since it could not be confirmed: `limited_by` then says "time". Only runs of
            the model (`probe` True) are timed. One entry is always run.
        global_batch: entries of one optimiser step: the size then divides it, and `accumulation` says how many batches
            make it up. most: the largest size in question.
        probe: runs a batch and gives its peak; True: a forward and backward pass of the model; False: predict alone.
            A model on the meta device is never run.

    Raises:
        ContractError: not even one entry fits; the message says what it takes and what there is.
    """
    need_module("model", model)
    need_whole("global_batch", 1 if global_batch is None else global_batch)
    need_whole("most", most)
    need_whole("available", 0 if available is None else available, 0)
    if not callable(probe) and type(probe) is not bool:
        raise ContractError(f"probe {probe!r} was given: use True, False, or a function of a batch size")
    if memory_share is not None and not (is_number(memory_share) and 0 < memory_share <= 1):
        raise ContractError(f"memory_share {shown(memory_share)} was given: use a number above 0 and up to 1, or None")
    if seconds is not None and not (is_number(seconds) and seconds > 0):
        raise ContractError(f"seconds {shown(seconds)} was given: use a positive number, or None for no limit")
    shapes = sample_of(model, sequence_length, training) if sample is None else sample
    place = next((t.device for t in model.parameters()), torch.device("cpu"))
    one = estimate_memory(model, 1, sample=shapes, training=training)
    on_cpu = place.type in ("cpu", "meta")
    space = available
    if space is None:
        share = memory_share or (CPU_SHARE if on_cpu else 1.0)
        space = int(share * available_memory(torch.device("cpu") if on_cpu else place) + one.weights)
    usable = int(space * USABLE)
    largest = min(most, global_batch or most)
    predicted = _predicted(
        lambda size: float(estimate_memory(model, size, sample=shapes, training=training)),
        float(one),
        usable,
        largest,
    )
    limited_by = f"memory: a step may take {usable / 1e9:.2f} GB"
    if predicted == largest:
        limited_by = f"global_batch: {global_batch} entries" if largest == global_batch else f"most: {most} entries"
    probes: list[tuple[int, int | None, str]] = []
    runner = _runner(model, shapes, training) if probe is True else probe
    if probe is True and seconds is not None and predicted > 1 and place.type != "meta":
        timely = _timely(_runner(model, shapes, training), predicted, time.monotonic() + seconds)
        if timely < predicted:
            predicted = timely
            limited_by = f"time: running more than {timely} entries would exceed {seconds:g} s (pass seconds=)"
    size = _dividing(predicted, global_batch)
    while size >= 1 and runner and place.type != "meta" and len(probes) < MOST_PROBES:
        peak, why = _tried(runner, size, usable - one.weights - one.optimiser)
        probes.append((size, peak, why))
        if not why:
            break
        limited_by = f"memory: {size} entries failed ({why})"
        smaller = size // 2 if peak is None else int(size * (usable - one.weights - one.optimiser) / peak)
        size = _dividing(max(min(smaller, size - 1), 0), global_batch)
    if size < 1:
        reasons = "; ".join(f"{number} entries: {why}" for number, _, why in probes if why)
        raise ContractError(
            f"{type(model).__name__}: one entry takes {one / 1e9:.2f} GB and {usable / 1e9:.2f} GB may be used"
            f"{f' ({reasons})' if reasons else ''}: use shorter sequences, checkpointing, or a device with more memory"
        )
    final = estimate_memory(model, size, sample=shapes, training=training)
    return BatchSize.of(size, -(-(global_batch or size) // size), final, space, probes, limited_by)


def _predicted(needed: Callable[[int], float], one: float, usable: float, most: int) -> int:
    """The largest size whose simulated step fits, 0 for none.

    What a step needs is the largest of its phases, each of which grows evenly with the size: a convex function, of
    which a chord is above. So where a line through two sizes, one that fits and one that does not, meets the limit, the
    size fits.
    """
    if one > usable:
        return 0
    fits, needs_fits, next_size = 1, one, 2
    while next_size <= most:
        needs = needed(next_size)
        if needs > usable:
            break
        fits, needs_fits = next_size, needs
        next_size = min(2 * next_size, most) if next_size < most else most + 1
    else:
        return fits
    short, needs_short = next_size, needs
    while short - fits > 1:
        share = (usable - needs_fits) / (needs_short - needs_fits)
        middle = min(max(int(fits + share * (short - fits)), fits + 1), short - 1)
        needs = needed(middle)
        if needs > usable:
            short, needs_short = middle, needs
        elif middle == short - 1:
            return middle
        else:
            # Just above is where the limit is, as a rule: one more look ends the search.
            fits, needs_fits = middle, needs
            above = needed(middle + 1)
            if above > usable:
                return middle
            fits, needs_fits = middle + 1, above
    return fits


def _timely(run: Probe, most: int, deadline: float) -> int:
    """The largest size up to `most` that can be run before a time.monotonic(), at least 1, judged by trial runs.

    An entry takes less in a larger batch, so trials grow until the next would take a share of the time that is left.
    """
    trial = 1
    while True:
        began = time.monotonic()
        if _tried(run, trial, float("inf"))[1]:
            return most  # memory is short at a size that should fit: the runs to come say so
        ended = time.monotonic()
        each = SLOWER * (ended - began) / trial
        fitting = int(min((deadline - ended) / each, most))
        larger = int(min(TRIAL_SHARE * fitting, 8 * trial))
        if fitting >= most or larger < 2 * trial:
            return max(fitting, 1)
        trial = larger


def _dividing(size: int, whole: int | None) -> int:
    """The largest divisor of `whole` up to `size`; `size` itself where there is no whole."""
    if whole is None or size < 1:
        return size
    return next(number for number in range(min(size, whole), 0, -1) if whole % number == 0)


def _tried(probe: Probe, size: int, limit: float) -> tuple[int | None, str]:
    """(peak, why the size failed) of one run. Nothing of a failed run is referred to afterwards."""
    try:
        peak = probe(size)
    except _SHORT as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        del error
    except RuntimeError as error:
        if "memory" not in str(error).lower():
            raise
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        del error
    else:
        return (
            peak,
            "" if peak <= limit else f"{peak / 1e9:.2f} GB beside weights and optimiser, {limit / 1e9:.2f} GB left",
        )
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, why


def _runner(model: nn.Module, shapes: Inputs, training: bool) -> Probe:
    """A probe that runs the model forward and backward; gradients that were there stay as they were."""

    def probe(size: int) -> int:
        place = next(model.parameters()).device

        def filled(tensor: Tensor) -> Tensor:
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=place)

        inputs = tree_map_only(Tensor, filled, batched(shapes, size))
        held = [p.grad for p in model.parameters()]
        before = model.training

        def step() -> None:
            for parameter in model.parameters():
                parameter.grad = None
            with torch.set_grad_enabled(training):
                output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
                if training:
                    loss_of(output).backward()

        try:
            model.train(training)
            return allocator_peak(step, str(place))
        finally:
            model.train(before)
            for parameter, grad in zip(model.parameters(), held, strict=True):
                parameter.grad = grad

    return probe
