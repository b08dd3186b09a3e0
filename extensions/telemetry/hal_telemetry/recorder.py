"""What ran: totals of every series, and a ring of the newest calls. Calls are only noted; the sums are made later."""

from __future__ import annotations

import os
import sys
import threading
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from threading import get_ident
from time import perf_counter, time
from typing import Any, NamedTuple

from hal_core import Decision, Fidelity, hookimpl
from hal_core.plugin_api import registry

#: Upper bounds of the histogram of seconds, 1 - 2 - 5 from ten microseconds to fifty seconds.
SECONDS = tuple(float(f"{digit}e{power}") for power in range(-5, 2) for digit in (1, 2, 5))
#: Upper bounds of the histogram of measured time over estimated time.
RATIOS = (0.125, 0.25, 0.5, 0.8, 1.0, 1.25, 2.0, 4.0, 8.0)
#: Calls that are noted before their sums are made: small, so that no single call waits long for the others' sums.
BATCH = 256
MOST_CALLS, MOST_SERIES, MOST_DECISIONS = 65_536, 1_000, 4_096
OTHER = "other"  # the caller of every series beyond MOST_SERIES


class Call(NamedTuple):
    """A call that ended.

    Attributes:
        decision: why it ran where it ran. seconds: its duration, as `hal_call` gives it.
        end: `time.perf_counter()` when it was reported. thread: the reporting thread's identifier.
    """

    decision: Decision
    seconds: float
    end: float
    thread: int


def _add(counts: list[int], bounds: Sequence[float], ordered: list[float]) -> None:
    """Count ordered values by upper bounds, the last place beyond them. Bounds are looked up, as they are fewer."""
    last, before = bisect_left(bounds, ordered[-1]), 0
    for place in range(bisect_left(bounds, ordered[0]), last):
        upto = bisect_right(ordered, bounds[place])
        counts[place] += upto - before
        before = upto
    counts[last] += len(ordered) - before


class Series:
    """Sums over the calls of one device and caller.

    Attributes:
        calls, seconds: their number and total duration. buckets: calls by the bounds SECONDS, the last one beyond.
        ratios: calls by the bounds RATIOS of measured over estimated time, of devices that are not simulated.
        ratio_sum: the sum of these ratios. error_sum: the sum of |measured - estimated|, in seconds.
    """

    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0
        self.buckets, self.ratios = [0] * (len(SECONDS) + 1), [0] * (len(RATIOS) + 1)
        self.ratio_sum = self.error_sum = 0.0

    def add(self, durations: list[float], estimated: float) -> None:
        """Add calls of one decision: their durations in order, and what each was estimated to take, 0 for nothing."""
        total, count = sum(durations), len(durations)
        self.calls += count
        self.seconds += total
        _add(self.buckets, SECONDS, durations)
        if estimated:
            below = bisect_right(durations, estimated)
            _add(self.ratios, [ratio * estimated for ratio in RATIOS], durations)
            self.ratio_sum += total / estimated
            self.error_sum += total - 2 * sum(durations[:below]) + (2 * below - count) * estimated

    def quantile(self, share: float) -> float:
        """The upper bound of the bucket that holds the quantile, in seconds; 0 without calls, inf beyond the last."""
        below, wanted = 0, share * self.calls
        for bound, count in zip((*SECONDS, float("inf")), self.buckets, strict=True):
            below += count
            if below >= wanted and below:
                return bound
        return 0.0


