"""The engines: order, tokens, credits, sharing, deadlock; and that nothing faster makes anything later."""

from __future__ import annotations

import itertools

import attrs
import pytest
from hal_kpu.profiles.profile import load
from hal_kpu.simulator.cycle_accurate import run_cycle_accurate
from hal_kpu.simulator.engines import BufferTooSmallError, DeadlockError, Fault
from hal_kpu.simulator.movement import Builder, Opcode, Place, Program, ProgramError
from hal_kpu.simulator.transactional import run_transactional

from .programs import quick_first, random_profile, random_program, run_averaged

RUNNERS = [run_transactional, run_averaged, run_cycle_accurate]
MACHINE = load("t32x32")
CALM = MACHINE.replace(dram__refresh_time=0, dram__activate=0)


def pipeline(slots: int, turns: int = 20, cycles: int = 100, size: int = 12800) -> Program:
    """Load, then compute; 12,800 bytes take 100 cycles of t32x32's memory."""
    b = Builder("pipeline")
    b.buffer("tile", "L3", slots, size)
    with b.loop(turns):
        b.load("tile", size, place=Place(0, size, steps=(size,)))
        b.compute(["tile"], steps=cycles, array=(32, 32))
    return b.build()


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize(
    ("slots", "cycles", "expected"),
    [
        (1, 100, 20 * 200),
        (2, 100, 100 + 20 * 100),
        (2, 60, 20 * 100 + 60),
        (2, 150, 100 + 20 * 150),
        (1, 60, 20 * 160),
    ],
)
def test_two_slots_hide_the_shorter_of_load_and_compute_and_one_slot_adds_them(run, slots, cycles, expected):
    assert run(pipeline(slots, cycles=cycles), CALM).cycles == expected


@pytest.mark.parametrize("run", RUNNERS)
def test_two_equal_transfers_get_half_each(run):
    size = 64 * 1000
    alone, both = Builder("alone"), Builder("both")
    for b, channels in ((alone, [0]), (both, [0, 1])):
        b.buffer("tile", "L3", len(channels), size)
        with b.together():
            for channel in channels:
                b.load("tile", size, channel=channel, place=Place(channel << 20, size))
    one, two = run(alone.build(), CALM), run(both.build(), CALM)
    ends = [span.end for span in two.timeline.spans()]
    assert one.cycles == 500
    assert max(ends) == 1000
    assert max(ends) - min(ends) <= 2  # four bursts of two cycles' worth
    assert [span.start for span in two.timeline.spans()] == pytest.approx([0, 0], abs=2)


