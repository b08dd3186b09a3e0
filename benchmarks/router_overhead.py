"""What routing adds to a call: `hal.attention` with `hal_router.enable()` and without, in turns.

A kept decision is that of a tiny input, called again and again; a fresh one is the first call of each of `SHAPES`
shapes, decided, bound and run. Times are of the calling thread's processor. A whole fresh call takes a hundred times
what the router adds, so the hooks' own time in it, measured inside, is what the bar is held against.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import hal_router
import record
import torch
from hal_router import control
from hal_router.keys import Keys

import hal_core as hal

BAR_KEPT, BAR_FRESH = 3.0, 20.0  # microseconds that the router may add
ROUNDS, CALLS, SHAPES = 40, 512, 48
#: Devices that the policy is asked about, and whether calls of the kind were learned from before.
CASES = {
    "one device that can": (1, False),
    "two devices that can, calls of this kind known": (2, True),
    "two devices that can, one of them unknown": (2, False),
}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def shapes() -> list[Tensors]:
    """Query, key and value of tiny requests, no two of which share a decision."""
    sizes = ((heads, length) for length in (4, 8, 16, 32, 64, 128) for heads in range(1, 9))
    found = [tuple(torch.randn(3, 1, heads, length, 16).unbind(0)) for heads, length in sizes]
    return found[:SHAPES]  # type: ignore[return-value]


def each(call: Callable[[], object], calls: int) -> float:
    """Microseconds of the thread's processor time for one call."""
    start = time.thread_time_ns()
    for _ in range(calls):
        call()
    return (time.thread_time_ns() - start) / calls / 1e3


def verdict(added: float, bar: float | None) -> list[str]:
    return ["", ""] if bar is None else [f"{bar:g}", "missed" if added > bar else "held"]


def tenth(values: Iterable[float]) -> float:
    """The value that a tenth of them is below: rounds that other work of the machine disturbed count little."""
    return statistics.quantiles(values, n=10)[0]


def turned(on: bool | None, warm: Tensors, fresh: Sequence[Tensors]) -> tuple[float, list[float]]:
    """Microseconds of a call whose decision is kept, and of the first call of each fresh shape. Turning the router on
    or off ends every decision.
    """
    hal_router.disable()
    hal_router.enable()
    if not on:
        hal_router.disable()
    hal.attention(*warm)
    hal.attention(*warm)
    gc.collect()
    first = [each(lambda tensors=tensors: hal.attention(*tensors), 1) for tensors in fresh]  # type: ignore[misc]
    for _ in range(CALLS):  # the first calls of a router are learned from one by one
        hal.attention(*warm)
    return each(lambda: hal.attention(*warm), CALLS), first


def beside(candidates: Sequence[Any]) -> list[Any]:
    """The candidates with a second device, ten times slower than the first."""
    one = candidates[0]
    time_ = attrs.evolve(one.estimate.time, low=10 * one.estimate.time.low, high=10 * one.estimate.time.high)
    device = attrs.evolve(one.device, id="second:0")
    return [
        *candidates,
        attrs.evolve(one, device=device, estimate=attrs.evolve(one.estimate, time=time_), transfer=True),
    ]


def clock() -> float:
    """Microseconds that reading the clock twice takes, a part of every figure that is timed inside."""
    start = time.thread_time_ns()
    for _ in range(10_000):
        time.thread_time_ns()
    return (time.thread_time_ns() - start) / 1e7


def hooks(warm: Tensors, fresh: Sequence[Tensors], devices: int, known: bool) -> float:
    """Microseconds that the router's hooks themselves take in a fresh decision and its first call, timed inside.

    devices: with 2 the policy is asked about two devices, and then, apart, about those that are here. known: calls of
    this kind were learned from before, on both devices.
    """
    hal_router.disable()
    hal_router.enable()
    router: Any = control.router
    hal.attention(*warm)
    two, spent, reads = devices == 2, 0, 0
    if known:
        learn(router, fresh)
    for name in ("policy", "decided", "call"):
        inner = getattr(router, name)

        def timed(*given: Any, inner: Any = inner, asked: bool = two and name == "policy") -> Any:
            nonlocal spent, reads
            more = (given[0], beside(given[1]), given[2]) if asked else given
            start = time.thread_time_ns()
            result = inner(*more)
            spent += time.thread_time_ns() - start
            reads += 1
            return inner(*given) if asked else result

        setattr(router, name, timed)
    for tensors in fresh:
        hal.attention(*tensors)
    return (spent / 1e3 - reads * clock()) / len(fresh)


def learn(router: Any, fresh: Sequence[Tensors]) -> None:
    """Let both devices be known for requests of the fresh ones' kinds, but not of their shapes."""
    asked = {}
    inner = router.policy

    def heard(request: Any, candidates: Any, policy: Any) -> Any:
        keys = Keys.of(request)
        asked[keys] = router.arms(request, beside(candidates), policy)
        return inner(request, candidates, policy)

    router.policy = heard
    for tensors in fresh:
        hal.explain(*tensors)
    del router.policy
    for keys, arms in asked.items():
        for arm in arms:
            other = keys._replace(shape=(*keys.shape, 0))
            router.chooser.observe(other, arm, 0.0, math.log(arm.seconds), False, calls=4)


def main() -> int:
    options = record.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    warm, *fresh = shapes()
    kept: list[tuple[float, ...]] = []
    first: list[list[tuple[float, ...]]] = [[] for _ in fresh]
    gc.disable()  # a collection is charged to whoever allocates last
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        os.environ["HAL_CACHE"] = folder
        for round_ in range(ROUNDS + 5):
            sides = [turned(on, warm, fresh) for on in (False, True, None)]
            if round_ >= 5:
                kept.append(tuple(side[0] for side in sides))
                for place, times in enumerate(zip(*(side[1] for side in sides), strict=True)):
                    first[place].append(times)
        inside = [tenth(hooks(warm, fresh, *case) for _ in range(ROUNDS)) for case in CASES.values()]
        hal_router.disable()
    rows, missed = [], False
    for name, rounds, bar in (("kept decision", [kept], BAR_KEPT), ("fresh decision, whole call", first, None)):
        off, on, again = ([tenth(row[side] for row in place) for place in rounds] for side in (0, 1, 2))
        added, null = (statistics.median(b - a for a, b in zip(off, other, strict=True)) for other in (on, again))
        figures = [f"{figure:.1f}" for figure in (statistics.median(off), statistics.median(on), added, null)]
        rows.append([name, *figures, *verdict(added, bar)])
        missed |= "missed" in rows[-1]
    for devices, took in zip(CASES, inside, strict=True):
        figures = ["", "", f"{took:.1f}", ""]
        rows.append(
            [f"the hooks within a fresh decision and its first call, {devices}", *figures, *verdict(took, BAR_FRESH)]
        )
        missed |= "missed" in rows[-1]
    columns = ["what", "off, us", "on, us", "added, us", "off against off, us", "bar, us", ""]
    found = ", ".join(device.id for device in hal.devices() if device.fidelity is hal.Fidelity.HARDWARE)
    notes = [
        f"The calling thread's processor time, without garbage collection: {CALLS} calls of a kept decision, and the "
        f"first call of each of {len(fresh)} shapes. Of {ROUNDS} rounds in turns, each side's figure is that which a "
        "tenth of the rounds is below. Off against off is the same difference between two sides without the router: "
        f"no difference below it means anything. Hooks: likewise, less what reading the clock takes. "
        f"Hardware devices here: {found}.",
    ]
    record.publish(options, "router", "The router on recorded times", columns, rows, notes, section="What a call costs")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
