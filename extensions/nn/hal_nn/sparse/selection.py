"""From priorities of blocks to a block plan: how many key blocks each query block reads, and which."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core import AttentionRequest, BlockPlan, ContractError

from ..arguments import is_number, need_whole
from .accelerated import device_kernel

MOST_SPARSITY = 0.95
#: Most key blocks of a row that the kernel of a device chooses from.
MOST_COLUMNS = 1 << 13


class SparseTiling(abc.ABC):
    """What the sparse tilings have in common; a subclass gives `plan`.

    Args:
        sparsity: share of the block pairs, of those that causal and window leave, that is not computed: 0 to 0.95.
            Every query block reads at least one key block, so that short sequences are denser.
        block_q, block_k: tokens in a block.

    Attributes:
        max_blocks: the most key blocks of a query block that strategies which read content declare beforehand.

    Raises:
        ContractError: a sparsity or a block size that cannot be.
    """

    needs_content = False

    def __init__(self, sparsity: float, block_q: int, block_k: int) -> None:
        if not is_number(sparsity) or not 0 <= sparsity <= MOST_SPARSITY:
            raise ContractError(f"sparsity {sparsity!r} was given: use a number from 0 to {MOST_SPARSITY}")
        for name, size in (("block_q", block_q), ("block_k", block_k)):
            need_whole(name, size)
        self.sparsity, self.block_q, self.block_k = float(sparsity), block_q, block_k
        self.name = ""

    def compute_optimal_tile_size(
        self, sequence_length: int, available_memory: int, backend_constraints: Mapping[str, int]
    ) -> int:
        """The pattern's own block of queries: a device does not change it."""
        return self.block_q

    def split_into_tiles(self, tensor: Tensor, tile_size: int) -> list[Tensor]:
        """Views of [batch, heads, length, dim] along its length; the last one may be shorter."""
        return list(tensor.split(tile_size, dim=2))

    @abc.abstractmethod
    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> BlockPlan:
        """The plan of a call; `query` and `key` are given to a tiling that reads content."""

    def shape(self, request: AttentionRequest) -> tuple[int, int]:
        """(query blocks, key blocks)."""
        return -(-request.len_q // self.block_q), -(-request.len_k // self.block_k)


def block_range(request: AttentionRequest, block_q: int, block_k: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """The key blocks [first, stop) that causal and window leave to each query block; first >= stop for none.

    Returns:
        (first, stop): int64 [query blocks].
    """
    first, stop = _range(
        request.len_q, request.len_k, request.band(request.len_q, request.len_k), block_q, block_k, device
    )
    return first, stop


def _range(
    len_q: int, len_k: int, band: tuple[int | None, int | None], block_q: int, block_k: int, device: Any = None
) -> tuple[Tensor, Tensor]:
    low, high = band
    start = torch.arange(0, max(len_q, 0), block_q, device=device)
    last = (start + block_q).clamp(max=len_q) - 1
    first = torch.zeros_like(start) if low is None else (start + low).clamp(min=0) // block_k
    end = torch.full_like(start, len_k)
    if high is not None:
        end = torch.minimum(end, last + high + 1).clamp(min=0)
    return first, (end + block_k - 1) // block_k


def row_budgets(counts: Tensor, sparsity: float) -> Tensor:
    """How many of its visible key blocks each query block reads.

    All rows get the same number, so far as they have as many, and the longest rows one more, until the share
    1 - sparsity of all visible blocks is reached. Every row with a visible block gets one.

    Args:
        counts: int64 [query blocks], visible key blocks of each.
    """
    total = int(counts.sum())
    keep = total if sparsity == 0 else round((1 - sparsity) * total)
    low, high = 1, max(int(counts.max()), 1) if len(counts) else 1
    while low < high:  # the largest number that all can have
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(counts.clamp(max=middle).sum()) <= keep else (low, middle - 1)
    budgets = counts.clamp(max=low)
    more = keep - int(budgets.sum())
    if more > 0:
        longer = (counts > low).nonzero().flatten()[-more:]
        budgets[longer] += 1
    return budgets


class Cut(NamedTuple):
    """What a sparsity leaves of a shape, whatever the pattern; kept, so never written to.

    Attributes:
        first, stop: int64 [query blocks], of `block_range`. budgets: int64 [query blocks], of `row_budgets`.
        hidden: bool [query blocks, key blocks], blocks that no row of the query block sees.
        forced: bool, likewise: the last visible block of each row, and its first where that is an eighth of the budget
            or less: attention gathers at the first tokens (Xiao et al. 2024), which pooling may hide.
        visible: how many block pairs are visible. most: the largest budget. total: the budgets' sum.
        blind: whether a query block sees no key block.
    """

    first: Tensor
    stop: Tensor
    budgets: Tensor
    hidden: Tensor
    forced: Tensor
    visible: int
    most: int
    total: int
    blind: bool


def cut_of(request: AttentionRequest, block_q: int, block_k: int, sparsity: float, device: Any) -> Cut:
    """The cut of a request's lengths, causal and window, on a torch device."""
    band = request.band(request.len_q, request.len_k)
    return _cut(request.len_q, request.len_k, band, block_q, block_k, sparsity, device)


@lru_cache(32)
@torch.inference_mode(False)  # what is kept serves calls with gradients too
def _cut(
    len_q: int,
    len_k: int,
    band: tuple[int | None, int | None],
    block_q: int,
    block_k: int,
    sparsity: float,
    device: Any,
) -> Cut:
    first, stop = _range(len_q, len_k, band, block_q, block_k)
    counts = (stop - first).clamp(min=0)
    budgets = row_budgets(counts, sparsity)
    column = torch.arange(-(-len_k // block_k))
    hidden = (column < first.unsqueeze(1)) | (column >= stop.unsqueeze(1))
    ends = (column == stop.unsqueeze(1) - 1) | ((column == first.unsqueeze(1)) & (budgets >= 8).unsqueeze(1))
    return Cut(
        first.to(device),
        stop.to(device),
        budgets.to(device),
        hidden.to(device),
        (ends & ~hidden).to(device),
        int(counts.sum()),
        int(budgets.max()) if len(budgets) else 0,
        int(budgets.sum()),
        bool((counts == 0).any()),
    )


def select(priority: Tensor, cut: Cut, block_q: int, block_k: int, counts: Tensor | None = None) -> BlockPlan:
    """The plan of the blocks with the highest priority among those that are visible.

    Args:
        priority: float [batch or 1, heads or 1, query blocks, key blocks]; written over.
        cut: of the same shape. counts: int64, `priority`'s shape without the last dimension: blocks to take, at most
            the budget; None: the budget.
    """
    most = max(min(cut.most, priority.shape[-1]), 1)
    # In descending order, so that the first entries of a row are its best whatever its count is.
    chosen = priority.masked_fill_(cut.hidden, -math.inf).topk(most, dim=-1).indices
    counts = cut.budgets.expand(priority.shape[:-1]) if counts is None else counts
    return BlockPlan(block_q, block_k, chosen.int(), counts.int().contiguous())


def allocate(share: Tensor, cut: Cut, block_q: int, block_k: int, p: float | None = None) -> BlockPlan:
    """The plan of the blocks with the largest share, over all heads and rows of a batch entry together.

    Each entry reads as many blocks as the budgets of its rows and heads add up to: rows and heads whose attention is
    spread get more of them than those whose attention is near. Of the blocks that equal the least share that is read, a
    row reads the part that the budget leaves of all, rounded down: the budget is never exceeded, and at most one block
    a row of it is not used, none where shares differ.

    On an accelerator nothing waits for the device: lists are as long as a row has key blocks, and where the device has
    the kernel "triton_choose_blocks" nothing is sorted.

    Args:
        share: float [batch, heads, query blocks, key blocks]; written over.
        p: each row stops at the blocks that hold this share of its total, if that is fewer.
    """
    total, columns = cut.total * share.shape[1], share.shape[-1]
    simple = p is None and columns <= MOST_COLUMNS and share.dtype == torch.float32
    choose = device_kernel("triton_choose_blocks", share) if simple else None
    if choose is not None:
        return BlockPlan(block_q, block_k, *choose(share, cut.hidden, cut.forced, total))
    ranked = share.nan_to_num_(0.0).masked_fill_(cut.hidden, -math.inf)
    enough = None if p is None else _enough(ranked, cut, p)
    ranked = ranked.masked_fill(cut.forced, math.inf)
    if not ranked.numel() or not total:
        counts = (ranked > -math.inf).sum(-1)
    else:
        least = ranked.flatten(1).topk(total, dim=1, sorted=False).values.amin(1).view(-1, 1, 1, 1)
        above, equal = (ranked > least).sum(-1), ((ranked == least) & (ranked > -math.inf)).sum(-1)
        left = total - above.flatten(1).sum(1)
        counts = above + equal * left.view(-1, 1, 1) // equal.flatten(1).sum(1).clamp(min=1).view(-1, 1, 1)
    if enough is not None:
        counts = torch.minimum(counts, enough)
    most = columns
    if share.device.type == "cpu":  # elsewhere asking for the longest list would wait
        most = max(int(counts.max()) if counts.numel() else 0, 1)
    return BlockPlan(block_q, block_k, ranked.topk(min(most, columns), dim=-1).indices.int(), counts.int())


def _enough(share: Tensor, cut: Cut, p: float) -> Tensor:
    """Each row's number of blocks that hold the share p of its total: those that it reads anyway, then its best."""
    share = share.clamp(min=0)
    certain = (share * cut.forced).sum(-1, keepdim=True)
    ordered = share.masked_fill(cut.forced, 0).sort(-1, descending=True).values
    enough = p * (certain + ordered.sum(-1, keepdim=True))
    before = certain + ordered.cumsum(-1) - ordered  # what a row has before it takes a further block
    counts: Tensor = cut.forced.sum(-1) + ((before < enough) & (ordered > 0)).sum(-1)
    return counts


def plan_density(plan: BlockPlan, request: AttentionRequest) -> float:
    """Share of the visible block pairs that a plan reads; of all its batch entries and heads on average."""
    visible = cut_of(request, plan.block_q, plan.block_k, 0.0, "cpu").visible
    return float(plan.counts.float().mean() * plan.counts.shape[-1]) / max(visible, 1)
