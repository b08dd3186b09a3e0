"""What a caller asks of a choice beside the core's objective: a deadline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from hal_core import ContractError

deadline_var: ContextVar[float | None] = ContextVar("hal_router_deadline", default=None)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Route the calls inside to the device of least energy among those expected to answer within `seconds`.

    Devices that state no energy come after those that do, the faster first. Where no device is expected to make it, the
    fastest runs and `hal.explain` says so. Without an enabled router it changes nothing. Threads do not inherit it.

    Raises:
        ContractError: not a number above 0.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
        raise ContractError(f"deadline {seconds!r} was given: pass seconds above 0")
    token = deadline_var.set(float(seconds))
    try:
        yield
    finally:
        deadline_var.reset(token)
