"""Torch's fused CPU kernel with its log-sum-exp: no mask, causal at any offset, and the backward pass from (out, lse).

The kernel is called below scaled_dot_product_attention, so its limits are minded here: a zero length kills the process,
a strided last dimension gives NaN, value size and key size must agree. It cannot be told where to write its results;
operands that have to be copied lie in the session's memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, Grads, MemoryManager

from ..memory import Workspace
from .native import readable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, upper: int | None, memory: MemoryManager
) -> AttentionOutput:
    """Attention without a mask.

    Args:
        query: [batch, heads_q, len_q, dim_qk]. key, value: [batch, heads_kv, len_k, dim_qk and dim_v].
        upper: row i reads keys 0 to i + upper; None for all.

    Returns:
        (out, lse). Rows that read no key give 0 and -inf.
    """
    with Workspace(memory) as workspace:
        operands = _operands(query, key, value, workspace)
        result = _attend(*operands, scale, upper)
        del operands
    return AttentionOutput(result[0][..., : value.shape[-1]], result[1])


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, upper: int | None) -> tuple[Tensor, Tensor]:
    len_q, len_k = query.shape[2], key.shape[2]
    fully_masked = fully_masked_rows(upper, len_q)
    if len_k == 0 or fully_masked == len_q or query.shape[0] == 0:
        return _empty(query, value.shape[-1])
    if upper is None or upper >= len_k - 1:
        return _forward(query, key, value, 0.0, False, scale=scale)  # type: ignore[no-any-return]
    if fully_masked:
        out, lse = _empty(query, value.shape[-1])
        part = _forward(query[:, :, fully_masked:], key, value, 0.0, True, scale=scale)
        out[:, :, fully_masked:], lse[:, :, fully_masked:] = part
        return out, lse
    if upper == 0:
        return _forward(query, key, value, 0.0, True, scale=scale)  # type: ignore[no-any-return]
    # Every row reads the first `upper` keys; the rest is causal from its own top left. Every row reads a key of both.
    out, lse = _forward(query, key[:, :, :upper], value[:, :, :upper], 0.0, False, scale=scale)
    after, after_lse = _forward(query, key[:, :, upper:], value[:, :, upper:], 0.0, True, scale=scale)
    out.lerp_(after, torch.sigmoid(after_lse - lse).unsqueeze(-1).to(out.dtype))
    torch.logaddexp(lse, after_lse, out=lse)
    return out, lse


def fully_masked_rows(upper: int | None, len_q: int) -> int:
    """How many rows, from the first, read no key."""
    return 0 if upper is None else min(max(-upper, 0), len_q)


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    scale: float,
    upper: int | None,
    memory: MemoryManager,
) -> Grads:
    """Gradients of query, key and value from a given (out, lse), shapes as in `forward`."""
    len_q, len_k = query.shape[2], key.shape[2]
    if len_k == 0 or fully_masked_rows(upper, len_q) == len_q or query.shape[0] == 0:
        return Grads(torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value))
    dim_qk, dim_v = query.shape[-1], value.shape[-1]
    with Workspace(memory) as workspace:
        operands = _operands(query, key, value, workspace)
        results = tuple(_padded(t, operands[2].shape[-1], workspace) for t in (out, grad_out))
        grad_q, grad_k, grad_v = _gradients(operands, results, lse, scale, upper)
        del operands, results
    return Grads(grad_q[..., :dim_qk], grad_k[..., :dim_qk], grad_v[..., :dim_v])


def _gradients(
    operands: tuple[Tensor, Tensor, Tensor], results: tuple[Tensor, ...], lse: Tensor, scale: float, upper: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = operands
    out, grad_out = results
    len_k, fully_masked = key.shape[2], fully_masked_rows(upper, query.shape[2])

    def part(columns: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows = slice(fully_masked, None)
        found: tuple[Tensor, Tensor, Tensor] = _backward(
            grad_out[:, :, rows],
            query[:, :, rows],
            key[:, :, columns],
            value[:, :, columns],
            out[:, :, rows],
            lse[:, :, rows],
            0.0,
            causal,
            scale=scale,
        )
        return found

    if upper is None or upper >= len_k - 1:
        return part(slice(None), False)
    if upper <= 0:
        grad_q, grad_k, grad_v = part(slice(None), True)
        if fully_masked:
            found, grad_q = grad_q, torch.zeros_like(query)
            grad_q[:, :, fully_masked:] = found
        return grad_q, grad_k, grad_v
    grad_q, *before = part(slice(0, upper), False)
    more, *after = part(slice(upper, None), True)
    grad_k, grad_v = (torch.empty_like(t) for t in (key, value))
    for grad, first, second in zip((grad_k, grad_v), before, after, strict=True):
        grad[:, :, :upper], grad[:, :, upper:] = first, second
    return grad_q.add_(more), grad_k, grad_v


def _operands(query: Tensor, key: Tensor, value: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """The operands with one head size, padded with zeros, which add nothing to either product, and with dense rows."""
    dim = max(query.shape[-1], value.shape[-1])
    query = query if query.shape[-1] == dim and readable(query) else _padded(query, dim, workspace, copy=True)
    return query, _padded(key, dim, workspace), _padded(value, dim, workspace)


def _padded(tensor: Tensor, dim: int, workspace: Workspace, *, copy: bool = False) -> Tensor:
    size = tensor.shape[-1]
    if size == dim and tensor.stride(-1) == 1 and not copy:
        return tensor
    room = workspace.take((*tensor.shape[:-1], dim), tensor.dtype)
    room[..., :size].copy_(tensor)
    room[..., size:].zero_()
    return room


def _empty(query: Tensor, dim_v: int) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_zeros((*query.shape[:3], dim_v)), query.new_full(query.shape[:3], -math.inf, dtype=exact)
