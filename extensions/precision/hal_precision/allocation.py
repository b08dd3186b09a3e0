"""The exact choice of a format for every block: a multiple-choice knapsack.

Minimise the sum of costs, one item for each block, under a bound on the sum of sizes (or the other way round).
Method: the Lagrangian dual gives a multiplier, a lower bound and a first solution; items whose reduced cost exceeds the
gap between the two cannot be part of a better solution and go; what is left is solved by dynamic programming over
undominated (size, cost) pairs, which are cut by the same bound. Where the states stay below a limit the result is
proven to be optimal; beyond it the best solution found is given with a proven gap.

Source: Sinha & Zoltners 1979 (dominance, linear relaxation); Pisinger 1995 (reduction by bounds and core).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_MOST_STATES = 200_000
#: Costs are sums of rounded numbers: a gap of this share of the cost is none.
_TOLERANCE = 1e-9


class Choice(NamedTuple):
    """items: the chosen item of every block. size, cost: their sums. gap: the most that another choice could cost
    less, 0 where this one is proven to be optimal.
    """

    items: NDArray[np.int64]
    size: float
    cost: float
    gap: float


def solve(sizes: Array, costs: Array, bound: float, most_states: int = _MOST_STATES) -> Choice | None:
    """The choice of least cost whose size is at most `bound`; None where the smallest is larger.

    Args:
        sizes, costs: [blocks, items], from 0 on; an item with an infinite size is not offered.
        bound: of the sum of sizes. most_states: of the dynamic programming.
    """
    costs = np.where(np.isfinite(sizes), costs, np.inf)
    smallest = _smallest(sizes, costs)
    if _total(sizes, smallest) > bound:
        return None
    multiplier, items = _dual(sizes, costs, bound, smallest)
    reduced = costs + multiplier * np.where(np.isfinite(sizes), sizes, 0.0)
    base = reduced.min(1)
    lower = float(base.sum() - multiplier * bound)
    items = _fill(sizes, costs, bound, items)
    best = _total(costs, items)
    if best - lower <= _TOLERANCE * max(abs(best), 1e-300):
        return Choice(items, _total(sizes, items), best, 0.0)
    extra = reduced - base[:, None]
    keep = extra <= (best - lower) * (1 + 1e-12)
    fixed = keep.sum(1) == 1
    chosen = np.where(keep, extra, np.inf).argmin(1)
    start = (float(sizes[fixed, chosen[fixed]].sum()), float(costs[fixed, chosen[fixed]].sum()))
    # Blocks with the most to decide come last: states stay few for longest.
    free = np.flatnonzero(~fixed)
    free = free[np.argsort(np.where(keep[free], extra[free], 0).sum(1), kind="stable")]
    found, complete = _enumerate(sizes, costs, extra, keep, free, start, bound, best - lower, most_states)
    if found is not None and found[0] < best:
        best, picks = found
        items = chosen.copy()
        items[free] = picks
    return Choice(items, _total(sizes, items), _total(costs, items), 0.0 if complete else best - lower)


def _total(values: Array, items: NDArray[np.int64]) -> float:
    return float(values[np.arange(len(values)), items].sum())


def _smallest(sizes: Array, costs: Array) -> NDArray[np.int64]:
    """Of every block the smallest item, of equal ones the one of least cost."""
    least = sizes.min(1, keepdims=True)
    found: NDArray[np.int64] = np.where(sizes == least, costs, np.inf).argmin(1).astype(np.int64)
    return found


def _dual(sizes: Array, costs: Array, bound: float, smallest: NDArray[np.int64]) -> tuple[float, NDArray[np.int64]]:
    """(multiplier that maximises the dual, the feasible choice at it), by bisection on the multiplier."""
    finite = np.where(np.isfinite(sizes), sizes, 0.0)

    def at(multiplier: float) -> NDArray[np.int64]:
        found: NDArray[np.int64] = (costs + multiplier * finite).argmin(1).astype(np.int64)
        return found

    if _total(sizes, at(0.0)) <= bound:
        return 0.0, at(0.0)
    low, high = 0.0, 1e-12
    while _total(sizes, at(high)) > bound:
        low, high = high, high * 4
        if high > 1e300:
            return 0.0, smallest
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if _total(sizes, at(middle)) > bound:
            low = middle
        else:
            high = middle
    return high, at(high)


def _fill(sizes: Array, costs: Array, bound: float, items: NDArray[np.int64]) -> NDArray[np.int64]:
    """Use what a feasible choice leaves of the bound: the exchange that lowers the cost most, until none fits."""
    items, rows = items.copy(), np.arange(len(items))
    left = bound - _total(sizes, items)
    while True:
        gain = costs[rows, items][:, None] - costs
        gain[(sizes - sizes[rows, items][:, None]) > left] = 0.0
        place = int(np.nanargmax(gain))
        block, item = divmod(place, costs.shape[1])
        if not gain[block, item] > 0:
            return items
        left -= sizes[block, item] - sizes[block, items[block]]
        items[block] = item


def _enumerate(
    sizes: Array,
    costs: Array,
    extra: Array,
    keep: NDArray[np.bool_],
    free: NDArray[np.int64],
    start: tuple[float, float],
    bound: float,
    gap: float,
    most_states: int,
) -> tuple[tuple[float, NDArray[np.int64]] | None, bool]:
    """((cost, items of the free blocks) of the best choice or None, whether every state was kept)."""
    size, cost, over = np.array([start[0]]), np.array([start[1]]), np.zeros(1)
    rest = np.array([np.where(keep[block], sizes[block], np.inf).min() for block in free])
    after = np.append(np.cumsum(rest[::-1])[::-1], 0.0)
    trail: list[tuple[NDArray[np.int32], NDArray[np.int8]]] = []
    complete = True
    for step, block in enumerate(free):
        items = np.flatnonzero(keep[block])
        parent = np.tile(np.arange(len(size), dtype=np.int32), len(items))
        item = np.repeat(items.astype(np.int8), len(size))
        new_size, new_cost = size[parent] + sizes[block, item], cost[parent] + costs[block, item]
        new_over = over[parent] + extra[block, item]
        good = (new_size + after[step + 1] <= bound) & (new_over <= gap * (1 + 1e-12))
        parent, item, new_size, new_cost, new_over = (
            each[good] for each in (parent, item, new_size, new_cost, new_over)
        )
        order = np.lexsort((new_cost, new_size))
        ordered = new_cost[order]
        before = np.concatenate(([np.inf], np.minimum.accumulate(ordered)[:-1]))
        order = order[ordered < before]
        if len(order) > most_states:
            complete = False
            order = np.sort(order[np.argpartition(new_over[order], most_states)[:most_states]])
        size, cost, over = new_size[order], new_cost[order], new_over[order]
        trail.append((parent[order], item[order]))
        if not len(size):
            return None, complete
    place = int(cost.argmin())
    best, picks = float(cost[place]), np.empty(len(free), np.int64)
    for step in range(len(free) - 1, -1, -1):
        parent, item = trail[step]
        picks[step], place = item[place], int(parent[place])
    return (best, picks), complete
