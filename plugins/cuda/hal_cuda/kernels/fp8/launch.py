"""The launch of the FP8 kernels: operands quantised, then one forward over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, BlockPlan, Causal, SequenceMetadata, TilePlan

from ...memory import Borrowed, borrowing
from ...runtime import binaries
from ...runtime.context import Context
from ...runtime.launch import launcher
from ...tiling import WARPGROUP_ROWS, Fp8Tiles, fp8_tiles
from ..hopper.launch import CACHED, LOG2E, add_map, side
from ..hopper.schedule import OVERHEAD, key_tiles, schedule
from ..portable.launch import empty_result
from .config import Config
from .quantise import mean_of_sums, quantise_rows, quantise_values, tile_maxima, tile_sums
from .wish import Wish, wish_of

BLOCK = 128  # tokens that share a scale
TILES = 8  # tiles of a sum of keys
_MOST_KEPT = 1024
_POINTERS = ("x", "out", "scales", "maxima", "mean", "dots", "sums")
_TYPES = {
    **dict.fromkeys(("scales", "maxima", "mean", "dots", "sums"), "*fp32"),
    "out": "*fp8e4nv",
    **dict.fromkeys(("x_b", "x_h", "x_m"), "i64"),
    **dict.fromkeys(("heads", "length", "blocks", "group", "chunks"), "i32"),
    "scale_of_scores": "fp32",
}


class Quantised(NamedTuple):
    """Operands in e4m3, as `quantise` gives and `forward_fp8` reads them.

    query, key: [batch, heads, length, dim], dim a power of two from 64 up. value: [batch, heads, blocks * dim_v, 128].
    Their scales: float32 [batch, heads, blocks or 1]. dots: see `quantise_rows`; None without centred keys or
    log-sum-exp.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_scale: Tensor
    key_scale: Tensor
    value_scale: Tensor
    dots: Tensor | None


def quantised_bytes(request: AttentionRequest) -> int:
    """Bytes that `Quantiser` borrows for a request."""
    r, wish = request, wish_of(request) or Wish()
    blocks_q, blocks = -(-r.len_q // BLOCK), -(-r.len_k // BLOCK)
    rows, keys = r.batch * r.heads_q, r.batch * r.heads_kv
    dim, dim_v = padded(r.dim_qk), padded(r.dim_v)
    size = rows * r.len_q * dim + keys * (r.len_k * dim + blocks * BLOCK * dim_v)
    size += 4 * (rows * blocks_q + 2 * keys * blocks)
    if wish.scales == "head":
        size += 4 * (rows + 2 * keys)
    if wish.centred:
        size += 4 * keys * dim * (-(-r.len_k // (BLOCK * TILES)) + 1) + 4 * rows * r.len_q * r.lse
    return size


def padded(dim: int) -> int:
    """A head size as the kernel has it: a power of two from 64 up."""
    return max(64, 1 << (dim - 1).bit_length())


class Quantiser:
    """Quantises operands of one dtype on one chip, on torch's current stream."""

    def __init__(self, context: Context, wish: Wish) -> None:
        self._chip, self._wish = context.chip, wish

    def __call__(
        self, borrow: Borrowed, query: Tensor, key: Tensor, value: Tensor, scale: float, lse: bool
    ) -> Quantised:
        """Args: borrow: gives the buffers. scale: of the scores. lse: the log-sum-exp is asked for."""
        per_block, centred = self._wish.scales == "block", self._wish.centred
        mean = self._mean(borrow, key) if centred else None
        dots = borrow(query.shape[:3], torch.float32) if centred and lse else None
        group = query.shape[1] // key.shape[1]
        rows = []
        for x, centre, product in ((query, mean if dots is not None else None, dots), (key, mean, None)):
            out = borrow((*x.shape[:3], padded(x.shape[3])), torch.float8_e4m3fn)
            subtract = centre is not None and product is None
            scales, maxima = self._scales(borrow, x, centre if subtract else None)
            flags = {"PER_BLOCK": per_block, "CENTRED": subtract, "DOTS": product is not None}
            run = self._launch(quantise_rows, x, **flags)
            run((x, out, scales, maxima, centre, product), [-(-x.shape[2] // BLOCK), group, scale])
            rows.append((out, scales))
        blocks = -(-value.shape[2] // BLOCK)
        turned = borrow((*value.shape[:2], blocks * padded(value.shape[3]), BLOCK), torch.float8_e4m3fn)
        scales, maxima = self._scales(borrow, value, None)
        self._launch(quantise_values, value, PER_BLOCK=per_block)((value, turned, scales, maxima), [blocks])
        return Quantised(rows[0][0], rows[1][0], turned, rows[0][1], rows[1][1], scales, dots)

    def _mean(self, borrow: Borrowed, key: Tensor) -> Tensor:
        heads, dim = key.shape[:2], padded(key.shape[3])
        chunks = -(-key.shape[2] // (BLOCK * TILES))
        sums = borrow((*heads, chunks, dim), torch.float32)
        mean = borrow((*heads, dim), torch.float32)
        self._launch(tile_sums, key, TILES=TILES)((key, sums), [chunks], chunks)
        types = {"sums": "*fp32", "mean": "*fp32", "length": "i32", "chunks": "i32"}
        run = launcher(self._chip, mean_of_sums, types, {"DP": dim}, num_warps=1)
        run((1, heads[0] * heads[1], 1), (sums, mean), [key.shape[2], chunks])
        return mean

    def _scales(self, borrow: Borrowed, x: Tensor, mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Room for the scales of a tensor, and the largest magnitudes that scales per head are made from."""
        blocks = -(-x.shape[2] // BLOCK)
        if self._wish.scales == "block":
            return borrow((*x.shape[:2], blocks), torch.float32), None
        maxima = borrow((*x.shape[:2], blocks), torch.float32)
        self._launch(tile_maxima, x, CENTRED=mean is not None)((x, maxima, mean), [blocks])
        return borrow((*x.shape[:2], 1), torch.float32), maxima

    def _launch(self, fn: Any, x: Tensor, **flags: Any) -> Callable[..., None]:
        """A launch (tensors, arguments after the length, programs of a head) of a kernel over the tiles of x."""
        kind = "*fp16" if x.dtype == torch.float16 else "*bf16"
        steps = x.stride()[:3]
        divisible = dict.fromkeys((name for name in _POINTERS if name in fn.arg_names), 16)
        if x.data_ptr() % 16 or any(step % 8 for step in steps):
            divisible.pop("x")
        else:
            divisible |= dict.fromkeys(("x_b", "x_h", "x_m"), 8)
        types = {name: _TYPES.get(name, kind) for name in fn.arg_names if name not in flags and name not in ("D", "DP")}
        constants = {"D": x.shape[3], "DP": padded(x.shape[3]), **flags}
        run = launcher(self._chip, fn, types, constants, divisible, num_warps=8)

        def launch(tensors: Any, rest: list[Any], programs: int | None = None) -> None:
            grid = (programs or -(-x.shape[2] // BLOCK), x.shape[0] * x.shape[1], 1)
            run(grid, tensors, [*steps, x.shape[1], x.shape[2], *rest])

        return launch


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
        """wish: None for the request's own. tiles, levels: for measurements; see `Config.two_levels`."""
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
        tiles = self._tiles or fp8_tiles(max(dim, padded(dim_v)), len_k, right is not None)
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
