"""Operands quantised to e4m3: what is launched for query, key and value, and what the forward then reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest

from ...memory import Borrowed
from ...runtime.context import Context
from ...runtime.launch import Launcher, launcher
from .quantise import mean_of_sums, quantise_all, quantise_rows, quantise_values, tile_maxima, tile_sums
from .wish import Wish, wish_of

BLOCK = 128  # tokens that share a scale
TILES = 8  # tiles of a sum of keys
_SIGNATURE = {
    "out": "*fp8e4nv",
    **dict.fromkeys(("scales", "maxima", "mean", "dots", "sums"), "*fp32"),
    **dict.fromkeys(("x_b", "x_h", "x_m"), "i64"),
    **dict.fromkeys(("heads", "length", "blocks", "group", "chunks"), "i32"),
    "scale_of_scores": "fp32",
}
_BUFFERS = ("out", "scales", "maxima", "mean", "dots", "sums")


class Quantised(NamedTuple):
    """Operands in e4m3, as `Quantiser` gives and `forward_fp8` reads them.

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


def padded(dim: int) -> int:
    """A head size as the kernel has it: a power of two from 64 up."""
    return max(64, 1 << (dim - 1).bit_length())


def blocks_of(length: int) -> int:
    """Blocks of tokens that share a scale."""
    return -(-length // BLOCK)


def quantised_bytes(request: AttentionRequest) -> int:
    """Bytes that `Quantiser` borrows for a request."""
    r, wish = request, wish_of(request) or Wish()
    rows, keys = r.batch * r.heads_q, r.batch * r.heads_kv
    blocks_q, blocks = blocks_of(r.len_q), blocks_of(r.len_k)
    dim = padded(r.dim_qk)
    size = rows * r.len_q * dim + keys * (r.len_k * dim + blocks * BLOCK * padded(r.dim_v))
    size += 4 * (rows * blocks_q + 2 * keys * blocks)
    if wish.scales == "head":
        size += 4 * (rows + 2 * keys)
    if wish.centred:
        size += 4 * keys * dim * (-(-blocks // TILES) + 1) + 4 * rows * r.len_q * r.lse
    return size


class Quantiser:
    """Quantises operands of one chip, on torch's current stream."""

    def __init__(self, context: Context, wish: Wish) -> None:
        self._chip, self._wish = context.chip, wish
        self._runs: dict[Any, Launcher] = {}

    def __call__(
        self, borrow: Borrowed, query: Tensor, key: Tensor, value: Tensor, scale: float, lse: bool
    ) -> Quantised:
        """Args: borrow: gives the buffers. scale: of the scores. lse: the log-sum-exp is asked for."""
        if self._wish == Wish("block", False):
            return self._at_once(borrow, query, key, value)
        mean = self._mean(borrow, key) if self._wish.centred else None
        dots = borrow(query.shape[:3], torch.float32) if lse and mean is not None else None
        group = query.shape[1] // key.shape[1]
        given = self._rows(borrow, query, None, None if dots is None else mean, dots, group, scale)
        keys = self._rows(borrow, key, mean, None, None, 1, scale)
        values = self._values(borrow, value)
        return Quantised(given[0], keys[0], values[0], given[1], keys[1], values[1], dots)

    def _at_once(self, borrow: Borrowed, query: Tensor, key: Tensor, value: Tensor) -> Quantised:
        """What needs nothing to be known beforehand, in one launch."""
        outs, programs = list[Tensor](), list[int]()
        for x in (query, key):
            outs.append(borrow((*x.shape[:3], padded(x.shape[3])), torch.float8_e4m3fn))
            programs.append(x.shape[0] * x.shape[1] * blocks_of(x.shape[2]))
        blocks = blocks_of(value.shape[2])
        outs.append(borrow((*value.shape[:2], blocks * padded(value.shape[3]), BLOCK), torch.float8_e4m3fn))
        scales = [borrow((*x.shape[:2], blocks_of(x.shape[2])), torch.float32) for x in (query, key, value)]
        aligned = all(_aligned(x) for x in (query, key, value))
        form = ("all", query.dtype, query.shape[3], value.shape[3], aligned)
        run = self._runs.get(form)
        if run is None:
            run = self._runs[form] = self._made_at_once(query, value, aligned)
        lengths = [query.shape[1], key.shape[1], query.shape[2], key.shape[2], *programs]
        steps = [step for x in (query, key, value) for step in x.stride()[:3]]
        grid = (programs[0] + 2 * programs[1], 1, 1)
        run(grid, (query, key, value, *outs, *scales), [*steps, *lengths])
        return Quantised(outs[0], outs[1], outs[2], scales[0], scales[1], scales[2], None)

    def _made_at_once(self, query: Tensor, value: Tensor, aligned: bool) -> Launcher:
        kind = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}[query.dtype]
        steps = tuple(f"{name}_{axis}" for name in "qkv" for axis in "bhm")
        types = dict.fromkeys("qkv", kind) | dict.fromkeys(("q8", "k8", "v8"), "*fp8e4nv")
        types |= dict.fromkeys(("q_scales", "k_scales", "v_scales"), "*fp32") | dict.fromkeys(steps, "i64")
        numbers = ("q_heads", "k_heads", "len_q", "len_k", "q_programs", "k_programs")
        types |= dict.fromkeys(numbers, "i32")
        divisible = dict.fromkeys(("q8", "k8", "v8", "q_scales", "k_scales", "v_scales"), 16)
        divisible |= (dict.fromkeys("qkv", 16) | dict.fromkeys(steps, 8)) if aligned else {}
        constants = {"D": query.shape[3], "DP": padded(query.shape[3])}
        constants |= {"DV": value.shape[3], "DVP": padded(value.shape[3])}
        return launcher(self._chip, quantise_all, types, constants, divisible, num_warps=4)

    def _rows(
        self,
        borrow: Borrowed,
        x: Tensor,
        centre: Tensor | None,
        against: Tensor | None,
        dots: Tensor | None,
        group: int,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Query or key and its scales. centre: what is subtracted; against: what `dots` are with."""
        out = borrow((*x.shape[:3], padded(x.shape[3])), torch.float8_e4m3fn)
        scales, maxima = self._scales(borrow, x, centre)
        flags = {"PER_BLOCK": maxima is None, "CENTRED": centre is not None, "DOTS": dots is not None}
        mean = centre if against is None else against
        blocks = blocks_of(x.shape[2])
        tensors = (x, out, scales, maxima, mean, dots)
        self._run("rows", x, flags)(_grid(x, blocks), tensors, [*_steps(x), blocks, group, scale])
        return out, scales

    def _values(self, borrow: Borrowed, x: Tensor) -> tuple[Tensor, Tensor]:
        blocks = blocks_of(x.shape[2])
        out = borrow((*x.shape[:2], blocks * padded(x.shape[3]), BLOCK), torch.float8_e4m3fn)
        scales, maxima = self._scales(borrow, x, None)
        run = self._run("values", x, {"PER_BLOCK": maxima is None})
        run(_grid(x, blocks), (x, out, scales, maxima), [*_steps(x), blocks])
        return out, scales

    def _mean(self, borrow: Borrowed, x: Tensor) -> Tensor:
        """The mean over the tokens of each head, float32 [batch, heads, dim]."""
        heads, dim, chunks = x.shape[:2], padded(x.shape[3]), -(-blocks_of(x.shape[2]) // TILES)
        sums = borrow((*heads, chunks, dim), torch.float32)
        mean = borrow((*heads, dim), torch.float32)
        self._run("sums", x, {"TILES": TILES})(_grid(x, chunks), (x, sums), [*_steps(x), chunks])
        self._run("mean", x, {})(_grid(x, 1), (sums, mean), [x.shape[2], chunks])
        return mean

    def _scales(self, borrow: Borrowed, x: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Room for the scales of a tensor, and, for scales per head, the largest magnitudes of its blocks."""
        blocks = blocks_of(x.shape[2])
        if self._wish.scales == "block":
            return borrow((*x.shape[:2], blocks), torch.float32), None
        maxima = borrow((*x.shape[:2], blocks), torch.float32)
        run = self._run("maxima", x, {"CENTRED": centre is not None})
        run(_grid(x, blocks), (x, maxima, centre), [*_steps(x), blocks])
        return borrow((*x.shape[:2], 1), torch.float32), maxima

    def _run(self, kernel: str, x: Tensor, flags: Mapping[str, Any]) -> Launcher:
        """A kernel over tensors like x, kept: by dtype, head size and whether addresses are multiples of 16 bytes."""
        aligned = _aligned(x)
        key = (kernel, x.dtype, x.shape[3], aligned, *flags.values())
        found = self._runs.get(key)
        if found is None:
            found = self._runs[key] = self._made(kernel, x, dict(flags), aligned)
        return found

    def _made(self, kernel: str, x: Tensor, flags: dict[str, Any], aligned: bool) -> Launcher:
        kind = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}[x.dtype]
        steps = ("x_b", "x_h", "x_m")
        divisible = dict.fromkeys(_BUFFERS, 16) | (({"x": 16} | dict.fromkeys(steps, 8)) if aligned else {})
        constants = {"D": x.shape[3], "DP": padded(x.shape[3]), **flags}
        types, chip = {"x": kind, **_SIGNATURE}, self._chip
        if kernel == "rows":
            return launcher(chip, quantise_rows, types, constants, divisible, num_warps=8)
        if kernel == "values":
            return launcher(chip, quantise_values, types, constants, divisible, num_warps=8)
        if kernel == "maxima":
            return launcher(chip, tile_maxima, types, constants, divisible, num_warps=8)
        if kernel == "sums":
            return launcher(chip, tile_sums, types, constants, divisible, num_warps=8)
        return launcher(chip, mean_of_sums, types, {"DP": constants["DP"]}, divisible, num_warps=1)


def _aligned(x: Tensor) -> bool:
    """Whether rows can be loaded by 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(step % 8 == 0 for step in x.stride()[:3])


def _steps(x: Tensor) -> list[int]:
    """A kernel's arguments about x: strides, heads and length."""
    return [*x.stride()[:3], x.shape[1], x.shape[2]]


def _grid(x: Tensor, programs: int) -> tuple[int, int, int]:
    return programs, x.shape[0] * x.shape[1], 1
