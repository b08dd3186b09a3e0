# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Quantised keys and values, as `attend` reads them: codes become numbers in registers, never in memory.

A product takes codes as they are, in float16 (float32 for float32 queries), which holds every one of them: the scales
of the keys' channels go to the query, those of the values' tokens to the weights. Two int4 codes share a byte, the
even channel in its lower half, so a tile of bytes is two tiles of numbers, and a product over them is two.
"""

import triton
import triton.language as tl

#: Kinds of a cache: as the query, int8, int4 in pairs, FP8.
PLAIN, INT8, INT4, FP8 = (tl.constexpr(n) for n in range(4))


@triton.jit
def scaled_query(at, ok, scale, present):
    """(rows of the query times the scales of their channels, float32, the largest number of each row)."""
    rows = tl.load(at, mask=ok, other=0.0).to(tl.float32) * tl.load(scale, mask=present, other=0.0)[None, :]
    return rows, tl.max(tl.abs(rows), 1)


@triton.jit
def decoded(codes, COMPUTE: tl.constexpr, FAST: tl.constexpr):
    """int8 or FP8 codes in COMPUTE. FAST: by bytes of a register, which Triton's interpreter cannot."""
    if FAST and codes.dtype == tl.int8 and COMPUTE == tl.float16:
        # 0x64 before a byte u is 1024 + u; u is the code + 128.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 u, m, s;
            xor.b32 u, $2, 0x80808080;
            mov.b32 m, 0x64646464;
            mov.b32 s, 0x64806480;
            prmt.b32 $0, u, m, 0x5150;
            prmt.b32 $1, u, m, 0x5352;
            sub.f16x2 $0, $0, s;
            sub.f16x2 $1, $1, s;
            }""",
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    return codes.to(COMPUTE)


@triton.jit
def decoded_pairs(codes, COMPUTE: tl.constexpr, FAST: tl.constexpr):
    """int4 codes in the lower and in the upper halves of bytes, in COMPUTE."""
    if FAST and COMPUTE == tl.float16:
        # 0x6400 with a half n below is 1024 + n; n with its sign bit turned is the code + 8.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, s;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            mov.b32 s, 0x64086408;
            lop3.b32 $0, a, 0x000f000f, s, 0x6a;
            lop3.b32 $1, b, 0x000f000f, s, 0x6a;
            shr.u32 a, a, 4;
            shr.u32 b, b, 4;
            lop3.b32 $2, a, 0x000f000f, s, 0x6a;
            lop3.b32 $3, b, 0x000f000f, s, 0x6a;
            sub.f16x2 $0, $0, s;
            sub.f16x2 $1, $1, s;
            sub.f16x2 $2, $2, s;
            sub.f16x2 $3, $3, s;
            }""",
            "=r,=r,=r,=r,r",
            [codes],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    signed = codes.to(tl.int8, bitcast=True)
    return ((signed << 4) >> 4).to(COMPUTE), (signed >> 4).to(COMPUTE)
