"""Cutting attention into tiles, sparse block plans, and merging partial results. Nothing here computes attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ContractError
from .request import DTYPE_BYTES, AttentionRequest

if TYPE_CHECKING:
    from torch import Tensor


class Tile(NamedTuple):
    """Rows q_start to q_stop against keys k_start to k_stop (stop excluded).

    `full` says that causal and window leave every pair visible, so no mask needs to be built.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    full: bool


class TilePlan(NamedTuple):
    """Tiles in the order to run them: by rows, then keys. Every visible pair lies in exactly one tile."""

    tiles: tuple[Tile, ...]
    block_q: int
    block_k: int


class BlockPlan(NamedTuple):
    """Block-sparse attention: which key blocks each query block reads.

    Attributes:
        block_q, block_k: tokens in a block.
        indices: int32 [batch or 1, heads or 1, query blocks, max_blocks], key-block numbers; entries past the count are
            ignored. counts: int32 [batch or 1, heads or 1, query blocks].
    """

    block_q: int
    block_k: int
    indices: Any
    counts: Any


def visible_keys(request: AttentionRequest, row: int, len_q: int, len_k: int) -> tuple[int, int]:
    """The keys [start, stop) that causal and window leave to query row `row`; start >= stop means none."""
    low, high = request.band(len_q, len_k)
    stop = len_k if high is None else min(row + high + 1, len_k)
    return 0 if low is None else max(row + low, 0), max(stop, 0)


class DenseTiling:
    """Square tiles over all visible pairs; what a device uses that has no better idea."""

    needs_content = False

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

        if needed(minimum) > available_memory:
            given = f"a tile of {minimum} tokens at head_dim {head_dim} needs {needed(minimum):,} bytes"
            raise ContractError(
                f"{given} and {available_memory:,} are available: allow a smaller minimum or more memory"
            )
        tile, top = minimum, min(maximum, max(minimum, 1 << max(sequence_length - 1, 0).bit_length()))
        while tile * 2 <= top and needed(tile * 2) <= available_memory:
            tile *= 2
        return tile

    def split_into_tiles(self, tensor: Tensor, tile_size: int) -> list[Tensor]:
        """Views of [batch, heads, length, dim] along its length; the last one may be shorter."""
        if tile_size < 1:
            raise ContractError(f"tile_size {tile_size} was given: use 1 or more")
        return list(tensor.split(tile_size, dim=2))

    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> TilePlan:
        """Tiles for the request's lengths (the tensors' where given), skipping those that causal and window hide.

        `limits` may hold "available_memory" (bytes, default 1 MiB), "block_q" and "block_k".
        """
        len_q = request.len_q if query is None else query.shape[2]
        len_k = request.len_k if key is None else key.shape[2]
        constraints = {"head_dim": max(request.dim_qk, request.dim_v), "dtype_bytes": DTYPE_BYTES.get(request.dtype, 4)}
        space, longest = limits.get("available_memory", 1 << 20), max(len_q, len_k)
        tile = limits.get("tile_size") or self.compute_optimal_tile_size(longest, space, constraints)
        block_q, block_k = limits.get("block_q", tile), limits.get("block_k", tile)
        tiles = []
        for q_start in range(0, len_q, block_q):
            q_stop = min(q_start + block_q, len_q)
            first, last = (visible_keys(request, row, len_q, len_k) for row in (q_start, q_stop - 1))
            for k_start in range(first[0] // block_k * block_k, last[1], block_k):
                k_stop = min(k_start + block_k, len_k)
                tiles.append(Tile(q_start, q_stop, k_start, k_stop, full=last[0] <= k_start and k_stop <= first[1]))
        return TilePlan(tuple(tiles), block_q, block_k)


def merge_partials(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over disjoint key ranges into attention over their union.

    Args:
        out: partial results, [parts, batch, heads, len_q, dim_v], any float dtype.
        lse: natural log-sum-exp of the scaled scores, [parts, batch, heads, len_q], float32 or float64.
            -inf marks a part in which a row has no key.

    Returns:
        (out, lse) without the parts axis. A row with no key in any part gives 0 and -inf.

    Raises:
        ContractError: shapes disagree, or lse is neither float32 nor float64.

    Source: Milakov & Gimelshein 2018 (online softmax), equation 3; Rabe & Staats 2021, section 3.
    """
    import torch

    if out.shape[:-1] != lse.shape or lse.dtype not in (torch.float32, torch.float64):
        given = f"out {tuple(out.shape)} and lse {tuple(lse.shape)} {lse.dtype} were given"
        raise ContractError(f"{given}: lse wants out's shape without the last dimension, in float32 or float64")
    dead = lse == -math.inf  # its out may hold anything, NaN included, and must not leak, nor may its gradient
    none = dead.all(dim=0)
    total = torch.logsumexp(lse.masked_fill(none, 0), dim=0)  # of finite rows: the gradient of log(0) is NaN
    parts = out.to(lse.dtype).masked_fill(dead.unsqueeze(-1), 0) * torch.exp(lse - total).unsqueeze(-1)
    return parts.sum(dim=0).to(out.dtype), total.masked_fill(none, -math.inf)


def slice_mask(mask: Tensor, tile: Tile) -> Tensor:
    """The part of a mask that a tile needs; dimensions of size 1 broadcast and stay."""
    if mask.shape[-2] != 1:
        mask = mask[..., tile.q_start : tile.q_stop, :]
    return mask if mask.shape[-1] == 1 else mask[..., tile.k_start : tile.k_stop]


def expand_block_plan(plan: BlockPlan, len_q: int, len_k: int) -> Tensor:
    """The boolean mask [batch or 1, heads or 1, len_q, len_k] that a block plan stands for."""
    import torch

    blocks_k = -(-len_k // plan.block_k)
    listed = torch.arange(plan.indices.shape[-1], device=plan.indices.device) < plan.counts.unsqueeze(-1)
    # Entries past the count go to one block beyond the last, which is cut off again.
    columns = torch.where(listed, plan.indices, blocks_k).long()
    blocks = torch.zeros((*plan.indices.shape[:-1], blocks_k + 1), dtype=torch.bool, device=plan.indices.device)
    blocks.scatter_(-1, columns, True)
    dense = blocks[..., :blocks_k].repeat_interleave(plan.block_q, dim=-2).repeat_interleave(plan.block_k, dim=-1)
    return dense[..., :len_q, :len_k]


def dense_mask(request: AttentionRequest, len_q: int, len_k: int, *, device: Any = None) -> Tensor | None:
    """The boolean mask [len_q, len_k] of causal and window together; None where everything is visible."""
    low, high = request.band(len_q, len_k)
    if low is None and high is None:
        return None
    import torch

    distance = torch.arange(len_k, device=device) - torch.arange(len_q, device=device).unsqueeze(1)
    visible = torch.ones_like(distance, dtype=torch.bool) if high is None else distance <= high
    return visible if low is None else visible & (distance >= low)
