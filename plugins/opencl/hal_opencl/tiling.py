"""How the OpenCL kernels cut attention: query rows and keys of a work item or a work group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from hal_compute.sizes import HEAD_DIMS, Sizes, splits_of, within

from hal_core.plugin_api import AttentionRequest, DenseTiling, TilePlan

from .discovery import is_cpu

if TYPE_CHECKING:
    from torch import Tensor

#: Block sizes of a caller's tiling that forward_rows.cl can be built for.
TILE_SIZES = (32, 64)
ROWS_TILE = 64  # keys in a tile of forward_rows.cl
ROWS_HEIGHT = 16  # query rows of one of its work items, in groups of 8
FEW_ROWS = 8  # rows up to which it reads the keys where they lie


class Shape(NamedTuple):
    """How a kernel cuts the work.

    Attributes:
        rows: query rows of a work item (forward_rows.cl) or of a work group (forward_tiles.cl). tile: keys of a tile.
        threads: work items of a group; 0 for forward_rows.cl. The fields after it are for forward_tiles.cl alone.
        height: query rows of a work item. slice: at most, head elements of the keys in local memory at once.
    """

    rows: int
    tile: int
    threads: int = 0
    height: int = 0
    slice: int = 0

    @property
    def packs_keys(self) -> bool:
        """Whether the kernel reads copies of the keys as transposed tiles."""
        return not self.threads and self.rows > FEW_ROWS

    def slice_width(self, dim: int) -> int:
        """Head elements of a slice: a divisor of `dim`."""
        return self.slice if dim % self.slice == 0 else 32

    def value_run(self, dim: int) -> int:
        """Keys whose values fit the local memory of a slice of keys: a power of 2."""
        return 1 << (max(self.tile * self.slice_width(dim) // dim, 4).bit_length() - 1)

    def local_bytes(self, dim: int) -> int:
        """Local memory of a work group: a slice of the queries, of the keys or values, and the weights."""
        width = self.slice_width(dim)
        return 4 * (self.rows * width + max(self.tile * width, self.value_run(dim) * dim) + self.rows * self.tile)

    def options(self, dim: int) -> list[str]:
        """Build options of forward_rows.cl or forward_tiles.cl."""
        if not self.threads:
            values = {
                "tile": self.tile,
                "rows": self.rows,
                "group": min(self.rows, 8),
                "direct": int(not self.packs_keys),
            }
        else:
            width = self.slice_width(dim)
            values = self._asdict() | {"slice": width, "run": self.value_run(dim), "sliced": int(width < dim)}
        return [f"-D{name.upper()}={value}" for name, value in values.items()]


_GPU_SHAPES = {128: Shape(64, 64, 64, 8, 64), 256: Shape(32, 64, 64, 4, 64)}  # by the largest head size
_GPU_FEW_SHAPES = {8: Shape(8, 64, 64, 2, 64), 16: Shape(16, 64, 64, 4, 64)}  # by the largest number of rows
_SMALL_SHAPE = Shape(
    16, 32, 32, 4, 32
)  # fits 16 KiB at any head size: the least local memory that OpenCL 1.1 allows a GPU


def shape_of(local_memory: int | None, dim: int, rows: int, keys: int) -> Shape:
    """The shape for units of `rows` query rows against `keys` keys.

    Args:
        local_memory: bytes that a work group may have on a GPU, for which the largest tiles are chosen that suit the
            head size; None for a CPU, whose row blocks suit registers and caches.
        dim: padded head size.
    """
    if local_memory is None:
        height = 1 << (rows - 1).bit_length() if rows <= FEW_ROWS else ROWS_HEIGHT
        return Shape(height, ROWS_TILE if keys > ROWS_TILE // 2 else ROWS_TILE // 2)
    few = (shape for most, shape in _GPU_FEW_SHAPES.items() if rows <= most)
    liked = next(few, None) or next(shape for most, shape in _GPU_SHAPES.items() if dim <= most)
    return liked if liked.local_bytes(dim) <= local_memory else _SMALL_SHAPE


class OpenClTiling(DenseTiling):
    """The cut that the device's kernels follow: blocks of query rows against tiles of keys, by the sizes of a call."""

    def __init__(self, local_memory: int | None, units: int) -> None:
        """`local_memory`: see `shape_of`. `units`: compute units of the device."""
        super().__init__(cut_by="opencl")
        self.local_memory, self.units = local_memory, units
        self.name = "opencl(cpu)" if local_memory is None else f"opencl({local_memory})"

    def shape(self, sizes: Sizes, plan: TilePlan | None = None) -> Shape:
        """The shape for a call; `plan`: a plan of equal blocks that the caller brought."""
        if plan is None:
            return shape_of(self.local_memory, sizes.dim, sizes.unit_rows, sizes.len_k)
        return Shape(plan.block_q, plan.block_k)

    def splits(self, shape: Shape, sizes: Sizes) -> tuple[int, int]:
        """(keys of a split, number of splits), see `splits_of`."""
        blocks, wanted = -(-sizes.unit_rows // shape.rows), self.units * (2 if self.local_memory is None else 4)
        return splits_of(blocks * sizes.units, sizes.len_k, shape.tile, wanted=wanted, least=4 * shape.tile)

    def compute_optimal_tile_size(
        self, sequence_length: int, available_memory: int, backend_constraints: Mapping[str, int]
    ) -> int:
        """Keys of a tile for a sequence; `backend_constraints`: "head_dim", 64 where it is missing."""
        return self.shape_at(backend_constraints.get("head_dim", 64), sequence_length, sequence_length).tile

    def shape_at(self, head_dim: int, rows: int, keys: int) -> Shape:
        """The shape for so many query rows and keys of any head size."""
        dim = next((dim for dim in HEAD_DIMS if dim >= head_dim), HEAD_DIMS[-1])
        return shape_of(self.local_memory, dim, max(rows, 1), keys)

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
        shape = self.shape(Sizes.of(request, pack=True))
        return TilePlan.equal(request, *within(limits, shape.rows, shape.tile), cut_by=self.cut_by)


def tiling_of(handle: Any) -> OpenClTiling:
    """The tiling of a device."""
    return OpenClTiling(None if is_cpu(handle) else int(handle.local_mem_size), int(handle.max_compute_units))
