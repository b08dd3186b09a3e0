"""Query heads that share a key head as rows of one product, so that each key is read once for all of them."""

from __future__ import annotations

from torch import Tensor


def pack_heads(query: Tensor, heads_kv: int) -> Tensor:
    """[batch, heads_q, len_q, dim] as [batch, heads_kv, group * len_q, dim]; a view where len_q is 1."""
    batch, heads_q, len_q, dim = query.shape
    return query.reshape(batch, heads_kv, heads_q // heads_kv * len_q, dim)


def pack_mask(mask: Tensor, heads_kv: int, group: int, len_q: int) -> Tensor:
    """A four-dimensional mask for packed rows. Copied only where it differs between heads or rows; those are few."""
    if mask.shape[1] == 1 and mask.shape[2] == 1:
        return mask
    batch, heads, _, len_k = mask.shape
    grouped = mask.unsqueeze(2) if heads == 1 else mask.unflatten(1, (heads_kv, group))
    return grouped.expand(batch, grouped.shape[1], group, len_q, len_k).flatten(2, 3)


def unpack_heads(packed: Tensor, heads_q: int, len_q: int) -> Tensor:
    """The inverse of `pack_heads`, also for a log-sum-exp without the last dimension."""
    return packed.reshape(packed.shape[0], heads_q, len_q, *packed.shape[3:])
