# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Which block a program takes, how its warpgroups wait for each other, and how the query's gradient reaches memory."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .config import Barriers, Block, Edges, Lists, Maps, Order, Shared

SYNC = gl.constexpr("bar.sync $1, $2; mov.b32 $0, $1;")
ARRIVE = gl.constexpr("bar.arrive $1, $2; mov.b32 $0, $1;")
THREE = gl.constexpr("=r,r,r")
TURN = gl.constexpr(8)  # the first named barrier of the turns: those below are Triton's
#: Wait for the copies of this thread to be written, then for the other threads of the warpgroup that loads.
WRITTEN = gl.constexpr("cp.async.bulk.wait_group 0; bar.sync $1, $2; mov.b32 $0, $1;")
#: Count a block's sums as added where $2 is not 0, by one thread of the second warp: its release takes as long as a
#: trip to the second-level cache, and the first warp waits for its own next turn meanwhile. Other blocks see the count
#: behind the sums by the release; the copy engine's writes and the threads' go by different proxies, which fences join.
COUNT = gl.constexpr(
    "{ .reg .pred p, r; .reg .b32 t; mov.u32 t, %tid.x; and.b32 t, t, 127; setp.eq.u32 p, t, 32; setp.ne.and.u32 r, "
    "$2, 0, p; @r fence.proxy.async; @r red.release.gpu.global.add.u32 [$1], 1; mov.b32 $0, t; }"
)
#: Wait until $2 blocks have been counted: the first warp, which sends.
AWAIT = gl.constexpr(
    "{ .reg .pred p, o; .reg .b32 n, t; mov.u32 t, %tid.x; and.b32 t, t, 127; setp.ge.u32 o, t, 32; @o bra GONE; "
    "AGAIN: ld.acquire.gpu.global.s32 n, [$1]; setp.lt.s32 p, n, $2; @p bra AGAIN; fence.proxy.async; "
    "GONE: mov.b32 $0, t; }"
)


