"""`use`, `prefer`, `configure` and `meter`: whose wish counts where, and what a meter sums."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fakes import FakeBackend, FakeSession, draw, plain, quantity

import hal_core as hal
from hal_core import ContractError, UnknownBackendError, UnsupportedError

Fake = Callable[..., FakeBackend]
Tensors = tuple[torch.Tensor, ...]


def where(tensors: Tensors, **wish: Any) -> str | None:
    return hal.explain(*tensors, **wish).chosen


@pytest.fixture
def three(fake: Fake) -> dict[str, FakeBackend]:
    """ "auto" is the automatic choice."""
    return {name: fake(name, time=time) for name, time in (("auto", 1e-13), ("one", 1e-9), ("two", 1e-9))}


@pytest.fixture
def tensors(generator: torch.Generator) -> Tensors:
    return draw(generator)


def test_use_nests_and_ends(three: dict[str, FakeBackend], tensors: Tensors) -> None:
    assert where(tensors) == "auto:0"
    with hal.use("one"):
        assert where(tensors) == "one:0"
        with hal.use("two"):
            assert where(tensors) == "two:0"
        assert where(tensors) == "one:0"
    assert where(tensors) == "auto:0"


def test_use_ends_with_an_exception(three: dict[str, FakeBackend], tensors: Tensors) -> None:
    with pytest.raises(KeyError), hal.use("one"), hal.prefer(["two"]):
        raise KeyError
    assert where(tensors) == "auto:0"


def test_one_use_may_be_entered_again_and_within_itself(three: dict[str, FakeBackend], tensors: Tensors) -> None:
    one = hal.use("one")
    with one, one:
        assert where(tensors) == "one:0"
    with one:
        assert where(tensors) == "one:0"
    assert where(tensors) == "auto:0"


def test_an_inner_wish_changes_only_what_it_says(three: dict[str, FakeBackend], tensors: Tensors) -> None:
    with hal.use("one", objective="error", transfer=False), hal.use(objective="time"):
        decision = hal.explain(*tensors)
        assert (decision.chosen, decision.objective, decision.policy.transfer) == ("one:0", "time", False)
        with hal.prefer(["two", "one"], transfer=True):
            decision = hal.explain(*tensors)
            assert (decision.chosen, decision.objective, decision.policy.transfer) == ("two:0", "time", True)


def test_unknown_names_and_wishes_are_refused_where_they_are_said(three: dict[str, FakeBackend]) -> None:
    with pytest.raises(UnknownBackendError, match="did you mean 'two'"), hal.use("twoo"):
        pass
    with pytest.raises(UnknownBackendError, match="did you mean 'two'"):
        hal.configure("twoo")
    for call in (lambda: hal.use(bckend="one"), lambda: hal.configure(memory=3), lambda: hal.prefer(["one"], speed=1)):
        with pytest.raises((ContractError, TypeError)):
            call()
    for names in ("one", []):
        with pytest.raises(ContractError, match="pass a list"):
            hal.prefer(names)


def test_configure_replaces_everything_and_nothing_restores_the_initial_state(
    three: dict[str, FakeBackend], tensors: Tensors
) -> None:
    hal.configure("one", objective="error")
    assert where(tensors) == "one:0"
    hal.configure("two")
    assert hal.explain(*tensors).objective == "time"
    hal.configure()
    assert where(tensors) == "auto:0"


def test_threads_do_not_inherit_use_and_do_share_configure(three: dict[str, FakeBackend], tensors: Tensors) -> None:
    with ThreadPoolExecutor(1) as pool, hal.use("one"):
        assert pool.submit(where, tensors).result() == "auto:0"
        assert pool.submit(contextvars.copy_context().run, where, tensors).result() == "one:0"
        hal.configure("two")
        assert pool.submit(where, tensors).result() == "two:0"
        assert where(tensors) == "one:0"


def test_each_thread_has_its_own_use(three: dict[str, FakeBackend], tensors: Tensors) -> None:
    together = threading.Barrier(2)

    def work(name: str) -> list[str | None]:
        seen = []
        for _ in range(20):
            with hal.use(name):
                together.wait()
                seen.append(where(tensors))
                hal.attention(*tensors)
        return seen

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, ("one", "two")))
    assert found == [["one:0"] * 20, ["two:0"] * 20]
    assert [len(three[name].ran) for name in ("auto", "one", "two")] == [0, 20, 20]


def test_asyncio_tasks_keep_their_own_use(three: dict[str, FakeBackend], tensors: Tensors) -> None:
    async def task(name: str) -> list[str | None]:
        seen = []
        with hal.use(name):
            for _ in range(5):
                await asyncio.sleep(0)
                seen.append(where(tensors))
                hal.attention(*tensors)
        return seen

    async def both() -> list[list[str | None]]:
        return await asyncio.gather(task("one"), task("two"))

    assert asyncio.run(both()) == [["one:0"] * 5, ["two:0"] * 5]
    assert [len(three[name].ran) for name in ("auto", "one", "two")] == [0, 5, 5]


# Memory limits


@pytest.mark.parametrize("limit", [0, -1, 1.5, "1G", True, {"one:0": 0}])
def test_a_malformed_memory_limit_is_refused(limit: Any) -> None:
    with pytest.raises(ContractError, match="pass bytes"):
        hal.configure(memory_limit=limit)


@pytest.mark.parametrize("limit", [1000, {"one:0": 1000}])
def test_a_call_over_the_memory_limit_is_refused_before_it_runs(fake: Fake, tensors: Tensors, limit: Any) -> None:
    backend = fake("one", memory=lambda request: 1200)
    hal.configure(memory_limit=limit)
    with pytest.raises(hal.MemoryLimitError) as caught:
        hal.attention(*tensors, backend="one")
    assert isinstance(caught.value, hal.UnsupportedError)
    for part in ("1,200", "0 in use", "1,000"):
        assert part in str(caught.value)
    assert not backend.ran
    fake("two")
    hal.configure(memory_limit={"two:0": 1000})
    hal.attention(*tensors, backend="one")


@pytest.mark.parametrize("autograd", ["native", "explicit"])
def test_what_is_in_use_counts_exactly_and_what_was_freed_does_not(
    fake: Fake, generator: torch.Generator, autograd: str
) -> None:
    backend = fake("one", autograd=autograd, memory=lambda request: 100 * request.len_q)
    tensors = draw(generator, grad=autograd == "explicit")  # 700 bytes for length 7, 800 for its bucket
    hal.configure(memory_limit=5000)
    bound = hal.bind(*tensors, backend="one")
    for call in (lambda: hal.attention(*tensors, backend="one"), lambda: bound(*tensors)):
        call()
        memory = hal.session("one").memory
        held = memory.allocate((4096,), "float8_e5m2")
        ran = len(backend.ran)
        call()  # 4,796 of 5,000 bytes
        small = memory.allocate((1,), "float32")  # a block of 512
        with pytest.raises(hal.MemoryLimitError) as caught:
            call()
        error = caught.value
        assert (error.requested, error.in_use, error.limit) == (700, 4608, 5000)
        for part in ("one:0", "700", "4,608 in use", "5,000"):
            assert part in str(error)
        assert len(backend.ran) == ran + 1
        memory.free(small)
        call()
        memory.free(held)


def test_a_shorter_call_of_the_same_bucket_fits_where_the_bucket_would_not(
    fake: Fake, generator: torch.Generator
) -> None:
    fake("one", memory=lambda request: 100 * request.len_q)
    hal.configure(memory_limit=4800)
    hal.attention(*draw(generator, len_q=8), backend="one")
    held = hal.session("one").memory.allocate((4096,), "float8_e5m2")
    hal.attention(*draw(generator, len_q=7), backend="one")  # 4,796 of 4,800
    with pytest.raises(hal.HalError, match="4,096"):
        hal.attention(*draw(generator, len_q=8), backend="one")
    hal.session("one").memory.free(held)


def test_the_limit_holds_for_operators_of_compiled_code(fake: Fake, tensors: Tensors) -> None:
    backend = fake("compiled_limit", memory=lambda request: 700)
    hal.configure(memory_limit=5000)
    compiled = torch.compile(lambda q, k, v: hal.attention(q, k, v, backend="compiled_limit"), backend="eager")
    compiled(*tensors)
    held = hal.session("compiled_limit").memory.allocate((4096,), "float8_e5m2")
    small = hal.session("compiled_limit").memory.allocate((1,), "float32")
    ran = len(backend.ran)
    with pytest.raises(hal.MemoryLimitError, match="700"):
        compiled(*tensors)
    assert len(backend.ran) == ran
    hal.session("compiled_limit").memory.free(held)
    compiled(*tensors)
    hal.session("compiled_limit").memory.free(small)


# The meter


def test_a_meter_sums_calls_and_visible_work_by_device(fake: Fake, generator: torch.Generator) -> None:
    fake("one"), fake("two")
    tensors = draw(generator, 2, 4, 6, 10, 8, dim_v=4)
    with hal.meter() as meter:
        for _ in range(3):
            hal.attention(*tensors, backend="one")
        hal.attention(*tensors, backend="one", is_causal=True)
        hal.attention(*tensors, backend="two")
    hal.attention(*tensors, backend="two")
    assert {name: record.calls for name, record in meter.records.items()} == {"one:0": 4, "two:0": 1}
    dense = 2 * 4 * 6 * 10 * (8 + 4)
    assert meter.records["one:0"].macs == 3 * dense + 2 * 4 * (6 * 7 // 2) * 12
    assert meter.records["two:0"].macs == dense
    assert meter.records["one:0"].device.fidelity == "hardware"
    assert meter.records["one:0"].wall > 0
    assert meter.wall == pytest.approx(sum(record.wall for record in meter.records.values()))


def test_time_is_modelled_for_a_simulated_device_and_measured_for_others(fake: Fake, tensors: Tensors) -> None:
    fake("silicon", time=quantity(1.0))
    fake("model", fidelity="simulated", time=quantity(2.0, 3.0, "modelled", "paper-projection"))
    with hal.meter() as meter:
        for name in ("silicon", "model", "model"):
            hal.attention(*tensors, backend=name)
    assert meter.records["silicon:0"].time is None
    time = meter.records["model:0"].time
    assert time is not None
    assert (time.low, time.high, time.basis, time.provenance) == (4.0, 6.0, "modelled", "paper-projection")


def test_energy_is_summed_with_the_worst_origin(fake: Fake, tensors: Tensors) -> None:
    stated = [
        quantity(1.0, 2.0, "measured", "measured-silicon"),
        quantity(3.0, 3.0, "declared", "vendor-published"),
        quantity(1.0, 1.0, "modelled", "measured-silicon"),
    ]
    backend = fake("one")
    with hal.meter() as meter:
        for energy in stated:
            backend.energy = energy
            hal.attention(*tensors, backend="one")
    energy = meter.records["one:0"].energy
    assert energy is not None
    assert (energy.low, energy.high, energy.basis, energy.provenance) == (5.0, 6.0, "declared", "vendor-published")


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_energy_that_is_unknown_for_one_call_is_unknown_for_all(fake: Fake, tensors: Tensors, silent: int) -> None:
    backend = fake("one")
    with hal.meter() as meter:
        for n in range(3):
            backend.energy = None if n == silent else quantity(1.0)
            hal.attention(*tensors, backend="one")
    assert meter.records["one:0"].energy is None


def test_the_innermost_meter_counts(fake: Fake, tensors: Tensors) -> None:
    fake("one")
    with hal.meter() as outer:
        hal.attention(*tensors, backend="one")
        with hal.meter() as inner:
            hal.attention(*tensors, backend="one")
            hal.attention(*tensors, backend="one")
        hal.attention(*tensors, backend="one")
    assert (outer.records["one:0"].calls, inner.records["one:0"].calls) == (2, 2)


def test_a_metered_call_is_synchronised_around(fake: Fake, tensors: Tensors) -> None:
    events: list[str] = []

    class Waiting(FakeSession):
        def synchronize(self) -> None:
            events.append("synchronize")

        def compute_attention(self, *arguments: Any, **options: Any) -> Any:
            events.append("compute")
            return super().compute_attention(*arguments, **options)

    fake("one", open=Waiting)
    hal.attention(*tensors, backend="one")
    assert events == ["compute"]
    with hal.meter():
        hal.attention(*tensors, backend="one")
    assert events[1:] == ["synchronize", "compute", "synchronize"]


def test_bound_and_differentiated_calls_are_metered(fake: Fake, generator: torch.Generator) -> None:
    fake("one", autograd="explicit")
    tensors = draw(generator, grad=True)
    bound = hal.bind(*tensors, backend="one")
    with hal.meter() as meter:
        bound(*tensors).sum().backward()
        hal.attention(*tensors, backend="one").sum().backward()
    assert meter.records["one:0"].calls == 2


def test_a_call_that_is_refused_is_not_counted(fake: Fake, tensors: Tensors) -> None:
    fake("one", capabilities=plain())
    with hal.meter() as meter, pytest.raises(UnsupportedError):
        hal.attention(*tensors, backend="one", window=(1, 1))
    assert meter.records == {}


def test_a_meter_adds_up_over_threads_that_share_it(fake: Fake, tensors: Tensors) -> None:
    fake("one", energy=quantity(0.5))
    with hal.meter() as meter, ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(contextvars.copy_context().run, lambda: hal.attention(*tensors, backend="one"))
            for _ in range(64)
        ]
        for job in jobs:
            job.result()
    record = meter.records["one:0"]
    assert record.calls == 64
    assert record.energy is not None
    assert math.isclose(record.energy.middle, 32.0)


def test_watch_keeps_the_decision_that_ran_and_leaves_the_meter_around_it_alone() -> None:
    query = torch.ones(1, 2, 4, 8)
    with hal.meter() as metered, hal.watch() as outer, hal.watch() as seen:
        assert hal.current_meter() is metered
        assert (seen.decision, seen.estimate, seen.calls) == (None, None, 0)
        hal.attention(query, query, query, backend="cpu:0")
    assert seen.decision is outer.decision
    assert seen.decision is not None
    assert seen.decision.chosen == "cpu:0"
    assert seen.estimate is seen.decision.winner.estimate
    assert seen.calls == outer.calls == metered.records["cpu:0"].calls == 1
    with hal.watch() as refused, pytest.raises(hal.ContractError):
        hal.attention(query, query, query[0, 0, 0])
    assert refused.decision is None
