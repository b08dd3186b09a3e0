"""What travels: keys (ring), all keys at once (gathered), heads (Ulysses), or queries."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core import AttentionRequest, ContractError, UnsupportedError, merge_partials
from hal_core.plugin_api import DTYPE_BYTES

from .description import Description, Given
from .draws import NOISE_BLOCK, Draws
from .exchange import Link, gather_tokens, trade
from .inner import Inner, choose
from .layout import REPLICATED, Pieces, TokenLayout, joined_ranks
from .parts import cut
from .ring import RingPlan, attend
from .topology import Topology

#: Bytes that one dense call under dropout may take for its pattern: int32 words, and what mixes them.
_PATTERN = 1 << 26

#: Bytes of keys and values that travel at once at least.
_TOGETHER, _TOGETHER_ON_ACCELERATORS = 1 << 21, 1 << 26


class Run(NamedTuple):
    """What a strategy runs with."""

    description: Description
    topology: Topology
    rng: tuple[int, int]

    def device(self, strategy: str) -> Inner:
        """The device of a rank's dense calls.

        Raises:
            UnsupportedError: no device runs them, or a noisy one does and tokens whose noise is drawn together are
                apart.
        """
        r, sharing = self.description.request, self.topology.heads or self.topology.ring
        parts = sharing.size if strategy in ("ulysses", "ring_ulysses") else 1
        # What queries bring back is merged by its log-sum-exp, through which gradients flow.
        grad_lse = r.grad_lse or (strategy == "pass_query" and bool(r.grads))
        request = replace(r, heads_q=r.heads_q // parts, heads_kv=r.heads_kv // parts, grad_lse=grad_lse)
        inner = choose(request, self.description.policy)
        layouts = (self.description.queries, self.description.keys) if inner.noisy else ()
        if (apart := next((layout for layout in layouts if _cuts(layout, NOISE_BLOCK)), None)) is not None:
            raise UnsupportedError(
                f"noise of {inner.device} is drawn by blocks of {NOISE_BLOCK} tokens, and {apart.name} of "
                f"{apart.length} tokens over {apart.world} ranks cuts them apart: use contiguous or zigzag and a "
                f"length whose runs are multiples of {NOISE_BLOCK}, or a device without noise"
            )
        return inner

    def plan(
        self,
        strategy: str,
        link: Link | None,
        queries: tuple[Pieces, ...],
        keys: tuple[Pieces, ...],
        rank: int = 0,
        first_head: int = 0,
    ) -> RingPlan:
        """The ring's plan."""
        d, inner = self.description, self.device(strategy)
        r, draws = inner.request, Draws(d.dropout, self.rng, first_head) if d.dropout or inner.noisy else None
        batch, heads, most = r.batch, r.heads_kv, most_pairs(d.dropout, r)
        if inner.noisy:  # the same calls wherever the tokens lie
            batch, heads, most = 1, 1, (NOISE_BLOCK, NOISE_BLOCK)
        elif link is not None or strategy == "ring":  # of one rank too: what is under way backward stays small
            heads = heads_together(r, keys)
        return RingPlan(link, inner, queries, keys, rank, d.rule, most, draws, cut(r, batch, heads))


def heads_together(r: AttentionRequest, keys: tuple[Pieces, ...]) -> int:
    """Key heads that travel at once, so that what is under way is small beside what a rank holds: the fewest whose keys
    and values are large enough for the link and the device.
    """
    tokens = max(sum(piece.size for piece in pieces) for pieces in keys)
    head = r.batch * tokens * (r.dim_qk + r.dim_v) * DTYPE_BYTES[r.dtype]
    least = _TOGETHER if r.device == "cpu" else _TOGETHER_ON_ACCELERATORS
    counts = [n for n in range(1, r.heads_kv + 1) if r.heads_kv % n == 0]
    return next((n for n in counts if n * head >= least), r.heads_kv)


def most_pairs(dropout: float, request: AttentionRequest) -> tuple[int, int] | None:
    """Bounds of the rows and keys of a dense call, so that the pattern of dropout stays small."""
    if not dropout:
        return None
    side = max(int((_PATTERN / (16 * max(request.batch * request.heads_q, 1))) ** 0.5), 64)
    return side, side


def ring(given: Given, run: Run) -> tuple[Tensor, Tensor]:
    """Keys travel."""
    link, d = run.topology.ring, run.description
    plan = run.plan("ring", link if link.size > 1 else None, d.queries.pieces, d.keys.pieces, link.rank)
    return attend(plan, given)


def gathered(given: Given, run: Run) -> tuple[Tensor, Tensor]:
    """Every rank holds all keys."""
    link, d = run.topology.ring, run.description
    own = d.queries.pieces[link.rank]
    pieces, order = joined_ranks(d.keys, tuple(range(link.size)), _step(own))
    key, value = (
        _ordered(gather_tokens(tensor, link, 2, name), order)
        for tensor, name in ((given.key, "keys"), (given.value, "values"))
    )
    return attend(run.plan("gathered", None, (own,), (pieces,)), given._replace(key=key, value=value))


