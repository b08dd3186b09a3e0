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


@gluon.jit
def scale_of(pointer, head, token, blocks, C: gl.constexpr):
    # The scale of a token's block. head: among all heads of the batch.
    if C.blocks:
        s = gl.load(pointer + head * blocks + token // BLOCK)
    else:
        s = gl.load(pointer + head)
    return s


@gluon.jit
def weigh(s, scale, level, C: gl.constexpr):
    # What follows from a tile's scores: the new level, what sums so far are multiplied by, weights.
    WIDE: gl.constexpr = C.keys > 64
    SL: gl.constexpr = accumulator(C.keys)
    grown = gl.maximum(level, largest(s, C.rows, C.keys, gl.SliceLayout(1, SL), WIDE) * scale - RAISED)
    alpha = gl.exp2(level - grown)
    p = gl.exp2(s * scale - gl.expand_dims(grown, 1))
    return grown, alpha, p
