"""The exact choice against every choice, and a plan's proof."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("torch")

from hal_precision import allocation


def every_choice(sizes: np.ndarray, costs: np.ndarray, bound: float) -> float:
    """The least cost by trying all choices."""
    best = np.inf
    for items in itertools.product(range(sizes.shape[1]), repeat=len(sizes)):
        rows = np.arange(len(sizes))
        if sizes[rows, items].sum() <= bound:
            best = min(best, costs[rows, items].sum())
    return float(best)


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, (7, 4)).astype(float)
    costs = rng.random((7, 4)) * 10
    if seed % 3 == 0:
        sizes[2, 1] = np.inf
    bound = float(np.quantile(np.where(np.isfinite(sizes), sizes, 30).sum(1), 0.5) * 4)
    found = allocation.solve(sizes, costs, bound)
    best = every_choice(sizes, costs, bound)
    if not np.isfinite(best):
        assert found is None
        return
    assert found is not None
    assert found.cost == pytest.approx(best, rel=1e-9)
    assert found.size <= bound
    assert found.gap == 0


def test_hundreds_of_blocks_are_proven_best_or_say_how_far_they_may_be() -> None:
    rng = np.random.default_rng(0)
    bits = np.array([2.0, 3, 4, 5, 6, 8, 16])
    sizes = rng.choice([64.0, 192.0], (600, 1)) * bits
    costs = rng.lognormal(0, 2, (600, 1)) * 4.0**-bits * rng.uniform(0.8, 1.2, (600, 7))
    found = allocation.solve(sizes, costs, float(sizes[:, 2].sum()))
    assert found is not None
    assert found.gap == 0
    few = allocation.solve(sizes, costs, float(sizes[:, 2].sum()), most_states=2)
    assert few is not None
    assert few.gap >= few.cost - found.cost - 1e-12
    assert few.gap < 1e-3 * found.cost


def test_a_bound_below_the_smallest_has_no_choice() -> None:
    assert allocation.solve(np.array([[3.0, 4.0]]), np.array([[1.0, 0.0]]), 2.0) is None
