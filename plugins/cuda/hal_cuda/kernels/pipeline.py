# ruff: noqa: N803, SIM108
"""How the Hopper kernels' warpgroups wait for each other, and which tiles each of them takes."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Named barriers 8 to 15 are free in Triton. Each asm text needs an operand and a result, so it copies one.
SYNC = gl.constexpr("bar.sync $1, $2; mov.b32 $0, $1;")
SYNC_IF = gl.constexpr("{ .reg .pred q; setp.ne.s32 q, $3, 0; @q bar.sync $1, $2; mov.b32 $0, $1; }")
ARRIVE = gl.constexpr("bar.arrive $1, $2; mov.b32 $0, $1;")
THREE, FOUR = gl.constexpr("=r,r,r"), gl.constexpr("=r,r,r,r")
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


@gluon.jit
def take_turn(c: gl.constexpr, PB: gl.constexpr, PING: gl.constexpr):
    if PING:
        bar_sync(gl.to_tensor(PB + c), gl.to_tensor(256))


@gluon.jit
def pass_turn(c: gl.constexpr, NC: gl.constexpr, PB: gl.constexpr, PING: gl.constexpr):
    if PING:
        bar_arrive(gl.to_tensor(PB + (c + 1) % NC), gl.to_tensor(256))


@gluon.jit
def release(e, st, base: gl.constexpr, EB: gl.constexpr, NC: gl.constexpr):
    # A stage has been read. bar.arrive (EB) does not block; mbarrier.arrive costs a barrier of the whole partition.
    if EB:
        bar_arrive(gl.to_tensor(base) + st, gl.to_tensor(128 * (NC + 1)))
    else:
        mbarrier.arrive(e.index(st), count=1)


@gluon.jit
def key_place(it, i, RING: gl.constexpr):
    # Place in the order of loading of the keys of a row tile's tile i, `it` tiles after the first of all. RING: keys
    # and values share their stages, in the order K0, K1, V0, K2, V1 ...: both products of a step find a stage that was
    # read a step ago.
    if RING:
        place = 2 * it + gl.maximum(2 * i - 1, 0)
    else:
        place = it + i
    return place


@gluon.jit
def value_place(it, i, count, RING: gl.constexpr):
    # The same of the values; count: tiles of the row tile.
    if RING:
        place = 2 * (it + i) + 1 + (i < count - 1).to(gl.int32)
    else:
        place = it + i
    return place


@gluon.jit
def load_tile(
    d,
    d2,
    s,
    s2,
    full,
    empty,
    place,
    batch,
    head,
    row,
    base: gl.constexpr,
    ST: gl.constexpr,
    S2: gl.constexpr,
    NB: gl.constexpr,
    NC: gl.constexpr,
    EB: gl.constexpr,
    D: gl.constexpr,
    D2: gl.constexpr,
):
    # Rows of keys or values into the stage that the tile ST places before has left, their second part into that of S2
    # before.
    b = place % NB
    if EB:
        bar_sync_if(gl.to_tensor(base) + b, gl.to_tensor(128 * (NC + 1)), (place >= NB).to(gl.int32))
    else:
        before = place + NB - ST
        mbarrier.wait(empty.index(before % NB), (before // NB + 1) & 1, pred=place >= ST)
    mbarrier.expect(full.index(b), d.block_type.nbytes + (d2.block_type.nbytes if D2 else 0))
    tma.async_copy_global_to_shared(d, [batch, head, row, 0], full.index(b), s.index(place % ST))
    if D2:
        if S2 != ST:
            before = place + NB - S2
            mbarrier.wait(empty.index(before % NB), (before // NB + 1) & 1, pred=place >= S2)
        tma.async_copy_global_to_shared(d2, [batch, head, row, D], full.index(b), s2.index(place % S2))


@gluon.jit
def hand_back(
    it,
    begin,
    end,
    count,
    kf,
    vf,
    ke,
    ve,
    c: gl.constexpr,
    NB: gl.constexpr,
    NC: gl.constexpr,
    PING: gl.constexpr,
    EB: gl.constexpr,
    PB: gl.constexpr,
    RING: gl.constexpr,
):
    # Tiles that this warpgroup does not read. It waits for them all the same: a skipped phase would let the next wait
    # on the stage pass at once, by parity.
    for i in range(begin, end):
        kj = key_place(it, i, RING)
        mbarrier.wait(kf.index(kj % NB), (kj // NB) & 1)
        take_turn(c, PB, PING)
        pass_turn(c, NC, PB, PING)
        release(ke, kj % NB, 8, EB, NC)
        vj = value_place(it, i, count, RING)
        mbarrier.wait(vf.index(vj % NB), (vj // NB) & 1)
        release(ve, vj % NB, 8 + NB, EB, NC)


@gluon.jit
def tiles_in(total, table, heads, TABLE: gl.constexpr):
    # Tiles of all heads; with a table of packed sequences they are counted there.
    if TABLE:
        total = gl.load(table) * heads
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
def tile_at(
    r, total, table, NT, HG, heads, len_q, len_k, shift, ROWS: gl.constexpr, TABLE: gl.constexpr, BOTTOM: gl.constexpr
):
    # Tile of round r: batch entry, head, first row, where its sequence begins in queries and keys, its lengths, its
    # diagonal.
    P = gl.num_programs(0)
    pos = gl.program_id(0)
    if r % 2 == 1:
        pos = P - 1 - pos
    t = r * P + pos
    # Heads in groups of HG, so that their K and V stay in L2; in a group, the longest tiles of every head first.
    if TABLE:
        NT = total // heads
    g = t // (HG * NT)
    u = t % (HG * NT)
    if TABLE:
        batch = 0
        head = g * HG + u % HG
        at = table + HEAD + u // HG * ENTRY
        m0 = gl.load(at)
        q_at = gl.load(at + 1)
        k_at = gl.load(at + 2)
        len_q = gl.load(at + 3)
        len_k = gl.load(at + 4)
        if BOTTOM:
            shift += len_k - len_q
    else:
        place = g * HG + u % HG
        batch = place // heads
        head = place % heads
        m0 = (NT - 1 - u // HG) * ROWS
        q_at = 0
        k_at = 0
    return batch, head, m0, q_at, k_at, len_q, len_k, shift


@gluon.jit
def key_tiles(
    row, ROWS: gl.constexpr, len_k, shift, left, right, BN: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr
):
    # Tiles [first, last) of keys that rows [row, row + ROWS) may read; at least one, which masks then hide.
    end = gl.maximum(len_k, 1)
    if RIGHT:
        end = gl.maximum(gl.minimum(row + ROWS + shift + right, len_k), 1)
    last = (end + BN - 1) // BN
    first = 0
    if LEFT:
        first = gl.minimum(gl.maximum(row + shift - left, 0) // BN, last - 1)
    return first, last
