"""Weights that stay in the array from call to call: encoded, corrected and programmed once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..runtime.driver import Cells

#: Elements of weights that one chip keeps, 8 bytes each; those beyond are programmed in each call.
MOST_ELEMENTS = 1 << 26


class WeightTile(NamedTuple):
    """Weights of one tile along the reduction.

    Attributes:
        place: of the tile along K. cells: [batch, N, width], as the driver holds them.
        scales: [batch, N, 1], float32.
    """

    place: slice
    cells: Cells
    scales: Tensor


class _Entry(NamedTuple):
    values: Tensor
    tiles: Sequence[WeightTile]


class HeldTiles:
    """The tiles of the parameters that a chip has multiplied by, for as long as these live and keep their values.

    Only `nn.Parameter` is held: other tensors come and go with a call. Values are compared and not `_version`, which
    writing through `.data` leaves as it is.
    """

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    def tiles(self, weight: Tensor, program: Callable[[], Sequence[WeightTile]]) -> Sequence[WeightTile]:
        """The tiles of a weight; `program` makes them where they are not held."""
        if not isinstance(weight, nn.Parameter):
            return program()
        with self._lock:
            entry: _Entry | None = self._entries.get(weight)
            if entry is not None and torch.equal(entry.values, weight):
                return entry.tiles
            kept = sum(each.values.numel() for each in self._entries.values() if each is not entry)
        made = _Entry(weight.detach().clone(), program())
        with self._lock:
            if kept + weight.numel() <= MOST_ELEMENTS:
                self._entries[weight] = made
            else:
                self._entries.pop(weight, None)
        return made.tiles
