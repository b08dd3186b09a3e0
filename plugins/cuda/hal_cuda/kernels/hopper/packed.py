"""Packed sequences on the Hopper kernel: a table of tiles made on the device, then one persistent launch over it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, BlockPlan, Causal, SequenceMetadata, TilePlan

from ...memory import borrowing
from ...runtime import binaries
from ...runtime.context import Context
from ...runtime.launch import Launcher, launcher
from ...tiling import WARPGROUP_ROWS, hopper_tiles_of
from ..portable.launch import PortablePath, empty_result
from .launch import CACHED, LOG2E, add_map, compile_forward, config_of, fits, follows, side
from .tile_table import tile_table

#: Triton types of `tile_table`'s run-time arguments.
TABLE_SIGNATURE = {
    **dict.fromkeys(("table", "cu_q", "cu_k"), "*i32"),
    **dict.fromkeys(("sequences", "all_q", "all_k", "most", "together", "programs"), "i32"),
}
_HEAD, _ENTRY = 8, 8  # numbers before the first entry of a table, and of an entry
_MOST_KEPT = 256


class Launch(NamedTuple):
    """What is the same for all calls on tensors of one form.

    kernel: the forward. list_tiles: launches the table, whose numbers are in `listing`. most: tiles there can be.
    programs: of the forward. sides: of query, key, value and output what their tensor maps are made from, made: for
    each of them the arguments by address. tail: arguments after the table.
    """

    kernel: binaries.Kernel
    list_tiles: Launcher
    listing: list[Any]
    most: int
    programs: int
    sides: tuple[tuple[tuple[int, ...], tuple[int, ...], Any], ...]
    made: tuple[dict[int, list[Any]], ...]
    tail: list[Any]


class PackedHopperPath:
    """A packed request bound to the Gluon kernel; tensors that the copy engine cannot read go to the plain path."""

    def __init__(self, request: AttentionRequest, context: Context, instead: PortablePath) -> None:
        self.request, self.chip, self._context, self._instead = request, context.chip, context, instead
        self._launches: dict[Any, Launch | None] = {}

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
        """Attention of each sequence; lengths are read on the device alone, so CUDA graphs may be replayed with
        others.
        """
        assert tables is not None
        assert tables.cu_seqlens_q is not None
        assert tables.cu_seqlens_k is not None
        cu_q, cu_k = tables.cu_seqlens_q, tables.cu_seqlens_k
        pointers = [query.data_ptr(), key.data_ptr(), value.data_ptr()]
        whole = cu_q.is_contiguous() and cu_k.is_contiguous() and cu_q.dtype == cu_k.dtype == torch.int32
        same = cu_q.data_ptr() == cu_k.data_ptr()
        sequences = cu_q.shape[0] - 1
        form = (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(), sequences, same)
        launch = self._launches.get(form)
        if launch is None and form not in self._launches:
            if len(self._launches) >= _MOST_KEPT:
                self._launches.clear()
            launch = self._launches[form] = self._build(query, key, value, sequences, same)
        if launch is None or not whole or (pointers[0] | pointers[1] | pointers[2]) & 15:
            return self._instead(query, key, value, mask, plan, tables, rng)
        out = empty_result(query, value.shape[3])
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if self.request.lse else None
        arguments: list[Any] = []
        for place, pointer in enumerate((*pointers, out.data_ptr())):
            arguments += launch.made[place].get(pointer) or add_map(launch.sides[place], launch.made[place], pointer)
        with borrowing(self._context.memory) as borrow:
            table = borrow((_HEAD + _ENTRY * launch.most,), torch.int32)
            launch.list_tiles((sequences, 1, 1), (table, cu_q, cu_k), launch.listing)
            arguments += [0 if lse is None else lse.data_ptr(), out.data_ptr(), table.data_ptr(), *launch.tail]
            launch.kernel((launch.programs, 1, 1), torch._C._cuda_getCurrentRawStream(self.chip.index), arguments)
        return AttentionOutput(out, lse)

    def _build(self, query: Tensor, key: Tensor, value: Tensor, sequences: int, same: bool) -> Launch | None:
        """None where the copy engine cannot read the tensors. same: queries and keys have the same lengths, which makes
        both diagonals one.
        """
        if not fits(query, key, value):
            return None
        r, chip = self.request, self.chip
        heads, tokens, dim_qk, dim_v = query.shape[1], query.shape[2], query.shape[3], value.shape[3]
        left, right = r.window or (None, None)
        if r.causal is not Causal.NONE:
            right = 0 if right is None else min(right, 0)
        bottom = r.causal is Causal.BOTTOM_RIGHT and not same
        reach = r.diagonal + (right or 0)
        mean_q, mean_k = (max(t.shape[2] // max(sequences, 1), 1) for t in (query, key))
        mean = replace(r, len_q=mean_q, len_k=mean_k)
        tiles = hopper_tiles_of(mean)
        if not follows(tiles, self._context.tiling.plan_for("hopper", mean)):
            return None
        config = config_of(
            tiles,
            dim_qk=dim_qk,
            dim_v=dim_v,
            group=heads // key.shape[1],
            left=left is not None,
            right=right is not None,
            shifted=right is not None and (bottom or reach % WARPGROUP_ROWS != 0),
            half=right is not None and same and reach <= 0 and reach % tiles.keys == 0,
            ragged=True,
            softcap=r.softcap is not None,
            lse=r.lse,
            packed=True,
            bottom=bottom,
        )
        dtype = "fp16" if query.dtype == torch.float16 else "bf16"
        made = binaries.kernel(("hopper", chip.index, dtype, config), lambda: compile_forward(dtype, config))
        rows = WARPGROUP_ROWS * tiles.consumers
        list_tiles = launcher(chip, tile_table, TABLE_SIGNATURE, {"ROWS": rows, "BLOCK": 128}, num_warps=4)
        scale, cap_in, cap_out = r.effective_scale * LOG2E, 0.0, 0.0
        if r.softcap is not None:
            cap_in, cap_out, scale = 2 * LOG2E * r.effective_scale / r.softcap, r.softcap * LOG2E, 1.0
        together, cached = 1, r.len_k * (dim_qk + dim_v) * query.itemsize * key.shape[1] // heads
        while heads % (2 * together) == 0 and 2 * together * cached <= CACHED:
            together *= 2
        out = empty_result(query, dim_v)
        tail = [
            out.stride(1),
            out.stride(2),
            together,
            heads,
            tokens,
            r.diagonal,
            left or 0,
            right or 0,
            scale,
            cap_in,
            cap_out,
            None,
        ]
        sides = tuple((*side(t), meta) for t, meta in zip((query, key, value, out), made.maps, strict=True))
        most = tokens // rows + sequences
        programs = min(chip.multiprocessors, most * heads)
        listing = [sequences, tokens, key.shape[2], most, together, programs]
        return Launch(made, list_tiles, listing, most, programs, sides, tuple({} for _ in sides), tail)
