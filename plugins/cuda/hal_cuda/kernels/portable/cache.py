# ruff: noqa: N803, SIM300
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Quantised keys and values, as `attend` reads them: codes become numbers in registers, never in memory.

A product takes codes as they are, in float16 (float32 for float32 queries), which holds every one of them: the scales
of the keys' channels go to the query, those of the values' tokens to the weights. An element of memory that holds
several codes gives a tile for each, a plane: two for the bytes of int4, the even channel in the lower half. Values are
read by words of two bytes where they allow it, because a product wants two keys of one channel side by side: so one
instruction takes a channel from two words.

FAST: by inline assembly, which Triton's interpreter cannot.
"""

import triton
import triton.language as tl

#: Kinds of a cache: as the query, int8, int4 in pairs, the two formats of FP8.
PLAIN, INT8, INT4, E4M3, E5M2 = (tl.constexpr(n) for n in range(5))


@triton.jit
def nothing(ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr):
    """Zeros of every plane."""
    zeros = tl.zeros([ROWS, COLUMNS], tl.float32)
    if PLANES == 1:
        return (zeros,)
    elif PLANES == 2:
        return (zeros, zeros)
    else:
        return (zeros, zeros, zeros, zeros)


@triton.jit
def scaled_query(row, stride, ok, scale, scale_stride, channels, present, PLANES: tl.constexpr, COMPUTE: tl.constexpr):
    """Rows of the query times the scales of their channels, each over its largest number: they fit float16 whatever
    the scales are.

    Gives (a tile in COMPUTE for each plane, largest [rows]).
    """
    one = tl.load(row + PLANES * channels[None, :] * stride, mask=ok, other=0.0).to(tl.float32)
    one *= tl.load(scale + PLANES * channels * scale_stride, mask=present, other=0.0)[None, :]
    largest = tl.max(tl.abs(one), 1)
    if PLANES == 1:
        return ((one / tl.where(largest == 0.0, 1.0, largest)[:, None]).to(COMPUTE),), largest
    else:
        two = tl.load(row + (2 * channels[None, :] + 1) * stride, mask=ok, other=0.0).to(tl.float32)
        two *= tl.load(scale + (2 * channels + 1) * scale_stride, mask=present, other=0.0)[None, :]
        largest = tl.maximum(largest, tl.max(tl.abs(two), 1))
        over = tl.where(largest == 0.0, 1.0, largest)[:, None]
        return ((one / over).to(COMPUTE), (two / over).to(COMPUTE)), largest


@triton.jit
def products(rows, planes, PLANES: tl.constexpr):
    """The sum of rows @ plane over all planes, float32."""
    sums = tl.dot(rows[0], planes[0], input_precision="ieee")
    if PLANES == 2:
        sums = tl.dot(rows[1], planes[1], sums, input_precision="ieee")
    return sums


@triton.jit
def added(weights, planes, sums, shrink, PLANES: tl.constexpr):
    """sums * shrink + weights @ plane, of every plane; float32 without TF32."""
    one = tl.dot(weights, planes[0], sums[0] * shrink[:, None], input_precision="ieee")
    if PLANES == 1:
        return (one,)
    else:
        two = tl.dot(weights, planes[1], sums[1] * shrink[:, None], input_precision="ieee")
        if PLANES == 2:
            return (one, two)
        else:
            three = tl.dot(weights, planes[2], sums[2] * shrink[:, None], input_precision="ieee")
            four = tl.dot(weights, planes[3], sums[3] * shrink[:, None], input_precision="ieee")
            return (one, two, three, four)


@triton.jit
def of_bytes(codes, CACHE: tl.constexpr, COMPUTE: tl.constexpr, FAST: tl.constexpr):
    """The planes of a tile of bytes, in COMPUTE."""
    if CACHE == PLAIN:
        return (codes,)
    elif CACHE == INT4:
        return _pairs(codes, COMPUTE, FAST)
    elif CACHE == INT8 and FAST and COMPUTE == tl.float16:
        # 0x64 before a byte u is 1024 + u; u is the code + 128.
        return (
            tl.inline_asm_elementwise(
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
            ),
        )
    elif CACHE == E5M2:  # the upper byte of a float16
        return ((codes.to(tl.uint8, bitcast=True).to(tl.int16) << 8).to(tl.float16, bitcast=True).to(COMPUTE),)
    else:
        return (codes.to(COMPUTE),)


@triton.jit
def _pairs(codes, COMPUTE: tl.constexpr, FAST: tl.constexpr):
    """The lower and the upper codes of int4 bytes."""
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
    else:
        signed = codes.to(tl.int8, bitcast=True)
        return (((signed << 4) >> 4).to(COMPUTE), (signed >> 4).to(COMPUTE))


@triton.jit
def of_words(codes, CACHE: tl.constexpr, COMPUTE: tl.constexpr, FAST: tl.constexpr):
    """The planes of a tile of words of two bytes, in COMPUTE: two, of int4 four."""
    if FAST and COMPUTE == tl.float16 and CACHE == INT8:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 u, m, s;
            xor.b32 u, $2, 0x80808080;
            mov.b32 m, 0x64646464;
            mov.b32 s, 0x64806480;
            prmt.b32 $0, u, m, 0x4240;
            prmt.b32 $1, u, m, 0x4341;
            sub.f16x2 $0, $0, s;
            sub.f16x2 $1, $1, s;
            }""",
            "=r,=r,r",
            [codes],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif FAST and COMPUTE == tl.float16 and CACHE == INT4:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 w, s;
            mov.b32 s, 0x64086408;
            lop3.b32 $0, $4, 0x000f000f, s, 0x6a;
            shr.u32 w, $4, 4;
            lop3.b32 $1, w, 0x000f000f, s, 0x6a;
            shr.u32 w, $4, 8;
            lop3.b32 $2, w, 0x000f000f, s, 0x6a;
            shr.u32 w, $4, 12;
            lop3.b32 $3, w, 0x000f000f, s, 0x6a;
            sub.f16x2 $0, $0, s;
            sub.f16x2 $1, $1, s;
            sub.f16x2 $2, $2, s;
            sub.f16x2 $3, $3, s;
            }""",
            "=r,=r,=r,=r,r",
            [codes],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif FAST and COMPUTE == tl.float16 and CACHE == E4M3:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 u;
            .reg .b16 a, b;
            prmt.b32 u, $2, 0, 0x3120;
            mov.b32 {a, b}, u;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            }""",
            "=r,=r,r",
            [codes],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    elif CACHE == INT4:
        one, two = (codes << 12) >> 12, (codes << 8) >> 12
        three, four = (codes << 4) >> 12, codes >> 12
        return (one.to(COMPUTE), two.to(COMPUTE), three.to(COMPUTE), four.to(COMPUTE))
    elif CACHE == INT8:
        return (((codes << 8) >> 8).to(COMPUTE), (codes >> 8).to(COMPUTE))
    elif CACHE == E5M2:
        one, two = (codes << 8).to(tl.float16, bitcast=True), (codes & -256).to(tl.float16, bitcast=True)
        return (one.to(COMPUTE), two.to(COMPUTE))
    else:
        one, two = (codes & 255).to(tl.uint8), ((codes >> 8) & 255).to(tl.uint8)
        return (
            one.to(tl.float8e4nv, bitcast=True).to(COMPUTE),
            two.to(tl.float8e4nv, bitcast=True).to(COMPUTE),
        )
