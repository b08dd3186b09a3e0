"""What the simulated devices of a checkout say of a fixed set of programs and draws.

    python benchmarks/simulator_worker.py CHECKOUT

answers each line with {row: figures}, the figures in full precision; `simulator_equality.py` asks two of them.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from checkouts import imported_from

if __name__ == "__main__":
    imported_from(sys.argv[1])

import hal_kpu

import hal_core as hal
from hal_core.testing import reference, relative_error

COUNTERS = ("cycles", "compute_cycles", "memory_cycles", "external_bytes", "memory_bytes", "page_hits", "page_misses")
DRAWS = ((1, 0), (1, 1), (7, 5))  # (seed, offset)


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _perceptron(x: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> Any:
    return hal_kpu.linear(hal_kpu.gelu(hal_kpu.linear(x, w1, b1)), w2, b2)


def _normalised(x: Any, weight: Any, bias: Any) -> Any:
    return hal_kpu.softmax(hal_kpu.layer_norm(x, 80, weight, bias))


def _attended(q: Any, k: Any, v: Any) -> Any:
    return hal_kpu.scaled_dot_product_attention(q, k, v)


PROGRAMS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "matmul": (hal_kpu.matmul, [(96, 200), (200, 130)]),
    "perceptron": (_perceptron, [(64, 96), (192, 96), (192,), (48, 192), (48,)]),
    "layer norm and softmax": (_normalised, [(33, 80), (80,), (80,)]),
    "convolution": (hal_kpu.conv2d, [(2, 3, 17, 19), (8, 3, 3, 3)]),
    "attention": (_attended, [(1, 2, 40, 16), (1, 2, 56, 16), (1, 2, 56, 16)]),
}


def kpu() -> Iterator[tuple[str, dict[str, Any]]]:
    """Counters of programs at both timed fidelities, and cycles of products by data flow."""
    for name, (function, shapes) in PROGRAMS.items():
        given = [hal_kpu.Tensor(_numbers(*shape)) for shape in shapes]
        for fidelity in (hal_kpu.TRANSACTIONAL, hal_kpu.CYCLE_ACCURATE):
            _, stats = hal_kpu.compile(function, fidelity=fidelity).execute_with_stats(*given)
            level = "cycle-accurate" if fidelity == hal_kpu.CYCLE_ACCURATE else "transactional"
            yield f"kpu, {name}, {level}", {counter: getattr(stats, counter) for counter in COUNTERS}
    for flow in ("os", "ws", "is"):
        stats = hal_kpu.simulate_gemm(70, 45, 130, rows=16, cols=16, dataflow=flow)
        yield f"kpu, product by {flow}", {"cycles": stats.cycles}
    query, key = torch.zeros(2, 8, 256, 64), torch.zeros(2, 2, 384, 64)
    for options in ({}, {"is_causal": True}):
        decision = hal.explain(query, key, key, enable_gqa=True, backend="kpu:0", **options)
        time = decision.winner.estimate.time
        yield f"kpu, hal.attention {options or ''}", {"low": time.low, "high": time.high}


def photonics() -> Iterator[tuple[str, dict[str, Any]]]:
    """Signal-to-noise ratios of attention by device and draw, in decibels, and the sum of the output."""
    query, key, value = _numbers(1, 2, 24, 32), _numbers(1, 2, 40, 32), _numbers(1, 2, 40, 32)
    want = reference(query, key, value).out
    for device in hal.devices():
        if device.family == "photonic":
            for rng in DRAWS:
                out = hal.attention(query, key, value, backend=device.id, rng=rng)
                ratio = -20 * math.log10(relative_error(out, want))
                name = f"{device.model}, seed {rng[0]}, offset {rng[1]}"
                yield name, {"snr": ratio, "sum": float(out.double().sum())}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        family = json.loads(line)
        print(json.dumps(dict({"kpu": kpu, "photonics": photonics}[family]())), flush=True)