def ulysses(given: Given, run: Run) -> tuple[Tensor, Tensor]:
    """Heads travel: each rank computes a part of the heads over the tokens of all ranks that share heads; between
    groups of such ranks keys travel.

    Source: Jacobs et al. 2023 (DeepSpeed Ulysses); over a ring: Fang & Zhao 2024 (USP).
    """
    t, d = run.topology, run.description
    heads, around = (t.ring, None) if t.heads is None else (t.heads, t.ring if t.ring.size > 1 else None)
    groups = 1 if t.heads is None else t.ring.size
    group = 0 if t.heads is None else t.ring.rank

    def arranged(layout: TokenLayout) -> list[tuple[Pieces, Tensor | None]]:
        return [joined_ranks(layout, tuple(range(i * heads.size, (i + 1) * heads.size))) for i in range(groups)]

    of_queries, of_keys = arranged(d.queries), arranged(d.keys)
    rows, columns = of_queries[group][1], of_keys[group][1]
    query = _ordered(trade(given.query, heads, 1, 2, "queries"), rows)
    key, value = (
        _ordered(trade(tensor, heads, 1, 2, name), columns)
        for tensor, name in ((given.key, "keys"), (given.value, "values"))
    )
    mask, first = given.mask, heads.rank * (given.query.shape[1] // heads.size)
    if mask is not None and mask.shape[2] != d.queries.local:  # one row for all
        mask = mask[:, first : first + query.shape[1]] if mask.shape[1] > 1 else mask
    elif mask is not None:
        whole = trade(mask, heads, 1, 2, "mask") if mask.shape[1] > 1 else gather_tokens(mask, heads, 2, "mask")
        mask = _ordered(whole, rows)
    places = (tuple(pieces for pieces, _ in of_queries), tuple(pieces for pieces, _ in of_keys))
    plan = run.plan("ulysses", around, *places, group, first)
    out, lse = attend(plan, Given(query, key, value, mask))
    del query, key, value, mask  # without gradients nothing else holds them while the results travel
    return (
        trade(_unordered(out, rows), heads, 2, 1, "output"),
        trade(_unordered(lse, rows), heads, 2, 1, "log-sum-exp"),
    )


def pass_query(given: Given, run: Run) -> tuple[Tensor, Tensor]:
    """Queries travel: every rank attends with all queries to its own keys, and what it found goes back."""
    link, d = run.topology.ring, run.description
    own = d.keys.pieces[link.rank]
    if d.queries.name == REPLICATED:
        out, lse = attend(run.plan("pass_query", None, (d.queries.pieces[link.rank],), (own,)), given)
        return merge_partials(link.all_gather(out, "partial outputs"), link.all_gather(lse, "partial log-sum-exp"))
    pieces, order = joined_ranks(d.queries, tuple(range(link.size)), _step(own))
    query, mask = _ordered(gather_tokens(given.query, link, 2, "queries"), order), given.mask
    if mask is not None and mask.shape[2] == d.queries.local:
        mask = _ordered(gather_tokens(mask, link, 2, "mask"), order)
    out, lse = attend(run.plan("pass_query", None, (pieces,), (own,)), given._replace(query=query, mask=mask))
    out, lse = _unordered(out, order), _unordered(lse, order)
    parts = trade(out[None], link, 3, 0, "partial outputs"), trade(lse[None], link, 3, 0, "partial log-sum-exp")
    return merge_partials(*parts)


#: By name; "ring_ulysses" is Ulysses on a 2-D mesh.
STRATEGIES: dict[str, Callable[[Given, Run], tuple[Tensor, Tensor]]] = {
    "ring": ring,
    "gathered": gathered,
    "ulysses": ulysses,
    "ring_ulysses": ulysses,
    "pass_query": pass_query,
}


def why_not(strategy: str, description: Description, shape: tuple[int, ...]) -> str:
    """Why a strategy cannot run a call on a mesh of this shape; "" where it can."""
    r = description.request
    if (strategy == "ring_ulysses") != (len(shape) == 2):
        return "it takes a mesh of 2 dimensions" if len(shape) == 1 else "a mesh of 2 dimensions was given"
    if description.queries.name == REPLICATED and strategy != "pass_query":
        return "queries are replicated"
    if strategy in ("ulysses", "ring_ulysses") and (r.heads_q % shape[-1] or r.heads_kv % shape[-1]):
        return f"{r.heads_q} query and {r.heads_kv} key heads cannot be cut into {shape[-1]} parts"
    return ""


def check_strategy(strategy: Any, description: Description, shape: tuple[int, ...]) -> None:
    """Raise ContractError where a strategy is unknown or cannot run a call, naming those that can."""
    if strategy not in STRATEGIES:
        raise ContractError(f"strategy {strategy!r} was given: use auto, {', '.join(STRATEGIES)}")
    if reason := why_not(strategy, description, shape):
        able = [name for name in STRATEGIES if not why_not(name, description, shape)]
        raise ContractError(
            f"strategy {strategy!r} cannot run this call, {reason}: use {', '.join([*able, 'auto'])}"
            if able
            else f"no strategy can run this call ({reason}): use a mesh of one dimension"
        )


def _cuts(layout: TokenLayout, block: int) -> bool:
    """Whether tokens of a block, counted from the sequence's first, lie on several ranks or out of order."""
    ends = [(piece, piece.last + 1) for pieces in layout.pieces for piece in pieces]
    return any(p.step > 1 or p.start % block or (end % block and end != layout.length) for p, end in ends)


def _step(pieces: Pieces) -> int:
    return next((piece.step for piece in pieces if piece.size > 1), 1)


def _ordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor.index_select(2, order.to(tensor.device))


def _unordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor.index_select(2, torch.argsort(order).to(tensor.device))
