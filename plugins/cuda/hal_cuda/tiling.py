"""How the kernels cut a request: tiles of query rows and keys, splits of the keys, and the stages of their loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, Causal, DenseTiling, MaskKind, TilePlan

from .discovery import Chip
from .kernels.portable.schedule import MOST_JOINED, Tiles as Tiles, Work, fastest, resident, tile_choices
from .memory import COUNTERS, PARTIAL

if TYPE_CHECKING:
    from torch import Tensor

#: Rows (tokens times heads of a group) up to which a group shares one tile.
MOST_PACKED_ROWS = 64
MOST_PACKED_TOKENS = 16
#: Rows of a tile over a quantised cache: fewer than a warpgroup multiplies. With 64, Triton 3.6's products of planes of
#: 32 columns (int8 and FP8 at head size 64, int4 at 128) were wrong on an H200, in kernels that its interpreter runs
#: right.
MOST_CACHE_ROWS = 32
#: Query rows of a consumer warpgroup of the Hopper kernel.
WARPGROUP_ROWS = 64
#: Block sizes of a tiling that the caller brings, which the portable kernel is compiled for.
FOREIGN_SIZES = (32, 64, 128)


class CudaTiling(DenseTiling):
    """The device's own cut of the work: equal blocks whose sizes were measured to be fast for each kernel.

    The kernels take their block sizes from the plan. Where torch's own attention serves a request, the plan is one
    block over everything, cut by "torch".

    Args:
        chip: the device.
        path_of: the name of the path that serves a request (see `paths.choose`).
    """

    def __init__(self, chip: Chip, path_of: Callable[[AttentionRequest], str]) -> None:
        super().__init__(cut_by="cuda")
        self.name = "cuda"
        self._chip, self._path_of = chip, path_of
        self._too_large: dict[AttentionRequest | tuple[AttentionRequest, str], Tiles] = {}

    def compute_optimal_tile_size(
        self, sequence_length: int, available_memory: int, backend_constraints: Mapping[str, int]
    ) -> int:
        """The largest power of two of query rows, from 16 to 128, whose operands fit; see `DenseTiling`."""
        bounds = {"minimum": 16, "maximum": 128, **backend_constraints}
        return super().compute_optimal_tile_size(sequence_length, available_memory, bounds)

    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> TilePlan:
        """Equal blocks as the kernel that serves the request is cut: block_q query rows against block_k keys.

        `limits` bound a tiling that the caller brings; the device's own tiles are within its kernels' limits already.
        """
        return self.plan_for(self._path_of(request), request)

    def plan_for(self, path: str, request: AttentionRequest) -> TilePlan:
        """The plan of a request on one path: "hopper", "portable", or one that torch cuts."""
        if path == "hopper":
            tiles = hopper_tiles_of(request)
            return TilePlan.equal(request, WARPGROUP_ROWS * tiles.consumers, tiles.keys, cut_by="cuda")
        if path == "masked" and (masked := masked_tiles_of(request)) is not None:
            return TilePlan.equal(request, masked.rows, masked.keys, cut_by="cuda")
        if path == "fp8":
            fp8 = fp8_tiles(max(request.dim_qk, request.dim_v), fp8_whole(request))
            return TilePlan.equal(request, WARPGROUP_ROWS * fp8.consumers, fp8.keys, cut_by="cuda")
        if path == "skipping":
            cut = skipping_tiles(max(request.dim_qk, request.dim_v))
            return TilePlan.equal(request, cut.rows, cut.keys, cut_by="cuda")
        if path == "portable":
            rows, keys, *_ = self.tiles(request)
            group = request.heads_q // request.heads_kv if packs(request, request.len_q) else 1
            return TilePlan.equal(request, max(rows // group, 1), keys, cut_by="cuda")
        return TilePlan.equal(request, max(request.len_q, 1), max(request.len_k, 1), cut_by="torch")

    def tiles(self, request: AttentionRequest) -> Tiles:
        """Tiles of the portable kernel: those measured, or the largest smaller ones that were not too large."""
        return self._too_large.get(request) or choose_tiles(request, request.len_q, self._chip)

    def splits(self, request: AttentionRequest, tiles: Tiles, len_q: int, len_k: int, batch: int) -> Splits:
        """How the keys of the portable kernel's tiles are divided among programs."""
        return choose_splits(request, tiles, len_q, len_k, batch, self._chip)

    def alone(self, request: AttentionRequest, tiles: Tiles) -> bool:
        """Whether a multiprocessor holds one decoding program at a time, so that no other hides its first loads."""
        return resident(_work(request, tiles, 1, request.len_k, request.batch), tiles, self._chip) == 1

    def shrink(self, request: AttentionRequest, tiles: Tiles) -> bool:
        """Remember that tiles do not fit the chip's shared memory. False where there are no smaller ones."""
        smaller = shrunk(tiles)
        if smaller is not None:
            self._too_large[request] = smaller
        return smaller is not None

    def backward_tiles(self, request: AttentionRequest, kernel: str) -> Tiles:
        """Tiles of a portable backward kernel, "kv", "q" or "mask": as chosen, or the largest smaller ones that fit."""
        return self._too_large.get((request, kernel)) or choose_backward_tiles(request, kernel, self._chip)

    def shrink_backward(self, request: AttentionRequest, kernel: str, tiles: Tiles) -> bool:
        """As `shrink`, of a backward kernel."""
        smaller = shrunk(tiles)
        if smaller is not None:
            self._too_large[request, kernel] = smaller
        return smaller is not None

    def choices(self, request: AttentionRequest, limits: Mapping[str, int]) -> Sequence[DenseTiling]:
        """Cuts worth trying, the device's own first, then the sizes that the portable kernel may be compiled for."""
        fitting = [
            (q, k) for q in FOREIGN_SIZES for k in FOREIGN_SIZES if not foreign_excess(request, q, k, self._chip)
        ]
        others = [] if self._path_of(request) not in ("hopper", "portable") else fitting
        return [self, *(DenseTiling(q, k) for q, k in others)]


