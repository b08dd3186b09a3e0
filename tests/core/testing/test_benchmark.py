"""BenchmarkRunner with a clock of its own: what is counted, in which order, and what is said about it."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

import hal_core as hal
from hal_core.testing import BenchmarkRunner, benchmark
from hal_core.testing.benchmark import host_peak, summarize


class Clock:
    """Nanoseconds that pass only where a function says so."""

    def __init__(self) -> None:
        self.now, self.calls = 0, []

    def takes(self, name: str, *milliseconds: float) -> Callable[[], None]:
        left = list(milliseconds)

        def work() -> None:
            self.calls.append(name)
            self.now += int(1e6 * (left.pop(0) if len(left) > 1 else left[0]))

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(benchmark.time, "perf_counter_ns", lambda: clock.now)
    return clock


def test_warms_up_before_it_times(clock: Clock) -> None:
    result = BenchmarkRunner(10, 20).run(clock.takes("work", *[50] * 10, 2), "work")
    assert (result.n_warmup, result.n_timed, len(clock.calls)) == (10, 20, 30)
    assert result.times_ms == (2.0,) * 20
    assert (result.mean, result.std, result.min, result.max) == (2, 0, 2, 2)
    assert result.extra["clock"] == "host, perf_counter_ns"
    assert "reduced" not in result.extra


def test_statistics_are_numpys(seed: int) -> None:
    chance = random.Random(seed)
    times = [chance.expovariate(1) for _ in range(137)]
    result = summarize("work", times)
    for percent, value in ((50, result.p50), (95, result.p95), (99, result.p99)):
        assert value == pytest.approx(numpy.percentile(times, percent))
    assert result.mean == pytest.approx(numpy.mean(times))
    assert result.std == pytest.approx(numpy.std(times, ddof=1))


def test_one_timed_call_has_no_spread(clock: Clock) -> None:
    result = BenchmarkRunner(0, 1).run(clock.takes("work", 3), "work")
    assert (result.n_timed, result.std, result.p99) == (1, 0, 3)


def test_a_long_function_is_called_less_often_and_that_is_said(clock: Clock) -> None:
    result = BenchmarkRunner(100, 1000, budget=2.2).run(clock.takes("work", 20), "work")
    assert (result.n_warmup, result.n_timed) == (10, 100)
    assert len(clock.calls) == 110
    assert "100 of 1000" in result.extra["reduced"]
    assert "100 of 1000" in str(result)
    longer = BenchmarkRunner(100, 1000, budget=2.2).run(clock.takes("work", 60_000), "work")
    assert (longer.n_warmup, longer.n_timed) == (3, 5)


def test_synchronising_is_timed_and_flushing_is_not(clock: Clock) -> None:
    runner = BenchmarkRunner(0, 5, synchronize=clock.takes("synchronize", 1), flush=clock.takes("flush", 100))
    assert runner.run(clock.takes("work", 2), "work").times_ms == (3.0,) * 5
    assert clock.calls[-5:-1] == ["flush", "synchronize", "work", "synchronize"]


def test_comparisons_are_interleaved(clock: Clock) -> None:
    compared = BenchmarkRunner(3, 40).compare({"a": clock.takes("a", 2), "b": clock.takes("b", 3)})
    timed = clock.calls[-80:]
    assert all(set(timed[i : i + 2]) == {"a", "b"} for i in range(0, 80, 2))
    assert {timed[i] for i in range(0, 80, 2)} == {"a", "b"}  # each goes first at times
    assert compared.baseline == "a"
    assert (compared.ratios["b"].ratio, compared.ratios["b"].low, compared.ratios["b"].high) == (1.5, 1.5, 1.5)
    assert "b / a: 1.500 [1.500, 1.500]" in str(compared)


def test_the_interval_holds_the_true_ratio_as_often_as_it_says(seed: int) -> None:
    chance, held = random.Random(seed), 0
    for _ in range(400):
        base = tuple(chance.lognormvariate(0, 0.3) for _ in range(60))
        other = tuple(1.2 * chance.lognormvariate(0, 0.3) for _ in range(60))
        ratio = benchmark._ratio(other, base)
        held += ratio.low <= 1.2 <= ratio.high
    assert 0.93 <= held / 400 <= 1.0


def test_peak_memory_of_the_host() -> None:
    runner = BenchmarkRunner(0, 1)
    result = runner.run(lambda: torch.ones(50_000_000, dtype=torch.uint8), "ones", track_memory=True)
    if result.peak_mem_mb is None:
        assert "not available" in result.extra["memory"]
        pytest.skip(result.extra["memory"])
    assert result.peak_mem_mb == pytest.approx(50, rel=0.1)
    assert "resident" in result.extra["memory"]
    assert runner.run(lambda: None, "nothing", track_memory=True).peak_mem_mb == pytest.approx(0, abs=5)
    assert runner.run(lambda: None, "untracked").peak_mem_mb is None


def test_memory_that_is_freed_inside_still_counts() -> None:
    def work() -> int:
        return sum(int(torch.ones(40_000_000, dtype=torch.uint8)[0]) for _ in range(3))

    peak, how = host_peak(work)
    assert peak is None or peak == pytest.approx(40, rel=0.1), how


def test_results_go_to_csv_and_json(clock: Clock, tmp_path: Path) -> None:
    runner = BenchmarkRunner(0, 4)
    runner.run(clock.takes("first", 1, 2, 3, 4, 5, 6, 7), "first, with a comma")
    runner.run(clock.takes("second", 2), "second")
    runner.to_csv(tmp_path / "times.csv")
    with open(tmp_path / "times.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["first, with a comma", "second"]
    assert float(rows[0]["mean"]) == 5.5
    assert "times_ms" not in rows[0]
    text = runner.to_json(tmp_path / "times.json")
    assert (tmp_path / "times.json").read_text() == text
    assert json.loads(text)[0]["times_ms"] == [4, 5, 6, 7]


@pytest.mark.parametrize("options", [{"timed": 0}, {"warmup": -1}, {"budget": 0}], ids=str)
def test_impossible_runs_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(hal.ContractError, match="were given"):
        BenchmarkRunner(**options)


def test_a_comparison_needs_two_functions_and_a_known_baseline() -> None:
    for functions, baseline in (({"a": print}, None), ({"a": print, "b": print}, "c"), ({}, None)):
        with pytest.raises(hal.ContractError, match="two or more"):
            BenchmarkRunner().compare(functions, baseline=baseline)
