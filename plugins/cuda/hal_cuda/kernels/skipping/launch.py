"""The launch of attention that skips tiles, and what was skipped."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, BlockPlan, Causal, SequenceMetadata, TilePlan

from ...runtime.context import Context
from ...runtime.launch import Launcher, launcher
from ...tiling import Tiles, power_of_two, skipping_tiles
from ..portable.launch import TYPES, aligned, empty_result
from .attend import attend_skipping
from .wish import threshold_of

_POINTERS = ("q", "k", "v", "out", "lse", "counts", "lost_share")
_STRIDES = 15  # q_b to o_m


class SkippedTiles(NamedTuple):
    """What was skipped since it was last asked.

    Attributes:
        tiles: that were met. skipped: of them. lost: no row of any call lost more than this share of its sum of
            weights.
    """

    tiles: int
    skipped: int
    lost: float

    @property
    def share(self) -> float:
        """Of the tiles that were met."""
        return self.skipped / max(self.tiles, 1)


class Tally:
    """Counts of a session, on its device until they are asked for."""

    def __init__(self, context: Context) -> None:
        memory = context.memory
        self._buffers = memory.allocate((2,), "float64"), memory.allocate((1,), "float32")
        self.counts: Tensor = memory.to_torch(self._buffers[0]).view(torch.int64).zero_()
        self.lost: Tensor = memory.to_torch(self._buffers[1]).zero_()

    def read(self) -> SkippedTiles:
        """The counts, which then begin anew. Waits for the device."""
        tiles, skipped = self.counts.tolist()
        found = SkippedTiles(tiles, skipped, self.lost.item())
        self.counts.zero_()
        self.lost.zero_()
        return found


class SkippingPath:
    """A request bound to the kernel that skips tiles."""

    def __init__(self, request: AttentionRequest, context: Context, tally: Tally) -> None:
        self.request, self.chip, self._tally = request, context.chip, tally
        self._tiling = context.tiling
        self._runs: dict[Any, Launcher] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        plan: BlockPlan | TilePlan | None = None,
        tables: SequenceMetadata | None = None,
        rng: tuple[int, int] | None = None,
    ) -> AttentionOutput:
        r = self.request
        batch, heads, len_q, _ = query.shape
        len_k = key.shape[2]
        shift = r.diagonal + (len_k - len_q if r.causal is Causal.BOTTOM_RIGHT else 0)
        out = empty_result(query, value.shape[3])
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if r.lse else None
        tiles = skipping_tiles(max(r.dim_qk, r.dim_v))
        threshold = threshold_of(r)
        numbers = [r.effective_scale, float(threshold or 0), heads // key.shape[1], len_q, len_k, shift]
        strides = [*query.stride(), *key.stride(), *value.stride(), *out.stride()[:3]]
        tensors = (query, key, value, out, lse, self._tally.counts, self._tally.lost)
        grid = (-(-len_q // tiles.rows), heads, batch)
        self._run(query.dtype, aligned(query, key, value), tiles)(grid, tensors, [*strides, *numbers])
        return AttentionOutput(out, lse)

    def _run(self, dtype: torch.dtype, unit: bool, tiles: Tiles) -> Launcher:
        found = self._runs.get((dtype, unit))
        if found is None:
            r, kind = self.request, TYPES[dtype]
            constants = {
                "DQ": r.dim_qk,
                "DV": r.dim_v,
                "BDQ": max(16, power_of_two(r.dim_qk)),
                "BDV": max(16, power_of_two(r.dim_v)),
                "BM": tiles.rows,
                "BN": tiles.keys,
                "CAUSAL": r.causal is not Causal.NONE,
                "LSE": r.lse,
                "ALIGNED": unit,
                "STAGES": tiles.stages,
            }
            signature = dict.fromkeys(_POINTERS[:4], f"*{kind}")
            signature |= {"lse": "*fp32", "counts": "*i64", "lost_share": "*fp32"}
            names = attend_skipping.arg_names
            signature |= dict.fromkeys(names[len(_POINTERS) : len(_POINTERS) + _STRIDES], "i64")
            signature |= {"scale": "fp32", "threshold": "fp32"}
            signature |= dict.fromkeys(("group", "len_q", "len_k", "shift"), "i32")
            found = self._runs[dtype, unit] = launcher(
                self.chip, attend_skipping, signature, constants, num_warps=tiles.warps
            )
        return found
