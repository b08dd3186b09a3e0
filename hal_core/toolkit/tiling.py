"""The tiling of a device that has no better idea: equal square blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..errors import refuse
from ..plans import TilePlan
from ..request import DTYPE_BYTES, AttentionRequest, Tensor


class DenseTiling:
    """Equal blocks over all visible pairs.

    Args:
        block_q, block_k: block sizes; None: the largest power of two whose operands fit the memory that is available.
    """

    needs_content = False

    def __init__(self, block_q: int | None = None, block_k: int | None = None, *, cut_by: str = "") -> None:
        wrong = [size for size in (block_q, block_k) if size is not None and (type(size) is not int or size < 1)]
        refuse((bool(wrong), f"blocks of {wrong} were given: use whole numbers of 1 or more"))
        self.block_q, self.block_k, self.cut_by = block_q, block_k or block_q, cut_by
        self.name = "dense" if block_q is None else f"dense({block_q}x{self.block_k})"

    def compute_optimal_tile_size(
        self, sequence_length: int, available_memory: int, backend_constraints: Mapping[str, int]
    ) -> int:
        """Largest power-of-two tile whose operands fit.

        Args:
            sequence_length: tokens.
            available_memory: bytes for one tile's query, key, value, scores and output.
            backend_constraints: "head_dim", "dtype_bytes", "minimum", "maximum"; each optional.

        Returns:
            A tile size between minimum (default 16) and maximum (default 1024), not above the next power of two
            of the sequence length.

        Raises:
            ContractError: not even the minimum fits.
        """
        head_dim, size = backend_constraints.get("head_dim", 64), backend_constraints.get("dtype_bytes", 4)
        minimum, maximum = backend_constraints.get("minimum", 16), backend_constraints.get("maximum", 1024)

        def needed(tile: int) -> int:
            return tile * (4 * head_dim * size + 4 * tile)

        refuse(
            (
                needed(minimum) > available_memory,
                f"a tile of {minimum} tokens at head_dim {head_dim} needs {needed(minimum):,} bytes and "
                f"{available_memory:,} are available: allow a smaller minimum or more memory",
            )
        )
        tile, top = minimum, min(maximum, max(minimum, 1 << max(sequence_length - 1, 0).bit_length()))
        while tile * 2 <= top and needed(tile * 2) <= available_memory:
            tile *= 2
        return tile

    def split_into_tiles(self, tensor: Tensor, tile_size: int) -> list[Tensor]:
        """Views of [batch, heads, length, dim] along its length; the last one may be shorter."""
        refuse((tile_size < 1, f"tile_size {tile_size} was given: use 1 or more"))
        return list(tensor.split(tile_size, dim=2))

    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> TilePlan:
        """Equal blocks over the request's lengths (the tensors' where given), without what causal and window hide.

        `limits` are bounds: "available_memory" (bytes, default 1 MiB), "minimum" and "maximum" block sizes.
        """
        request = replace(
            request,
            len_q=request.len_q if query is None else query.shape[2],
            len_k=request.len_k if key is None else key.shape[2],
        )
        block_q, block_k = self.block_q, self.block_k
        if block_q is None or block_k is None:
            sizes = {"head_dim": max(request.dim_qk, request.dim_v), "dtype_bytes": DTYPE_BYTES.get(request.dtype, 4)}
            block_q = block_k = self.compute_optimal_tile_size(
                max(request.len_q, request.len_k), limits.get("available_memory", 1 << 20), sizes | dict(limits)
            )
        return TilePlan.equal(request, block_q, block_k, cut_by=self.cut_by)

    def choices(self, request: AttentionRequest, limits: Mapping[str, int]) -> Sequence[DenseTiling]:
        """Cuts worth trying: this one, half and twice its block sizes within the limits."""
        plan = self.plan(request, limits)
        low, high = limits.get("minimum", 1), limits.get("maximum", max(request.len_q, request.len_k, 1))
        sizes = [(plan.block_q, plan.block_k)]
        sizes += [(q, k) for q in (plan.block_q // 2, plan.block_q * 2) for k in (plan.block_k // 2, plan.block_k * 2)]
        return [DenseTiling(q, k, cut_by=self.cut_by) for q, k in sizes if low <= min(q, k) and max(q, k) <= high]
