"""How this device cuts attention: block sizes, and how many heads are worked on at once. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hal_core.plugin_api import AttentionRequest, DenseTiling, TilePlan

from .discovery import this_machine
from .paths import path_of, reads_in_place

if TYPE_CHECKING:
    from torch import Tensor

#: Largest blocks of a tiling that a caller brings; 0: row and key ranges of any size.
LARGEST_BLOCK = 4096
#: Most rows (queries times group) of a task of hal-cpu-native, and the keys of its blocks.
COMPILED_ROWS, COMPILED_KEYS = 256, 64
_BLOCK = 512


class CpuTiling(DenseTiling):
    """The cut of the CPU's own kernels; for paths that torch cuts itself, a description of torch's blocks.

    Tiles have 512 x 512 pairs: smaller ones spend their time in calls, larger ones in memory. A window gets fewer rows,
    because tiles are whole, and rows beyond the window's width are paid for. The decode kernel takes all rows at once,
    and as many keys as are converted at once.

    Args:
        block_q, block_k: block sizes of the tiled kernel; None: chosen for each request.
    """

    def __init__(self, block_q: int | None = None, block_k: int | None = None) -> None:
        super().__init__(block_q, block_k, cut_by="cpu")
        self.name = "cpu" if block_q is None else f"cpu({self.block_q}x{self.block_k})"

    def compute_optimal_tile_size(
        self, sequence_length: int, available_memory: int, backend_constraints: Mapping[str, int]
    ) -> int:
        """As DenseTiling, with available_memory bounded by the second-level cache."""
        fits = min(available_memory, this_machine().l2)
        return super().compute_optimal_tile_size(sequence_length, fits, backend_constraints)

    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> TilePlan:
        """The blocks of a request with exact lengths.

        `limits` may bound them: "maximum", "block_q", "block_k", and "available_memory" (bytes of the operands of one
        tile).
        """
        path = path_of(request)
        if path in ("native", "packed", "fused") and not limits:
            return TilePlan.equal(request, *_torch_blocks(request), cut_by="torch")
        if path in ("compiled", "streamed") and not limits:
            group = max(request.heads_q // max(request.heads_kv, 1), 1)
            rows = request.len_q if path == "streamed" else COMPILED_ROWS // group
            return TilePlan.equal(request, max(min(rows, request.len_q), 1), COMPILED_KEYS, cut_by="hal-cpu-native")
        if path == "decode" and not limits:
            sizes = DecodeSizes.choose(request, direct=reads_in_place(request), one_batch=request.page_size is not None)
            return TilePlan.equal(request, max(request.len_q, 1), max(sizes.columns, 1), cut_by=self.cut_by)
        block_q, block_k = self._blocks(request)
        block_q, block_k = (
            min(size, limits.get("maximum", size), limits.get(name, size))
            for name, size in (("block_q", block_q), ("block_k", block_k))
        )
        if (space := limits.get("available_memory")) is not None:
            size = (8 if request.dtype == "float64" else 4) * (request.dim_qk + request.dim_v)
            while block_q + block_k > 2 and (block_q + block_k) * size > space:
                block_q, block_k = max(block_q // 2, 1), max(block_k // 2, 1)
        return TilePlan.equal(request, block_q, block_k, cut_by=self.cut_by)

    def choices(self, request: AttentionRequest, limits: Mapping[str, int]) -> Sequence[CpuTiling]:
        """Block sizes worth trying, the device's own guess first."""
        low, high = limits.get("minimum", 1), limits.get("maximum", LARGEST_BLOCK)
        first = self._blocks(request)
        sizes = [first, *((q, k) for q in (64, 128, 256, 512) for k in (128, 256, 512, 1024) if (q, k) != first)]
        fitting = [(q, k) for q, k in sizes if low <= min(q, k) and max(q, k) <= high]
        return [CpuTiling(q, k) for q, k in fitting]

    def _blocks(self, request: AttentionRequest) -> tuple[int, int]:
        """Query rows and keys of a tile, at least 1."""
        if request.block_plan is not None:
            block_q, block_k, _ = request.block_plan
            return block_q, max((self.block_k or _BLOCK) // block_k, 1) * block_k
        if self.block_q is not None and self.block_k is not None:
            return self.block_q, self.block_k
        most = _BLOCK
        if request.window is not None and request.window[0] is not None:
            most = min(max(request.window[0], 128), _BLOCK)
        rows = max(most // max(request.heads_q // max(request.heads_kv, 1), 1), 64)
        return max(min(request.len_q, rows), 1), max(min(request.len_k, _BLOCK), 1)


def _torch_blocks(request: AttentionRequest) -> tuple[int, int]:
    """The blocks of torch's CPU kernel.

    Source: PyTorch, aten/src/ATen/native/cpu/FlashAttentionKernel.cpp.
    """
    rows = 256 if request.len_q >= 768 else 64 if request.len_q >= 192 else 32
    return max(min(rows, request.len_q), 1), max(min(512, request.len_k), 1)


class TileSizes(NamedTuple):
    """Batch entries and key heads worked on at once, and the most query rows and keys of one tile."""

    batch: int
    heads: int
    rows: int
    columns: int

    @property
    def pairs(self) -> int:
        """Batch entries times key heads."""
        return self.batch * self.heads

    @classmethod
    def of(cls, request: AttentionRequest, plan: TilePlan, threads: int, *, one_head: bool = False) -> TileSizes:
        """As many heads at once as twice the second-level caches of all threads hold the scores of.

        Args:
            request: with exact lengths. plan: whose tiles are worked on.
            threads: that torch uses.
            one_head: a block plan has a pattern for each head, so heads are worked on one by one.
        """
        if plan.ranges is None:
            rows, columns = min(plan.block_q, request.len_q), min(plan.block_k, request.len_k)
        else:
            rows = max((stop - start for start, stop, _ in plan.ranges), default=0)
            columns = max((b - a for _, _, spans in plan.ranges for a, b in spans), default=0)
        if request.block_plan is not None:  # its blocks are whole, also where the lengths are shorter
            rows, columns = plan.block_q, max(plan.block_k, request.block_plan[1])
        group = request.heads_q // max(request.heads_kv, 1)
        scores = 2 * threads * this_machine().l2 // (8 if request.dtype == "float64" else 4)
        pairs = max(scores // max(group * rows * columns, 1), 1)
        if one_head or pairs < request.heads_kv:
            return cls(1, 1 if one_head else pairs, rows, columns)
        return cls(min(pairs // max(request.heads_kv, 1), max(request.batch, 1)), request.heads_kv, rows, columns)


class BlockSizes(NamedTuple):
    """Of a block plan: rows of a query block over the heads of a group, the most keys that are listed for it, query
    blocks, key blocks, and how many query blocks are multiplied at once: with lists of the greatest length, and at most
    where lists are shorter.
    """

    rows: int
    keys: int
    blocks_q: int
    blocks_k: int
    at_once: int
    at_most: int

    @classmethod
    def of(cls, request: AttentionRequest, threads: int) -> BlockSizes:
        """As many blocks at once as the second-level caches of all threads hold the scores of; lengths are exact."""
        assert request.block_plan is not None
        block_q, block_k, most = request.block_plan
        block_q = max(min(block_q, request.len_q), 1)  # a shorter call is one block
        blocks_q, blocks_k = -(-request.len_q // block_q), -(-request.len_k // block_k)
        rows = block_q * (request.heads_q // max(request.heads_kv, 1))
        keys = min(most, blocks_k) * block_k
        room = threads * this_machine().l2 // (8 if request.dtype == "float64" else 4)
        at_once = max(min(room // max(rows * keys, 1), blocks_q), 1)
        return cls(rows, keys, blocks_q, blocks_k, at_once, max(min(4 * at_once, blocks_q), 1))


class DecodeSizes(NamedTuple):
    """Batch entries worked on at once, and keys converted at once."""

    batch: int
    columns: int

    @classmethod
    def choose(cls, request: AttentionRequest, *, direct: bool, one_batch: bool) -> DecodeSizes:
        """As many as stay in the third-level cache.

        Args:
            request: with exact lengths.
            direct: keys and values are read where they lie, with nothing converted.
            one_batch: key heads of two batch entries have no common stride.
        """
        size, room = (8 if request.dtype == "float64" else 4), this_machine().l3 // 4
        rows = request.len_q * (request.heads_q // max(request.heads_kv, 1))
        scores = max(request.heads_kv * rows * request.len_k * size, 1)
        batch = 1 if one_batch else min(max(room // scores, 1), max(request.batch, 1))
        if direct:
            return cls(batch, request.len_k)
        one_key = max(batch * request.heads_kv * max(request.dim_qk, request.dim_v) * size, 1)
        return cls(batch, min(max(room // one_key, 64), request.len_k))
