# ruff: noqa: N803, E741
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Between the two products of the Hopper kernels: scores masked, and turned into weights that the second product reads.

WIDE (tiles of 128 keys): a thread's operations are laid out so that few wait for each other, its part of a row's sum is
kept apart until the end, and weights go from one step to the next by pairs in whole numbers. In tiles of 64 keys that
does not pay.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

HIDDEN = gl.constexpr(-1.0e30)  # a hidden score: finite, because -inf - -inf is NaN under FMA contraction
TO_BF16 = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
TO_FP16 = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
APART = gl.constexpr("mov.b32 {$0, $1}, $2;")
GROWTH = gl.constexpr(8.0)  # in base-2 units: weights of up to 2^8, far inside both 16-bit types


def _scaling(count: int) -> tuple[str, str]:
    """PTX, and its constraints, that multiplies `count` accumulators by their rows' factors, unless all of a warp's are
    1.

    Accumulators go by pairs: two of one row, two of the other row that a thread has a part in.
    """
    factors = range(2 * count, 3 * count)
    products = "".join(f"mul.f32 ${place}, ${place}, ${factor}; " for place, factor in enumerate(factors))
    one = "0f3F800000"
    asked = f"setp.neu.f32 p, ${factors[0]}, {one}; setp.neu.or.f32 p, ${factors[2]}, {one}, p; "
    asked += "vote.sync.any.pred q, p, -1;"
    text = f"{{ .reg .pred p, q; {asked} @!q bra.uni DONE; {products}DONE: }}"
    return text, ",".join(["=f"] * count + [str(place) for place in range(count)] + ["f"] * count)


RESCALE, RESCALE_CONSTRAINTS = map(gl.constexpr, _scaling(32))


@gluon.jit
def hide(s, t, row0, tile, work, SL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, RAGGED: gl.constexpr):
    # Scores of a tile of keys with those hidden that lie beyond the diagonals or behind the last key. t: the tile's
    # place, in tiles as wide as s.
    BM: gl.constexpr = s.shape[0]
    BN: gl.constexpr = s.shape[1]
    cols = t * BN + gl.arange(0, BN, gl.SliceLayout(0, SL))
    rows = row0 + gl.arange(0, BM, gl.SliceLayout(1, SL))
    if RIGHT:
        s = gl.where(gl.expand_dims(cols, 0) <= gl.expand_dims(rows + (tile.shift + work.right), 1), s, HIDDEN)
    if LEFT:
        s = gl.where(gl.expand_dims(cols, 0) >= gl.expand_dims(rows + (tile.shift - work.left), 1), s, HIDDEN)
    if RAGGED:  # not a sum: behind the last key of a packed sequence lies another, or anything
        s = gl.where(gl.expand_dims(cols < tile.len_k, 0), s, HIDDEN)
    return s


@gluon.jit
def capped(s, scaling, C: gl.constexpr):
    # cap_out * tanh(s * scale / cap), in base-2 units; cap_in = 2 * log2(e) * scale / cap.
    if C.softcap:
        s = scaling.cap_out - (2.0 * scaling.cap_out) / (gl.exp2(s * scaling.cap_in) + 1.0)
    return s


@gluon.jit
def largest(s, BM: gl.constexpr, BN: gl.constexpr, RL: gl.constexpr, WIDE: gl.constexpr):
    # The maximum of a row; by halves first.
    if WIDE:
        s = gl.max(s.reshape([BM, 2, BN // 2]), axis=1)
        s = gl.max(s.reshape([BM, 2, BN // 4]), axis=1)
    return gl.convert_layout(gl.max(s, axis=1), RL, assert_trivial=True)


@gluon.jit
def level(m, new, LAZY: gl.constexpr):
    # What the weights of a row are counted from. It follows the maximum; LAZY: once that has grown by more than GROWTH,
    # so that most steps have nothing to rescale, and the largest weight of a row is rounded like every other.
    grown = gl.maximum(m, new)
    if LAZY:
        grown = gl.where(grown > m + GROWTH, grown, m)
    return grown


@gluon.jit
def rescaled(o, alpha, BM: gl.constexpr, D: gl.constexpr, OL: gl.constexpr, LAZY: gl.constexpr):
    # The rows of o times alpha; LAZY: passed over where nothing of a warp has changed.
    alpha = gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, OL)), 1)
    if LAZY:
        alpha = alpha + gl.zeros([BM, D], gl.float32, OL)
        o = gl.inline_asm_elementwise(
            RESCALE, RESCALE_CONSTRAINTS, [o, alpha], dtype=gl.float32, is_pure=False, pack=32
        )
    else:
        o = o * alpha
    return o


@gluon.jit
def sums(p, BM: gl.constexpr, BN: gl.constexpr, LL: gl.constexpr, WIDE: gl.constexpr):
    # The sum of a row; WIDE: [BM, 8], what each thread holds of it.
    if WIDE:
        p = p.reshape([BM, BN // 8, 8])
    return gl.convert_layout(gl.sum(p, axis=1), LL, assert_trivial=True)


@gluon.jit
def scaled(l, alpha, LL: gl.constexpr, WIDE: gl.constexpr):
    # What `sums` gave, its rows times alpha.
    if WIDE:
        alpha = gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, LL), assert_trivial=True), 1)
    return l * alpha


@gluon.jit
def totals(l, RL: gl.constexpr, WIDE: gl.constexpr):
    # The sum of a row from what `sums` gave.
    if WIDE:
        l = gl.convert_layout(gl.sum(l, axis=1), RL, assert_trivial=True)
    return l


@gluon.jit
def narrow(p, BM: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, PL: gl.constexpr, WIDE: gl.constexpr):
    # Weights in 16 bits. A loop that carries 16-bit values takes an instruction more for each pair, so WIDE carries
    # pairs.
    if WIDE:
        low, high = gl.split(p.reshape([BM, BN // 2, 2]))
        asm: gl.constexpr = TO_FP16 if gl.float16 == KIND else TO_BF16
        w = gl.inline_asm_elementwise(asm, "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1)
    else:
        w = gl.convert_layout(p.to(KIND), PL, assert_trivial=True)
    return w


@gluon.jit
def operand(w, BM: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr, PL: gl.constexpr, WIDE: gl.constexpr):
    # The left side of P V from what `narrow` gave.
    if WIDE:
        low, high = gl.inline_asm_elementwise(APART, "=h,=h,r", [w], dtype=(gl.int16, gl.int16), is_pure=True, pack=1)
        w = gl.join(low.to(KIND, bitcast=True), high.to(KIND, bitcast=True)).reshape([BM, BN])
        w = gl.convert_layout(w, PL, assert_trivial=True)
    return w
