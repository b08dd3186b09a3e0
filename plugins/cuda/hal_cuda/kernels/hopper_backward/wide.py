# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The warpgroups of the Hopper backward that compute, for head sizes above 128, whose gradients no warpgroup can hold.

Blocks have 64 keys. One warpgroup makes S' and the weights P', and holds dV; the other makes dP' and the scores'
gradient dS', and holds dK. P' goes from the first to the second, dS' back, through shared memory; each makes some
columns of dQ, the first a step late. So no product is made twice, and both have about as much to do. P' is passed in
float16, whose numbers between 0 and 1 have three bits more than bfloat16's.
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
def scores(a, b, L: gl.constexpr, D: gl.constexpr):
    # a b', [64, 64], over D columns, on its way; columns 192 to 255 of a head size of 192 are not there.
    z = gl.zeros([64, 64], gl.float32, L)
    if D == 192:
        first, second = b.slice(0, 128, dim=1), b.slice(128, 64, dim=1)
        s = warpgroup_mma(a.slice(0, 128, dim=1), first.permute((1, 0)), z, use_acc=False, is_async=True)
        return warpgroup_mma(a.slice(128, 64, dim=1), second.permute((1, 0)), s, is_async=True)
    else:
        return warpgroup_mma(a, b.permute((1, 0)), z, use_acc=False, is_async=True)


@gluon.jit
def add_product(a16, b, left, right, LL: gl.constexpr, RL: gl.constexpr, D: gl.constexpr):
    # left, right: the sums' first 128 columns and those behind them, if any, to which a16 b is added, on its way.
    LO: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LL, k_width=2)
    RO: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=RL, k_width=2)
    of_left = gl.convert_layout(a16, LO, assert_trivial=True)
    left = warpgroup_mma(of_left, b.slice(0, 128, dim=1), left, is_async=True)
    if D > 128:
        of_right = gl.convert_layout(a16, RO, assert_trivial=True)
        right = warpgroup_mma(of_right, b.slice(128, D - 128, dim=1), right, is_async=True)
    return left, right


@gluon.jit
def grad_query_of(ds, k, FIRST: gl.constexpr, SIZE: gl.constexpr, L: gl.constexpr):
    # Columns of a tile of the query's gradient, on its way.
    z = gl.zeros([64, SIZE], gl.float32, L)
    return warpgroup_mma(ds.permute((1, 0)), k.slice(FIRST, SIZE, dim=1), z, use_acc=False, is_async=True)


