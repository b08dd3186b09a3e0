"""How attention is cut into the tiles of the photonic core.

QK^T holds keys as weights, `outputs` keys by `inputs` of the head's dimensions in one tile. PV holds values, so its
tiles are `inputs` keys wide: they lie along the reduction, and the range of a readout, with its noise, belongs to a
whole tile. A plan is therefore a cut of the keys into the tiles of PV. Its row ranges are the queries whose scores are
kept at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, DenseTiling, TilePlan, visible_keys

from .simulator.converters import NARROWEST

if TYPE_CHECKING:
    from torch import Tensor

#: Scores of one key head kept at once; their 4 MiB fit the cache of a processor.
SCORES = 1 << 20


def narrowed(window: tuple[int | None, int | None] | None, inputs: int) -> int:
    """The tile width of PV along the keys: as wide as the array, narrower for a window of fewer keys.

    A readout's range, and so its noise, belongs to a whole tile; most of a wide tile would lie outside the window.

    Args:
        window: (left, right) of the request. inputs: of the array.

    Returns:
        A power of two of at least `NARROWEST`, or `inputs`.
    """
    if window is None or None in window:
        return inputs
    keys = sum(side for side in window if side is not None) + 1
    return min(max(1 << (keys - 1).bit_length(), NARROWEST), inputs)


class PhotonicTiling(DenseTiling):
    """The device's own cut: tiles as wide as the array, narrower for narrow windows, over the keys that rows can see.

    Args:
        backend: its name, for `TilePlan.cut_by`. outputs, inputs: of the array.
    """

    def __init__(self, backend: str, outputs: int, inputs: int) -> None:
        super().__init__(cut_by=backend)
        self.outputs, self.inputs = outputs, inputs
        self.name = f"photonic({outputs}x{inputs})"

    def compute_optimal_tile_size(
        self, sequence_length: int, available_memory: int, backend_constraints: Mapping[str, int]
    ) -> int:
        """The width of a tile along the keys, at most the power of two at or above the sequence length.

        The tile lies in the optics, so neither the available memory nor the constraints change it.
        """
        return max(min(self.inputs, 1 << max(sequence_length - 1, 0).bit_length()), 1)

    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> TilePlan:
        """The tiles of PV for the request's lengths.

        Args:
            limits: bounds: "block_q" query rows at once, "block_k" keys in a tile, "available_memory" bytes for the
                operands of a tile. "minimum" and "maximum" bound tilings that a caller brings.
        """
        r, width = request, narrowed(request.window, self.inputs)
        width = max(min(width, limits.get("block_k", width)), 1)
        rows = rows_at_once(request)
        rows = max(min(rows, limits.get("block_q", rows)), 1)
        if space := limits.get("available_memory"):
            size = DTYPE_BYTES.get(r.dtype, 4)
            width = max(min(width, space // (2 * size * max(r.dim_qk + r.dim_v, 1))), 1)
            rows = max(min(rows, space // (2 * size * max(r.dim_qk, 1))), 1)
        low, _ = request.band(request.len_q, request.len_k)
        if low is None:  # every row sees the first key
            return TilePlan.equal(request, rows, width, cut_by=self.cut_by)
        return TilePlan.uneven(request, _from_first_key(request, rows, width), cut_by=self.cut_by)

    def choices(self, request: AttentionRequest, limits: Mapping[str, int]) -> Sequence[DenseTiling]:
        """This cut, and equal blocks of the same and half its width: less noise in a readout, more tiles to load."""
        widths = [width for width in (self.inputs, self.inputs // 2) if width >= NARROWEST]
        return [self, *(DenseTiling(width, width, cut_by=self.cut_by) for width in widths)]


def rows_at_once(request: AttentionRequest) -> int:
    """Query rows of which `SCORES` scores of one key head's group are kept."""
    group_size, len_q, len_k = request.heads_q // max(request.heads_kv, 1), request.len_q, request.len_k
    if group_size * len_q * len_k <= SCORES:
        return max(len_q, 1)
    return min(len_q, max(SCORES // max(group_size * len_k, 1), 1))


def heads_at_once(request: AttentionRequest) -> tuple[int, int]:
    """(batch entries, key heads) that are worked on together, by `SCORES` as well."""
    scores = max(request.heads_q // max(request.heads_kv, 1) * request.len_q * request.len_k, 1)
    heads = request.heads_kv if scores * request.heads_kv <= SCORES else max(SCORES // scores, 1)
    whole = scores * request.heads_kv
    batch = request.batch if whole * request.batch <= SCORES else max(SCORES // whole, 1)
    return batch, heads


def _from_first_key(
    request: AttentionRequest, rows: int, width: int
) -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
    """Row ranges, each with tiles that start at the first key that some of its rows sees."""
    len_q, len_k = request.len_q, request.len_k
    for q_start in range(0, len_q, rows):
        q_stop = min(q_start + rows, len_q)
        first, _ = visible_keys(request, q_start, len_q, len_k)
        _, last = visible_keys(request, q_stop - 1, len_q, len_k)
        yield q_start, q_stop, tuple((k, min(k + width, last)) for k in range(first, last, width))
