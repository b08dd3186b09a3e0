"""A real mixed run: the router against each device alone and the devices' static estimates, a load in the middle third.

    python benchmarks/router_mixed.py --minutes 20 --record

Each of them is a process of its own that learns from its own calls alone. For every request drawn, one process after
the other runs it, in random order, so that what else the machine does meets all of them alike. While the load is on,
other processes keep every core busy: that is a load on cpu:0. Devices that are emulated on the same cores are slowed
too, by how much is shown.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import record
import router_replay

#: Plugins whose devices are simulated: their estimates are of devices that are not here.
SIMULATED = "kpu,photonics,photonic_lightmatter,luminous,lightmatter,simulation"
DEVICES = ("cpu:0", "opencl:0")
MODELS = ("GPT-2", "Qwen 2.5 0.5B")
BLOCK, RESAMPLES = 25, 2000


def requests() -> list[Any]:
    """Prefills and decode steps of two models."""
    every = router_replay.requests()
    size, names = len(router_replay.LENGTHS), list(router_replay.MODELS)
    return [each for name in MODELS for each in every[names.index(name) * size :][:size]]


def serve(pipe: Connection, policy: str, seed: int) -> None:
    """Answer each place of a request with (seconds that its call took, the device that ran it)."""
    os.environ["HAL_CACHE"], os.environ["HAL_DISABLE"] = tempfile.mkdtemp(), f"{SIMULATED},vulkan"
    import torch

    import hal_core as hal

    torch.manual_seed(seed)
    kinds = requests()

    def call(place: int, **options: Any) -> tuple[float, str | None]:
        tensors, causal = router_replay.drawn(kinds[place]), kinds[place].causal is not hal.Causal.NONE
        with hal.watch() as watched:
            start = time.perf_counter()
            hal.attention(*tensors, is_causal=causal, enable_gqa=True, **options)
            seconds = time.perf_counter() - start
        decision = watched.decision
        return seconds, None if decision is None else decision.chosen

    with torch.no_grad():
        for device in DEVICES:  # kernels are compiled before anything is learned
            for place in range(len(kinds)):
                call(place, backend=device)
        if policy == "router":
            import hal_router

            hal_router.enable()
        options = {"backend": policy} if policy in DEVICES else {"allow_simulated": True}
        pipe.send(policy)
        while (place := pipe.recv()) is not None:
            pipe.send(call(place, **options))


class Worker:
    """A process that serves requests by one policy."""

    def __init__(self, policy: str, seed: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self.policy, (self.pipe, theirs) = policy, context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, policy, seed), daemon=True)
        self.process.start()

    def run(self, place: int) -> tuple[float, str]:
        self.pipe.send(place)
        answer: tuple[float, str] = self.pipe.recv()
        return answer


def interval(router: list[float], other: list[float], seed: int) -> tuple[float, float, float]:
    """Ratio of the sums router / other, and its 95% interval over resampled blocks of consecutive requests."""
    starts = range(0, len(router), BLOCK)
    blocks = [(sum(router[at : at + BLOCK]), sum(other[at : at + BLOCK])) for at in starts]
    draw, found = random.Random(seed), list[float]()
    for _ in range(RESAMPLES):
        taken = draw.choices(blocks, k=len(blocks))
        found.append(sum(mine for mine, _ in taken) / sum(theirs for _, theirs in taken))
    found.sort()
    ratio = sum(router) / sum(other)
    return ratio, found[RESAMPLES // 40], found[-RESAMPLES // 40]


def run(minutes: float, seed: int) -> tuple[list[str], list[tuple[bool, dict[str, float], str]]]:
    """(policies, per request: whether the load was on, seconds by policy, the router's device)."""
    workers = {}
    for name in ("router", "estimates", *DEVICES):
        workers[name] = Worker(name, seed)
        workers[name].pipe.recv()  # it is ready
    draw, places = random.Random(seed), range(len(requests()))
    log: list[tuple[bool, dict[str, float], str]] = []
    begin, burners = time.monotonic(), list[Any]()
    while (gone := (time.monotonic() - begin) / (60 * minutes)) < 1:
        loaded = 1 / 3 <= gone < 2 / 3
        if loaded and not burners:
            burners = [
                multiprocessing.Process(target=router_replay.burn, daemon=True) for _ in range(os.cpu_count() or 1)
            ]
            for burner in burners:
                burner.start()
        elif not loaded and burners:
            for burner in burners:
                burner.terminate()
            burners = []
        place, turn = draw.choice(places), list(workers)
        draw.shuffle(turn)
        answers = {name: workers[name].run(place) for name in turn}
        log.append((loaded, {name: seconds for name, (seconds, _) in answers.items()}, answers["router"][1]))
    for worker in workers.values():
        worker.pipe.send(None)
    return list(workers), log


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print every request")
    options = parser.parse_args()
    names, log = run(options.minutes, options.seed)
    if options.verbose:
        for loaded, seconds, device in log:
            print(loaded, {name: round(1e3 * each, 2) for name, each in seconds.items()}, device, file=sys.stderr)
    third = [n for n, (loaded, _, _) in enumerate(log) if loaded]
    parts = {"whole run": log, "before the load": log[: third[0]], "load": [log[n] for n in third]}
    parts["after the load"] = log[third[-1] + 1 :]
    rows, missed = [], False
    for part, kept in ((part, kept) for part, kept in parts.items() if kept):
        router = [seconds["router"] for _, seconds, _ in kept]
        taken = [device for _, _, device in kept]
        where = ", ".join(f"{d} {100 * taken.count(d) / len(taken):.0f}%" for d in sorted(set(taken)))
        for name in names:
            if name == "router":
                continue
            other = [seconds[name] for _, seconds, _ in kept]
            ratio, low, high = interval(router, other, options.seed)
            verdict = "" if part != "whole run" else "held" if high < 1 else "missed"
            missed |= verdict == "missed"
            figures = [f"{1e3 * statistics.fmean(times):.2f}" for times in (router, other)]
            rows.append(
                [part, name, str(len(kept)), *figures, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", where, verdict]
            )
    columns = [
        "part",
        "against",
        "requests",
        "router, ms",
        "other, ms",
        "router / other",
        "95% interval",
        "router on",
        "",
    ]
    notes = [
        f"{options.minutes:g} minutes of real calls, seed {options.seed}, mean times of a request by the clock of the "
        f"process that ran it, its decision included. Intervals: {RESAMPLES} bootstrap samples of blocks of {BLOCK} "
        "requests. Estimates: the same devices without the router. The bar: the whole run's interval below 1 against "
        "each device alone and against the estimates. Every kernel was compiled before.",
        "The load is processes that keep every core busy, so that devices that are emulated on these cores are slowed "
        "too. Other work shared the machine during the run; it met all policies in turns.",
    ]
    record.publish(options, "router", "A mixed run", columns, rows, notes, section="A mixed run")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