def packs(request: AttentionRequest, len_q: int) -> bool:
    """Whether the query heads of a group share a tile."""
    most = MOST_PACKED_ROWS if request.cache_dtype is None else MOST_CACHE_ROWS
    few = len_q <= MOST_PACKED_TOKENS and len_q * (request.heads_q // request.heads_kv) <= most
    return few and not request.packed and request.block_plan is None and request.tiling is None


def choose_tiles(request: AttentionRequest, len_q: int, chip: Chip) -> Tiles:
    """Tiles measured on Hopper; `shrunk` gives the next smaller ones where a chip's shared memory does not hold
    them.
    """
    if packs(request, len_q):
        return choose_decode(request, len_q, request.len_k, request.batch, chip)[0]
    wide, plain = widest(request), request.mask is MaskKind.NONE
    if request.dtype == "float32":
        tiles = Tiles(32, 32, 4, 2 if wide <= 128 else 1)
    elif wide > 128:
        tiles = Tiles(128, 32, 8, 3)
    elif request.block_plan is not None and plain:
        tiles = Tiles(128, 64, 4, 2)
    elif not plain and request.len_k <= 64:  # one tile of keys: nothing to load ahead, and a mask takes registers
        tiles = Tiles(64, 64, 8, 1)
    else:
        tiles = Tiles(64, 64, 4, 3)
    if request.cache_dtype is not None:
        tiles = tiles._replace(rows=min(tiles.rows, MOST_CACHE_ROWS), warps=4)
    rows, keys = min(tiles.rows, max(16, power_of_two(len_q))), tiles.keys
    if request.block_plan is not None:
        # A tile lies in one block of rows; blocks of odd sizes waste least in small tiles.
        block_q, block_k = request.block_plan[:2]
        rows = min(rows, max(16, block_q & -block_q if block_q > 16 else 16))
        keys = min(keys, max(16, power_of_two(block_k)))
    return tiles._replace(rows=rows, keys=keys, warps=4 if rows <= 64 and rows < tiles.rows else tiles.warps)


def choose_backward_tiles(request: AttentionRequest, kernel: str, chip: Chip) -> Tiles:
    """Tiles of a portable backward kernel: "kv" owns keys and walks rows, "q" and "mask" own rows and walk keys.

    The largest whose sums stay in registers with few spills, by what the assembler says of each; `shrunk` gives the
    next smaller ones. Where products read their operands from shared memory (capability 9 and 10) tiles are larger:
    elsewhere the tile that a program owns takes registers too.
    """
    wide = max(power_of_two(request.dim_qk), power_of_two(request.dim_v))
    from_shared = chip.capability[0] in (9, 10)
    if request.dtype == "float32":
        tiles = Tiles(32, 32, 4, 2 if wide <= 128 and kernel != "mask" else 1)
    elif kernel == "mask":
        tiles = Tiles(64, 64 if wide <= 128 and from_shared else 32, 8, 1)
    elif kernel == "q":
        tiles = Tiles(128 if from_shared else 64, 32, 8, 2)
        tiles = tiles if wide > 128 else Tiles(128, 64 if from_shared or wide <= 64 else 32, 8, 2)
    elif wide > 128:
        tiles = Tiles(32, 64, 8, 2) if from_shared else Tiles(32, 32, 8, 2)
    elif request.mask is MaskKind.ADDITIVE:
        tiles = Tiles(64, 64, 8, 2) if wide <= 64 else Tiles(32, 128, 8, 2)
        tiles = tiles if from_shared else Tiles(32, 64, 4 if wide <= 64 else 8, 2)
    elif from_shared:
        tiles = Tiles(64, 128, 8, 2)
    else:
        tiles = Tiles(32, 64, 4, 2) if wide <= 64 else Tiles(64, 64, 8, 2)
    rows, keys = (
        min(size, max(16, power_of_two(length)))
        for size, length in ((tiles.rows, request.len_q), (tiles.keys, request.len_k))
    )
    if request.block_plan is not None:
        # A tile lies in one block; blocks of odd sizes waste least in small tiles.
        rows, keys = (
            min(size, max(16, block & -block if block > 16 else 16))
            for size, block in ((rows, request.block_plan[0]), (keys, request.block_plan[1]))
        )
    return tiles._replace(rows=rows, keys=keys)


def tiles_of_plan(request: AttentionRequest, plan: TilePlan, own: Tiles, chip: Chip) -> Tiles:
    """Tiles of the portable kernel with a plan's block sizes, and as many stages as the chip's shared memory holds.

    Args:
        request: with exact lengths. own: the device's own tiles for it, whose warps and stages hold for their sizes.
    """
    group = request.heads_q // request.heads_kv if packs(request, request.len_q) else 1
    rows = max(16, power_of_two(plan.block_q * group))
    if (rows, plan.block_k) == (own.rows, own.keys):
        return own
    fitting = (n for n in (3, 2) if shared_bytes(request, rows, plan.block_k, n) <= chip.shared_memory)
    warps = 4 if rows <= 64 else 8
    if request.cache_dtype is not None and rows > MOST_CACHE_ROWS:
        warps = 2  # half a warpgroup
    return Tiles(rows, plan.block_k, warps, next(fitting, 1))


def shared_bytes(request: AttentionRequest, rows: int, keys: int, stages: int) -> int:
    """Shared memory that the portable kernel takes for the operands of a tile, bytes."""
    dim_qk, dim_v = (max(16, power_of_two(dim)) for dim in (request.dim_qk, request.dim_v))
    return (rows * dim_qk + stages * keys * (dim_qk + dim_v)) * DTYPE_BYTES[request.dtype]


def foreign_excess(request: AttentionRequest, block_q: int, block_k: int, chip: Chip) -> int:
    """Bytes by which the operands of one tile of these sizes exceed the chip's shared memory; 0 where they fit."""
    return max(shared_bytes(request, block_q, block_k, 1) - chip.shared_memory, 0)


def shrunk(tiles: Tiles) -> Tiles | None:
    """The next smaller tiles: fewer stages, then fewer keys, then fewer rows; None where there are none."""
    if tiles.stages > 1:
        return tiles._replace(stages=tiles.stages - 1)
    if tiles.keys > 16:
        return tiles._replace(keys=tiles.keys // 2, stages=2)
    return tiles._replace(rows=tiles.rows // 2, stages=2) if tiles.rows > 16 else None


class Splits(NamedTuple):
    """Programs that share the keys of a tile, and keys of each."""

    programs: int
    chunk: int


@lru_cache(maxsize=4096)
def choose_decode(
    request: AttentionRequest, len_q: int, len_k: int, batch: int, chip: Chip, tiles: Tiles | None = None
) -> tuple[Tiles, Splits]:
    """Tiles of a request whose heads are packed, and the division of its keys: the fastest by the model.

    tiles: those to divide the keys for; None: any.
    """
    group, wide = request.heads_q // request.heads_kv, widest(request)
    plain, size = request.mask is MaskKind.NONE, DTYPE_BYTES[request.dtype]
    rows = max(16, power_of_two(len_q * group))
    choices = (tiles,) if tiles else tile_choices(rows, wide, plain, size, request.cache_dtype)
    best: tuple[float, Tiles, int] | None = None
    for tile in choices:
        work = _work(request, tile, len_q, len_k, batch)
        time, parts = fastest(work, tile, _most_joined(request, tile, len_q, batch), chip)
        if best is None or time < best[0]:
            best = time, tile, parts
    assert best is not None
    _, tile, parts = best
    keys = _keys_read(request, len_q, len_k, tile.keys)
    programs = request.heads_kv * batch * -(-len_q * group // tile.rows)
    if request.page_size is not None and programs * 2 > chip.multiprocessors:
        parts = -(-keys // 4096)  # lengths differ within a batch: even pieces keep the longest from finishing alone
    steps = max(-(-keys // tile.keys), 1)
    each = -(-steps // min(parts, steps))
    return tile, Splits(-(-steps // each), each * tile.keys)


def _work(request: AttentionRequest, tiles: Tiles, len_q: int, len_k: int, batch: int) -> Work:
    """A decoding step as the model takes it."""
    rows, cache = len_q * (request.heads_q // request.heads_kv), request.cache_dtype
    size = DTYPE_BYTES[request.dtype]
    return Work(
        heads=request.heads_kv * batch,
        rows=rows,
        keys=_keys_read(request, len_q, len_k, tiles.keys),
        dim_qk=power_of_two(request.dim_qk),
        dim_v=power_of_two(request.dim_v),
        bits=4 if cache == "int4" else 8 * DTYPE_BYTES.get(cache or request.dtype, 1),
        size=size,
        cache=cache,
    )


def _keys_read(request: AttentionRequest, len_q: int, len_k: int, keys: int) -> int:
    """Keys that a tile of rows reads. keys: of a tile, by which a window's begin is rounded."""
    if request.window is not None and request.window[0] is not None:
        right = 0 if request.causal is not Causal.NONE else request.window[1]
        if right is not None:
            return min(len_k, request.window[0] + right + len_q + keys)
    return len_k


def widest(request: AttentionRequest) -> int:
    """The larger head size, as a power of two."""
    return max(power_of_two(request.dim_qk), power_of_two(request.dim_v))


def choose_splits(request: AttentionRequest, tiles: Tiles, len_q: int, len_k: int, batch: int, chip: Chip) -> Splits:
    """The division of the keys for given tiles."""
    return choose_decode(request, len_q, len_k, batch, chip, tiles)[1]


def _most_joined(request: AttentionRequest, tiles: Tiles, len_q: int, batch: int) -> int:
    """Parts of the keys up to which the last program of a tile may join them in the stream's workspace."""
    rows, beside = len_q * (request.heads_q // request.heads_kv), 2 if request.mask is MaskKind.ADDITIVE else 1
    if batch * request.heads_kv * -(-rows // tiles.rows) > COUNTERS:
        return 0
    numbers = batch * request.heads_kv * rows * (request.dim_v + beside)
    return min(PARTIAL // max(numbers, 1), MOST_JOINED)


class KeySplit(NamedTuple):
    """How the keys of a request's tiles are divided among programs.

    splits: programs and keys of each. partial: numbers that hold their partial results; 0: keys are not divided.
    joined: the most splits that the last program of a tile joins in the stream's workspace; 0: a second kernel joins
    them.
    """

    splits: Splits
    partial: int
    joined: int


def split_keys(
    request: AttentionRequest, tiles: Tiles, splits: Splits, len_q: int, batch: int, may_join: bool
) -> KeySplit:
    """What a division of the keys takes. may_join: there is a workspace."""
    if splits.programs == 1:
        return KeySplit(splits, 0, 0)
    beside = 2 if request.mask is MaskKind.ADDITIVE else 1  # largest score and sum of weights, or their log-sum-exp
    partial = batch * request.heads_q * len_q * splits.programs * (request.dim_v + beside)
    joined = may_join and splits.programs <= _most_joined(request, tiles, len_q, batch)
    return KeySplit(splits, partial, MOST_JOINED if joined else 0)


def power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


class HopperTiles(NamedTuple):
    """How a head size is run.

    keys: of a tile. consumers: warpgroups. turns: they take turns at the tensor cores. arrive: release stages by named
    barriers. own_output: shared memory of its own for the result. stages: of keys and of values. queries: stages of
    query tiles. ring: stages of second parts, where keys and values share them and the `stages` of first parts; 0: they
    do not.
    held: half of the query stays in registers, where no key hangs over the end. lazy: a row's maximum is followed in
    large steps.
    """

    keys: int
    consumers: int
    turns: bool
    arrive: bool
    own_output: bool
    stages: int
    queries: int
    ring: int = 0
    held: bool = False
    lazy: bool = False


def parts(dim: int) -> tuple[int, int]:
    """A head size as the kernel cuts it: a power of two from 64 up, and a second part or 0. The rest is read as
    zeros.
    """
    if dim <= 64:
        return 64, 0
    if dim <= 128:
        return (64, 32) if dim <= 96 else (128, 0)
    return (128, 64) if dim <= 192 else (256, 0)


def value_parts(dim: int) -> tuple[int, int]:
    """The same of values. Products leave out padded columns (see narrow.py), so one part serves up to 128."""
    return (128, 0) if parts(dim)[1] == 32 else parts(dim)


def hopper_tiles(
    dim_qk: int, dim_v: int, len_q: int, len_k: int, right: bool, left: bool = False, lse: bool = False
) -> HopperTiles:
    """The tiling of a call, measured on one H200 at lengths of 500 to 16384. right: rows end at a diagonal. left: they
    begin at one. lse: the log-sum-exp is asked for.

    Head size 64: three warpgroups, or two where those leave clearly fewer rows empty, the diagonal takes much of a row,
    or registers would not do. Turns pay where rows are short, or where a warpgroup has few registers. Head size 192:
    tiles of 128 keys fit where keys and values share three and a half stages, or where values are of 128; with 64 keys,
    shared memory gives the first product its operands no faster than it is done. Head size 256: so half of the query
    comes from registers. It and 192 with shared stages follow maxima in large steps, as their result is most to
    rescale; that adds 2 to 5% to the error.
    """
    widest = max(sum(parts(dim_qk)), sum(parts(dim_v)))
    same = parts(dim_qk) == value_parts(dim_v)
    long = len_k > 1024
    if widest == 64:
        full, narrow = (len_q / (-(-len_q // rows) * rows) for rows in (3 * WARPGROUP_ROWS, 2 * WARPGROUP_ROWS))
        three = full > 0.9 * narrow and (long or not right) and not (left and lse)
        return HopperTiles(128, 3 if three else 2, three, False, True, 3, 2)
    if widest == 96:
        return HopperTiles(128, 2, False, True, True, 2, 2)
    if widest == 128:
        return HopperTiles(128, 2, not long, long, True, 2, 2)
    if widest == 192:
        if same and long and not left:
            return HopperTiles(128, 2, True, False, False, 4, 1, ring=3, lazy=True)
        if value_parts(dim_v) == (128, 0) and not left and len_k > (1024 if right else 512):
            return HopperTiles(128, 2, False, True, False, 2, 1)
        return HopperTiles(64, 2, False, False, not same, 2, 2)
    turns = right or not long or len_k % 64 != 0
    return HopperTiles(64, 2, turns, False, not same, 2, 1, held=parts(dim_qk) == (256, 0), lazy=True)


def hopper_tiles_of(request: AttentionRequest) -> HopperTiles:
    """The Hopper kernel's tiles for a request's lengths."""
    left, right = request.window or (None, None)
    ends = right is not None or request.causal is not Causal.NONE
    dims = (request.dim_qk, request.dim_v)
    return hopper_tiles(*dims, request.len_q, request.len_k, ends, left is not None, request.lse)


class MaskedTiles(NamedTuple):
    """How the masked Hopper forward runs a head size; see `HopperTiles`. dim_qk, dim_v: head sizes as it computes
    them.
    """

    keys: int
    dim_qk: int
    dim_v: int
    stages: int
    queries: int
    own_output: bool
    arrive: bool
    consumers: int

    @property
    def rows(self) -> int:
        """Query rows of a program."""
        return WARPGROUP_ROWS * self.consumers


#: Shared memory of a program on Hopper, without what barriers take.
_HOPPER_SHARED = (227 << 10) - 512


@lru_cache(maxsize=4096)
def masked_tiles(dim_qk: int, dim_v: int, mask_bytes: int, block: tuple[int, int] | None) -> MaskedTiles | None:
    """The masked Hopper forward's tiles; None where it has none.

    Tiles of 128 keys up to head size 128. Where shared memory does not hold them with what they bring, first the second
    stage of queries goes, then the result's own memory, then half of the keys.

    Args:
        dim_qk, dim_v: head sizes, up to 256. mask_bytes: of an element of a mask over rows and keys; 0: there is none.
        block: sizes of a block plan's blocks. A program takes one tile of rows then, so that neither a second stage of
            queries nor memory for the result would serve it, and keys get a third or fourth stage. Blocks of 64 rows
            are taken by one warpgroup, of which a multiprocessor runs two programs.
    """
    wide_qk, wide_v = max(64, power_of_two(dim_qk)), max(64, power_of_two(dim_v))
    consumers, shared = 2, _HOPPER_SHARED
    if block is not None:
        if block[0] % WARPGROUP_ROWS or block[1] % 64:
            return None
        if block[0] % (2 * WARPGROUP_ROWS):
            consumers, shared = 1, _HOPPER_SHARED // 2 - 1024
    rows = WARPGROUP_ROWS * consumers
    ways = [(3, 2, True), (2, 2, True), (2, 1, True), (2, 1, False)]
    if block is not None:
        ways = [(4, 1, False), (3, 1, False), (2, 1, False)]
    largest = 128 if max(wide_qk, wide_v) <= 128 and consumers == 2 else 64
    for keys in (128, 64):
        if keys > largest or (block is not None and block[1] % keys):
            continue
        for stages, queries, own in ways:
            own = own or wide_qk != wide_v  # the query's memory has other rows
            fixed = rows * 2 * (queries * wide_qk + own * wide_v)
            if fixed + stages * keys * (2 * (wide_qk + wide_v) + rows * mask_bytes) <= shared:
                named = stages <= 3 and max(wide_qk, wide_v) == 128
                return MaskedTiles(keys, wide_qk, wide_v, stages, queries, own, named, consumers)
    return None


def masked_tiles_of(request: AttentionRequest) -> MaskedTiles | None:
    """The masked Hopper forward's tiles for a request, whose mask, if any, is taken to be of 16-bit numbers."""
    size = {MaskKind.NONE: 0, MaskKind.BOOLEAN: 1, MaskKind.ADDITIVE: 2}[request.mask]
    block = None if request.block_plan is None else request.block_plan[:2]
    return masked_tiles(request.dim_qk, request.dim_v, size, block)


class Fp8Tiles(NamedTuple):
    """How the FP8 forward runs a head size; see `HopperTiles`. apart, halves: see its `Config`."""

    keys: int
    consumers: int
    turns: bool
    arrive: bool
    stages: int
    queries: int
    apart: bool = False
    halves: bool = False


def fp8_tiles(dim: int, whole: bool) -> Fp8Tiles:
    """The FP8 forward's tiles, measured on one H200 at 8192 and 16384 tokens. whole: see `fp8_whole`.

    A softmax of so short products waits more than it computes, so a third warpgroup is worth more than products of one
    warpgroup beside its own softmax, for which 160 registers are too few at head size 128.
    """
    if dim > 128:
        return Fp8Tiles(128, 2, False, True, 2, 1, apart=True, halves=True)
    if not whole:
        return Fp8Tiles(128, 2, False, True, 4, 2)
    return Fp8Tiles(128, 3, False, False, 4, 1, apart=dim > 64)


def fp8_whole(request: AttentionRequest) -> bool:
    """Whether tiles of keys are cut at their middle or their end alone, for a request's exact lengths."""
    shift = request.diagonal
    if request.causal is Causal.BOTTOM_RIGHT:
        shift += request.len_k - request.len_q
    return request.len_k % 128 == 0 and (request.causal is Causal.NONE or shift % WARPGROUP_ROWS == 0)


def skipping_tiles(dim: int) -> Tiles:
    """Tiles of the kernel that skips some: small ones are skipped more often."""
    return Tiles(64, 64 if dim <= 128 else 32, 4, 2)


class HopperBackwardTiles(NamedTuple):
    """How the Hopper backward runs a head size: keys of a block, query rows of a tile, head sizes as it computes them,
    stages of the loads; turns and engine as in its `Config`.
    """

    keys: int
    rows: int
    dim_qk: int
    dim_v: int
    stages: int
    turns: bool
    engine: bool

    @property
    def size(self) -> int:
        """Numbers of a tile of the query's gradient, of a power of two of columns."""
        return self.rows * power_of_two(self.dim_qk)


def hopper_backward_tiles(dim_qk: int, dim_v: int, right: bool) -> HopperBackwardTiles:
    """The Hopper backward's tiles, measured on one H200. right: keys end at a diagonal, whose masks leave no registers
    for a third stage of loads.
    """
    widest = max(dim_qk, dim_v)
    if widest <= 64:
        return HopperBackwardTiles(128, 128, 64, 64, 2, turns=True, engine=False)
    if widest <= 128:
        return HopperBackwardTiles(128, 64, 128, 128, 2 if right else 3, turns=True, engine=True)
    wide_qk, wide_v = (192 if dim <= 192 else 256 for dim in (dim_qk, dim_v))
    return HopperBackwardTiles(64, 64, wide_qk, 128 if dim_v <= 128 else wide_v, 2, turns=False, engine=False)
