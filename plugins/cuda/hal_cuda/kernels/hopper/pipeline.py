# ruff: noqa: N803, SIM108
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""How the Hopper kernels' warpgroups wait for each other, and which tiles each of them takes."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .config import Tile

# Named barriers 8 to 15 are free in Triton. Each asm text needs an operand and a result, so it copies one.
SYNC = gl.constexpr("bar.sync $1, $2; mov.b32 $0, $1;")
SYNC_IF = gl.constexpr("{ .reg .pred q; setp.ne.s32 q, $3, 0; @q bar.sync $1, $2; mov.b32 $0, $1; }")
ARRIVE = gl.constexpr("bar.arrive $1, $2; mov.b32 $0, $1;")
THREE, FOUR = gl.constexpr("=r,r,r"), gl.constexpr("=r,r,r,r")
KEY_BARRIER = gl.constexpr(8)  # the first named barrier of the keys' stages; the values' follow, then the turns'
HEAD = gl.constexpr(8)  # numbers before the first entry of a table of tiles
ENTRY = gl.constexpr(8)  # numbers of an entry


@gluon.jit
def bar_sync(i, n):
    gl.inline_asm_elementwise(SYNC, THREE, [i, n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bar_sync_if(i, n, c):
    gl.inline_asm_elementwise(SYNC_IF, FOUR, [i, n, c], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bar_arrive(i, n):
    gl.inline_asm_elementwise(ARRIVE, THREE, [i, n], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def value_barrier(C):
    # The first named barrier of the values' stages.
    return 8 + C.barriers


@gluon.constexpr_function
def turn_barrier(C):
    # The first named barrier of the consumers' turns.
    return 8 + (2 * C.barriers if C.named else 0)


@gluon.jit
def take_turn(c: gl.constexpr, C: gl.constexpr):
    PB: gl.constexpr = turn_barrier(C)
    if C.turns:
        bar_sync(gl.to_tensor(PB + c), gl.to_tensor(256))


@gluon.jit
def pass_turn(c: gl.constexpr, C: gl.constexpr):
    PB: gl.constexpr = turn_barrier(C)
    if C.turns:
        bar_arrive(gl.to_tensor(PB + (c + 1) % C.consumers), gl.to_tensor(256))


@gluon.jit
def release(empty, stage, base: gl.constexpr, C: gl.constexpr):
    # A stage has been read. bar.arrive does not block; mbarrier.arrive costs a barrier of the whole partition.
    if C.named:
        bar_arrive(gl.to_tensor(base) + stage, gl.to_tensor(128 * (C.consumers + 1)))
    else:
        mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def key_place(before, i, C: gl.constexpr):
    # Place in the order of loading of the keys of a row tile's tile i, `before` tiles after the first of all. With a
    # shared ring keys and values share their stages, in the order K0, K1, V0, K2, V1 ...: both products of a step find
    # a stage that was read a step ago.
    if C.shared_ring:
        place = 2 * before + gl.maximum(2 * i - 1, 0)
    else:
        place = before + i
    return place


@gluon.jit
def value_place(before, i, count, C: gl.constexpr):
    # The same of the values; count: tiles of the row tile.
    if C.shared_ring:
        place = 2 * (before + i) + 1 + (i < count - 1).to(gl.int32)
    else:
        place = before + i
    return place


@gluon.jit
def load_tile(d, d2, s, s2, full, empty, place, at, base: gl.constexpr, C: gl.constexpr):
    # Rows of keys or values into the stage that the tile `stages` places before has left, their second part into that
    # of `stages2` before. d, d2: tensor maps; s, s2: shared memory; at: (batch entry, head, row).
    batch, head, row = at
    NB: gl.constexpr = C.barriers
    D: gl.constexpr = C.dim_v if base > KEY_BARRIER else C.dim_qk
    D2: gl.constexpr = C.dim_v2 if base > KEY_BARRIER else C.dim_qk2
    b = place % NB
    if C.named:
        bar_sync_if(gl.to_tensor(base) + b, gl.to_tensor(128 * (C.consumers + 1)), (place >= NB).to(gl.int32))
    else:
        before = place + NB - C.stages
        mbarrier.wait(empty.index(before % NB), (before // NB + 1) & 1, pred=place >= C.stages)
    mbarrier.expect(full.index(b), d.block_type.nbytes + (d2.block_type.nbytes if D2 else 0))
    tma.async_copy_global_to_shared(d, [batch, head, row, 0], full.index(b), s.index(place % C.stages))
    if D2:
        if C.stages2 != C.stages:
            before = place + NB - C.stages2
            mbarrier.wait(empty.index(before % NB), (before // NB + 1) & 1, pred=place >= C.stages2)
        tma.async_copy_global_to_shared(d2, [batch, head, row, D], full.index(b), s2.index(place % C.stages2))


@gluon.jit
def hand_back(before, begin, end, count, barriers, c: gl.constexpr, C: gl.constexpr):
    # Tiles that this warpgroup does not read. It waits for them all the same: a skipped phase would let the next wait
    # on the stage pass at once, by parity.
    NB: gl.constexpr = C.barriers
    for i in range(begin, end):
        kj = key_place(before, i, C)
        mbarrier.wait(barriers.key_full.index(kj % NB), (kj // NB) & 1)
        take_turn(c, C)
        pass_turn(c, C)
        release(barriers.key_empty, kj % NB, KEY_BARRIER, C)
        vj = value_place(before, i, count, C)
        mbarrier.wait(barriers.value_full.index(vj % NB), (vj // NB) & 1)
        release(barriers.value_empty, vj % NB, value_barrier(C), C)


@gluon.jit
def tiles_in(work, C: gl.constexpr):
    # Tiles of all heads; those of packed sequences are counted in their table.
    total = work.total
    if C.packed:
        total = gl.load(work.table) * work.heads
    return total


@gluon.jit
def rounds_of(total):
    # Persistent programs take tiles forwards in even rounds, backwards in odd ones: longest first, that balances them.
    P = gl.num_programs(0)
    pos = gl.program_id(0)
    if (total // P) % 2 == 1:
        pos = P - 1 - pos
    return total // P + (pos < total % P).to(gl.int32)


@gluon.jit
def tile_at(r, total, work, C: gl.constexpr):
    # The tile of round r.
    P = gl.num_programs(0)
    pos = gl.program_id(0)
    if r % 2 == 1:
        pos = P - 1 - pos
    t = r * P + pos
    # Heads in groups of `together`, so that their K and V stay in L2; in a group, the longest tiles of every head come
    # first.
    row_tiles, together, heads, shift = work.row_tiles, work.together, work.heads, work.shift
    len_q, len_k = work.len_q, work.len_k
    if C.packed:
        row_tiles = total // heads
    g = t // (together * row_tiles)
    u = t % (together * row_tiles)
    if C.packed:
        batch = 0
        head = g * together + u % together
        at = work.table + HEAD + u // together * ENTRY
        row = gl.load(at)
        first_query = gl.load(at + 1)
        first_key = gl.load(at + 2)
        len_q = gl.load(at + 3)
        len_k = gl.load(at + 4)
        if C.bottom:
            shift += len_k - len_q
    else:
        place = g * together + u % together
        batch = place // heads
        head = place % heads
        row = (row_tiles - 1 - u // together) * (C.rows * C.consumers)
        first_query = 0
        first_key = 0
    return Tile(batch, head, row, first_query, first_key, len_q, len_k, shift)


@gluon.jit
def key_tiles(row, ROWS: gl.constexpr, tile, work, C: gl.constexpr):
    # Tiles [first, last) of keys that rows [row, row + ROWS) may read; at least one, which masks then hide.
    end = gl.maximum(tile.len_k, 1)
    if C.right:
        end = gl.maximum(gl.minimum(row + ROWS + tile.shift + work.right, tile.len_k), 1)
    last = (end + C.keys - 1) // C.keys
    first = 0
    if C.left:
        first = gl.minimum(gl.maximum(row + tile.shift - work.left, 0) // C.keys, last - 1)
    return first, last
