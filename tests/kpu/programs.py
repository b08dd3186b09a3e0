"""Random movement programs for the tests of the engines, and which cases every run of the tests has."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
from hal_kpu.profiles.profile import Profile, load
from hal_kpu.simulator.dram.averaged import AveragedMemory
from hal_kpu.simulator.dram.banked import Timing
from hal_kpu.simulator.engines import Engines, Fault
from hal_kpu.simulator.movement import Builder, Place, Program
from hal_kpu.simulator.stats import Run


def quick_first(number: int, cases: Iterable[Any]) -> list[Any]:
    """Cases of which the first `number` always run, and the others with those that are slow."""
    return [case if at < number else pytest.param(case, marks=pytest.mark.slow) for at, case in enumerate(cases)]


def run_averaged(program: Program, profile: Profile, fault: Fault | None = None) -> Run:
    """TRANSACTIONAL as it runs long programs, whatever this one's length."""
    memory = AveragedMemory(Timing.of(profile))
    timeline = Engines(program, profile, memory, fault=fault).run()
    return Run(program=program, profile=profile, fidelity="transactional", timeline=timeline, memory=memory.counters)


def random_program(seed: int, slots: int = 0) -> Program:
    """Loads, moves, feeds, compute and stores in two nested loops. `slots` more in each buffer: nothing else
    changes.
    """
    rng = random.Random(seed)
    b = Builder(f"random{seed}")
    size, other = 64 * rng.randint(1, 60), 64 * rng.randint(1, 60)
    for name, level in (("a3", "L3"), ("b3", "L3"), ("out3", "L3"), ("a2", "L2"), ("b2", "L2"), ("out2", "L2")):
        b.buffer(name, level, rng.randint(1, 3) + slots, max(size, other))
    for name in ("a1", "b1", "sums"):
        b.buffer(name, "PE", rng.randint(1, 2) + slots, max(size, other))
    a, w, out = b.region(1 << 20), b.region(1 << 20), b.region(1 << 20)
    steps, vector, shared = rng.randint(1, 80), rng.randint(0, 400), rng.random() < 0.7
    deep, wide = rng.randint(1, 6), rng.randint(1, 12)
    with b.loop(wide):
        with b.loop(deep):
            loads = [
                ("a3", size, 0, Place(a, size, steps=(0, size))),
                ("b3", other, 1, Place(w, other, steps=(deep * other, other))),
            ]
            if shared:
                with b.together():
                    for name, length, channel, place in loads:
                        b.load(name, length, channel=channel, place=place)
            else:
                for name, length, channel, place in loads:
                    b.load(name, length, channel=channel, place=place)
            b.move("a3", "a2", size, mover=0)
            b.move("b3", "b2", other, mover=1, reorder=rng.choice(["identity", "transpose"]))
            b.feed_rows("a2", "a1", size, steps)
            b.feed_cols("b2", "b1", other, steps)
            b.compute(("a1", "b1"), steps=steps, array=(4, 4), macs=16 * steps)
        b.compute((), "sums", steps=1, total=steps * deep, array=(4, 4))
        b.drain("sums", "out2", size, 4)
        if vector:
            b.vector("out2", "out3", operations=vector, size=2 * size)
        else:
            b.move("out2", "out3", size, mover=2)
        b.store("out3", size, channel=2, place=Place(out, size, steps=(size,)))
        if rng.random() < 0.1:
            b.barrier()
    return b.build()


def random_profile(seed: int) -> Profile:
    """A machine of one array of 4 x 4 with figures drawn at random; memory from very slow to very fast."""
    rng = random.Random(seed)
    bandwidth = 10 ** rng.uniform(8.5, 11)
    return (
        load("t32x32")
        .with_array(4, 4)
        .replace(
            dram__bandwidth=bandwidth,
            engines__dma_bandwidth=bandwidth * rng.choice([0.6, 1, 1, 2]),
            dram__banks=rng.choice([4, 8, 16]),
            dram__page=rng.choice([1024, 4096, 8192]),
            dram__lookahead=rng.choice([2, 8, 16]),
            engines__mover_bandwidth=rng.choice([16, 64, 256]),
            buffers__l2=1 << 17,
        )
    )
