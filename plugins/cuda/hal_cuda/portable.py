"""The plain Triton path: any request, any strides. Chooses tiles and splits, fills in arguments, launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from hal_core import (
    AttentionOutput,
    AttentionRequest,
    BlockPlan,
    Causal,
    DeviceUnavailableError,
    MaskKind,
    SequenceTables,
)

from .chip import Chip, Launcher
from .kernels.attend import attend, keep_mask, merge
from .plans import listed_once

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.bool: "u8",
    torch.int32: "i32",
}  # fmt: skip
#: Rows (tokens times heads of a group) up to which a group shares one tile.
MOST_PACKED_ROWS = 64
MOST_PACKED_TOKENS = 16
_STRIDES = 28  # q_b to count_h in the kernel's signature
_MOST_LAUNCHES = 512


class Tiles(NamedTuple):
    """Rows and keys of a tile, warps of a program, stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int


def packs(request: AttentionRequest, len_q: int) -> bool:
    """Whether the query heads of a group share a tile."""
    few = len_q <= MOST_PACKED_TOKENS and len_q * (request.heads_q // request.heads_kv) <= MOST_PACKED_ROWS
    return few and not request.packed and request.block_plan is None


def choose_tiles(request: AttentionRequest, len_q: int) -> Tiles:
    """Tiles measured on Hopper; `shrunk` gives the next smaller ones where a chip's shared memory does not hold them."""
    wide = max(power_of_two(request.dim_qk), power_of_two(request.dim_v))
    plain = request.mask is MaskKind.NONE
    if packs(request, len_q):
        rows = max(16, power_of_two(len_q * (request.heads_q // request.heads_kv)))
        if request.dtype == "float32":
            return Tiles(rows, 32, 4, 2)
        many = wide <= 64 or (wide <= 128 and request.len_k > 2048)
        return Tiles(rows, 128 if many and plain and rows <= 32 else 64, 4, 3 if plain else 2)
    if request.dtype == "float32":
        tiles = Tiles(32, 32, 4, 2 if wide <= 128 else 1)
    elif wide > 128:
        tiles = Tiles(128, 32, 8, 3)
    elif request.block_plan is not None and plain:
        tiles = Tiles(128, 64, 4, 2)
    else:
        tiles = Tiles(64, 64, 4, 3)
    rows, keys = min(tiles.rows, max(16, power_of_two(len_q))), tiles.keys
    if request.block_plan is not None:  # a tile lies in one block of rows; blocks of odd sizes waste least in small tiles
        block_q, block_k = request.block_plan[:2]
        rows = min(rows, max(16, block_q & -block_q if block_q > 16 else 16))
        keys = min(keys, max(16, power_of_two(block_k)))
    return tiles._replace(rows=rows, keys=keys, warps=4 if rows <= 64 else tiles.warps)


def shrunk(tiles: Tiles) -> Tiles | None:
    """The next smaller tiles: fewer stages, then fewer keys, then fewer rows; None where there are none."""
    if tiles.stages > 1:
        return tiles._replace(stages=tiles.stages - 1)
    if tiles.keys > 16:
        return tiles._replace(keys=tiles.keys // 2, stages=2)
    return tiles._replace(rows=tiles.rows // 2, stages=2) if tiles.rows > 16 else None


class Splits(NamedTuple):
    """Programs that share the keys of a tile, and keys of each."""

    count: int
    chunk: int


def choose_splits(request: AttentionRequest, tiles: Tiles, len_q: int, len_k: int, batch: int, chip: Chip) -> Splits:
    """Divide the keys where tiles alone would leave multiprocessors idle."""
    heads = request.heads_kv
    row_tiles = -(-len_q * (request.heads_q // request.heads_kv) // tiles.rows)
    keys = len_k
    if request.window is not None and request.window[0] is not None:
        right = 0 if request.causal is not Causal.NONE else request.window[1]
        if right is not None:
            keys = min(keys, request.window[0] + right + len_q + tiles.keys)
    steps = max(-(-keys // tiles.keys), 1)
    programs = heads * batch * row_tiles
    slots = chip.multiprocessors * chip.decode_programs
    wanted = max(slots // max(programs, 1), 1)
    if request.page_size is not None and programs * 2 > slots:
        wanted = -(-keys // 4096)  # lengths differ within a batch: even pieces keep the longest from finishing alone
    steps_each = -(-steps // max(min(wanted, steps, 128), 1))
    return Splits(-(-steps // steps_each), steps_each * tiles.keys)


def power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def empty_result(query: Tensor, dim_v: int) -> Tensor:
    """[batch, heads, len_q, dim_v] laid out in memory as the query is."""
    batch, heads, length = query.shape[:3]
    if query.stride(1) < query.stride(2) and heads > 1 and length > 1:
        return torch.empty((batch, length, heads, dim_v), dtype=query.dtype, device=query.device).transpose(1, 2)
    return torch.empty((batch, heads, length, dim_v), dtype=query.dtype, device=query.device)


class Launch(NamedTuple):
    """What is the same for all calls on tensors of one form.

    arguments: of the kernel after its tensors; where it takes no mask, plan or tables, with a None for each of those. seed:
    where the random words are among them. like_query: the result has the query's shape and strides. With split keys, `partial`
    numbers hold the partial results and their log-sum-exp, and `merge` joins them.
    """

    run: Launcher
    arguments: list[Any]
    seed: int
    grid: tuple[int, int, int]
    like_query: bool
    partial: int = 0
    merge: Launcher | None = None
    merge_arguments: list[Any] = []  # noqa: RUF012 - never written to
    merge_grid: tuple[int, int, int] = (0, 0, 0)


class PortablePath:
    """A request bound to the plain Triton kernel on one chip."""

    def __init__(self, request: AttentionRequest, chip: Chip) -> None:
        self.request, self.chip = request, chip
        self._launches: dict[Any, Launch] = {}
        self._runs: dict[Any, Any] = {}
        self._last: tuple[Any, Launch | None] = ((), None)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, plan: BlockPlan | None = None,
        tables: SequenceTables | None = None, rng: tuple[int, int] | None = None,
    ) -> AttentionOutput:  # fmt: skip
        """Attention on tensors that the request describes; lengths are read from the tensors."""
        if plan is not None:
            plan = listed_once(plan, self.chip)
        if tables is not None:
            tables = SequenceTables(*(t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tables[:4]))
        form: Any = (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride())
        pointers = [query.data_ptr(), key.data_ptr(), value.data_ptr()]
        whole = not (pointers[0] | pointers[1] | pointers[2]) & 15
        extras = _extras(mask, plan, tables)
        form = (form, whole, extras)
        last, launch = self._last
        if launch is None or form != last:
            launch = self._launches.get(form)
            if launch is None:
                if len(self._launches) >= _MOST_LAUNCHES:
                    self._launches.clear()
                launch = self._launches[form] = self._build(query, key, value, mask, plan, tables)
            self._last = (form, launch)
        out = torch.empty_like(query) if launch.like_query else empty_result(query, value.shape[3])
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if self.request.lse else None
        arguments = launch.arguments
        if rng is not None:
            arguments = arguments.copy()
            arguments[launch.seed : launch.seed + 2] = random_words(rng)
        target, target_lse = out, lse
        if launch.merge is not None:
            target, target_lse = torch.empty(launch.partial, dtype=torch.float32, device=query.device), None
        tensors: tuple[Tensor | None, ...] = (query, key, value, target, target_lse)
        if extras is not None:
            tensors += (mask, *(tables or _NO_TABLES)[:4], *((None, None) if plan is None else plan[2:]))
        launch.run(launch.grid, tensors, arguments)
        if launch.merge is not None:
            launch.merge(launch.merge_grid, (target, out, lse), launch.merge_arguments)
        return AttentionOutput(out, lse)

    def _build(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, plan: BlockPlan | None,
        tables: SequenceTables | None,
    ) -> Launch:  # fmt: skip
        """The launch with the largest tiles that the chip holds."""
        len_q = self.request.len_q if self.request.packed else query.shape[2]
        tiles: Tiles | None = choose_tiles(self.request, len_q)
        while tiles is not None:
            try:
                return self._launch(tiles, query, key, value, mask, plan, tables)
            except OutOfResources:
                tiles = shrunk(tiles)
        raise DeviceUnavailableError(
            f"no tile of head_dim {self.request.dim_qk} fits {self.chip.shared_memory:,} bytes of shared memory: use another "
            "device"
        )

    def _launch(
        self, tiles: Tiles, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, plan: BlockPlan | None,
        tables: SequenceTables | None,
    ) -> Launch:  # fmt: skip
        r, chip = self.request, self.chip
        out = empty_result(query, value.shape[3])
        batch, heads_q, len_q, dim_qk = query.shape
        heads_kv, len_k, dim_v = key.shape[1], key.shape[2], value.shape[3]
        if r.packed:
            batch, len_q, len_k = r.batch, r.len_q, r.len_k
        elif r.page_size is not None:
            assert tables is not None
            len_k = tables.page_table.shape[1] * key.shape[2]
        pack = packs(r, len_q)
        splits = choose_splits(r, tiles, len_q, len_k, batch, chip) if pack else Splits(1, 0)
        split = splits.count > 1
        if plan is not None:
            row_tiles = -(-len_q // plan.block_q) * -(-plan.block_q // tiles.rows)
        else:
            row_tiles = -(-len_q * (heads_q // heads_kv if pack else 1) // tiles.rows)
        out_strides, lse_strides = _out_strides(out, splits.count)
        left, right = r.window or (None, None)
        if r.causal is not Causal.NONE:
            right = 0 if right is None else min(right, 0)
        constants = {
            "GROUP": heads_q // heads_kv, "DQ": dim_qk, "DV": dim_v, "BDQ": max(16, power_of_two(dim_qk)),
            "BDV": max(16, power_of_two(dim_v)), "BM": tiles.rows, "BN": tiles.keys, "PAGE": r.page_size or 0,
            "MASK": {MaskKind.NONE: 0, MaskKind.BOOLEAN: 1, MaskKind.ADDITIVE: 2}[r.mask],
            "BOTTOM": r.causal is Causal.BOTTOM_RIGHT, "LEFT": left is not None, "RIGHT": right is not None,
            "SOFTCAP": r.softcap is not None, "DROPOUT": r.dropout > 0, "PACKED": r.packed, "SEQLENS": r.page_size is not None,
            "PLAN": plan is not None, "PACK": pack, "SPLIT": split, "LSE": r.lse or split,
            "ALIGNED": _aligned(query, key, value),
            "EVEN": not pack and _whole_tiles(r, len_k, tiles.keys),
            "PDL": split and chip.dependent_launch, "STAGES": tiles.stages,
        }  # fmt: skip
        arguments = [
            *query.stride(), *key.stride(), *value.stride(), *out_strides, *lse_strides, *_mask_strides(mask),
            0 if tables is None or tables.page_table is None else tables.page_table.stride(0), *_plan_strides(plan),
            r.effective_scale, r.softcap or 1.0, r.dropout, 0, 0,
            heads_kv, len_q, len_k, r.diagonal, left or 0, right or 0, splits.chunk, splits.count,
            *((1, 1) if plan is None else plan[:2]), query.shape[2], key.shape[2] if r.page_size is None else key.shape[0],
        ]  # fmt: skip
        seed = _SEED
        if mask is None and plan is None and tables is None:
            arguments, seed = [None] * _OTHERS + arguments, seed + _OTHERS
        grid = (row_tiles * splits.count, heads_kv if pack else heads_q, batch)
        mask_type = "u8" if mask is None else TYPES[mask.dtype]
        chosen = (tiles.warps, mask_type, *constants.values())
        run = self._runs.get(chosen)
        if run is None:
            signature = attend_signature(TYPES[query.dtype], mask_type, split)
            run = self._runs[chosen] = chip.launcher(attend, signature, constants, num_warps=tiles.warps)
        like_query = dim_qk == dim_v and out.stride() == torch.empty_like(query).stride()
        if not split:
            return Launch(run, arguments, seed, grid, like_query)
        join = self._runs.get("merge")
        if join is None:
            pdl = chip.dependent_launch
            merge_constants = {"DV": dim_v, "BDV": max(16, power_of_two(dim_v)), "LSE": r.lse, "PDL": pdl}
            signature = merge_signature(TYPES[query.dtype])
            join = self._runs["merge"] = chip.launcher(merge, signature, merge_constants, num_warps=4, launch_pdl=pdl)
        rows = batch * heads_q * len_q * splits.count
        return Launch(
            run, arguments, seed, grid, like_query, rows * (dim_v + 1), join, [*out.stride()[:3], splits.count],
            (len_q, heads_q, batch),
        )  # fmt: skip


_NO_TABLES = SequenceTables()
_POINTERS = ("q", "k", "v", "out", "lse", "mask", "cu_q", "cu_k", "page_table", "seqlens", "plan_index", "plan_count")
_OTHERS = 7  # of the pointers: mask, tables and plan
_SEED = _STRIDES + 3


def attend_signature(dtype: str, mask: str, split: bool) -> dict[str, str]:
    """Triton types of `attend`'s run-time arguments."""
    types = dict.fromkeys(attend.arg_names, "i32")
    types |= dict.fromkeys(_POINTERS, "*i32") | dict.fromkeys(("q", "k", "v"), f"*{dtype}")
    types |= {"out": "*fp32" if split else f"*{dtype}", "lse": "*fp32", "mask": f"*{mask}"}
    types |= dict.fromkeys(attend.arg_names[len(_POINTERS) : len(_POINTERS) + _STRIDES], "i64")
    return types | dict.fromkeys(("scale", "softcap", "probability"), "fp32") | {"seed": "i64", "offset": "i32"}


def merge_signature(dtype: str) -> dict[str, str]:
    """Triton types of `merge`'s run-time arguments."""
    types = dict.fromkeys(("o_b", "o_h", "o_m"), "i64") | {"splits": "i32"}
    return types | {"part": "*fp32", "out": f"*{dtype}", "lse": "*fp32"}


def dropout_pattern(
    chip: Chip, shape: tuple[int, int, int, int], probability: float, rng: tuple[int, int], device: Any, first_batch: int = 0
) -> Tensor:
    """bool [batch, heads, len_q, len_k]: the pairs that the kernels keep under (seed, offset), from `first_batch` on."""
    batch, heads, rows, columns = shape
    keep = torch.empty(shape, dtype=torch.bool, device=device)
    signature = {"out": "*u8", "seed": "i64", "offset": "i32", "rows": "i32", "columns": "i32", "probability": "fp32"}
    signature |= {"first_head": "i32"}
    run = chip.launcher(keep_mask, signature, {"BLOCK": 1024}, num_warps=4)
    if keep.numel():
        arguments = [*random_words(rng), rows, columns, first_batch * heads, probability]
        run((batch * heads * rows, -(-columns // 1024), 1), (keep.view(torch.uint8),), arguments)
    return keep


def random_words(rng: tuple[int, int]) -> tuple[int, int]:
    """(seed, offset) as the kernels take them: 63 and 32 bits, the offset's upper half mixed into the seed."""
    seed = (rng[0] ^ rng[0] >> 63 ^ (rng[1] >> 32) * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)
    low = rng[1] & 0xFFFFFFFF
    return seed, low - (1 << 32) if low >> 31 else low


def _extras(mask: Tensor | None, plan: BlockPlan | None, tables: SequenceTables | None) -> Any:
    """What else the arguments depend on."""
    if mask is None and plan is None and tables is None:
        return None
    table = tables.page_table if tables is not None else None
    return (
        None if mask is None else (mask.shape, mask.stride(), mask.dtype),
        None if plan is None else (plan.indices.shape, plan.counts.shape, plan.indices.stride(), plan.counts.stride()),
        None if table is None else (table.shape, table.stride(0)),
    )


def _aligned(*tensors: Tensor) -> bool:
    """Whether loads of 16 bytes are possible: 16-bit elements, 8 of them a step, from 16-byte addresses."""
    return all(
        t.stride(3) == 1 and not t.data_ptr() & 15 and not any(s % (16 // t.itemsize) for s in t.stride()[:3])
        and not any(s % 8 for s in t.stride()[:3])
        for t in tensors
    )  # fmt: skip


def _whole_tiles(request: AttentionRequest, len_k: int, keys: int) -> bool:
    """Whether no tile of keys is cut short."""
    if request.packed or request.page_size is not None or len_k % keys:
        return False
    return request.block_plan is None or request.block_plan[1] % keys == 0


def _out_strides(out: Tensor, splits: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Strides of batch, head and row, of the output (or its partial results) and of the log-sum-exp."""
    heads, length, dim = out.shape[1:]
    if splits > 1:
        row = splits * dim
        return (heads * length * row, length * row, row), (heads * length * splits, length * splits, splits)
    return out.stride()[:3], (heads * length, length, 1)


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    """Strides as they are; 0 where the mask is broadcast."""
    if mask is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))


def _plan_strides(plan: BlockPlan | None) -> tuple[int, ...]:
    if plan is None:
        return (0, 0, 0, 0, 0)
    i, c = plan.indices, plan.counts
    sizes = [0 if n == 1 else s for n, s in zip(i.shape[:2], i.stride()[:2], strict=True)]
    counts = [0 if n == 1 else s for n, s in zip(c.shape[:2], c.stride()[:2], strict=True)]
    return (*sizes, i.stride(2), *counts)
