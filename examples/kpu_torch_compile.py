"""torch.compile(backend="kpu") for a CNN and a small transformer: outputs and gradients against eager, and the
coverage.

    python examples/kpu_torch_compile.py [--fidelity transactional]

At the transactional fidelity the same programs are also timed by the KPU's simulator; the cycles are simulated.
"""

from __future__ import annotations

import argparse
import copy

import hal_kpu
import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer layer with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.project(self.before(x)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.after(x))


def cnn() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return model, torch.randn(4, 3, 32, 32)


def transformer() -> tuple[nn.Module, Tensor]:
    layers = (Block(64, 4), Block(64, 4))
    return nn.Sequential(nn.Embedding(100, 64), *layers, nn.Linear(64, 100)), torch.randint(0, 100, (2, 16))


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--fidelity", choices=["behavioral", "transactional"], default="behavioral")
    backend = f"kpu_{options.parse_args().fidelity}"
    torch.manual_seed(0)
    for name, build in (("CNN", cnn), ("transformer", transformer)):
        model, x = build()
        eager, compiled = copy.deepcopy(model), torch.compile(model, backend=backend)
        want, got = eager(x), compiled(x)
        weights = torch.randn_like(want)
        (want * weights).sum().backward()
        (got * weights).sum().backward()
        last = [list(network.parameters())[-2].grad for network in (model, eager)]
        print(f"{name}: outputs differ from eager's by {distance(got, want):.1e}")
        print(f"{name}: the last weight's gradient differs by {distance(*last):.1e}")
        coverage = hal_kpu.get_last_stats()
        print(coverage.summary())
        if coverage.cycles:
            print(f"{coverage.cycles:,} simulated cycles, forward and backward")


if __name__ == "__main__":
    main()
