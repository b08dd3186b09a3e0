"""The plain Triton path: any request, any strides. Fills in arguments for chosen tiles and splits, launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from hal_core.plugin_api import (
    AttentionOutput,
    AttentionRequest,
    BlockPlan,
    Causal,
    DeviceUnavailableError,
    MaskKind,
    SequenceMetadata,
    TilePlan,
)

from ...memory import Workspace, borrowing
from ...runtime import binaries
from ...runtime.context import Context
from ...runtime.launch import Launcher, current_stream, dependent_launch, launcher
from ...tiling import Splits, Tiles, packs, power_of_two, split_keys, tiles_of_plan
from .arguments import (
    CACHES,
    MANY_ROWS,
    NO_TABLES,
    OTHERS,
    SEED,
    TYPES as TYPES,
    aligned as aligned,
    attend_signature,
    extras_of as extras_of,
    in_words as in_words,
    last_dim_contiguous as last_dim_contiguous,
    lse_strides,
    mask_strides as mask_strides,
    merge_signature,
    merged_at_once,
    plan_strides as plan_strides,
    same_layout,
    scale_strides,
    scaled_tokens,
    whole_tiles,
)
from .attend import attend
from .block_plans import listed_once
from .dropout import random_words
from .mask_tiles import mask_constants, mask_form, mask_steps
from .merge import merge
from .schedule import rows_joined

_MOST_LAUNCHES = 512


def empty_result(query: Tensor, dim_v: int) -> Tensor:
    """[batch, heads, len_q, dim_v] laid out in memory as the query is."""
    batch, heads, length = query.shape[:3]
    if query.stride(1) < query.stride(2) and heads > 1 and length > 1:
        return torch.empty((batch, length, heads, dim_v), dtype=query.dtype, device=query.device).transpose(1, 2)
    return torch.empty((batch, heads, length, dim_v), dtype=query.dtype, device=query.device)


class Launch(NamedTuple):
    """What is the same for all calls on tensors of one form.

    arguments: of the kernel after its tensors; where it takes no mask, plan or tables, with a None for each of those.
    seed: where the random words are among them. like_query: the result has the query's shape and strides. partial:
    numbers that hold the partial results of split keys, or 0. joins: the last program joins them,
    in the stream's workspace; else `merge` does.
    """

    run: Launcher
    arguments: list[Any]
    seed: int
    grid: tuple[int, int, int]
    like_query: bool
    partial: int = 0
    joins: bool = False
    merge: Launcher | None = None
    merge_arguments: list[Any] = []  # noqa: RUF012 - never written to
    merge_grid: tuple[int, int, int] = (0, 0, 0)


class PortablePath:
    """A request bound to the portable Triton kernel."""

    def __init__(self, request: AttentionRequest, context: Context) -> None:
        self.request, self.chip, self._context = request, context.chip, context
        # In a capture `merge` joins, which may round otherwise: where results must repeat, it does so everywhere.
        self._may_join = packs(request, 1) and not request.deterministic
        self._launches: dict[Any, Launch] = {}
        self._runs: dict[_Chosen | str, Launcher] = {}
        left, right = request.window or (None, None)
        if request.causal is not Causal.NONE:
            right = 0 if right is None else min(right, 0)
        self._band = left, right
        self._last: tuple[Any, Launch | None] = ((), None)

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
        """Attention on tensors that the request describes; lengths are read from the tensors.

        plan: a block plan, or a tile plan whose block sizes are used in place of the device's own.
        """
        cut = plan if isinstance(plan, TilePlan) else None
        blocks = plan if isinstance(plan, BlockPlan) else None
        if blocks is None and tables is None:
            return self._run(query, key, value, mask, None, None, rng, cut)
        with borrowing(self._context.memory) as borrow:
            blocks = None if blocks is None else listed_once(blocks, self.chip, borrow)
            if tables is not None:
                made = (last_dim_contiguous(t, borrow) for t in tables[:4])
                tables = SequenceMetadata(*made)._replace(key_scale=tables.key_scale, value_scale=tables.value_scale)
            return self._run(query, key, value, mask, blocks, tables, rng, cut)

    def _run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        plan: BlockPlan | None,
        tables: SequenceMetadata | None,
        rng: tuple[int, int] | None,
        cut: TilePlan | None,
    ) -> AttentionOutput:
        plain = mask is None and plan is None and tables is None
        if self.request.cache_dtype is not None:
            value = in_words(value)
        extras = None if plain else extras_of(mask, plan, tables)
        workspace = self._workspace(query) if self._may_join else None
        form = (
            query.shape,
            query.stride(),
            key.shape,
            key.stride(),
            value.shape,
            value.stride(),
            (query.data_ptr() | key.data_ptr() | value.data_ptr()) & 15,
            extras,
            mask_form(mask),
            workspace is None,
            None if cut is None else (cut.block_q, cut.block_k),
        )
        last, launch = self._last
        if launch is None or form != last:
            launch = self._launches.get(form)
            if launch is None:
                if len(self._launches) >= _MOST_LAUNCHES:
                    self._launches.clear()
                joins = workspace is not None
                launch = self._launches[form] = self._build(query, key, value, mask, plan, tables, joins, cut)
            self._last = (form, launch)
        out = torch.empty_like(query) if launch.like_query else empty_result(query, self.request.dim_v)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if self.request.lse else None
        arguments = launch.arguments
        if rng is not None:
            arguments = arguments.copy()
            arguments[launch.seed : launch.seed + 2] = random_words(rng)
        others = () if plain else (mask, *(tables or NO_TABLES), *((None, None) if plan is None else plan[2:]))
        if launch.joins:
            assert workspace is not None
            launch.run(launch.grid, (query, key, value, out, lse, *workspace, *others), arguments)
        elif launch.partial:
            with borrowing(self._context.memory) as borrow:
                partial = borrow((launch.partial,), torch.float32)
                launch.run(launch.grid, (query, key, value, out, lse, partial, None, *others), arguments)
                assert launch.merge is not None
                launch.merge(launch.merge_grid, (partial, out, lse), launch.merge_arguments)
        else:
            launch.run(launch.grid, (query, key, value, out, lse, None, None, *others), arguments)
        return AttentionOutput(out, lse)

    def _workspace(self, query: Tensor) -> Workspace | None:
        """That of the current stream; None while it is captured: a graph may be replayed on any stream."""
        if query.is_cuda and torch._C._cuda_isCurrentStreamCapturing():
            return None
        return self._context.workspaces.on(current_stream(self.chip))

    def _exact(self, query: Tensor, key: Tensor) -> AttentionRequest:
        """The request with the tensors' lengths; those of packed and paged keys lie in tables."""
        r = self.request
        if r.packed:
            return r
        return replace(r, len_q=query.shape[2], len_k=r.len_k if r.page_size is not None else key.shape[2])

    def _build(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        plan: BlockPlan | None,
        tables: SequenceMetadata | None,
        joins: bool,
        cut: TilePlan | None,
    ) -> Launch:
        """The launch with the block sizes of a plan: the caller's (`cut`), or the device's own, the largest that its
        shared memory holds. joins: there is a workspace.
        """
        request, tiling = self._exact(query, key), self._context.tiling
        while True:
            own = tiling.tiles(request)
            tiles: Tiles | None = tiles_of_plan(request, cut or tiling.plan_for("portable", request), own, self.chip)
            while tiles is not None:
                try:
                    return self._launch(tiles, query, key, value, mask, plan, tables, joins)
                except OutOfResources:
                    tiles = tiles._replace(stages=tiles.stages - 1) if tiles.stages > 1 else None
            if cut is not None or not tiling.shrink(request, own._replace(stages=1)):
                raise DeviceUnavailableError(
                    f"no tile of head_dim {self.request.dim_qk} fits {self.chip.shared_memory:,} bytes of shared "
                    "memory: "
                    "use another device"
                )

    def _launch(
        self,
        tiles: Tiles,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        plan: BlockPlan | None,
        tables: SequenceMetadata | None,
        joins: bool,
    ) -> Launch:
        r = self.request
        out = empty_result(query, r.dim_v)
        batch, heads_q, len_q, dim_qk = query.shape
        heads_kv, len_k = key.shape[1], key.shape[2]
        if r.packed:
            batch, len_q, len_k = r.batch, r.len_q, r.len_k
        elif r.page_size is not None:
            assert tables is not None
            len_k = tables.page_table.shape[1] * key.shape[2]
        pack, group = packs(r, len_q), heads_q // heads_kv
        whole = self._context.tiling.splits(r, tiles, len_q, len_k, batch) if pack else Splits(1, 0)
        splits, partial, at_once = split_keys(r, tiles, whole, len_q, batch, joins)
        split = splits.programs > 1
        if plan is not None:
            row_tiles = -(-len_q // plan.block_q) * -(-plan.block_q // tiles.rows)
        else:
            row_tiles = -(-len_q * (group if pack else 1) // tiles.rows)
        left, right = self._band
        arguments = [
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *out.stride()[:3],
            *lse_strides(out),
            *mask_strides(mask),
            0 if tables is None or tables.page_table is None else tables.page_table.stride(0),
            *scale_strides(tables),
            *plan_strides(plan),
            r.effective_scale,
            r.softcap or 1.0,
            r.dropout,
            0,
            0,
            heads_kv,
            len_q,
            len_k,
            r.diagonal,
            left or 0,
            right or 0,
            splits.chunk,
            splits.programs,
            *((1, 1) if plan is None else plan[:2]),
            query.shape[2],
            key.shape[2] if r.page_size is None else key.shape[0],
        ]
        seed = SEED
        if mask is None and plan is None and tables is None:
            arguments, seed = [None] * OTHERS + arguments, seed + OTHERS
        unit, even = aligned(query, key, value), not pack and whole_tiles(r, len_k, tiles.keys)
        types = ("u8" if mask is None else TYPES[mask.dtype], TYPES[key.dtype], TYPES[value.dtype])
        of_mask = tuple(mask_constants(mask).items()), tuple(mask_steps(mask).items())
        rows = tiles.rows if plan is None else plan.block_q
        even_rows = not pack and not r.packed and not len_q % rows and not rows % tiles.rows
        short = key.shape[2] * max(key.stride(2), value.stride(2)) < 1 << 31
        chosen = _Chosen(
            tiles, types, of_mask, pack, split, at_once, unit, even, even_rows, short, scaled_tokens(tables)
        )
        grid = (row_tiles * splits.programs, heads_kv if pack else heads_q, batch)
        like_query = dim_qk == r.dim_v and same_layout(out, torch.empty_like(query))
        launch = Launch(self._kernel(chosen, query.dtype), arguments, seed, grid, like_query, partial, at_once > 0)
        if at_once or not split:
            return launch
        count = batch * heads_q * len_q
        merging, many = [*out.stride()[:3], splits.programs, heads_q, len_q, count], count >= MANY_ROWS
        return launch._replace(
            merge=self._merge(query.dtype, many),
            merge_arguments=merging,
            merge_grid=(-(-count // merged_at_once(r.dim_v, many)[0]), 1, 1),
        )

    def _kernel(self, chosen: _Chosen, dtype: torch.dtype) -> Launcher:
        """The kernel for what was chosen; it serves every length and stride."""
        run = self._runs.get(chosen)
        if run is not None:
            return run
        if chosen.joins:  # a capture of a graph does not join, and must not compile either
            self._kernel(chosen._replace(joins=0), dtype)
            for many in (False, True):
                self._merge(dtype, many)
        r, (tiles, types, of_mask, pack, split, joins, aligned, even, even_rows, short, tokens) = self.request, chosen
        least = {None: 16, "int4": 64}.get(r.cache_dtype, 32)  # of numbers in a product, each plane's own 16
        left, right = self._band
        constants = {
            "GROUP": r.heads_q // r.heads_kv,
            "DQ": r.dim_qk,
            "DV": r.dim_v,
            "BDQ": max(least, power_of_two(r.dim_qk)),
            "BDV": max(least, power_of_two(r.dim_v)),
            "BM": tiles.rows,
            "BN": tiles.keys,
            "PAGE": r.page_size or 0,
            "MASK": {MaskKind.NONE: 0, MaskKind.BOOLEAN: 1, MaskKind.ADDITIVE: 2}[r.mask],
            **dict(of_mask[0]),
            "BOTTOM": r.causal is Causal.BOTTOM_RIGHT,
            "LEFT": left is not None,
            "RIGHT": right is not None,
            "SOFTCAP": r.softcap is not None,
            "DROPOUT": r.dropout > 0,
            "PACKED": r.packed,
            "SEQLENS": r.page_size is not None or r.used,
            "CACHE": CACHES[r.cache_dtype],
            "TOKENS": tokens,
            "WORDS": types[2] == "i16",
            "REREAD": pack and r.cache_dtype is None and self._context.tiling.alone(r, tiles),
            "FAST": not binaries.INTERPRETED,
            "PLAN": r.block_plan is not None,
            "PACK": pack,
            "SPLIT": split,
            "LSE": r.lse,
            "JOIN": joins,
            "ALIGNED": aligned,
            "EVEN": even,
            "SHORT": short,
            "EVEN_ROWS": even_rows,
            "PDL": split and not joins and dependent_launch(self.chip),
            "STAGES": tiles.stages,
            "ROWS": rows_joined(tiles, power_of_two(r.dim_v)) if joins else 0,
        }
        signature = attend_signature(TYPES[dtype], *types)
        run = launcher(self.chip, attend, signature, constants, dict(of_mask[1]), num_warps=tiles.warps)
        self._runs[chosen] = run
        return run

    def _merge(self, dtype: torch.dtype, many: bool) -> Launcher:
        run = self._runs.get(f"merge {many}")
        if run is None:
            pdl, dim_v = dependent_launch(self.chip), self.request.dim_v
            constants = {"DV": dim_v, "BDV": max(16, power_of_two(dim_v)), "LSE": self.request.lse, "PDL": pdl}
            constants |= {"TOTALS": self.request.mask is MaskKind.ADDITIVE}
            constants |= dict(zip(("ROWS", "PARTS"), merged_at_once(dim_v, many), strict=True))
            signature = merge_signature(TYPES[dtype])
            run = launcher(self.chip, merge, signature, constants, num_warps=4, launch_pdl=pdl)
            self._runs[f"merge {many}"] = run
        return run


class _Chosen(NamedTuple):
    """What a kernel is compiled for, beside its request: see `attend`'s constants of these names. types: Triton's, of
    mask, keys and values. of_mask: constants of a mask, and what its address and strides are multiples of.
    """

    tiles: Tiles
    types: tuple[str, str, str]
    of_mask: tuple[tuple[tuple[str, bool], ...], tuple[tuple[str, int], ...]]
    pack: bool
    split: bool
    joins: int
    aligned: bool
    even: bool
    even_rows: bool
    short: bool = True
    tokens: bool = False
