"""Which arm serves a request: the one believed best, or a small request on one of which too little is known."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from .estimator import NOTICED_LOAD, Believed, Estimator
from .keys import Keys

#: Exploration: share of the time served that it may cost beyond the best arm; seconds to begin with; and the longest
#: call, in seconds, that is ever made for it. A look at a loaded device that is long due may take twice the share.
SHARE, ALLOWANCE, LONGEST = 0.01, 2e-3, 0.05
#: The seconds to begin with are at most those of this many typical calls.
ALLOWED_CALLS = 20
#: Standard deviations by which an arm must be uncertain to be worth a call, and the spread below which it is known.
OPTIMISM, KNOWN = 2.0, 0.13
#: Calls for which an arm is tried with small requests after it might have served a larger one best.
HOPE_LASTS = 200
#: Calls before which nothing is explored: it is not known yet which are small.
FEWEST = 8
_LEAST, _NOTHING, _log_seconds = 1e-12, Believed(0.0, 0.0, 0.0), itemgetter(0)
#: Calls after which a device believed to be loaded is looked at again, by a cheap call, and then by any small one.
LOOK_AGAIN, LOOK_AT_LAST = 6, 20


class Arm(NamedTuple):
    """A device, or a device with one of its own tilings.

    Attributes:
        name: device id, and the tiling's name where there is one. device: the id.
        seconds: the device's own estimate. energy: joules and the rank of their fidelity; None where none is stated.
        learns: whether measured times say anything: the host's time of a simulator is not the device's.
    """

    name: str
    device: str
    seconds: float
    energy: float | None = None
    energy_rank: int = 0
    error: float = 0.0
    learns: bool = True
    tiling: Any = None


class Ranked(NamedTuple):
    """An arm with what is believed of it: expected log seconds, load included, and what that is made of."""

    log_seconds: float
    arm: Arm
    believed: Believed
    load: float

    @property
    def seconds(self) -> float:
        return math.exp(self.log_seconds)

    def text(self) -> str:
        """For `explain`: "cpu:0 1.2 ms (estimate 0.4 ms, learned x2.9 of 31 calls, load x1.1)"."""
        log_seconds, arm, (residual, _, seen), load = self
        learned = f", learned x{math.exp(residual):.3g} of {seen:.0f} calls" if seen or residual else ""
        loaded = f", load x{math.exp(load):.3g}" if abs(load) > 0.05 else ""
        shown = f"{arm.name} {1e3 * math.exp(log_seconds):.3g} ms"
        return f"{shown} (estimate {1e3 * arm.seconds:.3g} ms{learned}{loaded})"


class Choice(NamedTuple):
    """What was chosen. best: the arm believed best for the objective. why: "", or why another one is tried."""

    chosen: Ranked
    best: Ranked
    ranked: list[Ranked]
    why: str = ""
    aim: str = "least time"


class Chooser:
    """Chooses arms by an `Estimator`, and keeps exploration within its budget.

    Attributes:
        share: of the time served that exploring may cost. calls: that were observed. served: their seconds.
        spent, explored: seconds beyond the best arm's that exploring cost, and how many calls. typical: median log
            seconds of the newest calls.
    """

    def __init__(self, estimator: Estimator, share: float = SHARE) -> None:
        self.estimator, self.share = estimator, share
        self.calls, self.explored, self.served, self.spent = 0, 0, 0.0, 0.0
        self.typical: float | None = None
        self._hoped: dict[str, int] = {}
        self._recent: deque[float] = deque(maxlen=64)
        self._unsorted = 0

    def rank(self, keys: Keys, arms: Sequence[Arm]) -> list[Ranked]:
        """Every arm, the fastest believed first."""
        found, believe, loads = list[Ranked](), self.estimator.believe, self.estimator.loads
        for arm in arms:
            seconds = arm.seconds if arm.seconds > _LEAST else _LEAST
            if arm.learns:
                believed, load = believe(arm.name, keys, seconds), loads.get(arm.device)
                value = 0.0 if load is None else load.value
            else:
                believed, value = _NOTHING, 0.0
            found.append(Ranked(math.log(seconds) + believed.residual + value, arm, believed, value))
        found.sort(key=_log_seconds)
        return found

    def choose(
        self,
        keys: Keys,
        arms: Sequence[Arm],
        objective: str = "time",
        deadline: float | None = None,
        *,
        may_explore: bool = True,
    ) -> Choice:
        """The arm for a request. `arms` hold those that may serve it, and nothing else is ever chosen."""
        ranked = self.rank(keys, arms)
        best, aim = _best(ranked, objective, deadline)
        if not may_explore or objective != "time" or deadline is not None or len(ranked) == 1:
            return Choice(best, best, ranked, aim=aim)
        for each in ranked[1:]:
            if each.load > NOTICED_LOAD:
                if each.log_seconds - each.load < best.log_seconds:
                    self.estimator.load(each.arm.device).missed = self.calls
            elif each.believed.spread > KNOWN and each.arm.learns and _hopeful(each) < best.log_seconds:
                self._hoped[each.arm.name] = self.calls
        # A call above the median is never explored with.
        small = self.typical is not None and best.log_seconds <= self.typical + 0.05
        tried = self._worth_trying(ranked) if small else None
        return Choice(best, best, ranked, aim=aim) if tried is None else Choice(tried[0], best, ranked, tried[1], aim)

    def quick(self, keys: Keys, stated: Sequence[tuple[str, float]]) -> tuple[str, float, str] | None:
        """What `choose` chooses for least time among devices, where nothing could be explored: (device, seconds, why).

        None where too little is known of a device, or one is loaded: `choose` decides. stated: (id, own estimate).
        """
        estimator = self.estimator
        loads, expected, found = estimator.loads, estimator.expected, list[tuple[float, str, float, float, float]]()
        for device, estimate in stated:
            load, known = loads.get(device), expected(device, keys, estimate)
            value = 0.0 if load is None else load.value
            if known is None or value > NOTICED_LOAD:
                return None
            found.append((known[0] * math.exp(value), device, estimate, *known))
        found.sort()
        seconds, device, estimate, time, calls = found[0]
        learned = f"learned x{time / estimate:.3g} of {calls:.0f} calls"
        why = f"least time believed: {device} {1e3 * seconds:.3g} ms ({learned})"
        behind = f"; before {found[1][1]} {1e3 * found[1][0]:.3g} ms" if len(found) > 1 else ""
        return device, seconds, why + behind

    def _worth_trying(self, ranked: list[Ranked]) -> tuple[Ranked, str] | None:
        best = ranked[0]
        for each in sorted(ranked[1:], key=_hopeful):
            if not each.arm.learns:
                continue
            extra = each.seconds - best.seconds
            if each.seconds > LONGEST:
                continue
            if each.load > NOTICED_LOAD:
                load = self.estimator.load(each.arm.device)
                cheap = self.typical is not None and each.log_seconds < self.typical
                waited, share = self.calls - load.seen, self.share
                if waited >= LOOK_AT_LAST:
                    share *= 2
                due = waited >= (LOOK_AGAIN if cheap else LOOK_AT_LAST)
                if load.missed >= load.seen and due and self._affords(extra, share):
                    return each, f"looking whether the load of {each.arm.device} has gone"
                continue
            # Hope for a large request is tried with a small one.
            hoped = self.calls - self._hoped.get(each.arm.name, -HOPE_LASTS) < HOPE_LASTS
            if each.believed.spread > KNOWN and hoped and self._affords(extra, self.share):
                return each, f"seen {each.believed.seen:.0f} calls of this kind on {each.arm.name}"
        return None

    def _affords(self, extra: float, share: float) -> bool:
        begin = min(ALLOWANCE, ALLOWED_CALLS * math.exp(self.typical or 0.0))
        return self.spent + extra <= begin + share * self.served

    def observe(
        self,
        keys: Keys,
        arm: Arm,
        best: float,
        log_seconds: float,
        explored: bool,
        calls: int = 1,
        before: Believed | None = None,
    ) -> None:
        """Learn from `calls` calls of an arm.

        Args:
            best: believed log seconds of the best arm when it was chosen. log_seconds: mean of the measured ones.
            before: what the estimator believes now, where the caller knows.
        """
        self.calls += calls
        seconds = math.exp(log_seconds)
        self.served += calls * seconds
        if explored:
            self.explored += calls
            self.spent += calls * max(seconds - math.exp(best), 0.0)
        self._recent.append(log_seconds)
        self._unsorted += 1
        if self._unsorted >= 8 and len(self._recent) >= FEWEST:
            self.typical, self._unsorted = sorted(self._recent)[len(self._recent) // 2], 0
        if arm.learns:
            estimate = max(arm.seconds, _LEAST)
            ratio = log_seconds - math.log(estimate)
            self.estimator.learn(arm.name, arm.device, keys, estimate, ratio, calls, before)
            self.estimator.load(arm.device).seen = self.calls


def _hopeful(ranked: Ranked) -> float:
    """Log seconds that the arm may well have: uncertainty counts in its favour."""
    return ranked.log_seconds - OPTIMISM * ranked.believed.spread


def _best(ranked: list[Ranked], objective: str, deadline: float | None) -> tuple[Ranked, str]:
    if objective == "error":
        return min(ranked, key=lambda r: (r.arm.error, r.log_seconds)), "least error"
    if objective == "energy":
        return _least_energy(ranked), "least energy"
    if deadline is not None:
        in_time = [r for r in ranked if r.log_seconds + r.believed.spread <= math.log(deadline)]
        if not in_time:
            return ranked[0], f"no device is expected within {1e3 * deadline:.3g} ms, the fastest"
        return _least_energy(in_time), f"least energy within {1e3 * deadline:.3g} ms"
    return ranked[0], "least time"


def _least_energy(ranked: list[Ranked]) -> Ranked:
    """Joules of one fidelity alone are compared, the most real that is stated; else the fastest."""
    stated = [r for r in ranked if r.arm.energy is not None]
    rank = min((r.arm.energy_rank for r in stated), default=0)
    return min((r for r in stated if r.arm.energy_rank == rank), key=lambda r: r.arm.energy or 0.0, default=ranked[0])
