"""The launch of the Hopper kernel: its configuration, and tensor maps that are kept from call to call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, BlockPlan, Causal, SequenceMetadata, TilePlan

from ...runtime import binaries
from ...runtime.context import Context
from ...tiling import WARPGROUP_ROWS, HopperTiles, hopper_tiles_of, packs, parts, power_of_two, value_parts
from ..portable.launch import PortablePath, empty_result
from .config import Config
from .schedule import OVERHEAD, key_tiles, schedule

LOG2E = 1.4426950408889634
CACHED = 40 << 20  # bytes of keys and values that the second-level cache keeps beside the rest
_MOST_KEPT = 1024
_RUN_TIME = ("total", "row_tiles", "together", "heads", "len_q", "len_k", "shift", "left", "right")
_PACKED_RUN_TIME = ("together", "heads", "len_q", "shift", "left", "right")


def fits(*tensors: Tensor) -> bool:
    """Whether the copy engine can step through the tensors: by 16 bytes, never by 0. Addresses are looked at in each
    call.
    """
    for tensor in tensors:
        step = 16 // tensor.itemsize
        if tensor.stride(3) != 1:
            return False
        for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True):
            if size > 1 and (stride % step or stride <= 0):
                return False
    return True


def config_of(
    tiles: HopperTiles,
    *,
    dim_qk: int,
    dim_v: int,
    group: int,
    left: bool,
    right: bool,
    shifted: bool,
    half: bool,
    ragged: bool,
    softcap: bool,
    lse: bool,
    packed: bool = False,
    bottom: bool = False,
) -> Config:
    """What the kernel is compiled for; see `Config`."""
    first, second = value_parts(dim_v)
    stages2 = tiles.ring or tiles.stages
    return Config(
        group=group,
        rows=WARPGROUP_ROWS,
        keys=tiles.keys,
        dim_qk=parts(dim_qk)[0],
        dim_v=first,
        dim_qk2=parts(dim_qk)[1],
        dim_v2=second,
        value_columns=dim_v,
        stages=tiles.stages,
        stages2=stages2,
        query_stages=tiles.queries,
        barriers=tiles.stages if tiles.stages == stages2 else tiles.stages * stages2,
        shared_ring=tiles.ring > 0,
        consumers=tiles.consumers,
        turns=tiles.turns,
        named=tiles.arrive,
        own_output=tiles.own_output,
        held=tiles.held and not ragged,
        lazy=tiles.lazy,
        left=left,
        right=right,
        shifted=shifted,
        half=half,
        ragged=ragged,
        softcap=softcap,
        lse=lse,
        packed=packed,
        bottom=bottom,
    )


def kernel_signature(dtype: str, config: Config) -> dict[str, str]:
    """Triton types of the kernel's run-time arguments; dtype "bf16" or "fp16"."""
    rows, keys, types = config.rows, config.keys, {"lse": "*fp32"}
    first = (config.dim_qk, config.dim_v)
    second = (config.dim_qk2 or config.dim_qk, config.dim_v2 or config.dim_v)
    for (dim_qk, dim_v), number in ((first, ""), (second, "2"))[: 2 if config.split else 1]:
        types |= {f"qd{number}": _descriptor(dtype, rows, dim_qk), f"kd{number}": _descriptor(dtype, keys, dim_qk)}
        types |= {f"vd{number}": _descriptor(dtype, keys, dim_v), f"od{number}": _descriptor(dtype, rows, dim_v)}
    if config.packed:
        types |= {"out": f"*{dtype}", "table": "*i32", "out_head": "i64", "out_row": "i64"}
        types |= dict.fromkeys(_PACKED_RUN_TIME, "i32")
    else:
        types |= dict.fromkeys(_RUN_TIME, "i32")
    return types | dict.fromkeys(("scale", "cap_in", "cap_out"), "fp32")


def _descriptor(dtype: str, rows: int, dim: int) -> str:
    from triton.experimental.gluon import language as gl

    block = [1, 1, rows, dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16 if dtype == "fp16" else gl.bfloat16)
    return f"tensordesc<{dtype}[{', '.join(map(str, block))}],{layout!r}>"


class Launch(NamedTuple):
    """What is the same for all calls on tensors of one form.

    sides: for query, key, value and output (again for second parts: `repeats` is 2), how to make their tensor map and
    the arguments that follow it. made: for each of them the arguments by address.
    """

    kernel: binaries.Kernel
    grid: tuple[int, int, int]
    sides: tuple[tuple[tuple[int, ...], tuple[int, ...], Any], ...]
    made: tuple[dict[int, list[Any]], ...]
    tail: list[Any]
    like_query: bool
    repeats: int


