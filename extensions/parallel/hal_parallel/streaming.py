"""A long sequence on one device: blocks of keys stream through it, put together by the ring's own sums."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .description import Description, Given
from .dropout import Dropout
from .inner import choose
from .ring import RingAttention, RingPlan
from .strategies import most_pairs

#: Bytes that blocks may take beside inputs and results, where the call does not say.
MEMORY = 128 << 20
_SMALLEST = 64


def one_device(given: Given, d: Description, rng: tuple[int, int], memory: int | None) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp) of a whole sequence. Keys and values may lie in host memory while the query is elsewhere: they
    come block by block.
    """
    rows, keys = block_sizes(d, MEMORY if memory is None else memory, given.key.device != given.query.device)
    bound_rows, bound_keys = most_pairs(d.dropout, d.request)
    most = min(rows, bound_rows or rows), min(keys, bound_keys or keys)
    dropout = Dropout(d.dropout, rng) if d.dropout else None
    request = replace(d.request, len_q=min(most[0], d.request.len_q), len_k=min(most[1], d.request.len_k))
    plan = RingPlan(None, choose(request, d.policy), d.queries.pieces, d.keys.pieces, 0, d.rule, most, dropout)
    out, lse = RingAttention.apply(plan, *given)  # type: ignore[no-untyped-call]
    return out, lse


def block_sizes(d: Description, memory: int, moved: bool) -> tuple[int, int]:
    """(query rows, keys) of a block: the largest, halving from the whole, that takes at most half of `memory` bytes.
    The other half is for what the process has freed and not given back to the system.
    """
    r = d.request
    rows, keys = max(r.len_q, 1), max(r.len_k, 1)
    size = {"float64": 8, "float32": 4}.get(r.dtype, 2)
    while max(rows, keys) > _SMALLEST:
        request = replace(r, len_q=rows, len_k=keys)
        estimate = choose(request, d.policy).decision.winner.estimate
        needed = 0 if estimate is None else estimate.memory
        # Rows of output, its gradient and its products that are cut out; keys and values that are brought.
        needed += r.batch * r.heads_q * rows * r.dim_v * size * (4 if r.grads else 1)
        needed += r.batch * r.heads_kv * keys * (r.dim_qk + r.dim_v) * size * (2 if moved else 0)
        if 2 * needed <= memory:
            break
        rows, keys = (rows // 2, keys) if rows >= keys else (rows, keys // 2)
    return rows, keys
