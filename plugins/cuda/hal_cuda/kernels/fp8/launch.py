"""The launch of the FP8 kernels: operands quantised, then one forward over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, BlockPlan, Causal, SequenceMetadata, TilePlan

from ...memory import borrowing
from ...runtime import binaries
from ...runtime.context import Context
from ...tiling import WARPGROUP_ROWS, Fp8Tiles, fp8_tiles, fp8_whole
from ..hopper.launch import CACHED, LOG2E, add_map, side
from ..hopper.schedule import OVERHEAD, key_tiles, schedule
from ..portable.launch import empty_result
from .config import Config
from .operands import Quantised, Quantiser, padded
from .wish import Wish, wish_of

_MOST_KEPT = 1024


class Launch(NamedTuple):
    """What is the same for all calls on tensors of one form; see the Hopper kernel's `Launch`."""

    kernel: binaries.Kernel
    grid: tuple[int, int, int]
    sides: tuple[tuple[tuple[int, ...], tuple[int, ...], Any], ...]
    made: tuple[dict[int, list[Any]], ...]
    tail: list[Any]


class Fp8Path:
    """A request bound to the FP8 kernels on one chip."""

    def __init__(
        self,
        request: AttentionRequest,
        context: Context,
        wish: Wish | None = None,
        tiles: Fp8Tiles | None = None,
        levels: int = 2,
    ) -> None:
        """wish: None for the request's own. tiles, levels: for measurements; see `Config.two_levels`, which may be
        False for head sizes to 128.
        """
        wish = wish or wish_of(request) or Wish()
        self.request, self.chip, self._context, self._wish = request, context.chip, context, wish
        self._tiles, self._levels = tiles, levels
        self._quantise = Quantiser(context, wish)
        self._launches: dict[Any, Launch] = {}

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
        with borrowing(self._context.memory) as borrow:
            given = self._quantise(borrow, query, key, value, r.effective_scale, r.lse)
            out = empty_result(query, value.shape[3])
            return self.attend(given, out)

    def attend(self, given: Quantised, out: Tensor) -> AttentionOutput:
        """Attention of quantised operands into `out`, [batch, heads, len_q, dim_v]."""
        len_k, dim_k = given.key.shape[2], given.key.shape[1]
        form = (given.query.shape, len_k, dim_k, out.shape, out.stride(), out.dtype, given.key_scale.shape[2])
        launch = self._launches.get(form)
        if launch is None:
            if len(self._launches) >= _MOST_KEPT:
                self._launches.clear()
            launch = self._launches[form] = self._build(given, out)
        lse = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device) if self.request.lse else None
        arguments: list[Any] = []
        for place, tensor in enumerate((given.query, given.key, given.value, out)):
            pointer = tensor.data_ptr()
            arguments += launch.made[place].get(pointer) or add_map(launch.sides[place], launch.made[place], pointer)
        scales = (lse, given.query_scale, given.key_scale, given.value_scale, given.dots)
        arguments += [0 if tensor is None else tensor.data_ptr() for tensor in scales]
        stream = torch._C._cuda_getCurrentRawStream(self.chip.index)
        launch.kernel(launch.grid, stream, [*arguments, *launch.tail])
        return AttentionOutput(out, lse)

    def _build(self, given: Quantised, out: Tensor) -> Launch:
        r, chip = self.request, self.chip
        batch, heads, len_q, dim_v = out.shape
        heads_kv, len_k, dim = given.key.shape[1:]
        right = None if r.causal is Causal.NONE else 0
        shift = r.diagonal + (len_k - len_q if r.causal is Causal.BOTTOM_RIGHT else 0)
        whole = self._levels == 2 and fp8_whole(replace(r, len_q=len_q, len_k=len_k))
        tiles = self._tiles or fp8_tiles(max(dim, padded(dim_v)), whole)
        config = config_of(
            tiles,
            dim_qk=dim,
            dim_v=padded(dim_v),
            group=heads // heads_kv,
            blocks=self._wish.scales == "block",
            right=right is not None,
            shifted=right is not None and shift % WARPGROUP_ROWS != 0,
            ragged=len_k % tiles.keys != 0 and not (right is not None and shift <= len_k - len_q),
            lse=r.lse,
            mean=given.dots is not None,
            two_levels=self._levels == 2,
        )
        dtype = "fp16" if out.dtype == torch.float16 else "bf16"
        made = binaries.kernel(("fp8", chip.index, dtype, config), lambda: compile_forward(dtype, config))
        rows = WARPGROUP_ROWS * tiles.consumers
        row_tiles = -(-len_q // rows)
        costs = [
            OVERHEAD + key_tiles(first, rows, len_k, shift, None, right, tiles.keys)
            for first in range((row_tiles - 1) * rows, -1, -rows)
        ]
        cached = len_k * (dim + padded(dim_v)) * heads_kv // heads
        plan = schedule(costs, batch * heads, chip.multiprocessors, CACHED // max(cached, 1))
        tail = [
            given.query_scale.shape[2],
            given.key_scale.shape[2],
            row_tiles * batch * heads,
            row_tiles,
            plan.together,
            heads,
            len_q,
            len_k,
            shift,
            0,
            r.effective_scale * LOG2E,
            None,
        ]
        operands = (given.query, given.key, given.value, out)
        sides = tuple((*side(t), meta) for t, meta in zip(operands, made.maps, strict=True))
        return Launch(made, (plan.programs, 1, 1), sides, tuple({} for _ in sides), tail)


def config_of(
    tiles: Fp8Tiles,
    *,
    dim_qk: int,
    dim_v: int,
    group: int,
    blocks: bool,
    right: bool,
    shifted: bool,
    ragged: bool,
    lse: bool,
    mean: bool,
    two_levels: bool = True,
) -> Config:
    """What the kernel is compiled for; see `Config`."""
    return Config(
        group=group,
        rows=WARPGROUP_ROWS,
        keys=tiles.keys,
        dim_qk=dim_qk,
        dim_v=dim_v,
        stages=tiles.stages,
        query_stages=tiles.queries,
        barriers=tiles.stages,
        consumers=tiles.consumers,
        turns=tiles.turns,
        named=tiles.arrive,
        two_levels=two_levels,
        apart=tiles.apart,
        halves=tiles.halves and dim_v > 128,
        blocks=blocks,
        right=right,
        shifted=shifted,
        ragged=ragged,
        lse=lse,
        mean=mean,
    )


def kernel_signature(dtype: str, config: Config) -> dict[str, str]:
    """Triton types of the kernel's run-time arguments; dtype of the result, "bf16" or "fp16"."""
    from triton.experimental.gluon import language as gl

    def descriptor(kind: str, rows: int, columns: int) -> str:
        block = [1, 1, rows, columns]
        element = {"fp8e4nv": gl.float8e4nv, "fp16": gl.float16, "bf16": gl.bfloat16}[kind]
        layout = gl.NVMMASharedLayout.get_default_for(block, element)
        return f"tensordesc<{kind}[{', '.join(map(str, block))}],{layout!r}>"

    types = {
        "qd": descriptor("fp8e4nv", config.rows, config.dim_qk),
        "kd": descriptor("fp8e4nv", config.keys, config.dim_qk),
        "vd": descriptor("fp8e4nv", config.dim_v, config.keys),
        "od": descriptor(dtype, config.rows, config.dim_v),
        "scale": "fp32",
    }
    types |= dict.fromkeys(("lse", "q_scale", "k_scale", "v_scale", "q_mean"), "*fp32")
    numbers = ("q_blocks", "k_blocks", "total", "row_tiles", "together", "heads", "len_q", "len_k", "shift", "right")
    return types | dict.fromkeys(numbers, "i32")


def compile_forward(dtype: str, config: Config) -> Any:
    """The compiled kernel of a result's dtype ("bf16" or "fp16") and its configuration; needs no GPU."""
    from triton.backends.compiler import GPUTarget

    from .forward import forward_fp8

    signature = kernel_signature(dtype, config)
    return binaries.compile_for(forward_fp8, signature, {"C": config}, GPUTarget("cuda", 90, 32), num_warps=4)