@pytest.mark.parametrize("run", RUNNERS)
def test_the_shorter_transfer_leaves_the_memory_to_the_longer(run):
    b = Builder("unequal")
    b.buffer("tile", "L3", 2, 64000)
    with b.together():
        b.load("tile", 64000, channel=0)
        b.load("tile", 12800, channel=1, place=Place(1 << 20, 12800))
    ends = {span.engine: span.end for span in run(b.build(), CALM).timeline.spans()}
    assert ends["dma0"] == 600
    assert ends["dma1"] == pytest.approx(200, abs=2)


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("seed", quick_first(10, range(60)))
def test_busy_stall_and_idle_add_up_and_the_timeline_says_the_same(run, seed):
    program, profile = random_program(seed), random_profile(seed)
    done = run(program, profile)
    sums, spans = done.timeline.sums(), list(done.timeline.spans())
    for engine, time in done.timeline.engines.items():
        mine = sorted((s for s in spans if s.engine == engine), key=lambda s: s.start)
        assert time.total == done.cycles
        assert time.busy == sums[engine][0] == sum(s.end - s.start for s in mine)
        assert min(time.busy, time.stall, time.idle) >= 0
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine)), "an engine does one thing at a time"
    assert len(spans) == program.length - sum(n for i, n in program.instructions() if i.opcode is Opcode.BARRIER)
    assert max(s.end for s in spans) == done.cycles == max(last for _, _, last in sums.values())
    assert done.memory.bytes == program.total("bytes", Opcode.DMA_LOAD_TILE, Opcode.DMA_STORE_TILE)


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("block", quick_first(2, range(20)))
def test_no_run_beats_its_bounds_and_nothing_faster_or_larger_is_slower(run, block):
    for seed in range(25 * block, 25 * block + 25):  # 500 cases in all
        program, profile = random_program(seed), random_profile(seed)
        done = run(program, profile)
        compute = sum(i.steps * n for i, n in program.instructions() if i.opcode is Opcode.COMPUTE)
        assert done.cycles >= max(compute, done.memory.bytes / profile.bytes_per_cycle()), seed
        assert run(random_program(seed, slots=1), profile).cycles <= done.cycles, f"{seed}: a slot more"
        bandwidth, channel = profile["dram.bandwidth"], profile["engines.dma_bandwidth"]
        quick = profile.replace(dram__bandwidth=bandwidth * 1.3, engines__dma_bandwidth=channel * 1.3)
        assert run(program, quick).cycles <= done.cycles, f"{seed}: faster memory"
        prompt = profile.replace(dram__activate=profile["dram.activate"] / 2)
        assert run(program, prompt).cycles <= done.cycles, f"{seed}: faster opening of pages"
        calm = profile.replace(dram__refresh_time=profile["dram.refresh_time"] / 2)
        assert run(program, calm).cycles <= done.cycles, f"{seed}: shorter refresh"


def flat(program: Program) -> Program:
    """The program with its loops written out: nothing can be taken over."""
    from hal_kpu.simulator.movement import Loop

    def unroll(body, at):
        for item in body:
            if isinstance(item, Loop):
                for turn in range(item.count):
                    yield from unroll(item.body, (*at, turn))
            elif item.place is None:
                yield item
            else:
                moved = item.place.base + sum(a * b for a, b in zip(item.place.steps, at, strict=False))
                yield attrs.evolve(item, place=attrs.evolve(item.place, base=moved))

    return attrs.evolve(program, body=tuple(unroll(program.body, ())))


def written_out(program: Program, profile):
    """Timing without the taking over of repeated turns, by a memory that says it is not steady."""
    from hal_kpu.simulator.dram.averaged import AveragedMemory
    from hal_kpu.simulator.dram.banked import Timing
    from hal_kpu.simulator.engines import Engines

    memory = AveragedMemory(Timing.of(profile))
    memory.steady = False
    return Engines(program, profile, memory).run(), memory.counters


@pytest.mark.parametrize("seed", quick_first(10, range(80)))
def test_taking_over_repeated_turns_is_exact(seed):
    program, profile = random_program(seed), random_profile(seed)
    b = attrs.evolve(program, body=(attrs.evolve(program.body[0], count=150),))
    done, (slow, counters) = run_averaged(b, profile), written_out(b, profile)
    assert done.timeline.reused > 0
    assert done.timeline.makespan == slow.makespan
    assert done.timeline.engines == slow.engines
    assert sorted(map(str, done.timeline.spans())) == sorted(map(str, slow.spans()))
    assert done.memory.bytes == counters.bytes
    assert done.memory.page_misses == pytest.approx(counters.page_misses)


@pytest.mark.parametrize("run", RUNNERS)
def test_a_lost_credit_is_a_deadlock_that_says_who_waits_for_what(run):
    program = pipeline(slots=1)
    run(program, MACHINE)
    with pytest.raises(DeadlockError, match="dma0 waits for a free slot of buffer 'tile'") as caught:
        run(program, MACHINE, fault=Fault(lost_credit=("tile", 3)))
    assert "array waits for a tile in buffer 'tile', to run COMPUTE" in str(caught.value)
    assert set(caught.value.waiting) == {"dma0", "array"}


