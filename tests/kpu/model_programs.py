"""A random family of what models run on a KPU: products of attention and of linear layers, convolutions, attention
fused and not, elementwise passes; on every profile, in every dataflow and type.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from hal_kpu.profiles.profile import Profile, load
from hal_kpu.simulator.array import DATAFLOWS, Dataflow
from hal_kpu.simulator.attention.baseline import works
from hal_kpu.simulator.attention.program import fused
from hal_kpu.simulator.movement import Program
from hal_kpu.simulator.opcodes.work import Work
from hal_kpu.simulator.products.lowering import lower, lower_product
from hal_kpu.simulator.products.product import Product

from hal_core import AttentionRequest, Causal

SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}
_BATCHES, _LENGTHS, _HEADS = (1, 2, 4, 8, 12, 16, 25, 32, 64), (1, 32, 64, 77, 128, 197, 256, 384), (32, 64, 80, 128)
_WIDTHS = (64, 128, 384, 768, 1024)
KINDS = ("scores", "weighted", "linear", "random", "convolution", "fused", "unfused", "elementwise")


class Case(NamedTuple):
    """Programs that run one after the other on a machine.

    products: what the PEs multiply in them; of fused attention, whose products are parts of one program, nothing.
    """

    about: str
    programs: list[Program]
    profile: Profile
    products: list[Product | Work]
    dataflow: Dataflow


def model_case(seed: int) -> Case:
    """The case of a seed: one of each kind in turn."""
    rng, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    profile, flow = load(rng.choice(["t64", "t256", "t768"])), rng.choice(DATAFLOWS)
    dtype = rng.choice([*SIZES][:2] if kind in ("fused", "unfused") else [*SIZES])
    about, programs = f"{kind} {profile.name} {dtype}", []
    products: list[Product | Work] = []
    if kind in ("fused", "unfused"):
        request = _request(rng, dtype)
        about += f" {request.heads_q} x {request.len_q} x {request.len_k} x {request.dim_qk}"
        if kind == "fused":
            programs = [fused(profile, request)]
        else:
            about += f" {flow}"
            steps = [work for _, work in works(request)]
            programs = [lower(work, profile, flow) for work in steps]
            products = [work for work in steps if work.macs]
    elif kind == "elementwise":
        elements, reads = rng.randint(1, 1 << 20), rng.randint(1, 3)
        size = SIZES[dtype] * elements
        work = Work(
            engine="vector",
            elements=elements,
            passes=rng.randint(1, 12),
            reads_bytes=reads * size,
            writes_bytes=size,
            dtype=dtype,
        )
        about, programs = f"{about} {elements} x {work.passes}", [lower(work, profile)]
    else:
        product = _product(rng, kind, dtype)
        about += f" {flow} {product.batch} x {product.M} x {product.N} x {product.K} share {product.a_share:.2f}"
        programs, products = [lower_product(product, profile, flow)], [product]
    found = [program for program in programs if program is not None]
    return Case(f"seed {seed}: {about}", found, profile, products, flow)


def _request(rng: random.Random, dtype: str) -> AttentionRequest:
    heads, len_q, dim = rng.choice([1, 2, 4, 8, 12]), rng.choice(_LENGTHS), rng.choice(_HEADS)
    len_k = rng.choice([len_q, len_q, 77, 300])
    causal = rng.choice([Causal.NONE, Causal.NONE, Causal.TOP_LEFT, Causal.BOTTOM_RIGHT])
    return AttentionRequest(rng.choice([1, 2]), heads, heads, len_q, len_k, dim, dim, dtype, causal=causal)


def _product(rng: random.Random, kind: str, dtype: str) -> Product:
    batch, share = rng.choice(_BATCHES), 1.0
    if kind == "scores":
        M, K = rng.choice(_LENGTHS), rng.choice(_HEADS)
        N = rng.choice([M, M, 77, 256])
    elif kind == "weighted":
        M, N = rng.choice(_LENGTHS), rng.choice(_HEADS)
        K = rng.choice([M, M, 77, 256])
    elif kind == "linear":
        batch, M, N, K = 1, rng.choice(_LENGTHS), rng.choice(_WIDTHS), rng.choice(_WIDTHS)
    elif kind == "convolution":
        side, channels, kernel = rng.choice([7, 14, 28]), rng.choice([3, 16, 64, 128]), rng.choice([1, 3, 5])
        batch, M, N, K = 1, side * side, rng.choice([16, 64, 128]), channels * kernel * kernel
        share = 1 / (kernel * kernel)
    else:
        M, N, K = (rng.randint(1, 300) for _ in range(3))
        batch = rng.choice([1, 1, *_BATCHES])
    size = SIZES[dtype]
    out = 4 if dtype == "int8" else size
    return Product(batch=batch, M=M, N=N, K=K, dtype=dtype, size=size, out_size=out, a_share=share)
