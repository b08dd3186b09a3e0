"""Pages found closed: what the walk without a clock says is what the banks do."""

from __future__ import annotations

import pytest
from hal_kpu.profiles.profile import load
from hal_kpu.simulator.dram.averaged import AveragedMemory
from hal_kpu.simulator.dram.banked import BankedMemory, Timing
from hal_kpu.simulator.dram.reopening import reopenings
from hal_kpu.simulator.engines import Engines
from hal_kpu.simulator.movement import Builder, Place, Program

from .programs import run_averaged

PROFILE = load("t32x32")
TIMING = Timing.of(PROFILE)


def rounds(pages: int, times: int = 40, late: bool = False) -> Program:
    """Stores of one burst in every page of a region, `times` times over as the columns of a result; each waits for the
    store before it."""
    b = Builder(f"{pages} pages")
    b.buffer("tile", "L3", 1, TIMING.burst)
    steps = TIMING.burst, TIMING.page
    place = Place(b.region(pages * TIMING.page), TIMING.burst, steps=steps, counts=(times, pages))
    with b.loop(times), b.loop(pages):
        b.move((), "tile", TIMING.burst)
        b.store("tile", TIMING.burst, place=place, late=late)
    return b.build()


def walked(program: Program) -> float:
    found = reopenings(program, TIMING.page, TIMING.burst, TIMING.group)
    return sum(each.closed for (_, turn), each in found.items() if turn is None)


@pytest.mark.parametrize("pages", [1, 7, 8, 9, 10, 15, 20, 32])
@pytest.mark.parametrize("late", [False, True])
def test_the_walk_finds_every_page_that_the_banks_open_again(pages, late):
    program = rounds(pages, late=late)
    memory = BankedMemory(TIMING)
    exact = Engines(program, PROFILE, memory).run().makespan
    assert walked(program) == pytest.approx(memory.counters.page_misses - pages)
    if pages <= TIMING.group:
        assert walked(program) == 0
    if not late and pages >= 20:  # nothing hides the time of a page: without the walk, these take 16% less
        assert run_averaged(program, PROFILE).cycles == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("pages", [9, 20, 32])
def test_taking_over_rounds_that_reopen_pages_is_exact(pages):
    program = rounds(pages)
    memory = AveragedMemory(TIMING)
    memory.steady = False
    done = run_averaged(program, PROFILE)
    assert done.timeline.reused > 0
    assert done.timeline.makespan == Engines(program, PROFILE, memory).run().makespan


def test_a_tile_of_another_instruction_closes_pages_too():
    b = Builder("two")
    b.buffer("tile", "L3", 1, TIMING.burst)
    near, far = Place(TIMING.page, TIMING.burst), Place(TIMING.group * TIMING.page, TIMING.burst)  # in one bank
    with b.loop(10):
        for place in (near, far):
            b.load("tile", TIMING.burst, place=place)
            b.store("tile", TIMING.burst, place=Place(b.region(0), TIMING.burst))
    found = reopenings(b.build(), TIMING.page, TIMING.burst, TIMING.group)
    assert {group: (each.closed, each.turns, each.before) for (group, turn), each in found.items() if turn is None} == {
        (near,): (9, 10, 0),
        (far,): (9, 10, 0),
    }


def test_large_regions_are_left_out():
    assert walked(rounds(33)) == 0