class Recorder:
    """Notes calls and decisions, and sums them when it is asked, or after BATCH calls. Thread-safe.

    Attributes:
        calls: the fields of the newest `Call`s, oldest first. dropped: calls that left it. series: sums by (device,
            caller).
        decisions: by (device or "none", origin). refusals: by (device, code). errors: by (device, type) of what
            sessions raised. denied: access denials by kind. audited: records of the audit log, "written" and "failed".
    """

    def __init__(self) -> None:
        self._pending = deque[tuple[Decision, float, float, int]]()
        self.reset()
        self.observe = self._observer()
        os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        """Forget everything; in a child process too, which made none of its parent's calls."""
        self._lock = threading.RLock()
        self._pending.clear()
        self.calls: deque[tuple[Decision, float, float, int]] = deque(maxlen=MOST_CALLS)
        self.series: dict[tuple[str, str], Series] = {}
        self.decisions, self.refusals, self.errors = Counter[Any](), Counter[Any](), Counter[Any]()
        self.denied, self.audited, self.dropped = Counter[str](), Counter[str](written=0, failed=0), 0
        self._known: dict[int, tuple[Series, float, Decision]] = {}
        self.started, self.clock = time(), perf_counter()

    def _observer(self) -> Callable[[Decision, float], None]:
        """`observe(decision, seconds)`, which notes a call that ended: the hook itself, so that little is paid."""
        pending, note, drain, clock, thread = self._pending, self._pending.append, self.drain, perf_counter, get_ident

        def hal_call(decision: Decision, seconds: float) -> None:
            note((decision, seconds, clock(), thread()))
            if len(pending) >= BATCH:
                drain()

        return hookimpl(hal_call)

    def drain(self) -> None:
        """Add the noted calls to the sums, those of one decision together."""
        with self._lock:
            pending, groups = self._pending, defaultdict[int, list[float]](list)
            batch = [pending.popleft() for _ in range(len(pending))]
            self.dropped += max(0, len(self.calls) + len(batch) - MOST_CALLS)
            self.calls.extend(batch)
            for decision, seconds, _, _ in batch:
                groups[id(decision)].append(seconds)
            new = {id(fields[0]): fields[0] for fields in batch} if groups.keys() - self._known.keys() else {}
            for key, durations in groups.items():
                series, estimated, _ = self._known.get(key) or self._sums_of(new[key])
                series.add(sorted(durations), estimated)

    def _sums_of(self, decision: Decision) -> tuple[Series, float, Decision]:
        """(series, estimated seconds or 0, the decision, which is kept so that its identity stays its own)."""
        winner, caller = decision.winner, decision.policy.caller or ""
        if (winner.device.id, caller) not in self.series and len(self.series) >= MOST_SERIES:
            caller = OTHER
        series = self.series.setdefault((winner.device.id, caller), Series())
        # A simulator's estimate is the simulated device's time, and the call's duration is the host's.
        compared = winner.estimate is not None and winner.device.fidelity is not Fidelity.SIMULATED
        if len(self._known) >= MOST_DECISIONS:
            self._known.clear()
        middle = winner.estimate.time.middle if compared and winner.estimate else 0.0
        found = self._known[id(decision)] = (series, middle, decision)
        return found

    def decided(self, decision: Decision) -> None:
        """Count a decision and every refusal in it."""
        with self._lock:
            self.decisions[decision.chosen or "none", decision.origin] += 1
            self.refusals.update(
                (c.device.id, str(refusal.code)) for c in decision.candidates for refusal in c.refusals
            )

    def count(self, what: Counter[Any], key: Any) -> None:
        """Add one to a counter of this recorder."""
        with self._lock:
            what[key] += 1


#: The process's recorder.
recorder = Recorder()


def memory() -> Iterator[tuple[str, Any]]:
    """(device id, its `MemoryStats`) of every open session whose memory manager answers."""
    for entry in registry.entries():
        for device_id, session in list(entry.sessions.items()):
            try:
                yield device_id, session.memory.stats()
            except Exception as error:  # a lost device must not hide the others' figures
                failures[device_id] = f"{type(error).__name__}: {error}"


#: Devices whose counters could not be read, and why.
failures: dict[str, str] = {}


def routing() -> tuple[dict[str, str], Counter[str]]:
    """Of hal_router: the state of breakers, and how many requests wait, by device; empty where it is not imported."""
    router: Any = sys.modules.get("hal_router")
    state: dict[str, Any] = router.state() if hasattr(router, "state") else {}
    queued = Counter[str]()
    for pool in state.get("pools", ()):
        queued.update(pool["queued"])
    return {device: facts["state"] for device, facts in state.get("breakers", {}).items()}, queued


def snapshot(newest: int = 20) -> dict[str, Any]:
    """Everything that was recorded, as plain data.

    Args:
        newest: how many of the newest calls to include.

    Returns:
        "series": a list with device, caller, calls, seconds, p50, p99 (upper bounds, in seconds) and ratio, the mean of
        measured over estimated time (None where nothing was compared); "calls": the newest first; "memory" by device;
        "refusals", "decisions", "breakers" and "queued" of hal_router, "plugins" that failed, "dropped" calls, and
        "uptime" in seconds.
    """
    recorder.drain()
    rows = []
    with recorder._lock:
        for (device, caller), series in sorted(recorder.series.items()):
            compared = sum(series.ratios)
            row = {"device": device, "caller": caller, "calls": series.calls, "seconds": series.seconds}
            row |= {"p50": series.quantile(0.5), "p99": series.quantile(0.99)}
            rows.append(row | {"ratio": series.ratio_sum / compared if compared else None})
        calls = [Call(*fields) for fields in list(recorder.calls)[: -newest - 1 : -1]]
        refusals = [{"device": d, "code": c, "count": n} for (d, c), n in sorted(recorder.refusals.items())]
        decisions = [{"device": d, "origin": o, "count": n} for (d, o), n in sorted(recorder.decisions.items())]
    breakers, queued = routing()
    failed = [p.failure for p in registry.plugin_list() if p.failure is not None and p.failure.stage != "disabled"]
    return {
        "series": rows,
        "calls": [
            {
                "device": call.decision.chosen,
                "caller": call.decision.policy.caller or "",
                "seconds": call.seconds,
                "request": call.decision.request.describe(),
                "origin": call.decision.origin,
            }
            for call in calls
        ],
        "memory": {device: stats._asdict() for device, stats in memory()},
        "refusals": refusals,
        "decisions": decisions,
        "breakers": breakers,
        "queued": dict(queued),
        "plugins": [{"plugin": f.name, "stage": f.stage, "message": f.message} for f in failed],
        "dropped": recorder.dropped,
        "uptime": time() - recorder.started,
    }