@gluon.jit
def step_of_weights(i, m, prev, pointer, left, right, seen, shared: Shared, barriers: Barriers, block: Block,
                    edges: Edges, scaling: Scaling, MASK: gl.constexpr, C: gl.constexpr, SL: gl.constexpr,
                    LL: gl.constexpr, RL: gl.constexpr, QL: gl.constexpr, OWN: gl.constexpr):  # fmt: skip
    # One tile of queries; prev: the tile of the step before, whose dQ is made here, zeros in the first.
    ST: gl.constexpr = C.stages
    KIND: gl.constexpr = shared.query.dtype
    k = shared.key.index(opaque(0)).reshape([64, C.space_qk])
    stage, phase, at = i % ST, (i // ST) & 1, i % 2
    do = shared.grad_out.index(stage).reshape([64, C.space_v])
    q = shared.query.index(stage).reshape([64, C.space_qk])
    # The other has read the weights that lay `at`: queries are loaded behind its end of that step.
    mbarrier.wait(barriers.query.index(stage), phase)
    s = scores(k, q, SL, C.dim_qk)
    s = warpgroup_mma_wait(0, deps=[s])
    p, slope = weigh(s, stage, m * 64, block.key, seen, shared, edges, scaling, 0, MASK, C, SL)
    shared.weights.index(at).store(slope.to(gl.float16))
    fence_async_shared()
    mbarrier.arrive(barriers.passed.index(at), count=1)
    p16 = p.to(KIND)
    mbarrier.wait(barriers.grad_out.index(stage), phase)
    left, right = add_product(p16, do, left, right, LL, RL, C.dim_v)
    mbarrier.wait(barriers.scored.index(1 - at), (i // 2) & 1)
    ds = shared.grad_scores.index(1 - at)
    to = pointer + prev.to(gl.int64) * (64 * C.space_qk) + 8192
    dq = grad_query_of(ds, k, 128, OWN, QL)
    if C.dim_v > 128:
        left, right, p16 = warpgroup_mma_wait(1, deps=[left, right, p16])
    else:
        left, p16 = warpgroup_mma_wait(1, deps=[left, p16])
    mbarrier.arrive(barriers.done.index(stage), count=1)
    dq = warpgroup_mma_wait(0, deps=[dq])
    add_tile(dq, to)
    return left, right


@gluon.jit
def consumer_of_weights(pointer, maps: Maps, shared: Shared, barriers: Barriers, block: Block, lists: Lists,
                        edges: Edges, scaling: Scaling, C: gl.constexpr):  # fmt: skip
    RV: gl.constexpr = C.dim_v - 128 if C.dim_v > 128 else 64
    OWN: gl.constexpr = C.dim_qk - 128  # columns of dQ made here, behind the first 128
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    LL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    RL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, RV, 16])
    QL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, OWN, 16])
    ST: gl.constexpr = C.stages
    KIND: gl.constexpr = shared.query.dtype
    n = block.steps
    seen = visible_keys(block.key, block, lists, edges, C, SL)
    left = gl.zeros([64, 128], gl.float32, LL)
    right = gl.zeros([64, RV], gl.float32, RL)
    mbarrier.wait(barriers.key, 0)
    prev = block.place * C.group * block.tiles + block.first
    i = 0
    for g in range(C.group):
        base = (block.place * C.group + g) * block.tiles + block.first
        start, end = i * 0, block.count
        if C.right or C.ragged:
            start = block.begun
            for j in range(block.begun):
                left, right = step_of_weights(i, block.first + j, prev, pointer, left, right, seen, shared, barriers,
                                              block, edges, scaling, True, C, SL, LL, RL, QL, OWN)  # fmt: skip
                prev = base + j
                i += 1
        if C.left:
            end = block.ended
        for j in range(start, end):
            left, right = step_of_weights(i, block.first + j, prev, pointer, left, right, seen, shared, barriers, block,
                                          edges, scaling, False, C, SL, LL, RL, QL, OWN)  # fmt: skip
            prev = base + j
            i += 1
        if C.left:
            for j in range(end, block.count):
                left, right = step_of_weights(i, block.first + j, prev, pointer, left, right, seen, shared, barriers,
                                              block, edges, scaling, True, C, SL, LL, RL, QL, OWN)  # fmt: skip
                prev = base + j
                i += 1
    k = shared.key.index(0).reshape([64, C.space_qk])
    mbarrier.wait(barriers.scored.index((n - 1) % 2), (n // 2) & 1)
    ds = shared.grad_scores.index((n - 1) % 2)
    to = pointer + prev.to(gl.int64) * (64 * C.space_qk) + 8192
    dq = grad_query_of(ds, k, 128, OWN, QL)
    dq = warpgroup_mma_wait(0, deps=[dq])
    add_tile(dq, to)
    mbarrier.arrive(barriers.done.index(n % ST), count=1)
    mbarrier.wait(barriers.done.index(n % ST), (n // ST) & 1)  # the other has read the values
    to_write = shared.value.index(0).reshape([64, C.space_v])
    to_write.slice(0, 128, dim=1).store(left.to(KIND))
    if C.dim_v > 128:
        to_write.slice(128, RV, dim=1).store(right.to(KIND))
    fence_async_shared()
    place = [block.place // block.heads, block.place % block.heads, block.key, 0]
    tma.async_copy_shared_to_global(maps.grad_value, place, shared.value.index(0))
    tma.store_wait(0)


@gluon.jit
def step_of_scores(i, tile, pointer, left, right, shared: Shared, barriers: Barriers, C: gl.constexpr, SL: gl.constexpr,
                   LL: gl.constexpr, RL: gl.constexpr):  # fmt: skip
    # One tile of queries.
    ST: gl.constexpr = C.stages
    KIND: gl.constexpr = shared.query.dtype
    kb = opaque(0)
    k = shared.key.index(kb).reshape([64, C.space_qk])
    v = shared.value.index(kb).reshape([64, C.space_v])
    stage, phase, at = i % ST, (i // ST) & 1, i % 2
    do = shared.grad_out.index(stage).reshape([64, C.space_v])
    q = shared.query.index(stage).reshape([64, C.space_qk])
    mbarrier.wait(barriers.grad_out.index(stage), phase)
    dp = scores(v, do, SL, C.dim_v)
    mbarrier.wait(barriers.query.index(stage), phase)
    delta = shared.statistics.index(stage).slice(1, 1).load(SL)
    # The other has read the dS' that lay `at`: it ends a step before it passes the next weights.
    mbarrier.wait(barriers.passed.index(at), (i // 2) & 1)
    slope = shared.weights.index(at).load(SL).to(gl.float32)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds16 = (slope * (dp - delta)).to(KIND)
    ds = shared.grad_scores.index(at)
    ds.store(ds16)
    fence_async_shared()
    mbarrier.arrive(barriers.scored.index(at), count=1)
    left, right = add_product(ds16, q, left, right, LL, RL, C.dim_qk)
    dq = grad_query_of(ds, k, 0, 128, LL)
    left, right, ds16 = warpgroup_mma_wait(1, deps=[left, right, ds16])
    mbarrier.arrive(barriers.done.index(stage), count=1)
    dq = warpgroup_mma_wait(0, deps=[dq])
    add_tile(dq, pointer + tile.to(gl.int64) * (64 * C.space_qk))
    return left, right


@gluon.jit
def consumer_of_scores(pointer, maps: Maps, shared: Shared, barriers: Barriers, block: Block, lists: Lists,
                       edges: Edges, scaling: Scaling, C: gl.constexpr):  # fmt: skip
    RK: gl.constexpr = C.dim_qk - 128
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    LL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    RL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, RK, 16])
    ST: gl.constexpr = C.stages
    KIND: gl.constexpr = shared.query.dtype
    n = block.steps
    left = gl.zeros([64, 128], gl.float32, LL)
    right = gl.zeros([64, RK], gl.float32, RL)
    mbarrier.wait(barriers.key, 0)
    mbarrier.wait(barriers.value, 0)
    shared.grad_scores.index(1).store(gl.zeros([64, 64], KIND, SL))
    fence_async_shared()
    mbarrier.arrive(barriers.scored.index(1), count=1)
    i = 0
    for g in range(C.group):
        base = (block.place * C.group + g) * block.tiles + block.first
        for j in range(block.count):
            left, right = step_of_scores(i, base + j, pointer, left, right, shared, barriers, C, SL, LL, RL)
            i += 1
    mbarrier.arrive(barriers.done.index(n % ST), count=1)
    mbarrier.wait(barriers.done.index(n % ST), (n // ST) & 1)  # the other has read the keys
    to_write = shared.key.index(0).reshape([64, C.space_qk])
    to_write.slice(0, 128, dim=1).store((left * scaling.out_scale).to(KIND))
    to_write.slice(128, RK, dim=1).store((right * scaling.out_scale).to(KIND))
    fence_async_shared()
    place = [block.place // block.heads, block.place % block.heads, block.key, 0]
    tma.async_copy_shared_to_global(maps.grad_key, place, shared.key.index(0))
    tma.store_wait(0)
