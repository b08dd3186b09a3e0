"""Torch's cuDNN operators with the log-sum-exp handed out and in, beside own kernels that serve other lengths.

A session binds one path for all lengths of a bucket; here single calls go to cuDNN where it is estimated to be faster
at their own lengths. They launch what `F.scaled_dot_product_attention` launches on the same tensors.

Source: PyTorch 2.11, tools/autograd/derivatives.yaml, _scaled_dot_product_cudnn_attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, Causal, Grads

_MOST_LENGTHS = 1024


class CudnnForward:
    """Attention with its log-sum-exp under gradients.

    Args:
        request: without a mask, with as many key heads as query heads. own: serves the other calls.
        faster: (len_q, len_k) -> whether cuDNN is to serve these lengths.
    """

    def __init__(
        self, request: AttentionRequest, own: Callable[..., AttentionOutput], faster: Callable[[int, int], bool]
    ) -> None:
        self._own, self._faster = own, faster
        self._causal, self._scale = request.causal is not Causal.NONE, request.scale
        self._known: dict[tuple[int, int], bool] = {}
        self._attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> AttentionOutput:
        lengths = query.shape[2], key.shape[2]
        chosen = self._known.get(lengths)
        if chosen is None:
            if len(self._known) >= _MOST_LENGTHS:
                self._known.clear()
            chosen = self._known[lengths] = self._faster(*lengths)
        if not chosen or not _aligned(query, key, value):
            return self._own(query, key, value, *rest)
        out, lse = self._attend(query, key, value, None, True, 0.0, self._causal, False, scale=self._scale)[:2]
        return AttentionOutput(out, lse.view(out.shape[:3]))


class CudnnBackward:
    """Gradients from a forward's result, whichever kernel made it. own: serves calls with a gradient of the
    log-sum-exp."""

    def __init__(self, request: AttentionRequest, own: Callable[..., Grads]) -> None:
        self._own, self._causal, self._scale = own, request.causal is not Causal.NONE, request.scale
        self._random: tuple[Tensor, Tensor] | None = None
        self._differentiate = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        *rest: Any,
        grad_lse: Tensor | None = None,
        rng: tuple[int, int] | None = None,
    ) -> Grads:
        """out, grad_out: [batch, heads, len_q, dim_v]; lse, grad_lse: float32 [batch, heads, len_q], natural."""
        given = (query, key, value, out, lse, grad_out)
        if grad_lse is not None or not _aligned(query, key, value, out, grad_out):
            return self._own(*given, *rest, grad_lse=grad_lse, rng=rng)
        if self._random is None:  # the operator wants a seed and an offset, and reads them under dropout alone
            seed, offset = (torch.empty((), dtype=torch.int64, device=query.device) for _ in range(2))
            self._random = seed, offset
        lengths = query.shape[2], key.shape[2]
        of_rows = lse.contiguous().unsqueeze(-1)
        found = self._differentiate(
            grad_out,
            query,
            key,
            value,
            out,
            of_rows,
            *self._random,
            None,
            None,
            None,
            *lengths,
            0.0,
            self._causal,
            scale=self._scale,
        )
        return Grads(found[0], found[1], found[2], None)


def _aligned(*tensors: Tensor) -> bool:
    """Whether the operators read the tensors as they lie: by 16 bytes."""
    return not any(tensor.data_ptr() & 15 for tensor in tensors)


__all__ = ["CudnnBackward", "CudnnForward"]