class HopperPath:
    """A request bound to the Hopper kernel on one chip; tensors that the copy engine cannot read go to the portable
    path.
    """

    def __init__(self, request: AttentionRequest, context: Context, instead: PortablePath) -> None:
        self.request, self.chip, self._context, self._instead = request, context.chip, context, instead
        chip = context.chip
        self._launches: dict[Any, Launch | None] = {}
        self._stream, self._index, self._lse = torch._C._cuda_getCurrentRawStream, chip.index, request.lse
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
        form = (query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride())
        last, launch = self._last
        if form != last:
            launch = self._launch(form, query, key, value)
            self._last = (form, launch)
        pointers = (query.data_ptr(), key.data_ptr(), value.data_ptr())
        if launch is None or (pointers[0] | pointers[1] | pointers[2]) & 15:
            return self._instead(query, key, value, mask, plan, tables, rng)
        out = torch.empty_like(query) if launch.like_query else empty_result(query, value.shape[3])
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device) if self._lse else None
        made = launch.made
        arguments: list[Any] = []
        for place, pointer in enumerate((*pointers, out.data_ptr()) * launch.repeats):
            arguments += made[place].get(pointer) or add_map(launch.sides[place], made[place], pointer)
        arguments.append(0 if lse is None else lse.data_ptr())
        arguments += launch.tail
        launch.kernel(launch.grid, self._stream(self._index), arguments)
        return AttentionOutput(out, lse)

    def _launch(self, form: Any, query: Tensor, key: Tensor, value: Tensor) -> Launch | None:
        """The launch of a form; None where the copy engine cannot read it or few rows go to the plain path."""
        if form not in self._launches:
            if len(self._launches) >= _MOST_KEPT:
                self._launches.clear()
            steps_fit = fits(query, key, value) and not packs(self.request, query.shape[2])
            self._launches[form] = self._build(query, key, value) if steps_fit else None
        return self._launches[form]

    def _build(self, query: Tensor, key: Tensor, value: Tensor) -> Launch | None:
        r, chip = self.request, self.chip
        batch, heads, len_q, dim_qk = query.shape
        len_k, dim_v = key.shape[2], value.shape[3]
        left, right = r.window or (None, None)
        if r.causal is not Causal.NONE:
            right = 0 if right is None else min(right, 0)
        shift = r.diagonal + (len_k - len_q if r.causal is Causal.BOTTOM_RIGHT else 0)
        ends_inside = right is not None and shift + right <= len_k - len_q  # no row reaches past the last key
        exact = replace(r, len_q=len_q, len_k=len_k)
        tiles = hopper_tiles_of(exact)
        if not follows(tiles, self._context.tiling.plan_for("hopper", exact)):
            return None
        config = config_of(
            tiles,
            dim_qk=dim_qk,
            dim_v=dim_v,
            group=heads // key.shape[1],
            left=left is not None,
            right=right is not None,
            shifted=right is not None and (shift + right) % WARPGROUP_ROWS != 0,
            half=right is not None and (shift + right) % tiles.keys == 0 and ends_inside,
            ragged=len_k % tiles.keys != 0 and not ends_inside,
            softcap=r.softcap is not None,
            lse=r.lse,
        )
        dtype = "fp16" if query.dtype == torch.float16 else "bf16"
        key_of = ("hopper", chip.index, dtype, config)
        made = binaries.kernel(key_of, lambda: compile_forward(dtype, config))
        row_tiles = -(-len_q // (WARPGROUP_ROWS * tiles.consumers))
        rows = WARPGROUP_ROWS * tiles.consumers
        costs = [
            OVERHEAD + key_tiles(first, rows, len_k, shift, left, right, tiles.keys)
            for first in range((row_tiles - 1) * rows, -1, -rows)
        ]
        cached = len_k * (dim_qk + dim_v) * query.itemsize * key.shape[1] // heads
        plan = schedule(costs, batch * heads, chip.multiprocessors, CACHED // max(cached, 1))
        scale, cap_in, cap_out = r.effective_scale * LOG2E, 0.0, 0.0
        if r.softcap is not None:
            cap_in, cap_out, scale = 2 * LOG2E * r.effective_scale / r.softcap, r.softcap * LOG2E, 1.0
        out = empty_result(query, dim_v)
        tail = [
            row_tiles * batch * heads,
            row_tiles,
            plan.together,
            heads,
            len_q,
            len_k,
            shift,
            left or 0,
            right or 0,
            scale,
            cap_in,
            cap_out,
            None,
        ]
        repeats = 2 if config.split else 1
        sides = tuple((*side(t), meta) for t, meta in zip((query, key, value, out) * repeats, made.maps, strict=True))
        like_query = dim_qk == dim_v and out.stride() == torch.empty_like(query).stride()
        return Launch(made, (plan.programs, 1, 1), sides, tuple({} for _ in sides), tail, like_query, repeats)


def follows(tiles: HopperTiles, plan: TilePlan) -> bool:
    """Whether the tiles have a plan's block sizes. Where they do not, the portable kernel serves the call."""
    return (plan.block_q, plan.block_k) == (WARPGROUP_ROWS * tiles.consumers, tiles.keys)


def compile_forward(dtype: str, config: Config) -> Any:
    """The compiled kernel of a dtype ("bf16" or "fp16") and its configuration; needs no GPU."""
    from triton.backends.compiler import GPUTarget

    from .forward import forward, forward_packed, forward_split
    from .narrow import products

    padded, columns = config.dim_v, config.value_columns
    edit = (lambda ptx: products(ptx, padded, columns)) if columns < padded else None
    fn = forward_packed if config.packed else forward_split if config.split else forward
    target, signature = GPUTarget("cuda", 90, 32), kernel_signature(dtype, config)
    return binaries.compile_for(fn, signature, {"C": config}, target, edit=edit, num_warps=4)


def add_map(form: tuple[tuple[int, ...], tuple[int, ...], Any], kept: dict[int, list[Any]], pointer: int) -> list[Any]:
    """The arguments of one tensor: its map, which holds addresses alone and so may outlive it, its shape and its
    strides.

    form: shape, strides and the kernel's layout. kept: where they are found again, by address.
    """
    shape, strides, meta = form
    if len(kept) >= _MOST_KEPT:
        kept.clear()
    kept[pointer] = [binaries.tensor_map(pointer, shape, strides, meta), *shape, *strides]
    return kept[pointer]


def side(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides for a tensor map. A dimension of one element may have any stride; the map wants steps of 16
    bytes.
    """
    shape, step = tuple(tensor.shape), max(16 // tensor.itemsize, power_of_two(tensor.shape[3]))
    strides = [step if n == 1 else s for n, s in zip(shape[:3], tensor.stride()[:3], strict=True)]
    return shape, (*strides, 1)
