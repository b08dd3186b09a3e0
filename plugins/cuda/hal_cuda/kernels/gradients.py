"""Gradients by this package's own kernels: of a given forward's result, or as one differentiable call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput, AttentionRequest, BlockPlan, Grads, SequenceMetadata, TilePlan

from ..paths import hopper_assists
from ..runtime.context import Context
from .hopper_backward.launch import HopperBackward
from .portable import short_launch
from .portable.backward_launch import PortableBackward


class OwnBackward:
    """Gradients of a request from its forward's result.

    Args:
        path: "hopper", whose kernel hands on the tensors that the copy engine cannot read, or "portable". Masks,
            block plans and dropout go to the Hopper kernel too, where they suit it.
    """

    def __init__(self, path: str, request: AttentionRequest, context: Context) -> None:
        hopper = path == "hopper" or hopper_assists(request, context.chip)
        self._hopper = HopperBackward(request, context) if hopper else None
        alone = hopper and "mask" in request.grads
        of_mask = replace(request, grads=frozenset({"mask"}))
        self._of_mask = PortableBackward(of_mask, context) if alone else None
        short = path == "portable" and short_launch.takes(request) and request.grads >= {"q", "k", "v"}
        self._short = short_launch.ShortBackward(request, context) if short else None
        self._portable = PortableBackward(request, context)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        mask: Tensor | None = None,
        plan: BlockPlan | TilePlan | None = None,
        tables: SequenceMetadata | None = None,
        *,
        grad_lse: Tensor | None = None,
        rng: tuple[int, int] | None = None,
    ) -> Grads:
        """out, grad_out: [batch, heads, len_q, dim_v]; lse, grad_lse: float32 [batch, heads, len_q], natural."""
        given = (query, key, value, out, lse, grad_out)
        wide_mask = mask if mask is None or mask.dim() == 4 else mask[(None,) * (4 - mask.dim())]
        if self._short is not None and query.numel() and key.numel():
            grads = self._short(*given, wide_mask, grad_lse, rng)
            if grads is not None:
                return grads._replace(mask=None if grads.mask is None else grads.mask.view_as(mask))
        if self._hopper is not None:
            grads = self._hopper(*given, grad_lse, wide_mask, plan if isinstance(plan, BlockPlan) else None, rng)
            if grads is not None:
                if self._of_mask is None:
                    return grads
                return grads._replace(mask=self._of_mask(*given, mask, plan, tables, grad_lse=grad_lse, rng=rng).mask)
        return self._portable(*given, mask, plan, tables, grad_lse=grad_lse, rng=rng)


def differentiable(
    request: AttentionRequest, context: Context, forward: Callable[..., AttentionOutput]
) -> Callable[..., AttentionOutput]:
    """A call (query, key, value, ...) whose output, without a log-sum-exp, autograd differentiates by own kernels.

    For requests that torch's attention serves, where single calls have lengths that it does not take.

    Args:
        request: plain tensors, no mask, no dropout.
        forward: attention of these requests with its log-sum-exp.
    """
    backward = PortableBackward(replace(request, lse=True), context)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor
            out, lse = forward(query, key, value)
            ctx.save_for_backward(query, key, value, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            query, key, value, out, lse = ctx.saved_tensors
            return backward(query, key, value, out, lse, grads[0])[:3]

    def run(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> AttentionOutput:
        return AttentionOutput(Attention.apply(query, key, value))  # type: ignore[no-untyped-call]

    return run
