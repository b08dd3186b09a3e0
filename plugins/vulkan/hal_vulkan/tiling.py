"""How the Vulkan kernels cut attention: query rows and keys of a work group, from the sizes of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from hal_compute.sizes import HEAD_DIMS, MOST_SPLITS, Sizes, splits_of, within

from hal_core.plugin_api import AttentionRequest, DenseTiling, TilePlan

from .paths import MatrixStep, RowStep, matrix_step, row_step
from .runtime._vk import Adapter

if TYPE_CHECKING:
    from torch import Tensor


class TileCut(NamedTuple):
    """forward_tiles.comp: invocations and query rows of a work group, keys of a tile, rows per invocation."""

    threads: int
    rows: int
    keys: int
    height: int

    def shared_bytes(self, dim: int) -> int:
        """Shared memory of a work group: queries, keys or values, weights, and one number per row and invocation."""
        pitch = dim // 4 + 1
        operands = self.rows * pitch + self.keys * pitch + self.rows * (self.keys // 4 + 1)
        return 16 * operands + 4 * self.threads * self.height


_CPU_TILES = (TileCut(8, 8, 32, 8), TileCut(8, 8, 16, 8))
_GPU_TILES = {64: TileCut(128, 64, 32, 4), 128: TileCut(128, 32, 32, 4), 256: TileCut(64, 16, 16, 4)}  # by head size
#: Fits 32 KiB at any head size; every device seen so far has that much.
_SMALL_TILES = TileCut(32, 8, 16, 4)


def tile_cut(is_cpu: bool, dim: int, shared: int) -> TileCut:
    """The largest tiles that suit a head size and fit `shared` bytes of shared memory."""
    liked = _CPU_TILES if is_cpu else [cut for most, cut in _GPU_TILES.items() if dim <= most]
    return next((cut for cut in liked if cut.shared_bytes(dim) <= shared), _SMALL_TILES)


#: Block sizes of a caller's tiling that forward_tiles.comp can be specialised for.
TILE_SIZES = (16, 32)


def foreign_cut(block_q: int, block_k: int) -> TileCut:
    """Blocks of a caller's tiling: an invocation has 8 rows and an eighth of their keys."""
    return TileCut(block_q, block_q, block_k, 8)


class RowCut(NamedTuple):
    """forward_rows.comp: subgroups and query rows of a work group, invocations that share a key, loads of keys in
    flight.
    """

    step: RowStep
    subgroups: int
    rows: int
    lanes: int
    loads: int

    @property
    def threads(self) -> int:
        """Invocations of a work group."""
        return self.subgroups * self.step.subgroup

    @property
    def keys(self) -> int:
        """Keys that a work group reads at once."""
        return self.threads // self.lanes * self.loads

    def shared_bytes(self, dim: int) -> int:
        """Shared memory of a work group: sums, a maximum and a total per subgroup, one number per split, and a flag."""
        return self.rows * (self.subgroups * (4 * dim + 8) + 4 * MOST_SPLITS) + 4


_SUBGROUPS = (6, 4, 2)  # of a work group, the best first


