"""A program that produces every metric: calls, refusals, errors, denials, memory, an audit log, breakers and queues.

Run by test_prometheus.py; prints its port, and goes on until it is killed.
"""

from __future__ import annotations

import contextlib
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

import hal_telemetry
import torch
from fakes import FakeBackend, FakeSession

import hal_core as hal


class Failing(FakeSession):
    """Raises at every call."""

    def compute_attention(self, *given: Any, **more: Any) -> Any:
        raise OSError("the link is down")


def main() -> None:
    torch.set_num_threads(1)
    port = hal_telemetry.enable(0, audit=sys.argv[1])
    if find_spec("hal_router") is None:
        said = {"breakers": {"broken:0": {"state": "open"}}, "pools": [{"queued": {"cpu:0": 3}}]}
        sys.modules["hal_router"] = SimpleNamespace(state=lambda: said)  # type: ignore[assignment]
    else:
        with_router()
    with hal.caller("admin"):
        hal.register(FakeBackend("broken", open=Failing), name="broken")
    hal.configure(memory_limit=1 << 30)
    print(port, flush=True)
    q = torch.randn(1, 2, 8, 16)
    while True:
        with hal.caller("chat"):
            hal.attention(q, q, q, backend="cpu:0")
        with contextlib.suppress(hal.UnsupportedError):
            hal.attention(q, q, q, backend="cpu:0", max_error=1e-30)
        with contextlib.suppress(hal.AccessDeniedError):
            hal.session("kpu:0")
        with contextlib.suppress(OSError):
            hal.attention(q, q, q, backend="broken")
        time.sleep(0.02)


def with_router() -> None:
    """What hal_router says, with a breaker and a queue that its own state need not have."""
    import hal_router

    own = hal_router.state

    def state() -> Any:
        found = own()
        pools = [*found["pools"], {"queued": {"cpu:0": 3}}]
        return found | {"breakers": found["breakers"] | {"broken:0": {"state": "open"}}, "pools": pools}

    hal_router.state = state


if __name__ == "__main__":
    main()