@builtin
def reduce_add(desc, coord, src, _semantic=None):
    # Shared memory added to global memory by the copy engine: Gluon 3.6 has the operation and no function for it.
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@gluon.jit
def opaque(x):
    # The same number, unknown to the compiler, so addresses computed from it are not hoisted out of the loop and spilt.
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [gl.to_tensor(x)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def take_turn(c: gl.constexpr, C: gl.constexpr):
    if C.turns:
        gl.inline_asm_elementwise(
            SYNC, THREE, [gl.to_tensor(TURN + c), gl.to_tensor(256)], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def pass_turn(c: gl.constexpr, C: gl.constexpr):
    if C.turns:
        gl.inline_asm_elementwise(
            ARRIVE, THREE, [gl.to_tensor(TURN + 1 - c), gl.to_tensor(256)], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def listed_steps(number, place, heads, g, lists: Lists, C: gl.constexpr):
    # Tiles of one query head of the group that a block plan lets these keys meet.
    at = (place // heads) * lists.list_b + (place % heads * C.group + g) * lists.list_h + number // lists.blocks
    return gl.load(lists.counts + at) * C.per_block


@gluon.jit
def steps_of(block: Block, g, lists: Lists, C: gl.constexpr):
    # Tiles of query head g of the group. Keys that nobody reads meet one tile, which their length of 0 hides.
    if C.planned:
        steps = listed_steps(block.number, block.place, block.heads, g, lists, C)
        return gl.where(block.count == 0, gl.where(g == 0, 1, 0), steps)
    else:
        return block.count


@gluon.jit
def tile_of(block: Block, g, j, lists: Lists, C: gl.constexpr):
    # The tile of step j of query head g.
    if C.planned:
        at = (block.place // block.heads) * lists.list_b + (block.place % block.heads * C.group + g) * lists.list_h
        at = (at + block.number // lists.blocks) * lists.rows + j // C.per_block
        tile = gl.load(lists.indices + at) * C.per_block + j % C.per_block
        return gl.where(block.count == 0, 0, tile)
    else:
        return block.first + j


@gluon.jit
def block_of(tiles, blocks, together, heads_kv, lists: Lists, edges: Edges, C: gl.constexpr):
    # The block of this program. Heads are worked on `together`, so that their queries and gradients stay in the
    # second-level cache; among those, the first keys come first, which a causal diagonal gives the most rows.
    program = gl.program_id(0)
    turn = program % (together * blocks)
    place = program // (together * blocks) * together + turn % together
    number = turn // together
    if C.ordered:  # a block waits for those behind it alone: they have begun
        number = blocks - 1 - number
    key = number * C.keys
    first, count = tiles * 0, tiles
    if C.right:
        first = gl.minimum(gl.maximum(key - edges.above, 0) // C.rows, tiles - 1)
        count = tiles - first
    if C.left:
        end = gl.maximum(key + C.keys - edges.below + C.rows - 1, 0) // C.rows
        count = gl.maximum(gl.minimum(end, tiles) - first, 1)  # keys that nobody reads: one tile, all of it hidden
    begun, ended = tiles * 0, count
    if C.right:
        whole = gl.maximum(key + C.keys - 1 - edges.above + C.rows - 1, 0) // C.rows
        begun = gl.minimum(gl.maximum(whole - first, 0), count)
    if C.left:
        reach = key - edges.below - C.rows + 1
        ended = gl.where(reach < 0, 0, gl.maximum(reach, 0) // C.rows + 1 - first)
        ended = gl.minimum(gl.maximum(ended, begun), count)
    if C.planned:
        first, count = tiles * 0, tiles * 0
        for g in range(C.group):
            count += listed_steps(number, place, heads_kv, g, lists, C)
        return Block(number, key, place, heads_kv, first, count, first, first, tiles, gl.maximum(count, 1))
    if C.ragged:
        cut = key + C.keys > edges.len_k
        begun = gl.where(cut, count, begun)
        ended = gl.where(cut, count, ended)
    return Block(number, key, place, heads_kv, first, count, begun, ended, tiles, count * C.group)


@gluon.jit
def hide(p, key0, row0, edges: Edges, C: gl.constexpr, SL: gl.constexpr):
    # Weights [keys, rows] set to 0 beyond the diagonals and behind the last key. Rows behind the last have a
    # log-sum-exp of infinity.
    BM: gl.constexpr = p.shape[1]
    keys = gl.expand_dims(key0 + gl.arange(0, p.shape[0], gl.SliceLayout(1, SL)), 1)
    rows = gl.expand_dims(row0 + gl.arange(0, BM, gl.SliceLayout(0, SL)), 0)
    if C.right:
        p = gl.where(keys <= rows + edges.above, p, 0.0)
    if C.left:
        p = gl.where(keys >= rows + edges.below, p, 0.0)
    return gl.where(keys < edges.len_k, p, 0.0)


@gluon.jit
def in_order(dq, ROWS: gl.constexpr, COLS: gl.constexpr, RL: gl.constexpr):
    # A tile [64, 64 or 128] of the query's gradient in the order of threads: four numbers of thread 0, of thread 1 and
    # so on, of 8 columns after the other. No data moves. `finish` restores the order.
    x = dq.reshape([4, 2, 8, dq.shape[1] // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([ROWS, COLS])
    return gl.convert_layout(x, RL, assert_trivial=True)


@gluon.jit
def add_tile(dq, to):
    # By threads: 16 bytes of each, 512 of a warp.
    ROWS: gl.constexpr = dq.shape[1] // 8
    RL: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, 4], [1, 0])
    x = in_order(dq, ROWS, 512, RL)
    rows = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, RL)) * 512, 1)
    gl.atomic_add(to + rows + gl.expand_dims(gl.arange(0, 512, gl.SliceLayout(0, RL)), 0), x, sem="relaxed")


@gluon.jit
def send_tile(dq, sums, staged, row):
    # By the copy engine, through shared memory.
    RL: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [2, 2], [1, 0])
    x = in_order(dq, 16, 256, RL)
    tma.store_wait(0)  # the last one has been read
    staged.store(x)
    fence_async_shared()
    reduce_add(sums, [row, 0], staged)


@gluon.jit
def before(m, block: Block, order: Order, edges: Edges, C: gl.constexpr):
    # How many blocks add to tile m before this one: those behind it that read the tile, see `block_of`.
    last = order.blocks - 1
    if C.right:
        reach = gl.maximum((m + 1) * C.rows - 1 + edges.above, 0) // C.keys  # the last block at this diagonal
        last = gl.where(m == block.tiles - 1, last, gl.minimum(reach, last))
    return last - block.number


@gluon.jit
def hand_over(dq, staged, i, barriers: Barriers, c: gl.constexpr, C: gl.constexpr):
    # A warpgroup's half of a tile, for the warpgroup that loads to add in its turn.
    RL: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [2, 2], [1, 0])
    x = in_order(dq, 16, 256, RL)
    place = i % C.staging
    mbarrier.wait(barriers.free.index(place), ((i // C.staging) & 1) ^ 1)
    staged.index(place * 2 + c).store(x)
    fence_async_shared()
    mbarrier.arrive(barriers.ready.index(place * 2 + c), count=1)


@gluon.jit
def settle(e, barriers: Barriers, block: Block, order: Order, C: gl.constexpr):
    # Counts what step e has added, once it lies in memory.
    gl.inline_asm_elementwise(
        WRITTEN, THREE, [gl.to_tensor(TURN + 2), gl.to_tensor(128)], dtype=gl.int32, is_pure=False, pack=1
    )
    if C.staging > 1:  # noqa: SIM102  the first is known when the kernel is compiled
        if e >= 0:
            mbarrier.arrive(barriers.free.index(e % C.staging), count=1)
    tile = (block.place * C.group + gl.maximum(e - 1, 0) // block.count) * block.tiles
    at = order.arrivals + tile + block.first + gl.maximum(e - 1, 0) % block.count
    gl.inline_asm_elementwise(COUNT, "=r,l,r", [at, (e >= 1).to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def add_in_order(e, maps: Maps, shared: Shared, barriers: Barriers, block: Block, order: Order, edges: Edges,
                 C: gl.constexpr):  # fmt: skip
    # Adds what the consumers made in step e, of the tile of the step before; the zeros of the first step are left out.
    # Step e - 1 is counted first, which had the time since to reach memory.
    ROWS: gl.constexpr = C.rows * C.dim_qk // 256
    place = e % C.staging
    mbarrier.wait(barriers.ready.index(place * 2), (e // C.staging) & 1)
    mbarrier.wait(barriers.ready.index(place * 2 + 1), (e // C.staging) & 1)
    settle(e - 1, barriers, block, order, C)
    if e >= 1:
        m = block.first + (e - 1) % block.count
        tile = (block.place * C.group + (e - 1) // block.count) * block.tiles + m
        at, ahead = order.arrivals + tile, before(m, block, order, edges, C)
        gl.inline_asm_elementwise(AWAIT, "=r,l,r", [at, ahead], dtype=gl.int32, is_pure=False, pack=1)
        reduce_add(maps.sums, [tile * ROWS, 0], shared.grad_query.index(place * 2))
        reduce_add(maps.sums, [tile * ROWS + 16, 0], shared.grad_query.index(place * 2 + 1))
        if C.staging == 1:
            tma.store_wait(0)
    if C.staging == 1:
        mbarrier.arrive(barriers.free.index(place), count=1)


@gluon.jit
def add_grad_query(dq, pointer, maps: Maps, shared: Shared, barriers: Barriers, tile, i, c: gl.constexpr,
                   C: gl.constexpr):  # fmt: skip
    # A warpgroup's half of a tile of the query's gradient, added to its sums.
    SIZE: gl.constexpr = C.rows * C.dim_qk
    if C.ordered:
        hand_over(dq, shared.grad_query, i, barriers, c, C)
    elif C.engine:
        send_tile(dq, maps.sums, shared.grad_query.index(c), tile * (SIZE // 256) + c * 16)
    else:
        add_tile(dq, pointer + tile.to(gl.int64) * SIZE + c * 4096)


@gluon.jit
def load_step(i, head, tile, at_key, maps: Maps, shared: Shared, barriers: Barriers, block: Block, lists: Lists,
              C: gl.constexpr):  # fmt: skip
    # The tile of queries of step i, and what goes with it.
    stage = i % C.stages
    mbarrier.wait(barriers.done.index(stage), ((i // C.stages) & 1) ^ 1)
    full = barriers.query.index(stage)
    size: gl.constexpr = maps.query.block_type.nbytes + maps.statistics.block_type.nbytes
    if C.mask > 0:
        mbarrier.expect(full, size + maps.mask.block_type.nbytes)
    else:
        mbarrier.expect(full, size)
    batch = block.place // block.heads
    at_row = [batch, head, tile * C.rows, 0]
    tma.async_copy_global_to_shared(maps.query, at_row, full, shared.query.index(stage))
    numbers = ((batch * block.heads * C.group + head) * block.tiles + tile) * C.statistics
    tma.async_copy_global_to_shared(maps.statistics, [numbers, 0], full, shared.statistics.index(stage))
    if C.mask > 0:
        at_mask = [batch * lists.mask_b, head * lists.mask_h, tile * C.rows, block.key]
        tma.async_copy_global_to_shared(maps.mask, at_mask, full, shared.mask.index(stage))
    if i == 0:
        mbarrier.expect(barriers.value, maps.value.block_type.nbytes)
        tma.async_copy_global_to_shared(maps.value, at_key, barriers.value, shared.value.index(0))
    full_grad = barriers.grad_out.index(stage)
    mbarrier.expect(full_grad, maps.grad_out.block_type.nbytes)
    tma.async_copy_global_to_shared(maps.grad_out, at_row, full_grad, shared.grad_out.index(stage))


@gluon.jit
def producer(maps: Maps, shared: Shared, barriers: Barriers, block: Block, lists: Lists, order: Order, edges: Edges,
             C: gl.constexpr):  # fmt: skip
    # The warpgroup that loads: the block's keys and values once, then the tiles of each query head of the group. Where
    # sums are added in order, it does that too, `stages` steps behind its loads.
    mbarrier.expect(barriers.key, maps.key.block_type.nbytes)
    batch, head_kv = block.place // block.heads, block.place % block.heads
    at_key = [batch, head_kv, block.key, 0]
    tma.async_copy_global_to_shared(maps.key, at_key, barriers.key, shared.key.index(0))
    i = 0
    if C.ordered:
        for i in range(block.steps + C.stages + 1):
            if i < block.steps:
                head, tile = head_kv * C.group + i // block.count, block.first + i % block.count
                load_step(i, head, tile, at_key, maps, shared, barriers, block, lists, C)
            if i >= C.stages:
                add_in_order(i - C.stages, maps, shared, barriers, block, order, edges, C)
        settle(block.steps, barriers, block, order, C)
    else:
        for g in range(C.group):
            head = head_kv * C.group + g
            for j in range(steps_of(block, g, lists, C)):
                tile = tile_of(block, g, j, lists, C)
                load_step(i, head, tile, at_key, maps, shared, barriers, block, lists, C)
                i += 1
