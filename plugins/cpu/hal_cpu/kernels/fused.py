"""Torch's fused CPU kernel with its log-sum-exp: no mask, causal at any offset, and the backward pass from (out, lse).

The kernel is called below scaled_dot_product_attention, so its limits are minded here: a zero length kills the process,
a strided last dimension gives NaN, value size and key size must agree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from hal_core.plugin_api import AttentionOutput, Grads, merge_partials

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, upper: int | None) -> AttentionOutput:
    """Attention without a mask.

    Args:
        query: [batch, heads_q, len_q, dim_qk]. key, value: [batch, heads_kv, len_k, dim_qk and dim_v].
        upper: row i reads keys 0 to i + upper; None for all.

    Returns:
        (out, lse). Rows that read no key give 0 and -inf.
    """
    dim_v, len_q, len_k = value.shape[-1], query.shape[2], key.shape[2]
    query, key, value = _equal_dims(query, key, value)
    dead = 0 if upper is None else min(max(-upper, 0), len_q)  # rows before the first that reads a key
    if len_k == 0 or dead == len_q or query.shape[0] == 0:
        return _nothing(query, dim_v)
    if upper is None or upper >= len_k - 1:
        return _cut(_forward(query, key, value, 0.0, False, scale=scale), dim_v)
    if dead:
        alive = _forward(query[:, :, dead:], key, value, 0.0, True, scale=scale)
        empty = _nothing(query[:, :, :dead], value.shape[-1])
        return _cut((torch.cat((empty.out, alive[0]), 2), torch.cat((empty.lse, alive[1]), 2)), dim_v)
    if upper == 0:
        return _cut(_forward(query, key, value, 0.0, True, scale=scale), dim_v)
    # Every row reads the first `upper` keys; the rest is causal from its own top left.
    before = _forward(query, key[:, :, :upper], value[:, :, :upper], 0.0, False, scale=scale)
    after = _forward(query, key[:, :, upper:], value[:, :, upper:], 0.0, True, scale=scale)
    merged = merge_partials(*(torch.stack(pair) for pair in zip(before, after, strict=True)))
    return _cut(merged, dim_v)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scale: float,
    upper: int | None,
) -> Grads:
    """Gradients of query, key and value from a given (out, lse), shapes as in `forward`."""
    dim_qk, dim_v, len_q, len_k = query.shape[-1], value.shape[-1], query.shape[2], key.shape[2]
    dead = 0 if upper is None else min(max(-upper, 0), len_q)
    if len_k == 0 or dead == len_q or query.shape[0] == 0:
        return Grads(torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value))
    query, key, value = _equal_dims(query, key, value)
    out, grad_out = (pad(t, (0, value.shape[-1] - dim_v)) for t in (out, grad_out))
    out, grad_out = (t if t.stride(-1) == 1 else t.contiguous() for t in (out, grad_out))
    alive = slice(dead, None)
    rows = (grad_out[:, :, alive], query[:, :, alive])
    ends = (out[:, :, alive], lse[:, :, alive])

    def part(columns: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = _backward(
            *rows, key[:, :, columns], value[:, :, columns], *ends, 0.0, causal, scale=scale
        )
        return grads

    if upper is None or upper >= len_k - 1:
        grad_q, grad_k, grad_v = part(slice(None), False)
    elif upper <= 0:
        grad_q, grad_k, grad_v = part(slice(None), True)
        grad_q = pad(grad_q, (0, 0, dead, 0)) if dead else grad_q
    else:
        before, after = part(slice(0, upper), False), part(slice(upper, None), True)
        grad_q = before[0] + after[0]
        grad_k, grad_v = (torch.cat((before[i], after[i]), 2) for i in (1, 2))
    return Grads(grad_q[..., :dim_qk], grad_k[..., :dim_qk], grad_v[..., :dim_v])


def _equal_dims(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad with zeros to one head size, and make the last dimension dense: zeros add nothing to either product."""
    more = query.shape[-1] - value.shape[-1]
    if more > 0:
        value = pad(value, (0, more))
    elif more < 0:
        query, key = pad(query, (0, -more)), pad(key, (0, -more))
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    return query, key, value


def _nothing(query: Tensor, dim_v: int) -> AttentionOutput:
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    return AttentionOutput(
        query.new_zeros((*query.shape[:3], dim_v)), query.new_full(query.shape[:3], -math.inf, dtype=exact)
    )


def _cut(result: tuple[Tensor, Tensor], dim_v: int) -> AttentionOutput:
    out, lse = result
    return AttentionOutput(out[..., :dim_v], lse)
