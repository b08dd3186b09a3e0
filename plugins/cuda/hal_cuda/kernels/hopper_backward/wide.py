# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The warpgroups of the Hopper backward that compute, for head sizes above 128.

Blocks have 64 keys. Each warpgroup makes all of S' and dP', seven products for five, and half the columns of dK, dV
and dQ, so nothing is exchanged.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .config import Barriers, Block, Edges, Lists, Maps, Scaling, Shared
from .consumer import visible_keys, weights
from .pipeline import add_tile, opaque


@gluon.jit
def step_wide(i, m, tile, pointer, dk, dv, seen, shared: Shared, barriers: Barriers, block: Block, edges: Edges,
              scaling: Scaling, c: gl.constexpr, MASK: gl.constexpr, C: gl.constexpr, SL: gl.constexpr,
              PL: gl.constexpr, VL: gl.constexpr, QL: gl.constexpr):  # fmt: skip
    ST: gl.constexpr = C.stages
    D: gl.constexpr = C.dim_qk
    HV: gl.constexpr = C.dim_v // 2
    KIND: gl.constexpr = shared.query.dtype
    kb = opaque(0)
    k = shared.key.index(kb).reshape([64, D])
    v = shared.value.index(kb).reshape([64, C.dim_v])
    stage = i % ST
    do = shared.grad_out.index(stage).reshape([C.rows, C.dim_v])
    q = shared.query.index(stage).reshape([C.rows, D])
    p, slope, dp = weights(q, do, k, v, stage, (i // ST) & 1, m * C.rows, block.key, seen, shared, barriers, edges,
                           scaling, c, MASK, C, SL)  # fmt: skip
    p16 = gl.convert_layout(p.to(KIND), VL, assert_trivial=True)
    dv = warpgroup_mma(p16, do.slice(c * HV, HV, dim=1), dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    delta = shared.statistics.index(stage).slice(1, 1).load(SL)
    ds16 = (slope * (dp - delta)).to(KIND)
    d16 = gl.convert_layout(ds16, PL, assert_trivial=True)
    dk = warpgroup_mma(d16, q.slice(c * 128, 128, dim=1), dk, is_async=True)
    ds = shared.grad_scores.index(c)  # of its own: the other has the same
    ds.store(ds16)
    fence_async_shared()
    z = gl.zeros([64, 64], gl.float32, QL)
    dq = warpgroup_mma(ds.permute((1, 0)), k.slice(c * 128, 64, dim=1), z, use_acc=False, is_async=True)
    dv, dk, p16, d16 = warpgroup_mma_wait(1, deps=[dv, dk, p16, d16])
    dr = warpgroup_mma(ds.permute((1, 0)), k.slice(c * 128 + 64, 64, dim=1), z, use_acc=False, is_async=True)
    dq = warpgroup_mma_wait(1, deps=[dq])
    mbarrier.arrive(barriers.done.index(stage), count=1)
    to = pointer + tile.to(gl.int64) * (C.rows * D) + c * 8192
    add_tile(dq, to)
    dr = warpgroup_mma_wait(0, deps=[dr])
    add_tile(dr, to + 4096)
    return dk, dv


@gluon.jit
def consumer_wide(pointer, maps: Maps, shared: Shared, barriers: Barriers, block: Block, lists: Lists,
                  edges: Edges, scaling: Scaling, c: gl.constexpr, C: gl.constexpr):  # fmt: skip
    HV: gl.constexpr = C.dim_v // 2
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C.rows, 16])
    GL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    WL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HV, 16])
    PL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=GL, k_width=2)
    VL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=WL, k_width=2)
    QL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    ST: gl.constexpr = C.stages
    KIND: gl.constexpr = shared.query.dtype
    n = block.steps
    seen = visible_keys(block.key, block, lists, edges, C, SL)
    dk = gl.zeros([64, 128], gl.float32, GL)
    dv = gl.zeros([64, HV], gl.float32, WL)
    mbarrier.wait(barriers.key, 0)
    mbarrier.wait(barriers.value, 0)
    i = 0
    for g in range(C.group):
        base = (block.place * C.group + g) * block.tiles + block.first
        start, end = i * 0, block.count
        if C.right or C.ragged:
            start = block.begun
            for j in range(block.begun):
                dk, dv = step_wide(i, block.first + j, base + j, pointer, dk, dv, seen, shared, barriers, block, edges,
                                   scaling, c, True, C, SL, PL, VL, QL)  # fmt: skip
                i += 1
        if C.left:
            end = block.ended
        for j in range(start, end):
            dk, dv = step_wide(i, block.first + j, base + j, pointer, dk, dv, seen, shared, barriers, block, edges,
                               scaling, c, False, C, SL, PL, VL, QL)  # fmt: skip
            i += 1
        if C.left:
            for j in range(end, block.count):
                dk, dv = step_wide(i, block.first + j, base + j, pointer, dk, dv, seen, shared, barriers, block, edges,
                                   scaling, c, True, C, SL, PL, VL, QL)  # fmt: skip
                i += 1
    mbarrier.wait(barriers.done.index((n - 1) % ST), ((n - 1) // ST) & 1)  # both have read the keys and the values
    shared.value.index(0).reshape([64, C.dim_v]).slice(c * HV, HV, dim=1).store(dv.to(KIND))
    shared.key.index(0).reshape([64, C.dim_qk]).slice(c * 128, 128, dim=1).store((dk * scaling.out_scale).to(KIND))
    fence_async_shared()
    at_v = [block.place // block.heads, block.place % block.heads, block.key, c * HV]
    tma.async_copy_shared_to_global(maps.grad_value, at_v, shared.value.index(0).slice(c * HV, HV, dim=3))
    at_k = [block.place // block.heads, block.place % block.heads, block.key, c * 128]
    tma.async_copy_shared_to_global(maps.grad_key, at_k, shared.key.index(0).slice(c * 128, 128, dim=3))
    tma.store_wait(0)
