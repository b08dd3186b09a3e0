"""How tensors of PyTorch's attention operators lie in memory, and how theirs become those of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: The order in which dimensions [batch, heads, rows, dim] lie in memory where heads lie behind rows.
HEADS_LAST = (0, 2, 1, 3)
#: What `unused_state` makes its results like.
_states: dict[Any, tuple[Tensor, ...]] = {}


def broadcast(mask: Tensor | None, *, keep: bool) -> Tensor | None:
    """A mask of four dimensions, without those that it was expanded along unless its gradient has them."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask
    if keep:
        return mask
    for place in (0, 1):
        if mask.shape[place] > 1 and mask.stride(place) == 0:
            mask = mask.narrow(place, 0, 1)
    return mask


def unused_state(query: Tensor) -> tuple[Tensor, ...]:
    """Random state, unused and debug mask of FlashAttention's operators, which nothing reads without dropout."""
    like = _states.get((query.device, query.dtype))
    if like is None:
        state = torch.empty(2, dtype=torch.uint64, device=query.device)
        unused = torch.empty((), dtype=torch.uint64, device=query.device)
        like = _states[query.device, query.dtype] = state, unused, query.new_empty(0)
    return tuple(map(torch.empty_like, like))


def laid_like(result: Tensor, operand: Tensor) -> Tensor:
    """A result in memory as `torch.empty_like(operand)` would lie, but for its last size: itself, or a copy."""
    if result.stride() == operand.stride() and result.shape == operand.shape:
        return result
    if result.shape == operand.shape:
        strides = torch.empty_like(operand, device="meta").stride()
        return result if _same(result, strides) else result.new_empty_strided(result.shape, strides).copy_(result)
    return laid_by(result, sorted(range(operand.dim()), key=lambda place: operand.stride(place), reverse=True))


def laid_by(result: Tensor, order: Sequence[int]) -> Tensor:
    """A dense result whose dimensions lie in memory in this order, the last one innermost: itself, or a copy."""
    strides, step = [0] * result.dim(), 1
    for place in reversed(order):
        strides[place], step = step, step * result.shape[place]
    return result if _same(result, strides) else result.new_empty_strided(result.shape, strides).copy_(result)


def _same(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether these are the tensor's strides; a dimension of one element may have any."""
    return all(n == 1 or a == b for n, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True))


def whole_columns(grad: Tensor) -> Tensor:
    """A bias's gradient whose rows lie whole 16 elements apart, as the efficient kernels leave it."""
    columns = grad.shape[-1]
    whole = grad.new_empty((*grad.shape[:-1], columns + -columns % 16))[..., :columns]
    return grad if _same(grad, whole.stride()) else whole.copy_(grad)


def of_hidden_rows(lse: Tensor, bias: Tensor | None) -> Tensor:
    """The log-sum-exp with +inf for rows that a bias hides whole, as PyTorch's kernels keep it: their backward, and the
    own one, then give such a row weights of 0."""
    return lse if bias is None else lse.nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=torch.inf)


def heads_first(packed: Tensor) -> Tensor:
    """[tokens, heads, dim] as [1, heads, tokens, dim]."""
    return packed.transpose(0, 1)[None]
