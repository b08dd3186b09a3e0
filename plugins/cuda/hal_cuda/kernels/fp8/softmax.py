# ruff: noqa: N803, SIM108
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Scores to weights in the FP8 kernel."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..hopper.softmax import largest
from .layouts import accumulator
from .quantise import BLOCK

LEAST = gl.constexpr(-1.0e20)  # least level: far above a hidden score, so hidden weights are exactly 0
RAISED = gl.constexpr(8.0)  # weights are up to 2^8, in the upper half of e4m3's range; l holds them so too


@gluon.constexpr_function
def bits(stages):
    # Of the number of a stage, where stages are a power of two; else None.
    return stages.bit_length() - 1 if stages & (stages - 1) == 0 else None


@gluon.jit
def stage_of(place, C: gl.constexpr):
    # The stage of the tile at a place in the order of loading. Shifts cost less than divisions of signed numbers.
    BITS: gl.constexpr = bits(C.stages)
    if BITS is None:
        s = place % C.stages
    else:
        s = place & (C.stages - 1)
    return s


@gluon.jit
def phase_of(place, C: gl.constexpr):
    # The parity of the round in which its stage holds that tile.
    BITS: gl.constexpr = bits(C.stages)
    if BITS is None:
        p = (place // C.stages) & 1
    else:
        p = (place >> BITS) & 1
    return p


@gluon.jit
def scale_of(pointer, head, token, blocks, C: gl.constexpr):
    # The scale of a token's block. head: among all heads of the batch.
    if C.blocks:
        s = gl.load(pointer + head * blocks + token // BLOCK)
    else:
        s = gl.load(pointer + head)
    return s


@gluon.jit
def reciprocal(x):
    # Of a scale, which is 2^-120 at least.
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def weigh(s, scale, level, C: gl.constexpr):
    # What follows from a tile's scores: the new level, what sums so far are multiplied by, weights.
    WIDE: gl.constexpr = C.keys > 64
    SL: gl.constexpr = accumulator(C.keys)
    grown = gl.maximum(level, largest(s, C.rows, C.keys, gl.SliceLayout(1, SL), WIDE) * scale - RAISED)
    alpha = gl.exp2(level - grown)
    p = gl.exp2(s * scale - gl.expand_dims(grown, 1))
    return grown, alpha, p
