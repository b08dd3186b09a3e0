# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The warpgroups of the Hopper backward that compute, for head sizes above 128, whose gradients no warpgroup can hold.

Blocks have 64 keys. One warpgroup makes S' and the weights P', and holds dV; the other makes dP' and the scores'
gradient dS', and holds dK. P' goes from the first to the second, dS' back, through shared memory; each makes half the
columns of dQ, the first a step late. So no product is made twice, and both have as much to do. P' is passed in float16,
whose numbers between 0 and 1 have three bits more than bfloat16's.
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
from .consumer import visible_keys, weigh
from .pipeline import add_tile, opaque


@gluon.jit
def grad_query_of(ds, k, half: gl.constexpr, QL: gl.constexpr):
    # Half the columns of a tile of the query's gradient, 64 by 64.
    z = gl.zeros([64, 64], gl.float32, QL)
    rows = ds.permute((1, 0))
    left = warpgroup_mma(rows, k.slice(half * 128, 64, dim=1), z, use_acc=False, is_async=True)
    right = warpgroup_mma(rows, k.slice(half * 128 + 64, 64, dim=1), z, use_acc=False, is_async=True)
    return left, right


@gluon.jit
def step_of_weights(i, m, prev, pointer, dv, seen, shared: Shared, barriers: Barriers, block: Block, edges: Edges,
                    scaling: Scaling, MASK: gl.constexpr, C: gl.constexpr, SL: gl.constexpr, VL: gl.constexpr,
                    QL: gl.constexpr):  # fmt: skip
    # One tile of queries; prev: the tile of the step before, whose dQ is made here, zeros in the first.
    ST: gl.constexpr = C.stages
    BM: gl.constexpr = C.rows
    KIND: gl.constexpr = shared.query.dtype
    k = shared.key.index(opaque(0)).reshape([64, C.dim_qk])
    stage, phase, at = i % ST, (i // ST) & 1, i % 2
    do = shared.grad_out.index(stage).reshape([C.rows, C.dim_v])
    q = shared.query.index(stage).reshape([C.rows, C.dim_qk])
    # From here on the other has read the weights that lay in this place: the loads wait for its end of that step.
    mbarrier.wait(barriers.query.index(stage), phase)
    z = gl.zeros([64, BM], gl.float32, SL)
    s = warpgroup_mma(k, q.permute((1, 0)), z, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    p, slope = weigh(s, stage, m * C.rows, block.key, seen, shared, edges, scaling, 0, MASK, C, SL)
    shared.weights.index(at).store(slope.to(gl.float16))
    fence_async_shared()
    mbarrier.arrive(barriers.passed.index(at), count=1)
    p16 = gl.convert_layout(p.to(KIND), VL, assert_trivial=True)
    mbarrier.wait(barriers.grad_out.index(stage), phase)
    dv = warpgroup_mma(p16, do, dv, is_async=True)
    mbarrier.wait(barriers.scored.index(1 - at), (i // 2) & 1)
    dq, dr = grad_query_of(shared.grad_scores.index(1 - at), k, 0, QL)
    dv, p16 = warpgroup_mma_wait(2, deps=[dv, p16])
    mbarrier.arrive(barriers.done.index(stage), count=1)
    to = pointer + prev.to(gl.int64) * (C.rows * C.dim_qk)
    dq = warpgroup_mma_wait(1, deps=[dq])
    add_tile(dq, to)
    dr = warpgroup_mma_wait(0, deps=[dr])
    add_tile(dr, to + 4096)
    return dv


@gluon.jit
def consumer_of_weights(pointer, maps: Maps, shared: Shared, barriers: Barriers, block: Block, lists: Lists,
                        edges: Edges, scaling: Scaling, C: gl.constexpr):  # fmt: skip
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C.rows, 16])
    WL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C.dim_v, 16])
    VL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=WL, k_width=2)
    QL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    ST: gl.constexpr = C.stages
    n = block.steps
    seen = visible_keys(block.key, block, lists, edges, C, SL)
    DV: gl.constexpr = C.dim_v
    dv = gl.zeros([64, DV], gl.float32, WL)
    mbarrier.wait(barriers.key, 0)
    prev = block.place * C.group * block.tiles + block.first
    i = 0
    for g in range(C.group):
        base = (block.place * C.group + g) * block.tiles + block.first
        start, end = i * 0, block.count
        if C.right or C.ragged:
            start = block.begun
            for j in range(block.begun):
                dv = step_of_weights(i, block.first + j, prev, pointer, dv, seen, shared, barriers, block, edges, scaling,
                                     True, C, SL, VL, QL)  # fmt: skip
                prev = base + j
                i += 1
        if C.left:
            end = block.ended
        for j in range(start, end):
            dv = step_of_weights(i, block.first + j, prev, pointer, dv, seen, shared, barriers, block, edges, scaling,
                                 False, C, SL, VL, QL)  # fmt: skip
            prev = base + j
            i += 1
        if C.left:
            for j in range(end, block.count):
                dv = step_of_weights(i, block.first + j, prev, pointer, dv, seen, shared, barriers, block, edges, scaling,
                                     True, C, SL, VL, QL)  # fmt: skip
                prev = base + j
                i += 1
    k = shared.key.index(0).reshape([64, C.dim_qk])
    mbarrier.wait(barriers.scored.index((n - 1) % 2), (n // 2) & 1)
    dq, dr = grad_query_of(shared.grad_scores.index((n - 1) % 2), k, 0, QL)
    dq, dr = warpgroup_mma_wait(0, deps=[dq, dr])
    mbarrier.arrive(barriers.done.index(n % ST), count=1)
    to = pointer + prev.to(gl.int64) * (C.rows * C.dim_qk)
    add_tile(dq, to)
    add_tile(dr, to + 4096)
    mbarrier.wait(barriers.done.index(n % ST), (n // ST) & 1)  # the other has read the values
    shared.value.index(0).reshape([64, C.dim_v]).store(dv.to(shared.query.dtype))
    fence_async_shared()
    at = [block.place // block.heads, block.place % block.heads, block.key, 0]
    tma.async_copy_shared_to_global(maps.grad_value, at, shared.value.index(0))
    tma.store_wait(0)


@gluon.jit
def step_of_scores(i, tile, pointer, dk, shared: Shared, barriers: Barriers, C: gl.constexpr, SL: gl.constexpr,
                   PL: gl.constexpr, QL: gl.constexpr):  # fmt: skip
    # One tile of queries.
    ST: gl.constexpr = C.stages
    BM: gl.constexpr = C.rows
    KIND: gl.constexpr = shared.query.dtype
    kb = opaque(0)
    k = shared.key.index(kb).reshape([64, C.dim_qk])
    v = shared.value.index(kb).reshape([64, C.dim_v])
    stage, phase, at = i % ST, (i // ST) & 1, i % 2
    do = shared.grad_out.index(stage).reshape([C.rows, C.dim_v])
    q = shared.query.index(stage).reshape([C.rows, C.dim_qk])
    mbarrier.wait(barriers.grad_out.index(stage), phase)
    z = gl.zeros([64, BM], gl.float32, SL)
    dp = warpgroup_mma(v, do.permute((1, 0)), z, use_acc=False, is_async=True)
    mbarrier.wait(barriers.query.index(stage), phase)
    delta = shared.statistics.index(stage).slice(1, 1).load(SL)
    # From here on the other has read the dS' that lay in this place: it ends a step before it passes the next weights.
    mbarrier.wait(barriers.passed.index(at), (i // 2) & 1)
    slope = shared.weights.index(at).load(SL).to(gl.float32)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds16 = (slope * (dp - delta)).to(KIND)
    ds = shared.grad_scores.index(at)
    ds.store(ds16)
    fence_async_shared()
    mbarrier.arrive(barriers.scored.index(at), count=1)
    d16 = gl.convert_layout(ds16, PL, assert_trivial=True)
    dk = warpgroup_mma(d16, q, dk, is_async=True)
    dq, dr = grad_query_of(ds, k, 1, QL)
    dk, d16 = warpgroup_mma_wait(2, deps=[dk, d16])
    mbarrier.arrive(barriers.done.index(stage), count=1)
    to = pointer + tile.to(gl.int64) * (C.rows * C.dim_qk) + 8192
    dq = warpgroup_mma_wait(1, deps=[dq])
    add_tile(dq, to)
    dr = warpgroup_mma_wait(0, deps=[dr])
    add_tile(dr, to + 4096)
    return dk


@gluon.jit
def consumer_of_scores(pointer, maps: Maps, shared: Shared, barriers: Barriers, block: Block, lists: Lists,
                       edges: Edges, scaling: Scaling, C: gl.constexpr):  # fmt: skip
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C.rows, 16])
    GL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C.dim_qk, 16])
    PL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=GL, k_width=2)
    QL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    ST: gl.constexpr = C.stages
    KIND: gl.constexpr = shared.query.dtype
    n = block.steps
    D: gl.constexpr = C.dim_qk
    BM: gl.constexpr = C.rows
    dk = gl.zeros([64, D], gl.float32, GL)
    mbarrier.wait(barriers.key, 0)
    mbarrier.wait(barriers.value, 0)
    shared.grad_scores.index(1).store(gl.zeros([64, BM], KIND, SL))
    fence_async_shared()
    mbarrier.arrive(barriers.scored.index(1), count=1)
    i = 0
    for g in range(C.group):
        base = (block.place * C.group + g) * block.tiles + block.first
        for j in range(block.count):
            dk = step_of_scores(i, base + j, pointer, dk, shared, barriers, C, SL, PL, QL)
            i += 1
    mbarrier.arrive(barriers.done.index(n % ST), count=1)
    mbarrier.wait(barriers.done.index(n % ST), (n // ST) & 1)  # the other has read the keys
    shared.key.index(0).reshape([64, C.dim_qk]).store((dk * scaling.out_scale).to(KIND))
    fence_async_shared()
    at = [block.place // block.heads, block.place % block.heads, block.key, 0]
    tma.async_copy_shared_to_global(maps.grad_key, at, shared.key.index(0))
    tma.store_wait(0)
