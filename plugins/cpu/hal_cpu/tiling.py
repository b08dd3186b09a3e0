"""How this device cuts attention: block sizes, and how many heads are worked on at once. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hal_core.plugin_api import AttentionRequest, DenseTiling

from .discovery import this_machine


class CpuTiling(DenseTiling):
    """Square tiles whose operands stay in one core's second-level cache."""

    def compute_optimal_tile_size(
        self, sequence_length: int, available_memory: int, backend_constraints: Mapping[str, int]
    ) -> int:
        """As DenseTiling, with available_memory bounded by the second-level cache."""
        fits = min(available_memory, this_machine().l2)
        return super().compute_optimal_tile_size(sequence_length, fits, backend_constraints)


class TileSizes(NamedTuple):
    """Batch entries, key/value heads, query rows and keys of one tile."""

    batch: int
    heads: int
    rows: int
    columns: int

    @property
    def pairs(self) -> int:
        return self.batch * self.heads

    @classmethod
    def choose(
        cls, request: AttentionRequest, threads: int, *, one_head: bool = False, tile: int | None = None
    ) -> TileSizes:
        """Tiles of 512 x 512 pairs, for as many heads as twice the second-level caches of all threads hold the scores
        of.

        Smaller tiles spend their time in calls, larger ones in memory. A window gets fewer rows: tiles are whole, and
        rows beyond the window's width are paid for.

        Args:
            request: with exact lengths.
            threads: that torch uses.
            one_head: a block plan has a pattern for each head, so heads are worked on one by one.
            tile: query rows and keys, where the caller insists.
        """
        group = request.heads_q // request.heads_kv
        scores = 2 * threads * this_machine().l2 // (8 if request.dtype == "float64" else 4)
        most = 512
        if request.window is not None and request.window[0] is not None:
            most = min(max(request.window[0], 128), 512)
        rows = min(request.len_q, tile or max(most // group, 64))
        columns = min(request.len_k, tile or 512)
        if request.block_plan is not None:
            block_q, block_k, _ = request.block_plan
            rows, columns = block_q, max(columns // block_k, 1) * block_k
        pairs = max(scores // max(group * rows * columns, 1), 1)
        if one_head or pairs < request.heads_kv:
            return cls(1, 1 if one_head else pairs, rows, columns)
        return cls(min(pairs // request.heads_kv, max(request.batch, 1)), request.heads_kv, rows, columns)


class DecodeSizes(NamedTuple):
    """Batch entries worked on at once, and keys widened at once."""

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
        rows = request.len_q * (request.heads_q // request.heads_kv)
        scores = max(request.heads_kv * rows * request.len_k * size, 1)
        batch = 1 if one_batch else min(max(room // scores, 1), max(request.batch, 1))
        if direct:
            return cls(batch, request.len_k)
        one_key = batch * request.heads_kv * max(request.dim_qk, request.dim_v) * size
        return cls(batch, min(max(room // one_key, 64), request.len_k))
