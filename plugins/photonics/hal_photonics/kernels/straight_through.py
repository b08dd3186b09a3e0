"""The straight-through estimator: the chip's values with the gradients of exact attention.

Source: Bengio, Léonard & Courville 2013, "Estimating or propagating gradients through stochastic neurons".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionOutput


def with_gradients_of(found: AttentionOutput, exact: AttentionOutput) -> AttentionOutput:
    """The values of `found`, differentiated as `exact` is."""
    lse = None if found.lse is None else valued(found.lse, exact.lse)
    return AttentionOutput(valued(found.out, exact.out), lse)


class _Valued(torch.autograd.Function):
    """The first operand's value with the second one's gradient. (Adding a difference would give NaN for -inf.)"""

    @staticmethod
    def forward(ctx: Any, values: Tensor, differentiable: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0]


def valued(values: Tensor, differentiable: Tensor | None) -> Tensor:
    """The values of the first tensor with the gradient of the second."""
    result: Tensor = _Valued.apply(values, differentiable)  # type: ignore[no-untyped-call]
    return result
