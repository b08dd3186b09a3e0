# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Rotary position embedding in Triton: elements 2 i and 2 i + 1 of a head are turned by position * base^(-2 i / D).

Source: Su et al. 2021 (RoFormer), equation 34.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime import binaries
from ...runtime.launch import launcher
from .checks import TYPES, aligned, check_tensors, chip_of
from .forms import Rotation, check_table, log_step, rotation, steps_by_16, strides_of

#: Heads of one program, which shares its cosines among them; bytes of a head's positions that it turns at a time.
HEADS, BYTES = 8, 8192
QUARTERS = tl.constexpr(2.0 / math.pi)  # quarters of a turn in a radian
QUARTER = tl.constexpr(math.pi / 2)
#: Minimax fits on an eighth of a turn to either side: (sin(r) / r - 1) / r^2 and (cos(r) - 1 + r^2 / 2) / r^4, in r^2.
S0, S1, S2 = (tl.constexpr(c) for c in (-0.16666665, 0.00833274, -0.0001958686))
C0, C1, C2 = (tl.constexpr(c) for c in (0.041666665, -0.0013888295, 2.4546889e-05))


@triton.jit
def angles(position, pair, step):
    """Cosine and sine of position * 2^(pair * step), float32. Whole quarters of a turn are taken off in float64,
    where float32 would lose the fraction.
    """
    fourths = position.to(tl.float64) * (tl.exp2(pair.to(tl.float64) * step) * QUARTERS)
    whole = tl.floor(fourths + 0.5)
    r = (fourths - whole).to(tl.float32) * QUARTER
    z = r * r
    sine = r + r * z * (S0 + z * (S1 + z * S2))
    cosine = 1.0 - 0.5 * z + z * z * (C0 + z * (C1 + z * C2))
    quarter = (whole - 4.0 * tl.floor(0.25 * whole)).to(tl.int32)
    swap = (quarter & 1) != 0
    c, s = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -c, c), tl.where((quarter & 2) != 0, -s, s)