@pytest.mark.parametrize("run", RUNNERS)
def test_a_lost_credit_of_two_takes_the_overlap_away(run):
    assert (
        run(pipeline(slots=2), CALM, fault=Fault(lost_credit=("tile", 1))).cycles > run(pipeline(slots=2), CALM).cycles
    )


@pytest.mark.parametrize("run", RUNNERS)
def test_engines_that_wait_for_each_other_are_named(run):
    b = Builder("ring")
    b.buffer("x", "L3", 1, 64)
    b.buffer("y", "L2", 1, 64)
    b.move("x", "y", 64, mover=0)
    b.move("y", "x", 64, mover=1)
    with pytest.raises(
        DeadlockError, match=r"mover0 waits for a tile in buffer 'x'.*mover1 waits for a tile in buffer 'y'"
    ):
        run(b.build(), MACHINE)


@pytest.mark.parametrize("run", RUNNERS)
def test_an_order_that_runs_ahead_of_its_credits_still_runs(run):
    b, c = Builder("ahead"), Builder("in order")
    for builder in (b, c):
        builder.buffer("tile", "L3", 1, 6400)
    for _ in range(3):
        b.load("tile", 6400)
    for _ in range(3):
        b.compute(["tile"], steps=10, array=(32, 32))
        c.load("tile", 6400)
        c.compute(["tile"], steps=10, array=(32, 32))
    assert run(b.build(), MACHINE).cycles == run(c.build(), MACHINE).cycles


def test_a_bank_without_refresh_changes_the_counters():
    program = pipeline(slots=2, turns=400)
    whole, skipped = run_cycle_accurate(program, MACHINE), run_cycle_accurate(program, MACHINE, skip_refresh=3)
    assert whole.refreshes[3] > 0
    assert skipped.refreshes[3] == 0
    assert skipped.refreshes[2] == skipped.refreshes[4] > 0
    assert skipped.memory.refresh_stall < whole.memory.refresh_stall


def test_a_barrier_holds_everything_back():
    b = Builder("barrier")
    b.buffer("tile", "L3", 4, 12800)
    b.load("tile", 12800)
    b.load("tile", 12800)
    b.barrier()
    b.compute(["tile"], steps=10, array=(32, 32))
    assert run_transactional(b.build(), CALM).cycles == 210


def test_a_program_larger_than_its_buffers_is_refused_with_size_and_need():
    wanted = r"L3 holds 262,144 B .* 300,000 B are needed, 300,000 B of them for buffer 'tile' \(3 slots of 100,000 B\)"
    with pytest.raises(BufferTooSmallError, match=wanted):
        run_transactional(pipeline(slots=3, size=100000), MACHINE)


def test_what_a_program_cannot_say_is_refused_where_it_is_written():
    b = Builder("bad")
    b.buffer("tile", "L3", 2, 64)
    with pytest.raises(ProgramError, match="DMA_LOAD_TILE gives 128 B to buffer 'tile' in L3, whose slots hold 64 B"):
        b.load("tile", 128)
    with pytest.raises(ProgramError, match="names buffer 'tiles': make it with buffer"):
        b.load("tiles", 64)
    with pytest.raises(ProgramError, match="buffer 'tile' was made twice"):
        b.buffer("tile", "L2", 1, 1)
    with pytest.raises(ProgramError, match="0 slots"):
        b.buffer("none", "L2", 0, 1)
    with pytest.raises(ProgramError, match="lies in a place of 10 B"):
        b.load("tile", 64, place=Place(0, 10))


def test_the_listing_shows_loops_and_flow():
    text = pipeline(2).listing()
    assert text.splitlines() == [
        "PROGRAM pipeline, 1 arrays",
        "BUFFER tile L3 2 x 12800 B",
        "LOOP_BEGIN 20",
        "  DMA_LOAD_TILE dma0: - -> tile, 12800 B",
        "  COMPUTE array: tile -> -, 100",
        "LOOP_END",
    ]
