"""Diagnosis of an attention graph: its bottleneck, how fast it over-smooths, and what one more edge does.

    python examples/geometric/bottlenecks.py [--out bottlenecks.png]

Two groups of tokens attend within themselves, and one pair of tokens to each other. The edge of lowest curvature is the
bridge; the rows of `flow.attention` become alike at the second eigenvalue of the weights.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from hal_geometric import arithmetic, flow, graph
from torch import Tensor

import hal_core as hal


def two_groups(size: int = 8, bridges: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(mask of who attends to whom, bool [n, n]; scores [n, n])."""
    n = 2 * size
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[:size, :size] = mask[size:, size:] = True
    for at in range(bridges):
        mask[size - 1 - at, size + at] = mask[size + at, size - 1 - at] = True
    return mask, 0.1 * torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(mask: Tensor, scores: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


def spread(mask: Tensor, scores: Tensor, steps: int, seed: int = 0) -> list[float]:
    """The distance of the rows from their stationary mean after each step of attention."""
    n = len(mask)
    pi = arithmetic.chain(weights(mask, scores)).stationary
    x = torch.randn(1, 1, n, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    query, key = scores.view(1, 1, n, n), torch.eye(n, dtype=torch.float64).view(1, 1, n, n)  # q k^T = scores
    values, found = x, []
    for _ in range(steps):
        values = flow.attention(query, key, values, dt=0.5, scale=1.0, attn_mask=mask, backend="cpu:0")
        found.append(float((values[0, 0] - pi @ values[0, 0]).norm()))
    return found


def diagnose(bridges: int, size: int = 8, steps: int = 60) -> dict[str, Any]:
    mask, scores = two_groups(size, bridges)
    p = weights(mask, scores)
    seen = graph.diagnose(p, 3, exact=True)
    found = spread(mask, scores, steps)
    return {
        "edges": seen.edges.tolist(),
        "curvature": seen.curvature.tolist(),
        "gap": 1 - seen.second,
        "spread": found,
        "decay": found[-1] / found[-2],
        "predicted": 0.5 + 0.5 * seen.second,  # steps of dt = 0.5; the second eigenvalue is positive here
    }


def picture(path: str, results: dict[int, dict[str, Any]], size: int = 8) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    mask, _ = two_groups(size)
    edges, curvature = graph.ollivier(mask & ~torch.eye(2 * size, dtype=torch.bool))
    angle = torch.arange(size) * 2 * torch.pi / size
    ring = torch.stack([angle.cos(), angle.sin()], 1)
    places = torch.cat([ring.flip(0).roll(1, 0), 1.0 * ring.flip(1) + torch.tensor([3.5, 0.0])])
    shades = plt.get_cmap("coolwarm_r")
    for (a, b), k in zip(edges.tolist(), curvature.tolist(), strict=True):
        left.plot(*places[[a, b]].T, color=shades((k + 1.5) / 3), linewidth=2.5 if k < 0 else 0.8)
    left.scatter(*places.T, color="black", s=15, zorder=3)
    left.set_title("curvature of the edges: red is negative")
    left.set_aspect("equal")
    left.axis("off")
    for bridges, found in results.items():
        right.semilogy(found["spread"], label=f"{bridges} bridge{'s' * (bridges > 1)}, gap {found['gap']:.3f}")
    right.set(xlabel="steps of attention", ylabel="spread of the rows", title="over-smoothing: rows become alike")
    right.legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[int, dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="write a picture here")
    options = parser.parse_args(arguments)
    hal.device("cpu:0")
    results = {bridges: diagnose(bridges) for bridges in (1, 2)}
    for bridges, found in results.items():
        edge, curvature = found["edges"][0], found["curvature"][0]
        print(
            f"{bridges} bridge(s): narrowest edge {edge} of curvature {curvature:.3f}, spectral gap {found['gap']:.4f}"
        )
        print(f"  rows become alike by {found['decay']:.4f} a step, predicted {found['predicted']:.4f}")
    if options.out:
        picture(options.out, results)
    return results


if __name__ == "__main__":
    main()
