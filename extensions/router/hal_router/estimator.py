"""How long a request takes on an arm: the device's own estimate, a learned residual on log time, and a load term.

An arm is a device, or a device with one of its own tilings. The logarithm of a call's time is modelled as

    log(time) = log(fixed + factor * estimate) + residual(size) + residual(shape) + load(device)

`fixed` and `factor` are fitted by least squares of the relative error for each device, arm and kind of request, each
shrunk towards the level above it (ridge regression around the parent's line): most estimates miss a host's overhead, a
constant of each call, or are off by a factor, and a line tells the two apart from a few calls of different sizes. The
residuals are shrunk means, as in empirical Bayes estimation with normal means. The load of a device moves fast and is
learned from the newest calls; while it is high the rest learns little, so that another tenant is not taken for the
device itself.

Times are seconds. Nothing here imports torch or reads a clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from .keys import Keys
from .line import MEMORY, SHRINKAGE, Line, is_number

#: What one call alone may be wrong by beside noise, in log seconds: a cold start, or an interruption.
OUTLIER = 0.6
#: Standard deviation of log(time / estimate) of a device of which nothing was seen: estimates are within about a
#: factor of 6, two standard deviations.
PRIOR_SPREAD = 0.9
#: Share of a size's residual that is taken: the shape says more, and the line holds for other sizes too.
SIZE_SHARE = 0.6
#: Share of an innovation that the load follows, and innovations whose median counts: two outliers of five move nothing.
#: (Of three, two outliers that meet by chance were taken for a load several times in 2,000 calls.)
LOAD_GAIN, LOAD_CALLS = 0.6, 5
#: A load beyond this is taken for one: the residual learns less, and the device is looked at again.
NOTICED_LOAD = 0.25
#: Calls of a kind from which on it is known.
WELL_KNOWN = 8
_MOST_SHAPES = 10_000


class Believed(NamedTuple):
    """log(time / estimate), load apart, and its standard deviation; how many calls of this kind were seen."""

    residual: float
    spread: float
    seen: float


class Load:
    """The fast term of one device.

    Attributes:
        value: log of the factor by which the device is slower than usual. seen, missed: the router's call count when
            the device last ran, and when it last would have been the best but for its load.
        calls: that it ran. error: recent mean of |log(measured / believed)|.
    """

    __slots__ = ("_recent", "calls", "error", "missed", "seen", "value")

    def __init__(self) -> None:
        self.value, self.seen, self.missed, self.calls, self.error = 0.0, 0, -1, 0, 0.0
        self._recent: list[float] = []

    def follow(self, innovation: float) -> None:
        """Move with the median of the newest innovations: log(measured) - log(believed), load included."""
        self._recent = [*self._recent[1 - LOAD_CALLS :], innovation]
        full = len(self._recent) == LOAD_CALLS
        middle = sorted(self._recent)[LOAD_CALLS // 2] if full else min(self._recent, key=abs)
        self.error += 0.1 * (abs(innovation) - self.error)
        step = LOAD_GAIN * middle if abs(middle) > 0.15 else 0.1 * middle
        if self.value > NOTICED_LOAD and innovation < -NOTICED_LOAD:
            step = max(innovation, -self.value)  # no call is much faster than its device by accident
        self.value = min(max(self.value + step, -3.0), 3.0)
        self._recent = [each - step for each in self._recent]

    def forget(self) -> None:
        """Nothing is known any more of how busy the device is."""
        self.value, self._recent = 0.0, []


class Known:
    """What was learned of one arm and one kind of request: a line, and [calls, mean of log(time / estimate)] by size
    and by shape.
    """

    __slots__ = ("line", "shapes", "sizes")

    def __init__(self) -> None:
        self.line, self.sizes, self.shapes = Line(), dict[int, list[float]](), dict[tuple[int, ...], list[float]]()


class Estimator:
    """Residuals by arm, and loads by device.

    Attributes:
        devices: lines that all arms of a device share. arms: each arm's. kinds: by arm and kind of request.
        loads: by device id. version: changes with everything that is learned but loads.
    """

    def __init__(self) -> None:
        self.devices, self.arms = dict[str, Line](), dict[str, Line]()
        self.kinds: dict[str, dict[str, Known]] = {}
        self.loads: dict[str, Load] = {}
        self.version, self._shapes = 0, 0

    def load(self, device: str) -> Load:
        found = self.loads.get(device)
        if found is None:
            found = self.loads[device] = Load()
        return found

    def believe(self, arm: str, keys: Keys, estimate: float) -> Believed:
        """What is believed of a request on an arm whose own estimate it is, in seconds; the device's load apart."""
        kinds = self.kinds.get(arm)
        known = None if kinds is None else kinds.get(keys[0])
        if known is None:
            line = self.arms.get(arm)
            if line is not None:
                spread = PRIOR_SPREAD * (0.5 + 0.5 * SHRINKAGE / (line.calls + SHRINKAGE))
            else:
                line, spread = self.devices.get(arm.partition(" ")[0]), 0.6 * PRIOR_SPREAD
                if line is None:
                    return Believed(0.0, PRIOR_SPREAD, 0.0)
            return Believed(math.log(line.fixed / estimate + line.factor), spread, 0.0)
        line, (_, size, shape) = known.line, keys
        calls = line.calls
        residual = math.log(line.fixed / estimate + line.factor)
        spread = 0.35 * PRIOR_SPREAD * SHRINKAGE / (calls + SHRINKAGE) + OUTLIER / max(calls, 1.0) ** 2
        # Beyond the estimates that were met a line says less.
        near = calls / (calls + SHRINKAGE)
        if not line.low <= estimate <= line.high:
            near *= min(estimate / line.low, line.high / estimate)
        residual, share = _refined(known, size, shape, residual)
        near = max(near, share)
        return Believed(residual, spread + 0.15 * PRIOR_SPREAD * (1.0 - near) + 0.02, calls)

    def expected(self, arm: str, keys: Keys, estimate: float) -> tuple[float, float] | None:
        """(seconds expected of a request on an arm without load, calls of its kind), as `believe` has them.

        None where a call might be worth making to know more: below `WELL_KNOWN` calls, or beyond their estimates.
        """
        kinds = self.kinds.get(arm)
        known = None if kinds is None else kinds.get(keys[0])
        if known is None:
            return None
        line, sizes, (_, size, shape) = known.line, known.sizes, keys
        if line.calls < WELL_KNOWN or not line.low <= estimate <= line.high:
            return None
        time = line.fixed + line.factor * estimate
        if size in sizes or size - 1 in sizes or size + 1 in sizes or shape in known.shapes:
            time = estimate * math.exp(_refined(known, size, shape, math.log(time / estimate))[0])
        return time, line.calls

    def learn(
        self,
        arm: str,
        device: str,
        keys: Keys,
        estimate: float,
        ratio: float,
        calls: int = 1,
        before: Believed | None = None,
    ) -> None:
        """Learn from `calls` calls whose mean log(time / estimate) was `ratio`. before: what `believe` gives now, where
        the caller knows.
        """
        load = self.load(device)
        before = before or self.believe(arm, keys, estimate)
        self.version += 1
        innovation = ratio - before.residual - load.value
        load.calls += calls
        fresh = before.seen < 3.0  # the residual is not known yet: it learns, the load waits
        if not fresh:
            load.follow(innovation)
        elif load.value:
            load.follow(0.25 * innovation)
        trust = 1.0 if fresh else math.exp(-abs(load.value) / NOTICED_LOAD)
        limit = 3.0 if fresh else 0.5  # an outlier of a known arm moves little
        seen = before.residual + min(max(ratio - load.value - before.residual, -limit), limit)
        weight = min(calls * trust, MEMORY)
        if weight < 1e-6:
            return
        kinds = self.kinds.setdefault(arm, {})
        known = kinds.get(keys.kind)
        if known is None:
            known = kinds[keys.kind] = Known()
        time, fixed, factor = estimate * math.exp(seen), 0.0, 1.0
        for line in (self.devices.setdefault(device, Line()), self.arms.setdefault(arm, Line()), known.line):
            line.learn(estimate, time, weight, fixed, factor)
            fixed, factor = line.fixed, line.factor
        if keys.shape not in known.shapes:
            self._shapes += 1
            if self._shapes > _MOST_SHAPES:
                self._shrink()
        for node in (known.sizes.setdefault(keys.size, [0.0, 0.0]), known.shapes.setdefault(keys.shape, [0.0, 0.0])):
            node[0] = min(node[0] + weight, MEMORY)
            node[1] += (seen - node[1]) * weight / node[0]

    def _every(self) -> Iterator[Known]:
        return (known for kinds in self.kinds.values() for known in kinds.values())

    def _shrink(self) -> None:
        """Drop the shapes that were seen least."""
        counts = sorted(node[0] for known in self._every() for node in known.shapes.values())
        least = counts[len(counts) // 2]
        for known in self._every():
            known.shapes = {shape: node for shape, node in known.shapes.items() if node[0] > least}
        self._shapes = sum(len(known.shapes) for known in self._every())

    def forget(self, devices: Iterable[str]) -> None:
        """Drop what was learned of some devices, for example after another driver was installed."""
        for device in devices:
            self.loads.pop(device, None)
            self.devices.pop(device, None)
            for arm in [arm for arm in self.arms if arm.partition(" ")[0] == device]:
                del self.arms[arm]
                self.kinds.pop(arm, None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; loads are of the moment and not kept."""
        return {
            "devices": {device: line.to_list() for device, line in self.devices.items()},
            "arms": {
                arm: {
                    "line": line.to_list(),
                    "kinds": {
                        kind: {
                            "line": known.line.to_list(),
                            "sizes": _rows(known.sizes),
                            "shapes": _rows({" ".join(map(str, shape)): node for shape, node in known.shapes.items()}),
                        }
                        for kind, known in self.kinds[arm].items()
                    },
                }
                for arm, line in self.arms.items()
            },
        }

    def read(self, data: Any) -> None:
        """Take `to_dict`'s data. Raises ValueError where it is none, and then takes nothing."""
        found = Estimator()
        try:
            found.devices = {str(device): Line.read(row) for device, row in data["devices"].items()}
            for arm, row in data["arms"].items():
                found.arms[arm], kinds = Line.read(row["line"]), found.kinds.setdefault(arm, {})
                for kind, each in row["kinds"].items():
                    known = kinds[kind] = Known()
                    known.line = Line.read(each["line"])
                    known.sizes = {int(size): _node(node) for size, node in each["sizes"].items()}
                    known.shapes = {
                        tuple(map(int, shape.split())): _node(node) for shape, node in each["shapes"].items()
                    }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{str(data)[:80]} holds no belief ({error})") from error
        self.devices, self.arms, self.kinds = found.devices, found.arms, found.kinds
        self._shapes = sum(len(known.shapes) for known in self._every())


def _refined(known: Known, size: int, shape: tuple[int, ...], residual: float) -> tuple[float, float]:
    """A line's residual with what its size, those next to it and its shape add; the largest of their shares."""
    most, get = 0.0, known.sizes.get
    for each, part in ((size - 1, 0.5 * SIZE_SHARE), (size + 1, 0.5 * SIZE_SHARE), (size, SIZE_SHARE)):
        node = get(each)
        if node is not None:
            share = part * _share(node, residual)
            most = max(most, share)
            residual += share * (node[1] - residual)
    node = known.shapes.get(shape)
    if node is not None:
        share = _share(node, residual)
        most = max(most, share)
        residual += share * (node[1] - residual)
    return residual, most


def _rows(nodes: dict[Any, list[float]]) -> dict[str, list[float]]:
    return {str(key): [round(calls, 2), round(mean, 4)] for key, (calls, mean) in nodes.items()}


def _node(row: Any) -> list[float]:
    if not isinstance(row, list) or len(row) != 2 or not all(map(is_number, row)) or not 0 <= row[0] <= MEMORY:
        raise ValueError(f"{row!r} is no belief")
    return [float(row[0]), float(row[1])]


def _share(node: list[float], above: float) -> float:
    """How much a level says beside the one above it: little where it has seen few calls, and less where those few are
    far off, as outliers are.
    """
    calls, off = node[0], node[1] - above
    return calls / (calls + SHRINKAGE + 4.0 * off * off / calls) if calls else 0.0