@triton.jit
def rope_table(cos, sin, positions, pairs, step, BLOCK: tl.constexpr):
    """cos, sin: [positions, pairs], float32. step: log2 of the ratio of a pair's frequency to the one before."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    c, s = angles(at // pairs, at % pairs, step)
    tl.store(cos + at, c, mask=at < positions * pairs)
    tl.store(sin + at, s, mask=at < positions * pairs)


@triton.jit
def turn_heads(x, out, x_h, x_n, first, heads, position, there, c, s, length, D: tl.constexpr, HEADS: tl.constexpr):
    """Turn up to HEADS heads, the first of them `first`. x, out: of one batch entry; out is contiguous."""
    element = tl.arange(0, 2 * c.shape[1])
    inside = there[:, None] & (element < D)[None, :]
    for head in range(first, tl.minimum(first + HEADS, heads)):
        some = tl.load(x + head * x_h + (position * x_n)[:, None] + element[None, :], mask=inside)
        even, odd = tl.split(tl.reshape(some.to(tl.float32), [c.shape[0], c.shape[1], 2]))
        turned = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [c.shape[0], 2 * c.shape[1]])
        target = out + (head * length + position)[:, None] * D + element[None, :]
        tl.store(target, turned.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rope_heads(
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    heads_q,
    heads_k,
    length,
    blocks,
    step,
    TABLE: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Turn query and key. Grid: (blocks of ROWS positions * batch, groups of HEADS heads of q, then of k). q, k:
    [batch, heads, length, D]; cos, sin: float32 [positions, D / 2] where TABLE, else computed from `step`. PAIRS: D / 2
    rounded up to a power of two.
    """
    batch, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0) % blocks
    position = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = position < length
    pair = tl.arange(0, PAIRS)
    if TABLE:
        place = position[:, None] * (D // 2) + pair[None, :]
        known = there[:, None] & (pair < D // 2)[None, :]
        c, s = tl.load(cos + place, mask=known, other=1.0), tl.load(sin + place, mask=known, other=0.0)
    else:
        c, s = angles(position[:, None], pair[None, :], step)
    groups = tl.cdiv(heads_q, HEADS)
    group = tl.program_id(1)
    if group < groups:
        out = q_out + batch * heads_q * length * D
        turn_heads(q + batch * q_b, out, q_h, q_n, group * HEADS, heads_q, position, there, c, s, length, D, HEADS)
    else:
        out = k_out + batch * heads_k * length * D
        first = (group - groups) * HEADS
        turn_heads(k + batch * k_b, out, k_h, k_n, first, heads_k, position, there, c, s, length, D, HEADS)


def _rotate(form: Rotation, tables: tuple[Tensor, Tensor] | None, base: float) -> tuple[Tensor, Tensor]:
    query, key, query_out, key_out = form
    batch, heads_q, length, dim = query.shape
    heads_k = key.shape[1]
    if not batch * length * (heads_q + heads_k):
        return query_out, key_out
    chip, pairs = chip_of(query.device), triton.next_power_of_2(dim // 2)
    rows = max(min(BYTES // (2 * pairs * query.itemsize), triton.next_power_of_2(length)), 1)
    blocks = -(-length // rows)
    even = dim * query.itemsize % 16 == 0 and steps_by_16(query, key) and aligned(*(tables or ()))
    kind = f"*{TYPES[query.dtype]}"
    types = dict.fromkeys(("q", "k", "q_out", "k_out"), kind) | dict.fromkeys(("cos", "sin"), "*fp32")
    strides = ("q_b", "q_h", "q_n", "k_b", "k_h", "k_n")
    types |= dict.fromkeys(strides, "i64") | dict.fromkeys(("heads_q", "heads_k", "blocks"), "i32")
    types |= {"length": "i64", "step": "fp64"}
    steps = [*((s, 8) for s in strides), *((p, 16) for p in ("q", "k", "q_out", "k_out", "cos", "sin"))]
    constants = {"TABLE": tables is not None, "D": dim, "PAIRS": pairs, "ROWS": rows, "HEADS": HEADS}
    groups = -(-heads_q // HEADS) - (-heads_k // HEADS)
    given = (query, key, *(tables or (None, None)), query_out, key_out)
    moved = [*strides_of(query), *strides_of(key)]
    divisible = dict(steps) if even else {}
    with torch.cuda.device_of(query):
        launch = launcher(chip, rope_heads, types, constants, num_warps=4, divisible=divisible)
        launch((blocks * batch, groups, 1), given, [*moved, heads_q, heads_k, length, blocks, log_step(dim, base)])
    return query_out, key_out


def triton_rope_forward(Q: Tensor, K: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`hal_cuda.kernels.rope_forward` in Triton."""
    return _rotate(rotation("triton_rope_forward", Q, K, binaries.INTERPRETED, (cos, sin)), (cos, sin), 1e4)


def triton_rope_forward_fused(Q: Tensor, K: Tensor, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """`hal_cuda.kernels.rope_forward_fused` in Triton."""
    return _rotate(rotation("triton_rope_forward_fused", Q, K, binaries.INTERPRETED, base=base), None, base)


def triton_rope_precompute_freqs(
    max_seq_len: int, head_dim: int, base: float = 10000.0, *, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """`hal_cuda.kernels.rope_precompute_freqs` in Triton."""
    check_table("triton_rope_precompute_freqs", max_seq_len, head_dim, base)
    place = torch.device(device if device is not None else "cpu" if binaries.INTERPRETED else "cuda")
    cos, sin = (torch.empty(max_seq_len, head_dim // 2, dtype=torch.float32, device=place) for _ in range(2))
    check_tensors("triton_rope_precompute_freqs", binaries.INTERPRETED, [cos])
    if cos.numel():
        types = {"cos": "*fp32", "sin": "*fp32", "positions": "i64", "pairs": "i64", "step": "fp64"}
        with torch.cuda.device_of(cos):
            launch = launcher(chip_of(cos.device), rope_table, types, {"BLOCK": 512}, num_warps=4)
            launch((-(-cos.numel() // 512), 1, 1), (cos, sin), [max_seq_len, head_dim // 2, log_step(head_dim, base)])
    return cos, sin
