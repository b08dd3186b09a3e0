"""A rank's memory falls as one over the number of ranks."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path
from typing import Any

import hal_parallel
import pytest
import torch

pytestmark = [
    pytest.mark.xdist_group("parallel"),
    pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peaks are read from Linux's /proc"),
]
HERE = str(Path(__file__))


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def peak(mesh: Any, rank: int, world: int, tokens: int, layout: str, heads: int) -> list[int]:
    """Bytes beyond the idle rank, shards and results included: of the forward pass, and of both."""

    def run(local: int) -> list[int]:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again
        idle, found = status("VmRSS"), []
        tensors = [torch.randn(1, heads, local, 64, requires_grad=True) for _ in range(3)]
        out = hal_parallel.attention(*tensors, mesh, layout=layout, strategy="ring", is_causal=True, backend="cpu")
        found.append(status("VmHWM") - idle)
        grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
        assert all(grad.isfinite().all() for grad in grads)
        return [*found, status("VmHWM") - idle]

    run(64)  # what is imported at first
    return run(tokens // world)


def slopes(ranks: Any, layout: str, tokens: int, heads: int) -> list[float]:
    """Of the logarithm of a rank's peak against that of the number of ranks, least squares: forward, both passes."""
    worlds = (4, 2, 1)
    found = []
    for world in worlds:
        each = ranks.run("called", world, code=f"{HERE}:peak", tokens=tokens, layout=layout, heads=heads)
        found.append([max(sizes) for sizes in zip(*each, strict=True)])
        print(layout, world, [f"{size / 2**20:.1f} MiB" for size in found[-1]])
    x = [math.log(world) for world in worlds]
    mean = sum(x) / len(x)
    return [
        sum((a - mean) * math.log(y) for a, y in zip(x, column, strict=True)) / sum((a - mean) ** 2 for a in x)
        for column in zip(*found, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_a_ranks_memory_falls_as_one_over_the_ranks(mapped_ranks, layout):
    for slope in slopes(mapped_ranks, layout, 1 << 15, 8):
        assert abs(slope + 1) <= 0.15, slope
