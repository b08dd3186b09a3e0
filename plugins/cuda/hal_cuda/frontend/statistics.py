"""How many attention calls of PyTorch ran where, and why those that did not run on own kernels did not."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class SdpaStatistics(NamedTuple):
    """Calls of PyTorch's fused attention operators since the process began, or since they were last reset.

    A call counts when its operator runs: a compiled function's operators count, a CUDA graph's replay does not.

    Attributes:
        own: calls that ran on this package's kernels, by operator ("_scaled_dot_product_flash_attention").
        original: calls that ran on the kernel that the operator had before, by operator.
        reasons: how many of the original's calls had which reason.
    """

    own: Mapping[str, int]
    original: Mapping[str, int]
    reasons: Mapping[str, int]


class Counts:
    """Thread-safe counts of calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own: Counter[str] = Counter()
        self._original: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()

    def own(self, operator: str) -> None:
        with self._lock:
            self._own[operator] += 1

    def original(self, operator: str, reason: str) -> None:
        with self._lock:
            self._original[operator] += 1
            self._reasons[reason] += 1

    def read(self, *, reset: bool = False) -> SdpaStatistics:
        with self._lock:
            counters = (self._own, self._original, self._reasons)
            found = SdpaStatistics(*(MappingProxyType(dict(counter)) for counter in counters))
            if reset:
                for counter in counters:
                    counter.clear()
        return found


__all__ = ["Counts", "SdpaStatistics"]
