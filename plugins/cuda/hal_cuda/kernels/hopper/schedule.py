"""How the tiles of a launch go to programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

OVERHEAD = 2  # cost of a tile of rows beside its keys, in tiles of keys


class Schedule(NamedTuple):
    """Programs of a launch, and heads that are worked on at a time."""

    programs: int
    together: int


def schedule(costs: Sequence[int], heads: int, multiprocessors: int, most_together: int) -> Schedule:
    """How tiles go to programs: one program a multiprocessor where that balances, else a program a tile.

    Args:
        costs: of the row tiles of a head, in the order they are taken. heads: batch entries times query heads.
        most_together: heads whose keys and values the second-level cache holds.

    A persistent program loads its next tile while it finishes one, which pays as long as no program gets much more than
    the others; tiles of `together` heads are taken longest first, forwards and backwards in turn.
    """
    tiles = len(costs) * heads
    if tiles <= multiprocessors:
        return Schedule(tiles, 1)
    number = torch.arange(min(tiles, 1 << 16))
    turn, place = number // multiprocessors, number % multiprocessors
    program = torch.where(turn % 2 == 1, multiprocessors - 1 - place, place)
    each = torch.tensor(costs, dtype=torch.float64)
    best, least = 1, math.inf
    together = 1
    while together <= heads and together <= max(most_together, 1) and heads % together == 0:
        cost = each[number % (together * len(costs)) // together]
        longest = torch.zeros(multiprocessors, dtype=torch.float64).index_add_(0, program, cost).max().item()
        if longest < 0.99 * least:
            best, least = together, longest
        together *= 2
    mean = each.mean().item() * len(number) / multiprocessors
    if least <= 1.09 * mean or len(set(costs)) == 1:
        return Schedule(multiprocessors, best)
    together = 8
    while heads % together:
        together //= 2
    return Schedule(tiles, together)


def key_tiles(row: int, rows: int, len_k: int, shift: int, left: int | None, right: int | None, keys: int) -> int:
    """Tiles of keys that a tile of rows reads, as the kernel counts them."""
    end = len_k if right is None else max(min(row + rows + shift + right, len_k), 1)
    last = -(-end // keys)
    return last - (0 if left is None else min(max(row + shift - left, 0) // keys, last - 1))
