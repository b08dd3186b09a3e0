# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The warpgroups of the Hopper backward that compute, for head sizes up to 128: 64 keys of a block each.

Scores are transposed, S' = K Q' and dP' = V dO', so P' and dS' go from registers into dV += P' dO and dK += dS' Q. dS'
alone goes through shared memory, for dQ = dS K, of which each warpgroup takes a half. dQ of a step is made one step
late, so that no warpgroup waits for the other's dS.
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
from .pipeline import (
    add_grad_query,
    hide,
    opaque,
    pass_turn,
    steps_of,
    take_turn,
    tile_of,
)


@gluon.jit
def visible_keys(key0, block: Block, lists: Lists, edges: Edges, C: gl.constexpr, SL: gl.constexpr):
    # Whether a mask lets rows read each of 64 keys.
    keys = key0 + gl.arange(0, 64, gl.SliceLayout(1, SL))
    if C.padded:
        at = lists.visible + (block.place // block.heads).to(gl.int64) * lists.visible_b + keys
        return gl.expand_dims(gl.load(at, mask=keys < edges.len_k, other=0) != 0, 1)
    else:
        return gl.expand_dims(keys, 1)


@gluon.jit
def signed(p, key0, step, base, scaling: Scaling, SL: gl.constexpr):
    # Weights, negative where dropout drops the pair: the pattern of `dropout.kept_pairs`, in no register of its own.
    keys = key0 + gl.arange(0, 64, gl.SliceLayout(1, SL))
    half = gl.expand_dims(keys // 2, 1).to(gl.uint32)
    word = half * step.to(gl.uint32, bitcast=True) + base.to(gl.uint32, bitcast=True)
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    word = word ^ (word >> 16)
    part = gl.where(gl.expand_dims(keys % 2, 1) != 0, word >> 16, word & 0xFFFF).to(gl.int32)
    return gl.where(part >= scaling.least, p, 0.0 - p)


@gluon.jit
def weigh(s, stage, row0, key0, seen, shared: Shared, edges: Edges, scaling: Scaling, c: gl.constexpr,
          MASK: gl.constexpr, C: gl.constexpr, SL: gl.constexpr):  # fmt: skip
    # The weights P' of scores S', in float32, negative where dropout drops them; and what the gradient of the scores is
    # a multiple of, which is P' unless scores are capped. seen: of `visible_keys`.
    lse = shared.statistics.index(stage).slice(0, 1).load(SL)
    x = s * scaling.scale
    if C.softcap:
        t = 1.0 - 2.0 / (gl.exp2(s * scaling.cap_in) + 1.0)
        x = scaling.cap_out * t
    if C.mask > 0:
        given = shared.mask.index(stage).reshape([C.rows, C.keys]).permute((1, 0)).slice(c * 64, 64).load(SL)
    if C.mask == 2:  # the difference first: the lowest finite number of a mask times log2(e) would be -inf
        share = shared.statistics.index(stage).slice(2, 1).load(SL)
        p = gl.exp2((x + given.to(gl.float32) - lse) * 1.4426950408889634 + share)
    else:
        p = gl.exp2(x - lse)
    if C.mask == 1:
        p = gl.where(given != 0, p, 0.0)
    if MASK:
        p = hide(p, key0, row0, edges, C, SL)
    if C.padded:
        p = gl.where(seen, p, 0.0)
    if C.dropout:
        step = shared.statistics.index(stage).slice(2, 1).load(SL)
        base = shared.statistics.index(stage).slice(3, 1).load(SL)
        p = signed(p, key0, step, base, scaling, SL)
    slope = p
    if C.softcap:
        slope = p * (1.0 - t * t)
    return p, slope


@gluon.jit
def weights(q, do, k, v, stage, phase, row0, key0, seen, shared: Shared, barriers: Barriers, edges: Edges,
            scaling: Scaling, c: gl.constexpr, MASK: gl.constexpr, C: gl.constexpr, SL: gl.constexpr):  # fmt: skip
    # S' and dP' begun, S' waited for. Returns what `weigh` does, and dP' on its way.
    BM: gl.constexpr = C.rows
    z = gl.zeros([64, BM], gl.float32, SL)
    mbarrier.wait(barriers.query.index(stage), phase)
    take_turn(c, C)
    s = warpgroup_mma(k, q.permute((1, 0)), z, use_acc=False, is_async=True)
    mbarrier.wait(barriers.grad_out.index(stage), phase)
    dp = warpgroup_mma(v, do.permute((1, 0)), z, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    p, slope = weigh(s, stage, row0, key0, seen, shared, edges, scaling, c, MASK, C, SL)
    return p, slope, dp


@gluon.jit
def grad_query(ds, k, c: gl.constexpr, C: gl.constexpr, QL: gl.constexpr):
    # This warpgroup's half: of the columns where a tile has 64 queries, of the queries where it has 128.
    z = gl.zeros([64, 64], gl.float32, QL)
    if C.rows == 64:
        return warpgroup_mma(ds.permute((1, 0)), k.slice(c * 64, 64, dim=1), z, use_acc=False, is_async=True)
    else:
        return warpgroup_mma(ds.slice(c * 64, 64, dim=1).permute((1, 0)), k, z, use_acc=False, is_async=True)


@gluon.jit
def step(i, m, prev, pointer, dk, dv, key0, seen, maps: Maps, shared: Shared, barriers: Barriers, block: Block,
         edges: Edges, scaling: Scaling, c: gl.constexpr, MASK: gl.constexpr, C: gl.constexpr, SL: gl.constexpr,
         PL: gl.constexpr, QL: gl.constexpr):  # fmt: skip
    # One tile of queries; prev: the tile of dQ that the step before worked on.
    ST: gl.constexpr = C.stages
    NS: gl.constexpr = C.score_stages
    D: gl.constexpr = C.dim_qk
    KIND: gl.constexpr = shared.query.dtype
    kb = opaque(0)
    kk = shared.key.index(kb).reshape([128, D])
    stage = i % ST
    do = shared.grad_out.index(stage).reshape([C.rows, D])
    q = shared.query.index(stage).reshape([C.rows, D])
    v = shared.value.index(kb).reshape([128, D]).slice(c * 64, 64)
    p, slope, dp = weights(q, do, kk.slice(c * 64, 64), v, stage, (i // ST) & 1, m * C.rows, key0, seen, shared,
                           barriers, edges, scaling, c, MASK, C, SL)  # fmt: skip
    if C.dropout:
        p16 = gl.convert_layout(gl.maximum(p, 0.0).to(KIND), PL, assert_trivial=True)
    else:
        p16 = gl.convert_layout(p.to(KIND), PL, assert_trivial=True)
    dv = warpgroup_mma(p16, do, dv, is_async=True)
    pass_turn(c, C)
    dp = warpgroup_mma_wait(1, deps=[dp])
    delta = shared.statistics.index(stage).slice(1, 1).load(SL)
    if C.dropout:
        ds16 = (gl.abs(slope) * (gl.where(slope > 0.0, dp * scaling.kept, 0.0) - delta)).to(KIND)
    else:
        ds16 = (slope * (dp - delta)).to(KIND)
    d16 = gl.convert_layout(ds16, PL, assert_trivial=True)
    dk = warpgroup_mma(d16, q, dk, is_async=True)
    b = i % NS  # both have read the dS that lay here, NS - 1 steps ago
    mbarrier.wait(barriers.done.index((i - NS + 1) % ST), ((i - NS + 1) // ST) & 1, pred=i >= NS - 1)
    shared.grad_scores.index(b).slice(c * 64, 64).store(ds16)
    fence_async_shared()
    mbarrier.arrive(barriers.scored.index(b), count=1)
    pb = (i + NS - 1) % NS  # dQ of the step before; zeros in the first
    mbarrier.wait(barriers.scored.index(pb), (i // NS) & 1)
    dq = grad_query(shared.grad_scores.index(pb), kk, c, C, QL)
    dv, dk, dq, p16, d16 = warpgroup_mma_wait(0, deps=[dv, dk, dq, p16, d16])
    mbarrier.arrive(barriers.done.index(stage), count=1)
    add_grad_query(dq, pointer, maps, shared, barriers, prev, i, c, C)
    return dk, dv


@gluon.jit
def consumer(pointer, maps: Maps, shared: Shared, barriers: Barriers, block: Block, lists: Lists,
             edges: Edges, scaling: Scaling, c: gl.constexpr, C: gl.constexpr):  # fmt: skip
    SL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C.rows, 16])
    GL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, C.dim_qk, 16])
    PL: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=GL, k_width=2)
    QL: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    ST: gl.constexpr = C.stages
    NS: gl.constexpr = C.score_stages
    D: gl.constexpr = C.dim_qk
    BM: gl.constexpr = C.rows
    KIND: gl.constexpr = shared.query.dtype
    n = block.steps
    key0 = block.key + c * 64
    seen = visible_keys(key0, block, lists, edges, C, SL)
    dk = gl.zeros([64, D], gl.float32, GL)
    dv = gl.zeros([64, D], gl.float32, GL)
    mbarrier.wait(barriers.key, 0)
    mbarrier.wait(barriers.value, 0)
    shared.grad_scores.index(NS - 1).slice(c * 64, 64).store(gl.zeros([64, BM], KIND, SL))
    fence_async_shared()
    mbarrier.arrive(barriers.scored.index(NS - 1), count=1)
    if c == 1:  # the other has the first turn
        pass_turn(c, C)
    prev = block.place * C.group * block.tiles + block.first
    i = 0
    if C.planned:
        for g in range(C.group):
            base = (block.place * C.group + g) * block.tiles
            for j in range(steps_of(block, g, lists, C)):
                m = tile_of(block, g, j, lists, C)
                dk, dv = step(i, m, prev, pointer, dk, dv, key0, seen, maps, shared, barriers, block, edges,
                              scaling, c, True, C, SL, PL, QL)  # fmt: skip
                prev = base + m
                i += 1
    else:
        for g in range(C.group):
            base = (block.place * C.group + g) * block.tiles + block.first
            start, end = i * 0, block.count
            if C.right or C.ragged:
                start = block.begun
                for j in range(block.begun):
                    dk, dv = step(i, block.first + j, prev, pointer, dk, dv, key0, seen, maps, shared, barriers, block,
                                  edges, scaling, c, True, C, SL, PL, QL)  # fmt: skip
                    prev = base + j
                    i += 1
            if C.left:
                end = block.ended
            for j in range(start, end):
                dk, dv = step(i, block.first + j, prev, pointer, dk, dv, key0, seen, maps, shared, barriers, block,
                              edges, scaling, c, False, C, SL, PL, QL)  # fmt: skip
                prev = base + j
                i += 1
            if C.left:
                for j in range(end, block.count):
                    dk, dv = step(i, block.first + j, prev, pointer, dk, dv, key0, seen, maps, shared, barriers, block,
                                  edges, scaling, c, True, C, SL, PL, QL)  # fmt: skip
                    prev = base + j
                    i += 1
    if c == 0:  # leave no arrival pending
        take_turn(c, C)
    b = (n - 1) % NS  # the last dQ
    kk = shared.key.index(0).reshape([128, D])
    mbarrier.wait(barriers.scored.index(b), (n // NS) & 1)
    dq = grad_query(shared.grad_scores.index(b), kk, c, C, QL)
    dq = warpgroup_mma_wait(0, deps=[dq])
    mbarrier.arrive(barriers.done.index(n % ST), count=1)
    add_grad_query(dq, pointer, maps, shared, barriers, prev, n, c, C)
    of_value = dv
    if C.dropout:
        of_value = dv * scaling.kept
    # The rows of the values have been read by this warpgroup alone, those of the keys by both.
    shared.value.index(0).reshape([128, D]).slice(c * 64, 64).store(of_value.to(KIND))
    mbarrier.wait(barriers.done.index(n % ST), (n // ST) & 1)
    kk.slice(c * 64, 64).store((dk * scaling.out_scale).to(KIND))
    fence_async_shared()
    at = [block.place // block.heads, block.place % block.heads, key0, 0]
    tma.async_copy_shared_to_global(maps.grad_value, at, shared.value.index(0).slice(c * 64, 64, dim=2))
    tma.async_copy_shared_to_global(maps.grad_key, at, shared.key.index(0).slice(c * 64, 64, dim=2))
    tma.store_wait(0)
