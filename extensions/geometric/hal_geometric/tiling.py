"""`AdaptiveTiling`: which blocks of keys a call reads, from what its queries and keys hold, with a certificate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, BlockPlan, ContractError, MaskKind

from . import certificate, parts
from .certificate import BlockStatistics

Mode = Literal["certified", "exact", "estimate", "precision"]
MODES = ("certified", "exact", "estimate", "precision")
#: (query, key) with the scale in query -> priority of each block, [B, H, query blocks, key blocks].
Scorer = Callable[[Tensor, Tensor], Tensor]
#: Rows times key blocks that are bounded at once, over all heads.
_AT_ONCE = 1 << 23
#: A plan from bounds of whole blocks of queries that reads a larger share gives way to bounds of each row.
_COARSE_UP_TO = 0.5


class AdaptiveTiling:
    """Skip the blocks of keys that hold at most a share tau of each row's attention.

    Dropping the mass m of a row moves its output by at most 2 m max |v - mean v|. Blocks are taken for the rows of a
    block of queries together: those of the highest bound, until for every row
    upper(dropped) <= tau (upper(dropped) + lower(kept)).

    Args:
        tau: the share that may be lost, above 0, below 1.
        mode: "certified": by the bounds of `certificate`, no row loses more than tau. "exact": by the scores
            themselves, which cost half of dense attention: for plans that are used again. "estimate": by the second
            cumulant, without a guarantee: whole rows can be lost, so only `adaptive_attention` takes it, which
            measures the loss. "precision": the same estimate; `adaptive_attention` computes the blocks of small mass
            in 16 bits instead of dropping them.
        block: tokens in a block of queries and of keys; raised to the next size that `device` takes.
        share: of "precision": the share of the blocks in full precision; None: what tau gives.
        device: whose block sizes count; None: those of no device.
        scorer: another order in which blocks are taken, say antidiagonal sums; the certificate stays.

    Raises:
        ContractError: a parameter that cannot be; in `plan`, a mask or a softcap, which the bounds do not know.
    """

    needs_content = True

    def __init__(
        self,
        tau: float = 0.01,
        *,
        mode: Mode = "certified",
        block: int = 64,
        share: float | None = None,
        device: str | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        if not 0 < tau < 1:
            raise ContractError(f"tau {tau} was given: use a share between 0 and 1")
        if mode not in MODES:
            raise ContractError(f"mode {mode!r} was given: use {', '.join(MODES)}")
        if share is not None and not (mode == "precision" and 0 < share <= 1):
            raise ContractError(f"share {share} in mode {mode!r} was given: use a share up to 1, in 'precision'")
        sizes = hal.capabilities(device).block_sizes if device is not None else hal.Range(1)
        fitting = sizes.next_up(block) if block > 0 else None
        if fitting is None:
            raise ContractError(f"block {block} was given: {device or 'a device'} takes {sizes}")
        self.tau, self.mode, self.share, self.scorer = float(tau), mode, share, scorer
        self.block_q = self.block_k = fitting
        by = "" if scorer is None else f",{getattr(scorer, '__qualname__', scorer)}"
        self.name = f"adaptive({self.tau:g},{mode},{fitting},{share}{by})"

    @property
    def max_blocks(self) -> int:
        """Declared beforehand without the lengths."""
        return 1 << 14

    def compute_optimal_tile_size(
        self, sequence_length: int, available_memory: int, backend_constraints: Mapping[str, int]
    ) -> int:
        """The tiling's own block: the plan was made for it."""
        return self.block_q

    def split_into_tiles(self, tensor: Tensor, tile_size: int) -> list[Tensor]:
        """Views of [batch, heads, length, dim] along its length; the last one may be shorter."""
        return list(tensor.split(tile_size, dim=2))

    def plan(
        self,
        request: AttentionRequest,
        limits: Mapping[str, int],
        *,
        query: Tensor | None = None,
        key: Tensor | None = None,
    ) -> BlockPlan:
        """The plan for a call's queries [B, H, len_q, d] and keys [B, Hk, len_k, d], on their device."""
        if query is None or key is None:
            raise ContractError(f"tiling {self.name} plans from query and key: they were not given")
        if self.mode in ("estimate", "precision"):
            raise ContractError(
                f"tiling {self.name} gives no plan that may be dropped unseen: call hal_geometric.adaptive_attention, "
                "which measures the loss or merges both precisions"
            )
        return self.choose(request, query, key)

    def choose(self, request: AttentionRequest, query: Tensor, key: Tensor) -> BlockPlan:
        """`plan` in every mode: the blocks that hold all but tau by the mode's bounds, scores or estimate."""
        if request.mask is not MaskKind.NONE or request.softcap is not None or request.dropout:
            raise ContractError(
                f"a mask, softcap or dropout was given to tiling {self.name}, whose bounds do not know it: use causal "
                "and window, or leave tiling= out"
            )
        with torch.no_grad():
            return Planner(self, request, query, key).plan()


