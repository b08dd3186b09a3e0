# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""gelu(X W^T + bias) in Triton: the Hopper kernel where its tensors suit the copy engine, else one for every GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...discovery import Chip
from ...runtime import binaries
from ...runtime.launch import current_stream, launcher
from .checks import TYPES, aligned, chip_of
from .forms import gelu_of_product, unit
from .gelu_config import GeluConfig

_MOST_MAPS = 256
INNER = tl.constexpr(1.5957691216057308)  # 2 * sqrt(2 / pi)


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """x * Phi(x), or its tanh approximation: x / (1 + exp(-2 u)) is x / 2 * (1 + tanh(u))."""
    if TANH:
        y = x / (1.0 + tl.exp(-INNER * x * (1.0 + 0.044715 * x * x)))
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return y


@triton.jit
def gelu_linear(
    x,
    w,
    bias,
    out,
    rows,
    columns,
    depth,
    x_m,
    x_k,
    w_n,
    w_k,
    X_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr,
    TANH: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """gelu(x w^T + bias). Grid: tiles, TOGETHER tiles of rows at a time. x: [rows, depth], w: [columns, depth], with
    strides; out: [rows, columns], contiguous. X_UNIT, W_UNIT: the dimension of stride 1, "k", "m" or "n"; "":
    neither.
    """
    if X_UNIT == "k":
        x_k = 1
    elif X_UNIT == "m":
        x_m = 1
    if W_UNIT == "k":
        w_k = 1
    elif W_UNIT == "n":
        w_n = 1
    tiles, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0)
    group = program // (TOGETHER * across)
    height = tl.minimum(tiles - group * TOGETHER, TOGETHER)
    inside = program % (TOGETHER * across)
    row = (group * TOGETHER + inside % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (inside // height).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, STEP)
    left = x + (row * x_m)[:, None] + (k * x_k)[None, :]
    right = w + (k * w_k)[:, None] + (column * w_n)[None, :]
    found = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, STEP):
        there = k < depth - start
        a = tl.load(left, mask=there[None, :] & (row < rows)[:, None], other=0.0)
        b = tl.load(right, mask=there[:, None] & (column < columns)[None, :], other=0.0)
        found = tl.dot(a, b, found, input_precision="ieee")
        left += STEP * x_k
        right += STEP * w_k
    if BIAS:
        found += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    target = out + (row * columns)[:, None] + column[None, :]
    written = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(target, gelu(found, TANH).to(out.dtype.element_ty), mask=written)


def portable_tiles(rows: int, dtype: torch.dtype, capability: tuple[int, int]) -> dict[str, int]:
    """Block sizes, warps and pipeline stages of `gelu_linear`."""
    if capability < (8, 0):  # no copies that run beside the products
        return {"ROWS": 64, "COLUMNS": 64, "STEP": 32, "num_warps": 4, "num_stages": 1}
    if dtype == torch.float32:
        return {"ROWS": 64, "COLUMNS": 64, "STEP": 32, "num_warps": 4, "num_stages": 3}
    if rows <= 64:
        return {"ROWS": 16 if rows <= 16 else 64, "COLUMNS": 64, "STEP": 64, "num_warps": 4, "num_stages": 4}
    return {"ROWS": 128, "COLUMNS": 128, "STEP": 64, "num_warps": 8, "num_stages": 3}


def portable(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, tanh: bool) -> None:
    """The kernel for every GPU."""
    rows, depth = x.shape
    columns, chip = w.shape[0], chip_of(x.device)
    tiles = portable_tiles(rows, x.dtype, chip.capability)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    kind = f"*{TYPES[x.dtype]}"
    types = dict.fromkeys(("x", "w", "bias", "out"), kind) | dict.fromkeys(("rows", "columns", "depth"), "i64")
    strides = {"x_m": x.stride(0), "x_k": x.stride(1), "w_n": w.stride(0), "w_k": w.stride(1)}
    types |= dict.fromkeys(strides, "i64")
    x_unit, w_unit = unit(x, "m"), unit(w, "n")
    wide = {name: step for name, step in strides.items() if name not in (f"x_{x_unit}", f"w_{w_unit}")}
    even = aligned(x, w, out) and not any(step % 8 for step in wide.values())
    known = [(name, 8) for name in ("columns", "depth") if columns % 8 == 0 and depth % 8 == 0]
    known += [*((name, 16) for name in ("x", "w", "out")), *((name, 8) for name in wide)]
    constants = {"X_UNIT": x_unit, "W_UNIT": w_unit, "TANH": tanh, "BIAS": bias is not None, **tiles, "TOGETHER": 8}
    divisible = dict(known) if even else {}
    launch = launcher(chip, gelu_linear, types, constants, divisible=divisible, **options)
    programs = -(-rows // tiles["ROWS"]) * -(-columns // tiles["COLUMNS"])
    launch((programs, 1, 1), (x, w, bias, out), [rows, columns, depth, *strides.values()])


def hopper_config(x: Tensor, w: Tensor, out: Tensor, bias: Tensor | None, tanh: bool, chip: Chip) -> GeluConfig | None:
    """How the Hopper kernel computes a product; None where it cannot: the copy engine steps by 16 bytes."""
    if chip.capability != (9, 0) or binaries.INTERPRETED or not binaries.tested():
        return None
    w_rows = w.stride(1) != 1 and w.stride(0) == 1
    inner, outer = (w.stride(0), w.stride(1)) if w_rows else (w.stride(1), w.stride(0))
    narrow = x.dtype in (torch.float16, torch.bfloat16) and x.stride(1) == 1 and inner == 1
    steps = (x.stride(0), outer, out.stride(0))
    large = x.shape[0] > 64 and w.shape[0] >= 64 and x.shape[1] > 0
    if not (narrow and large and all(step % 8 == 0 and step > 0 for step in steps) and aligned(x, w, out)):
        return None
    return GeluConfig(tanh=tanh, bias=bias is not None, w_rows=w_rows)


def hopper_signature(dtype: str, config: GeluConfig) -> dict[str, str]:
    """Triton types of the Hopper kernel's run-time arguments; dtype "bf16" or "fp16"."""
    from triton.experimental.gluon import language as gl

    kind = gl.float16 if dtype == "fp16" else gl.bfloat16

    def descriptor(*block: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for(list(block), kind)
        return f"tensordesc<{dtype}[{', '.join(map(str, block))}],{layout!r}>"

    w = (config.depth, config.columns) if config.w_rows else (config.columns, config.depth)
    return {
        "xd": descriptor(64 * config.consumers, config.depth),
        "wd": descriptor(*w),
        "od": descriptor(64, config.columns // config.parts),
        "bias": f"*{dtype}",
    } | dict.fromkeys(("row_tiles", "column_tiles", "steps", "columns"), "i32")


def compile_hopper(dtype: str, config: GeluConfig) -> Any:
    """The compiled Hopper kernel; needs no GPU."""
    from triton.backends.compiler import GPUTarget

    from .gelu_hopper import gelu_linear_hopper

    target, signature = GPUTarget("cuda", 90, 32), hopper_signature(dtype, config)
    return binaries.compile_for(gelu_linear_hopper, signature, {"C": config}, target, num_warps=4)


@lru_cache(maxsize=_MOST_MAPS)
def _map(pointer: int, shape: tuple[int, int], stride: int, meta: tuple[tuple[str, Any], ...]) -> list[Any]:
    """A kernel's arguments for a matrix: its tensor map, which holds addresses alone, its shape and its strides."""
    known = dict(meta)
    return [binaries.tensor_map(pointer, shape, (stride, 1), known), *shape, stride, 1]


def hopper(
    x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, config: GeluConfig, chip: Chip, programs: int = 0
) -> None:
    """The Hopper kernel. programs: of the launch; 0: as many as there are multiprocessors."""
    dtype = TYPES[x.dtype]
    made = binaries.kernel(("gelu", chip.index, dtype, config), lambda: compile_hopper(dtype, config))
    stored = w.mT if config.w_rows else w
    arguments: list[Any] = []
    for t, meta in zip((x, stored, out), made.maps, strict=True):
        frozen = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in meta.items())
        arguments += _map(t.data_ptr(), tuple(t.shape), t.stride(0), frozen)
    row_tiles, column_tiles = -(-x.shape[0] // (64 * config.consumers)), -(-w.shape[0] // config.columns)
    arguments += [0 if bias is None else bias.data_ptr(), row_tiles, column_tiles]
    arguments += [-(-x.shape[1] // config.depth), w.shape[0], None]
    made((min(programs or chip.multiprocessors, row_tiles * column_tiles), 1, 1), current_stream(chip), arguments)


def run(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, tanh: bool) -> None:
    """A `forms.Multiply` by the fastest Triton kernel that can."""
    chip = chip_of(x.device)
    config = hopper_config(x, w, out, bias, tanh, chip)
    with torch.cuda.device_of(x):
        if config is None:
            portable(x, w, bias, out, tanh)
        else:
            hopper(x, w, bias, out, config, chip)


def triton_fused_gelu_linear(X: Tensor, W: Tensor, bias: Tensor | None = None, use_tanh_approx: bool = False) -> Tensor:
    """`hal_cuda.kernels.fused_gelu_linear` in Triton."""
    return gelu_of_product("triton_fused_gelu_linear", X, W, bias, use_tanh_approx, binaries.INTERPRETED, run)
