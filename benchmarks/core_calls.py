"""Processor time of each way of calling, in microseconds, on a device that returns its query: the core's own part.

    python benchmarks/core_calls.py CHECKOUT

prints one JSON object by row for the `hal_core` of that checkout; `core_overhead.py --against` compares two of them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])

import hal_core as hal


class EchoSession(hal.SimpleSession):
    """Answers with the query, by the core's fast path."""

    def __init__(self) -> None:
        super().__init__(lambda query, key, value, mask, request: (query, None), autograd="native")

    def bind(self, request: hal.AttentionRequest) -> Callable[..., Any]:
        return lambda query, key, value, mask, plan, tables, rng: query


class EchoBackend:
    """One device that nothing underbids."""

    def devices(self) -> Sequence[hal.Device]:
        return [hal.Device(id="echo:0", family="echo", vendor="none", model="echo", fidelity="hardware")]

    def capabilities(self, device: hal.Device) -> hal.Capabilities:
        numerics = {"float32": hal.Numerics(1e-5, gradient=1e-4)}
        return hal.Capabilities(
            dtypes=set(numerics), numerics=numerics, head_dim=hal.Range(1), features={"backward", "lse"}
        )

    def check(self, request: hal.AttentionRequest, device: hal.Device) -> Sequence[hal.Refusal]:
        return ()

    def estimate(self, request: hal.AttentionRequest, device: hal.Device) -> hal.Estimate:
        return hal.Estimate(time=hal.Quantity(1e-15, 1e-15, "declared", "assumed"))

    def open(self, device: hal.Device) -> EchoSession:
        return EchoSession()


def microseconds(call: Callable[[], object], repeat: int = 2000, rounds: int = 7) -> float:
    """The least mean of several rounds: what the machine's other work disturbs least."""
    for _ in range(repeat // 4):
        call()
    means = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeat):
            call()
        means.append((time.process_time() - start) / repeat * 1e6)
    return min(means)


def rows() -> dict[str, float]:
    """Microseconds by way of calling."""
    torch.set_num_threads(1)
    hal.register(EchoBackend())
    query = torch.randn(1, 2, 8, 16)
    grown = cycle([torch.randn(1, 2, length, 16) for length in range(65, 129)])
    leaf, ones = query.clone().requires_grad_(), torch.ones_like(query)

    def growing() -> object:
        key = next(grown)
        return hal.attention(query, key, key)

    with torch.no_grad():
        bound = hal.bind(query, query, query)
        found = {
            "no gradient": microseconds(lambda: hal.attention(query, query, query)),
            "key length growing by one each call": microseconds(growing),
            "a bound call": microseconds(lambda: bound(query, query, query)),
        }
    both = microseconds(lambda: torch.autograd.grad(hal.attention(leaf, leaf, leaf) * 1, leaf, ones))
    return found | {"forward and backward": both}


if __name__ == "__main__":
    print(json.dumps(rows()))
