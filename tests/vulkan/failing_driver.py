"""Drivers that fail, count or say nothing, and calls to see what is left of a session."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

import hal_core as hal
from hal_core.testing import reference, relative_error

HOST_MEMORY, DEVICE_MEMORY, LOST = -1, -2, -4  # VkResult


class Failing:
    """A driver whose function `name` returns `result` instead of doing anything; a wait for a lost device still waits,
    since this device is not lost and works on."""

    def __init__(self, lib: Any, name: str, result: int) -> None:
        self._lib, self._name, self._result = lib, name, result

    def __getattr__(self, name: str) -> Any:
        if (self._name, name) == ("vkWaitSemaphores", "vkGetSemaphoreCounterValue"):
            return lambda *given: self._result  # what a wait on a card looks at first
        return self._fail if name == self._name else getattr(self._lib, name)

    def _fail(self, *given: Any) -> int:
        if (self._name, self._result) == ("vkWaitSemaphores", LOST):
            self._lib.vkWaitSemaphores(*given)
        return self._result


def bound(session: Any, length: int = 16) -> tuple[Any, torch.Tensor]:
    query = torch.randn(1, 2, length, 32)
    request = hal.AttentionRequest(
        batch=1, heads_q=2, heads_kv=2, len_q=length, len_k=length, dim_qk=32, dim_v=32, dtype="float32"
    )
    return session.bind(request), query


def works(session: Any) -> None:
    run, query = bound(session, 24)
    assert relative_error(run(query, query, query), reference(query, query, query).out) <= 1e-5


class Counting:
    """A driver whose calls are counted, and which may fail in one of them."""

    def __init__(self, lib: Any, failing: str = "", result: int = DEVICE_MEMORY) -> None:
        self._lib, self._failing, self._result, self.called = lib, failing, result, Counter[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> Any:
            self.called[name] += 1
            return self._result if name == self._failing else getattr(self._lib, name)(*given)

        return call
