"""Timing that can be trusted: device events or a synchronised host clock, interleaved comparisons, and their spread."""

from __future__ import annotations

import csv
import ctypes
import importlib
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from ..errors import ContractError

Call = Callable[[], Any]
_PILOT, _LEAST = 3, 5  # calls that tell how long one takes; fewest timed ones


@attrs.frozen(kw_only=True)
class BenchmarkResult:
    """How long a function took.

    Attributes:
        n_warmup, n_timed: calls made before and under the clock.
        times_ms: every timed call, in the order they ran; mean to p99: over them, in milliseconds.
        peak_mem_mb: most memory held by one call beyond what was held before, in 10^6 bytes; None where not tracked.
        extra: "clock" and "memory" say how both were measured; "reduced" why there are fewer calls than asked for.
    """

    name: str
    n_warmup: int
    n_timed: int
    times_ms: tuple[float, ...]
    mean: float
    std: float
    min: float
    max: float
    p50: float
    p95: float
    p99: float
    peak_mem_mb: float | None = None
    extra: Mapping[str, Any] = attrs.field(factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return attrs.asdict(self)

    def __str__(self) -> str:
        memory = "" if self.peak_mem_mb is None else f", peak {self.peak_mem_mb:.1f} MB"
        note = f" ({self.extra['reduced']})" if "reduced" in self.extra else ""
        return (
            f"{self.name}: p50 {self.p50:.4g} ms, p95 {self.p95:.4g}, p99 {self.p99:.4g}, mean {self.mean:.4g} "
            f"± {self.std:.2g} over {self.n_timed} calls{memory}{note}"
        )


@attrs.frozen
class Ratio:
    """Time of a function over time of the baseline: the median of the rounds' ratios, and its 95% confidence
    interval.
    """

    ratio: float
    low: float
    high: float


@attrs.frozen(kw_only=True)
class Comparison:
    """Functions timed side by side. `ratios` holds every function but the baseline; below 1 is faster."""

    baseline: str
    results: Mapping[str, BenchmarkResult]
    ratios: Mapping[str, Ratio]

    def __str__(self) -> str:
        ratios = [f"{n} / {self.baseline}: {r.ratio:.3f} [{r.low:.3f}, {r.high:.3f}]" for n, r in self.ratios.items()]
        return "\n".join([*map(str, self.results.values()), *ratios])


class BenchmarkRunner:
    """Times functions of no arguments.

    Args:
        warmup, timed: calls before and under the clock.
        device: torch device that the work runs on. "cuda" is timed by device events, everything else by the host's
            clock.
        synchronize: called around each timed call, for devices whose work goes on after the call returns.
        flush: called before each timed call and not timed, for example to empty a cache.
        budget: seconds for one function, warm-up included; a longer one gets fewer calls, and `extra` says so.
    """

    def __init__(
        self,
        warmup: int = 100,
        timed: int = 1000,
        *,
        device: str = "cpu",
        synchronize: Call | None = None,
        flush: Call | None = None,
        budget: float = 30.0,
    ) -> None:
        if warmup < 0 or timed < 1 or budget <= 0:
            raise ContractError(f"warmup {warmup}, timed {timed}, budget {budget} were given: use >= 0, >= 1 and > 0")
        self.warmup, self.timed, self.budget, self.device = warmup, timed, budget, device
        self._events = device.partition(":")[0] == "cuda"
        self._flush = flush or (lambda: None)
        self._cuda: Any = importlib.import_module("torch").cuda if self._events else None
        self._synchronize = synchronize or (lambda: self._cuda.synchronize() if self._events else None)
        self.results: list[BenchmarkResult] = []

    def run(self, fn: Call, name: str, track_memory: bool = False) -> BenchmarkResult:
        """Time one function; memory is measured in one more call, which is not timed."""
        return self._measure({name: fn}, track_memory)[name]

    def compare(
        self, functions: Mapping[str, Call], *, baseline: str | None = None, track_memory: bool = False
    ) -> Comparison:
        """Time functions interleaved: each round calls every one once, in random order.

        Args:
            functions: by name. baseline: the name that the ratios divide by; None for the first.

        Raises:
            ContractError: fewer than two functions, or an unknown baseline.
        """
        base = baseline if baseline is not None else next(iter(functions), "")
        if len(functions) < 2 or base not in functions:
            raise ContractError(
                f"{list(functions)} with baseline {base!r} were given: pass two or more, one of that name"
            )
        results = self._measure(functions, track_memory)
        ratios = {n: _ratio(r.times_ms, results[base].times_ms) for n, r in results.items() if n != base}
        return Comparison(baseline=base, results=results, ratios=ratios)

    def _measure(self, functions: Mapping[str, Call], track_memory: bool) -> dict[str, BenchmarkResult]:
        # The very first call may compile or allocate; the last of the pilots tells how many calls the budget allows.
        longest = max([self._host_ms(fn) for _ in range(_PILOT)][-1] / 1e3 for fn in functions.values())
        share = min(self.budget / ((self.warmup + self.timed) * longest), 1.0)
        warmup, timed = max(int(self.warmup * share), _PILOT), max(int(self.timed * share), min(_LEAST, self.timed))
        extra = {"clock": "device events" if self._events else "host, perf_counter_ns"}
        if timed < self.timed:
            why = f"one takes {longest:.3g} s, the budget is {self.budget:g} s"
            extra["reduced"] = f"{timed} of {self.timed} timed calls: {why}"
        for fn in list(functions.values()) * (warmup - _PILOT):
            fn()
        order, clocked = random.Random(0), {name: list[Any]() for name in functions}
        for _ in range(timed):
            for name in order.sample(list(functions), len(functions)):
                clocked[name].append(
                    self._between_events(functions[name]) if self._events else self._host_ms(functions[name])
                )
        self._synchronize()
        made: dict[str, BenchmarkResult] = {}
        for name, fn in functions.items():
            peak, how = self._peak(fn) if track_memory else (None, "not tracked")
            times = [start.elapsed_time(stop) for start, stop in clocked[name]] if self._events else clocked[name]
            made[name] = summarize(name, times, n_warmup=warmup, peak_mem_mb=peak, extra=extra | {"memory": how})
        self.results += made.values()
        return made

    def _host_ms(self, fn: Call) -> float:
        self._flush()
        self._synchronize()
        begun = time.perf_counter_ns()
        fn()
        self._synchronize()
        return (time.perf_counter_ns() - begun) / 1e6

    def _between_events(self, fn: Call) -> tuple[Any, Any]:
        """Two events around the call, to be read when the device has passed them."""
        self._flush()
        start, stop = (self._cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        stop.record()
        return start, stop

    def _peak(self, fn: Call) -> tuple[float | None, str]:
        if self._events:
            held = self._cuda.memory_allocated(self.device)
            self._cuda.reset_peak_memory_stats(self.device)
            fn()
            return (self._cuda.max_memory_allocated(self.device) - held) / 1e6, "torch's CUDA allocator, most allocated"
        return host_peak(fn)

    def to_csv(self, path: str | Path) -> None:
        """All results so far, one row each, without the single times."""
        columns = [field.name for field in attrs.fields(BenchmarkResult) if field.name != "times_ms"]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(result.to_dict() | {"extra": json.dumps(dict(result.extra))} for result in self.results)

    def to_json(self, path: str | Path | None = None) -> str:
        """All results so far with every single time, as text, and into a file where a path is given."""
        text = json.dumps([result.to_dict() for result in self.results], indent=1)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text


def summarize(name: str, times_ms: Iterable[float], *, n_warmup: int = 0, **fields: Any) -> BenchmarkResult:
    """A result from times in milliseconds; percentiles are interpolated; `fields` are the rest of BenchmarkResult's."""
    times = tuple(times_ms)
    percent = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
    return BenchmarkResult(
        name=name,
        n_warmup=n_warmup,
        n_timed=len(times),
        times_ms=times,
        mean=statistics.fmean(times),
        min=min(times),
        max=max(times),
        std=statistics.stdev(times) if len(times) > 1 else 0.0,
        p50=percent[49],
        p95=percent[94],
        p99=percent[98],
        **fields,
    )


def _ratio(times: tuple[float, ...], baseline: tuple[float, ...]) -> Ratio:
    """Median of paired ratios. Its interval comes from order statistics (binomial, p = 1/2): no shape is assumed.

    Source: Conover, Practical Nonparametric Statistics, 3rd edition, section 3.2.
    """
    ratios = sorted(t / b if b > 0 else math.inf for t, b in zip(times, baseline, strict=True))
    reach = 0.98 * math.sqrt(len(ratios))  # 1.96 standard deviations of Binomial(n, 1/2) are 0.98 sqrt(n)
    low, high = math.floor(len(ratios) / 2 - reach) - 1, math.ceil(len(ratios) / 2 + reach)
    return Ratio(statistics.median(ratios), ratios[max(low, 0)], ratios[min(high, len(ratios) - 1)])


def host_peak(fn: Call) -> tuple[float | None, str]:
    """Most resident memory of one call beyond what was resident before, in 10^6 bytes, and how it was measured."""
    try:
        import resource  # not on every system

        ctypes.CDLL(None).malloc_trim(0)  # freed blocks that stay resident would hide what the call takes again
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    except (ImportError, OSError, AttributeError, TypeError):
        return None, "not available: no resident high-water mark on this system"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fn()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6, "resident set, high-water mark"


def allocator_peak(fn: Call, device: str = "cpu") -> int:
    """The most bytes that one call holds at once beyond what was held before, counted by torch's allocator.

    On the CPU the events of torch.profiler are summed; on CUDA it is torch.cuda.max_memory_allocated. Memory that does
    not come from torch's allocator is not seen.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device.partition(":")[0] == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - held)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        fn()
    results: Any = profiled.profiler
    events = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event[0])
    return int(max([0, *itertools.accumulate(nbytes for _, nbytes in events)]))