def row_cut(step: RowStep, sizes: Sizes, *, least: bool) -> RowCut | None:
    """The cut of a call; None where it has too many rows for the registers or for shared memory.

    `least`: take only calls that matrices do not read faster.
    """
    if sizes.unit_rows > (4 if least else 8) or (least and sizes.dim < 96):
        return None
    rows = next(rows for rows in (1, 2, 4, 8) if rows >= sizes.unit_rows)
    loads = sizes.dim * (4 if sizes.dtype == "float32" else 2) // 16  # of 16 bytes in a row
    lanes = min(1 << (loads - 1).bit_length(), step.subgroup)
    held = -(-loads // lanes) * (1 if sizes.dtype == "float32" else 2)  # groups of 4 numbers of a row in an invocation
    cuts = (RowCut(step, subgroups, rows, lanes, 8 if rows * held <= 4 else 4) for subgroups in _SUBGROUPS)
    return next((cut for cut in cuts if cut.shared_bytes(sizes.dim) <= step.shared), None)


class MatrixCut(NamedTuple):
    """forward_nv2.comp and forward_khr.comp: invocations of a work group, keys of a tile, matrices of rows in a
    subgroup.

    Attributes:
        alone: subgroups share their rows and have keys of their own, for calls of few rows.
        ahead: the scores of the next tile are computed beside this tile's weights, with two sets of tiles in shared
            memory (1) or one (2).
    """

    step: MatrixStep
    threads: int
    keys: int
    height: int
    alone: bool
    ahead: int = 0

    @property
    def rows(self) -> int:
        """Query rows of a work group."""
        return self.height * self.step.side * (1 if self.alone else self.threads // self.step.subgroup)

    @property
    def stride(self) -> int:
        """Keys from one tile of a subgroup to its next."""
        return self.keys * (self.threads // self.step.subgroup if self.alone else 1)

    def shared_bytes(self, dim: int) -> int:
        """Shared memory of a work group, as the shaders compute it."""
        side, subgroups, pitch = self.step.side, self.threads // self.step.subgroup, dim // 8 + 1
        tall = subgroups * self.height * side
        tiles = self.keys * pitch * (subgroups if self.alone else 4 if self.ahead == 1 else 2)
        ending = tall * ((dim if self.alone else side) // 4 + 1)
        weights = 0 if self.step.name == "nv2" else tall * (self.keys // 4 + (3 if self.keys < 24 else 1))
        return 16 * (max(tiles, self.rows * pitch, ending) + weights) + 8 * tall

    def fits(self, dim: int) -> bool:
        """Whether shared memory is large enough, and every invocation has equal pieces of a tile and of a row of
        scores.

        Pieces of a tile are 16 bytes. Only forward_khr.comp distributes rows of scores, in pieces of twice 4.
        """
        loaders = self.step.subgroup if self.alone else self.threads
        evenly = self.keys * dim // 8 % loaders == 0
        if self.step.name == "khr":
            evenly &= self.keys % (8 * self.step.subgroup // self.step.side) == 0
        return evenly and self.shared_bytes(dim) <= self.step.shared


# (subgroups, matrices of keys in a tile, matrices of rows in a subgroup, ahead), by head size: the fastest on an H200
_FASTEST = {
    32: (4, 4, 2, 2),
    64: (4, 2, 2, 1),
    96: (8, 4, 1, 2),
    128: (8, 2, 1, 1),
    192: (6, 2, 1, 2),
    256: (4, 1, 1, 2),
}
_AHEAD = [(4, 4, 1, 2), (4, 2, 1, 2)]
_PLAIN = [(4, 4, 1, 0), (4, 2, 1, 0), (2, 2, 1, 0), (1, 2, 1, 0), (1, 1, 1, 0)]


def matrix_cuts(step: MatrixStep, dim: int, *, alone: bool) -> list[MatrixCut]:
    """The cuts that fit, best first: the fastest one measured, then those that more rows or less memory need."""
    shapes = [_FASTEST[dim], *_AHEAD, *_PLAIN] if step.name == "nv2" else _PLAIN
    made = (
        MatrixCut(step, groups * step.subgroup, tiles * step.side, height, alone, ahead)
        for groups, tiles, height, ahead in (_PLAIN[1:] if alone else shapes)
    )
    return [cut for cut in made if cut.fits(dim)]


def matrix_cut(step: MatrixStep, sizes: Sizes) -> MatrixCut | None:
    """The best cut that fits the device and the call; None where tiles in shared memory are used."""
    fitting = matrix_cuts(step, sizes.dim, alone=sizes.unit_rows <= step.side)
    return next((cut for cut in fitting if sizes.range_rows % cut.rows == 0), None)


# Work groups that keep a large device busy: twice as many where they read short rows; for few rows, two for each of an
# H200's 132 multiprocessors. A further dispatch would serialise the others.
_MATRIX_GROUPS, _ROW_GROUPS = 128, 264


def matrix_splits(cut: MatrixCut, sizes: Sizes) -> tuple[int, int]:
    """(keys of a split, number of splits) of forward_nv2.comp and forward_khr.comp."""
    blocks, wanted = -(-sizes.unit_rows // cut.rows), _MATRIX_GROUPS * (2 if cut.alone and sizes.dim <= 64 else 1)
    return splits_of(blocks * sizes.units, sizes.len_k, cut.stride, wanted=wanted, least=4 * cut.stride)


def tile_splits(cut: TileCut, sizes: Sizes, *, is_cpu: bool) -> tuple[int, int]:
    """(keys of a split, number of splits) of forward_tiles.comp."""
    blocks, (wanted, least) = -(-sizes.unit_rows // cut.rows), (4, 256) if is_cpu else (512, 128)
    return splits_of(blocks * sizes.units, sizes.len_k, cut.keys, wanted=wanted, least=least)


def row_splits(cut: RowCut, sizes: Sizes) -> tuple[int, int]:
    """(keys of a split, number of splits) of forward_rows.comp."""
    groups = sizes.units * -(-sizes.unit_rows // cut.rows)
    return splits_of(groups, sizes.len_k, cut.keys, wanted=_ROW_GROUPS // groups * groups, least=4 * cut.keys)


STREAM_BYTES = 1 << 16  # of keys, and of values, in a uniform buffer
STREAM_LANES = 8  # invocations of a subgroup, and of a work group
_SHUFFLE = 0x10  # VK_SUBGROUP_FEATURE_SHUFFLE_BIT
#: At most, bytes of keys, and share of the session's limit, in chunks filled less than half: short rows of many
#: sequences.
_SPARE, _SPARE_PART = 128 << 20, 16
#: Multiply-accumulates, per float of a query that an invocation holds, from which compiling so large a shader pays.
_STREAM_FROM = 1 << 16


class StreamCut(NamedTuple):
    """forward_stream.comp: query rows of an invocation, keys of a chunk, and chunks of a key head."""

    rows_each: int
    keys: int
    chunks: int

    @property
    def rows(self) -> int:
        """Query rows of a work group."""
        return STREAM_LANES * self.rows_each


def stream_cut(adapter: Adapter, sizes: Sizes, limit: int, *, planned: bool) -> StreamCut | None:
    """The cut of a long call without a block plan on a CPU's driver; None where another kernel is faster or needed.

    `limit`: bytes that the session may have.
    """
    limits, rows = adapter.limits, sizes.len_q
    if not adapter.is_cpu or planned or sizes.dim > 128 or STREAM_BYTES % (4 * sizes.dim):
        return None  # chunks follow each other without gaps
    if limits["maxUniformBufferRange"] < STREAM_BYTES or limits["subgroupSize"] != STREAM_LANES:
        return None
    if not limits["subgroupOperations"] & _SHUFFLE:
        return None
    if rows < STREAM_LANES:
        rows *= sizes.heads_q // sizes.heads_kv
    macs = 2 * sizes.batch * sizes.heads_q * sizes.len_q * sizes.dim * sizes.len_k
    if macs < _STREAM_FROM * sizes.dim * _rows_each(rows):
        return None
    keys = STREAM_BYTES // (4 * sizes.dim)
    chunks = -(-sizes.len_k // keys)
    nbytes, spare = sizes.batch * sizes.heads_kv * chunks * STREAM_BYTES, min(_SPARE, limit // _SPARE_PART)
    if nbytes > limits["maxStorageBufferRange"] or (2 * sizes.len_k < keys and nbytes > spare):
        return None
    return StreamCut(_rows_each(sizes.unit_rows), keys, chunks)


def _rows_each(rows: int) -> int:
    """Query rows of an invocation for units of `rows`: a power of 2; with 8 compiling takes 10 s and saves nothing."""
    return min(4, 1 << (-(-rows // STREAM_LANES) - 1).bit_length())


Cut = TileCut | RowCut | MatrixCut | StreamCut


class VulkanTiling(DenseTiling):
    """The cut that the device's kernels follow: blocks of query rows against tiles of keys, by the sizes of a call."""

    def __init__(self, adapter: Adapter, limit: int) -> None:
        """`limit`: bytes that the session may have."""
        super().__init__(cut_by="vulkan")
        self._adapter, self._limit = adapter, limit
        self.shared = adapter.limits["maxComputeSharedMemorySize"]
        self.name = f"vulkan({adapter.name}, {self.shared})"

    def cut(self, sizes: Sizes, *, planned: bool = False, plan: TilePlan | None = None) -> Cut:
        """The cut, and by its type the kernel, that serves a call best.

        Args:
            planned: whether the call has a block plan. plan: equal blocks of a tiling that the caller brought.
        """
        if plan is not None:
            return foreign_cut(plan.block_q, plan.block_k)
        adapter = self._adapter
        matrices, few = matrix_step(adapter, sizes.dtype), row_step(adapter)
        cut: Cut | None = None if few is None else row_cut(few, sizes, least=matrices is not None)
        if cut is None and matrices is not None:
            cut = matrix_cut(matrices, sizes)
        cut = cut or stream_cut(adapter, sizes, self._limit, planned=planned)
        return cut or tile_cut(adapter.is_cpu, sizes.dim, self.shared)

    def compute_optimal_tile_size(
        self, sequence_length: int, available_memory: int, backend_constraints: Mapping[str, int]
    ) -> int:
        """Keys of a tile in shared memory. `backend_constraints`: "head_dim", 64 where it is missing."""
        return self.tiles(backend_constraints.get("head_dim", 64)).keys

    def tiles(self, head_dim: int) -> TileCut:
        """The tiles in shared memory for a head size."""
        dim = next((dim for dim in HEAD_DIMS if dim >= head_dim), HEAD_DIMS[-1])
        return tile_cut(self._adapter.is_cpu, dim, self.shared)

    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> TilePlan:
        """The blocks of query rows and keys that the kernels read, without what causal and window hide.

        Where query heads that share a key head are packed, a block has the rows of several heads.
        """
        cut = self.cut(Sizes.of(request, pack=True), planned=request.block_plan is not None)
        return TilePlan.equal(request, *within(limits, cut.rows, cut.keys), cut_by=self.cut_by)
