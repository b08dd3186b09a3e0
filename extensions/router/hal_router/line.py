"""A device's time as a line over its own estimate: what a call costs at least, and a factor."""

from __future__ import annotations

import math
from typing import Any

#: Calls that the level above counts for: its time at the estimates that are met, and each of its line's two terms.
SHRINKAGE, RIDGE = 1.0, 3.0
#: Calls that a mean or a line remembers.
MEMORY = 40.0


class Line:
    """time = fixed + factor * estimate, fitted to the newest calls of a device, arm or kind of request.

    Attributes:
        calls: that count. fixed: seconds. factor: on the estimate. low, high: the estimates that were met. ratio: mean
            of log(time / estimate), for people to read.
    """

    __slots__ = ("_ee", "_et", "_off", "_tt", "_wet", "_wt", "calls", "factor", "fixed", "high", "low", "ratio")
    _STORED = ("calls", "fixed", "factor", "low", "high", "ratio", "_off", "_tt", "_et", "_ee", "_wt", "_wet")

    def __init__(self) -> None:
        self.calls = self.fixed = self.high = self.ratio = self._off = 0.0
        self.factor, self.low = 1.0, math.inf
        # Sums over calls of 1 / time^2, estimate / time^2, estimate^2 / time^2, 1 / time and estimate / time.
        self._tt = self._et = self._ee = self._wt = self._wet = 0.0

    def learn(self, estimate: float, time: float, weight: float, fixed: float, factor: float) -> None:
        """Take `weight` calls of a time. fixed, factor: the line of the level above.

        Minimises the sum of (1 - (a + b estimate) / time)^2 over the calls with a ridge around the level above, whose
        line is first scaled by the mean ratio to it.
        """
        self.low, self.high = min(self.low, estimate), max(self.high, estimate)
        if self.calls + weight > MEMORY:
            kept = max(MEMORY - weight, 0.0) / self.calls if self.calls else 0.0
            self.calls *= kept
            self._tt, self._et, self._ee = self._tt * kept, self._et * kept, self._ee * kept
            self._wt, self._wet = self._wt * kept, self._wet * kept
        self.calls += weight
        x, y = 1.0 / time, estimate / time
        self._tt, self._et, self._ee = self._tt + weight * x * x, self._et + weight * x * y, self._ee + weight * y * y
        self._wt, self._wet = self._wt + weight * x, self._wet + weight * y
        step = weight / self.calls
        self.ratio -= (math.log(y) + self.ratio) * step
        self._off += (math.log(time / (fixed + factor * estimate)) - self._off) * step
        scale = math.exp(self.calls / (self.calls + SHRINKAGE) * self._off)
        fixed, factor = fixed * scale, factor * scale
        # In units of what the scaled line says here, so that both terms weigh alike: u + v is near 1.
        above = fixed + factor * estimate
        per = above / estimate
        uu = self._tt * above * above + SHRINKAGE + RIDGE
        uv = self._et * above * per + SHRINKAGE
        vv = self._ee * per * per + SHRINKAGE + RIDGE
        right_u = self._wt * above + SHRINKAGE + RIDGE * fixed / above
        right_v = self._wet * per + SHRINKAGE + RIDGE * factor / per
        determinant = uu * vv - uv * uv
        u = (right_u * vv - right_v * uv) / determinant
        v = (right_v * uu - right_u * uv) / determinant
        if u < 0.0:
            u, v = 0.0, right_v / vv
        elif v < 0.0:
            u, v = right_u / uu, 0.0
        self.fixed, self.factor = u * above, v * per

    def to_list(self) -> list[float]:
        return [float(f"{getattr(self, name):.7g}") for name in self._STORED]

    @classmethod
    def read(cls, row: Any) -> Line:
        """`to_list`'s data. Raises ValueError where it is none."""
        if not isinstance(row, list) or len(row) != len(cls._STORED) or not all(map(is_number, row)):
            raise ValueError(f"{row!r} is no belief")
        line = cls()
        for name, value in zip(cls._STORED, row, strict=True):
            setattr(line, name, float(value))
        sums = (line._tt, line._et, line._ee, line._wt, line._wet, line.fixed, line.factor)
        if not (0 <= line.calls <= MEMORY and 0 < line.low <= line.high and min(sums) >= 0 and sum(sums[-2:]) > 0):
            raise ValueError(f"{row!r} is no belief")
        return line


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