class Planner:
    """The plan of one call."""

    def __init__(self, tiling: AdaptiveTiling, request: AttentionRequest, query: Tensor, key: Tensor) -> None:
        self.tiling, self.block = tiling, tiling.block_q
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.both: Tensor | None = None
        if query.shape == key.shape and query.dtype != wide:  # one copy for both, so that both are split at once
            self.both = query.new_empty((2, *query.shape), dtype=wide)
            self.query, self.key = self.both[0].copy_(query).mul_(request.effective_scale), self.both[1].copy_(key)
        else:
            self.query, self.key = query.to(wide) * request.effective_scale, key.to(wide)
        self.group = query.shape[1] // key.shape[1]
        self.blocks_q, self.blocks_k = (-(-t.shape[2] // self.block) for t in (query, key))
        self.band = request.band(query.shape[2], key.shape[2])
        self.banded = self.band != (None, None)  # otherwise every pair is visible, and nothing asks which are
        hidden, partial = self._visible()
        self.hidden, self.partial = hidden, partial
        self.statistics: BlockStatistics | None = None
        self.priority = None if tiling.scorer is None else tiling.scorer(self.query, self.key)

    def _visible(self) -> tuple[Tensor, Tensor]:
        """Blocks of which no pair, and of which not every pair is visible: bool [query blocks, key blocks]."""
        device, block, (low, high) = self.query.device, self.block, self.band
        a = torch.arange(self.blocks_q, device=device).unsqueeze(1) * block
        c = torch.arange(self.blocks_k, device=device) * block
        b = (a + block).clamp(max=self.query.shape[2]) - 1
        e = (c + block).clamp(max=self.key.shape[2]) - 1
        hidden = torch.zeros(self.blocks_q, self.blocks_k, dtype=torch.bool, device=device)
        partial = hidden.clone()
        if high is not None:
            hidden |= c > b + high
            partial |= e > a + high
        if low is not None:
            hidden |= e < a + low
            partial |= c < b + low
        return hidden, partial & ~hidden

    def plan(self) -> BlockPlan:
        """The blocks to read, by bounds of whole blocks of queries where these suffice, else row by row."""
        if self.tiling.mode == "certified":
            visible = int((~self.hidden).sum()) if self.banded else self.hidden.numel()
            found = plan_of_coarse(self.block, visible, *self.coarse())
            if found is not None:
                return found[0]
        if self.tiling.mode != "exact":
            self.statistics = certificate.block_statistics(self.key, self.block).repeated(self.group)
        batch, heads = self.query.shape[:2]
        at_once = max(_AT_ONCE // (batch * heads * self.block * self.blocks_k), 1)
        orders, kept = [], []
        share = self.tiling.share
        masses = []
        for first in range(0, self.blocks_q, at_once):
            last = min(first + at_once, self.blocks_q)
            lower, upper = self._bounds(first, last)
            if share is not None:
                total = torch.where(lower.isfinite(), lower, -torch.inf).logsumexp(-1, keepdim=True)
                masses.append(_by_block((upper - total).exp().nan_to_num_(0.0), self.block).amax(-2))
                continue
            order, count = self._choose(lower, upper, first, last, self.block)
            orders.append(order)
            kept.append(count)
        if share is not None:
            return self._largest(torch.cat(masses, 2), share)
        order, count = torch.cat(orders, 2), torch.cat(kept, 2)
        return _plan(self.block, order, count, int(count.max()) if count.numel() else 1)

    def coarse(self) -> tuple[Tensor, Tensor, Tensor]:
        """(key blocks, those to keep first; how many are kept; sum and largest of these) by bounds of whole blocks of
        queries. Nothing waits for the device.
        """
        order, count = self._choose(*self._coarse_bounds(), 0, self.blocks_q, parts.PARTS)
        return order, count, torch.stack((count.sum(), count.amax())) if count.numel() else count.new_zeros(2)

    def _coarse_bounds(self) -> tuple[Tensor, Tensor]:
        """`_bounds` of all rows, in `parts.PARTS` rows for each block of queries."""
        if self.both is not None:
            together = parts.split(self.both, self.block)
            queries, keys = (parts.Parts(*(t[n] for t in together)) for n in range(2))
        else:
            queries, keys = (parts.split(t, self.block) for t in (self.query, self.key))
        if self.group > 1:
            keys = parts.Parts(*(t.repeat_interleave(self.group, 1) for t in keys))
        lower, upper = parts.bounds(queries, keys)
        if self.banded:
            mask = (self.hidden | self.partial).repeat_interleave(parts.PARTS, 0)
            lower, upper = (t.masked_fill_(mask, -torch.inf) for t in (lower, upper))
        return lower, upper

    def _bounds(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """log of lower and upper bounds of each block's mass, [B, H, rows, key blocks], rows of these query blocks.

        A block that is visible in part has no lower bound, and no upper one where it is not known: it is kept.
        """
        rows = slice(first * self.block, min(last * self.block, self.query.shape[2]))
        query, mode = self.query[:, :, rows], self.tiling.mode
        if mode == "exact":
            key = self.key.repeat_interleave(self.group, 1) if self.group > 1 else self.key
            lower = certificate.block_masses(query, key, self.block, self._hidden_pairs(rows))
            return lower, lower
        assert self.statistics is not None
        if mode == "certified":
            lower = certificate.jensen(query, self.statistics)
            upper = certificate.bennett(query, self.statistics).add_(lower)
        else:
            lower = upper = certificate.second_cumulant(query, self.statistics)
        if self.banded:
            mask = (self.hidden | self.partial)[first:last].repeat_interleave(self.block, 0)[: query.shape[2]]
            lower = lower.masked_fill(mask, -torch.inf)
            upper = upper.masked_fill(mask, -torch.inf)
        return lower, upper

    def _hidden_pairs(self, rows: slice) -> Tensor | None:
        low, high = self.band
        if low is None and high is None:
            return None
        i = torch.arange(rows.start, rows.stop, device=self.query.device).unsqueeze(1)
        j = torch.arange(self.key.shape[2], device=self.query.device)
        hidden = torch.zeros(len(i), len(j), dtype=torch.bool, device=self.query.device)
        hidden |= j > i + high if high is not None else hidden
        hidden |= j < i + low if low is not None else hidden
        return hidden

    def _choose(self, lower: Tensor, upper: Tensor, first: int, last: int, rows: int) -> tuple[Tensor, Tensor]:
        """(key blocks, those to keep first; how many are kept) of query blocks, with this many rows of bounds each."""
        peak = lower.amax(-1, keepdim=True).clamp_min_(torch.finfo(lower.dtype).min / 2)
        above = _by_block((upper - peak).exp_(), rows)
        below = above if lower is upper else _by_block((lower - peak).exp_(), rows)
        total = below.sum(-1, keepdim=True)
        if self.priority is None:
            rank = (above / total.clamp_min(torch.finfo(total.dtype).tiny)).amax(-2)
        else:
            rank = self.priority[:, :, first:last].to(above.dtype)
        hidden, partial = self.hidden[first:last], self.partial[first:last]
        forced = partial if self.banded and self.tiling.mode != "exact" else None
        if forced is not None:
            rank = rank.masked_fill(forced, torch.inf)
        if self.banded:
            rank = rank.masked_fill(hidden, -torch.inf)
        order = rank.sort(-1).indices  # the smallest first
        index = order.unsqueeze(-2).expand_as(above)
        dropped = above.gather(-1, index).cumsum(-1)
        left = dropped if below is above else below.gather(-1, index).cumsum(-1)
        tau = self.tiling.tau
        fine = (dropped * (1 - tau) <= tau * (total - left).clamp_min_(0)).all(-2)
        if forced is not None:
            fine &= ~forced.expand_as(order).gather(-1, order)
        many = fine.long().cumprod(-1).sum(-1)
        if not self.banded:  # a row that sees a block keeps one
            return order.flip(-1), self.blocks_k - many.clamp(max=self.blocks_k - 1)
        seen = (~hidden).sum(-1)
        many = torch.minimum(many, (self.blocks_k - seen.clamp(min=0) + (seen - 1).clamp_min(0)))
        count = self.blocks_k - many
        count = torch.where(seen == 0, torch.zeros_like(count), torch.minimum(count, seen.expand_as(count)))
        return order.flip(-1), count

    def _largest(self, mass: Tensor, share: float) -> BlockPlan:
        """The blocks of the largest mass, a share of all visible ones, over heads and rows of a batch entry."""
        mass = mass.masked_fill(self.partial, torch.inf).masked_fill(self.hidden, -torch.inf)
        flat = mass.flatten(1)
        wanted = max(round(share * int((~self.hidden).sum()) * mass.shape[1]), 1)
        least = flat.topk(wanted, 1).values[:, -1].view(-1, 1, 1, 1)
        count = ((mass >= least) & ~self.hidden).sum(-1)
        order = mass.sort(-1, descending=True).indices
        return BlockPlan(self.block, self.block, order[..., : max(int(count.max()), 1)].int().contiguous(), count.int())


def plan_of_coarse(
    block: int, visible: int, order: Tensor, count: Tensor, sums: Tensor
) -> tuple[BlockPlan, float] | None:
    """The plan of `Planner.coarse` and the share of the visible blocks that it reads; None above a half of them:
    then each row is to be bounded by itself.
    """
    read, most = sums.tolist()  # the one reading of values that a device has computed
    density = read / max(visible * (count.numel() // max(count.shape[-1], 1)), 1)
    return None if density > _COARSE_UP_TO else (_plan(block, order, count, most), density)


def _plan(block: int, order: Tensor, count: Tensor, most: int) -> BlockPlan:
    """most: the largest count."""
    return BlockPlan(block, block, order[..., : max(most, 1)].int().contiguous(), count.int())


def _by_block(bounds: Tensor, rows: int) -> Tensor:
    """Bounds [B, H, all rows, key blocks] as [B, H, query blocks, rows, key blocks]; zeros after the last."""
    padded = torch.nn.functional.pad(bounds, (0, 0, 0, -bounds.shape[2] % rows))
    cut: Tensor = padded.unflatten(2, (-1, rows))
    return cut
