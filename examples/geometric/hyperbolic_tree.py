"""Hyperbolic against Euclidean attention on trees, at equal parameters.

    python examples/geometric/hyperbolic_tree.py [--out tree.png]

Each seed draws a random tree of 120 vertices. Attention over the vertices learns to give each vertex its neighbours:
two numbers per vertex and one factor are learned in both geometries, and both are one call of `hal.attention` with a
lifted query and key. The score is -beta cosh(dist) of the hyperbolic plane (`lift.lorentz`), or -beta |x - y|^2 of the
Euclidean one (`lift.euclidean`). The loss is the cross-entropy of the weights with uniform ones over the neighbours,
less the least that is possible (a Kullback-Leibler divergence, nats).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from hal_geometric import Lorentz, lift
from torch import Tensor

import hal_core as hal

SHEET = Lorentz(check=False)
#: Two-sided 95% of Student's distribution with 4 degrees of freedom, for 5 seeds.
STUDENT = 2.776


class Tree(NamedTuple):
    """parent: of each vertex but the first. target: [n, n], uniform over the neighbours of each row's vertex."""

    parent: list[int]
    target: Tensor


def tree(seed: int, vertices: int = 120) -> Tree:
    """A random tree: each vertex hangs from one of the earlier ones that have at most two children."""
    generator = torch.Generator().manual_seed(seed)
    parent: list[int] = []
    children = [0] * vertices
    for vertex in range(1, vertices):
        free = [v for v in range(vertex) if children[v] < 3][:12]
        chosen = free[int(torch.randint(len(free), (1,), generator=generator))]
        children[chosen] += 1
        parent.append(chosen)
    near = torch.zeros(vertices, vertices)
    for vertex, up in enumerate(parent, 1):
        near[vertex, up] = near[up, vertex] = 1
    return Tree(parent, near / near.sum(1, keepdim=True))


def on_sheet(tangent: Tensor) -> Tensor:
    """The points of the hyperbolic plane that tangent vectors [..., 2] at the origin reach."""
    origin = SHEET.origin(2).expand(*tangent.shape[:-1], 3)
    return SHEET.exp(origin, torch.nn.functional.pad(tangent, (1, 0)))


def geodesics(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """The points at these shares of the way from each start to its end."""
    return SHEET.exp(start.expand(len(share), -1, -1), share * SHEET.log(start, end))


def weights(points: Tensor, log_beta: Tensor, geometry: str) -> Tensor:
    """Attention of each vertex over all others, [n, n]: the values are unit vectors."""
    n = len(points)
    x = points.view(1, 1, n, 2)
    if geometry == "hyperbolic":
        x = on_sheet(x)
        q, k = lift.lorentz(x, x, 1.0, space=SHEET, centre=False)
    else:
        q, k = lift.euclidean(x, x, 1.0)
    others = ~torch.eye(n, dtype=torch.bool)
    out = hal.attention(q * log_beta.exp(), k, torch.eye(n).view(1, 1, n, n), others, scale=1.0, backend="cpu:0")
    return out[0, 0]  # type: ignore[no-any-return]


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads would wait for each other longer than matrices this small take, the more so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def train(data: Tree, geometry: str, seed: int, steps: int = 400) -> tuple[float, Tensor]:
    """(divergence from the target, points [n, 2]) after training."""
    generator = torch.Generator().manual_seed(seed)
    points = (0.3 * torch.randn(len(data.target), 2, generator=generator)).requires_grad_()
    log_beta = torch.zeros(()).requires_grad_()
    optimizer = torch.optim.Adam([points, log_beta], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    least = float(torch.special.entr(data.target).sum(1).mean())
    loss = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -(data.target * weights(points, log_beta, geometry).clamp_min(1e-12).log()).sum(1).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach()) - least, points.detach()


def compare(seeds: int = 5, vertices: int = 120, steps: int = 400) -> dict[str, Any]:
    """Divergences of both geometries for each seed, and the interval of their mean difference."""
    rows = []
    for seed in range(seeds):
        data = tree(seed, vertices)
        rows.append([train(data, geometry, seed, steps)[0] for geometry in ("euclidean", "hyperbolic")])
    found = torch.tensor(rows)
    difference = found[:, 0] - found[:, 1]
    half = STUDENT * float(difference.std()) / math.sqrt(seeds)
    mean = float(difference.mean())
    return {"rows": rows, "better_by": mean, "interval": (mean - half, mean + half)}


def picture(path: str, seed: int = 0, vertices: int = 120, steps: int = 400) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from hal_geometric import Poincare
    from matplotlib import pyplot as plt

    data = tree(seed, vertices)
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    for axis, geometry in zip(axes, ("euclidean", "hyperbolic"), strict=True):
        loss, points = train(data, geometry, seed, steps)
        ends = points[1:], points[data.parent]
        share = torch.linspace(0, 1, 20).view(-1, 1, 1)
        if geometry == "hyperbolic":
            lines, disk = geodesics(*map(on_sheet, ends), share), Poincare(check=False)
            lines, points = disk.from_lorentz(lines), disk.from_lorentz(on_sheet(points))
            axis.add_patch(plt.Circle((0, 0), 1, fill=False, color="grey"))
        else:
            lines = torch.lerp(*ends, share)
        axis.plot(lines[..., 0], lines[..., 1], color="tab:blue", linewidth=0.7)
        axis.scatter(*points.T, s=8, color="black", zorder=3)
        axis.set_title(f"{geometry}: {loss:.3f} nats from the target")
        axis.set_aspect("equal")
        axis.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="write a picture of the first tree here")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    found = compare(options.seeds)
    for seed, (flat, curved) in enumerate(found["rows"]):
        print(f"tree {seed}: euclidean {flat:.3f}, hyperbolic {curved:.3f} nats")
    low, high = found["interval"]
    print(f"hyperbolic is better by {found['better_by']:.3f} nats, 95% interval {low:.3f} to {high:.3f}")
    if options.out:
        picture(options.out)
    return found


if __name__ == "__main__":
    main()
