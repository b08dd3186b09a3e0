"""The launch of the masked Hopper kernel: its configuration, and tensor maps that are kept from call to call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import (
    AttentionOutput,
    AttentionRequest,
    BlockPlan,
    Causal,
    MaskKind,
    SequenceMetadata,
    TilePlan,
)

from ...memory import borrowing
from ...runtime import binaries
from ...runtime.context import Context
from ...tiling import WARPGROUP_ROWS, MaskedTiles, masked_tiles
from ..hopper.launch import CACHED, LOG2E, add_map, fits, side
from ..hopper.schedule import OVERHEAD, Schedule, key_tiles, schedule
from ..portable.arguments import TYPES, plan_strides
from ..portable.block_plans import listed_once
from ..portable.launch import PortablePath, empty_result
from .config import Config

_MOST_KEPT = 1024
_RUN_TIME = (
    *("mask_b", "mask_h", "index_b", "index_h", "index_m", "count_b", "count_h", "block_tiles", "blocks"),
    *("total", "row_tiles", "together", "heads", "len_q", "len_k", "shift", "left", "right"),
)
#: Values of `Config.mask`.
_KINDS = {MaskKind.NONE: 0, MaskKind.BOOLEAN: 1, MaskKind.ADDITIVE: 2}


def config_of(
    tiles: MaskedTiles,
    *,
    group: int,
    left: bool,
    right: bool,
    ragged: bool,
    softcap: bool,
    lse: bool,
    mask: int,
    of_keys: bool,
    per_block: int,
) -> Config:
    """What the kernel is compiled for; see `Config`."""
    return Config(
        group=group,
        rows=WARPGROUP_ROWS,
        keys=tiles.keys,
        dim_qk=tiles.dim_qk,
        dim_v=tiles.dim_v,
        stages=tiles.stages,
        query_stages=tiles.queries,
        consumers=tiles.consumers,
        turns=False,
        named=tiles.arrive,
        own_output=tiles.own_output,
        held=False,
        lazy=False,
        left=left,
        right=right,
        ragged=ragged,
        softcap=softcap,
        lse=lse and mask != 2,
        natural_lse=lse and mask == 2,
        mask=mask,
        of_keys=of_keys,
        per_block=per_block,
    )


def kernel_signature(dtype: str, mask: str, config: Config) -> dict[str, str]:
    """Triton types of the kernel's run-time arguments; dtype "bf16" or "fp16"; mask: the type of its elements."""
    C = config
    types = {
        "qd": _descriptor(dtype, C.rows, C.dim_qk),
        "kd": _descriptor(dtype, C.keys, C.dim_qk),
        "vd": _descriptor(dtype, C.keys, C.dim_v),
        "od": _descriptor(dtype, C.rows, C.dim_v),
    }
    types["md"] = _descriptor(mask, C.rows, C.keys) if C.tiled else types["qd"]
    types |= {"lse": "*fp32", "mask": f"*{mask}", "indices": "*i32", "counts": "*i32"}
    return types | dict.fromkeys(_RUN_TIME, "i32") | dict.fromkeys(("scale", "cap_in", "cap_out"), "fp32")


def _descriptor(dtype: str, rows: int, columns: int) -> str:
    from triton.experimental.gluon import language as gl

    block = [1, 1, rows, columns]
    kind = {"u8": gl.uint8, "fp16": gl.float16, "bf16": gl.bfloat16, "fp32": gl.float32}[dtype]
    return f"tensordesc<{dtype}[{', '.join(map(str, block))}],{gl.NVMMASharedLayout.get_default_for(block, kind)!r}>"


def compile_masked(dtype: str, mask: str, config: Config) -> Any:
    """The compiled kernel of a dtype ("bf16" or "fp16"), a mask's type and a configuration; needs no GPU."""
    from triton.backends.compiler import GPUTarget

    from .kernel import forward_masked

    signature, target = kernel_signature(dtype, mask, config), GPUTarget("cuda", 90, 32)
    most: dict[str, Any] = (
        {"maxnreg": 128} if config.consumers == 1 else {}
    )  # two programs share a multiprocessor's registers
    return binaries.compile_for(forward_masked, signature, {"C": config}, target, num_warps=4, **most)


class Launch(NamedTuple):
    """What is the same for all calls on tensors of one form.

    sides: what the tensor maps of query, key, value, output and mask are made from, and made: for each of them its
    arguments by address. steps: of a mask, `Lists.mask_b` and `Lists.mask_h`. blocks: `Lists.tiles` and
    `Lists.blocks`. tail: arguments behind those. of_rows: a mask has a tensor map.
    """

    kernel: binaries.Kernel
    grid: tuple[int, int, int]
    sides: tuple[tuple[tuple[int, ...], tuple[int, ...], Any], ...]
    made: tuple[dict[int, list[Any]], ...]
    steps: tuple[int, int]
    blocks: tuple[int, int]
    tail: list[Any]
    of_rows: bool


class HopperMaskedPath:
    """A request with a mask or a block plan bound to the masked Hopper kernel on one chip.

    What the kernel does not take goes to the portable path: tensors that the copy engine cannot read, masks of other
    forms than rows and keys or keys alone, blocks that are not whole tiles.
    """

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
        """Attention on tensors that the request describes; lengths are read from the tensors."""
        blocks = plan if isinstance(plan, BlockPlan) else None
        brief = None if mask is None else without_repeats(mask)
        of_mask = None if brief is None else (brief.shape, brief.stride(), brief.dtype)
        of_plan = None if blocks is None else blocks[:2]
        form = (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(), of_mask, of_plan)
        launch = self._launches.get(form)
        if launch is None and form not in self._launches:
            if len(self._launches) >= _MOST_KEPT:
                self._launches.clear()
            launch = self._launches[form] = self._build(query, key, value, brief, blocks)
        pointers = [query.data_ptr(), key.data_ptr(), value.data_ptr()]
        at_mask = 0 if brief is None else brief.data_ptr()
        if launch is None or (pointers[0] | pointers[1] | pointers[2] | at_mask * launch.of_rows) & 15:
            return self._instead(query, key, value, mask, plan, tables, rng)
        out = empty_result(query, value.shape[3])
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if self.request.lse else None
        addresses = (*pointers, out.data_ptr(), at_mask if launch.of_rows else pointers[0])
        arguments: list[Any] = []
        for place, pointer in enumerate(addresses):
            kept = launch.made[place]
            arguments += kept.get(pointer) or add_map(launch.sides[place], kept, pointer)
        arguments += [0 if lse is None else lse.data_ptr(), at_mask]
        stream = torch._C._cuda_getCurrentRawStream(self.chip.index)
        if blocks is None:
            launch.kernel(launch.grid, stream, [*arguments, 0, 0, *launch.steps, *(0,) * 5, 1, 0, *launch.tail])
            return AttentionOutput(out, lse)
        with borrowing(self._context.memory) as borrow:
            once = listed_once(blocks, self.chip, borrow)
            arguments += [once.indices.data_ptr(), once.counts.data_ptr(), *launch.steps]
            launch.kernel(launch.grid, stream, [*arguments, *plan_strides(once), *launch.blocks, *launch.tail])
        return AttentionOutput(out, lse)

    def _build(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, plan: BlockPlan | None
    ) -> Launch | None:
        r, chip = self.request, self.chip
        batch, heads, len_q, dim_qk = query.shape
        heads_kv, len_k, dim_v = key.shape[1], key.shape[2], value.shape[3]
        of_rows = mask is not None and mask.shape[2] > 1
        if not fits(query, key, value) or (mask is not None and not readable(mask, len_q, len_k)):
            return None
        tiles = masked_tiles(
            dim_qk, dim_v, mask.element_size() if mask is not None and of_rows else 0, plan and (plan[0], plan[1])
        )
        if tiles is None or (plan is not None and plan.indices.numel() == 0):
            return None
        if (plan is None) != (r.block_plan is None) or (mask is None) != (r.mask is MaskKind.NONE):
            return None
        exact = replace(r, len_q=len_q, len_k=len_k)
        cut = self._context.tiling.plan_for("masked", exact)
        if cut.block_q != tiles.rows:
            return None
        left, right = r.window or (None, None)
        if r.causal is not Causal.NONE:
            right = 0 if right is None else min(right, 0)
        shift = r.diagonal + (len_k - len_q if r.causal is Causal.BOTTOM_RIGHT else 0)
        kind = 0 if mask is None else _KINDS[r.mask]
        config = config_of(
            tiles,
            group=heads // heads_kv,
            left=left is not None,
            right=right is not None,
            # Rows without listed keys read keys behind the last; a boolean mask hides those by itself.
            ragged=plan is not None or (kind != 1 and len_k % tiles.keys != 0),
            softcap=r.softcap is not None,
            lse=r.lse,
            mask=kind,
            of_keys=mask is not None and not of_rows,
            per_block=0 if plan is None else plan.block_k // tiles.keys,
        )
        dtype, of_mask = TYPES[query.dtype], "u8" if mask is None else TYPES[mask.dtype]
        key_of = ("hopper masked", chip.index, dtype, of_mask, config)
        made = binaries.kernel(key_of, lambda: compile_masked(dtype, of_mask, config))
        row_tiles, rows = -(-len_q // tiles.rows), tiles.rows
        cached = len_k * (dim_qk + dim_v) * query.itemsize * heads_kv // heads
        if plan is None:
            costs = [
                OVERHEAD + key_tiles(first, rows, len_k, shift, left, right, tiles.keys)
                for first in range((row_tiles - 1) * rows, -1, -rows)
            ]
            shared = schedule(costs, batch * heads, chip.multiprocessors, CACHED // max(cached, 1))
        else:
            shared = Schedule(row_tiles * batch * heads, 1)
        unit = 1.0 if kind == 2 else LOG2E
        scale, cap_in, cap_out = r.effective_scale * unit, 0.0, 0.0
        if r.softcap is not None:
            cap_in, cap_out, scale = 2 * LOG2E * r.effective_scale / r.softcap, r.softcap * unit, 1.0
        tail = [
            *(row_tiles * batch * heads, row_tiles, shared.together, heads, len_q, len_k, shift, left or 0, right or 0),
            *(scale, cap_in, cap_out, None),
        ]
        steps = 0, 0
        if mask is not None:
            runs = [size > 1 for size in mask.shape[:2]]
            steps = (int(runs[0]), int(runs[1])) if of_rows else (mask.stride(0) * runs[0], mask.stride(1) * runs[1])
        forms = [side(t) for t in (query, key, value, empty_result(query, dim_v))]
        forms.append(side(mask) if mask is not None and of_rows else forms[0])
        sides = tuple((shape, strides, meta) for (shape, strides), meta in zip(forms, made.maps, strict=True))
        return Launch(
            kernel=made,
            grid=(shared.programs, 1, 1),
            sides=sides,
            made=tuple({} for _ in sides),
            steps=steps,
            blocks=(1, 0) if plan is None else (plan.block_q // rows, -(-len_k // plan.block_k)),
            tail=tail,
            of_rows=of_rows,
        )


def without_repeats(mask: Tensor) -> Tensor:
    """A mask of four dimensions with size 1 where it is expanded (stride 0); nothing is copied."""
    for dim in (0, 1, 2):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def readable(mask: Tensor, len_q: int, len_k: int) -> bool:
    """Whether the kernel reads a mask: of every key, one behind the other, and of no row or of every row, in steps of
    16 bytes.
    """
    kinds = (torch.bool, torch.float16, torch.bfloat16, torch.float32)
    if mask.shape[3] != len_k or mask.stride(3) != 1 or mask.dtype not in kinds:
        return False
    if mask.shape[2] > 1:
        return mask.shape[2] == len_q and fits(mask)
    return max(abs(s) for s in mask.stride()) * max(mask.shape) < 1 << 31


__all__ = ["HopperMaskedPath", "compile_masked", "config_of", "kernel_signature"]
