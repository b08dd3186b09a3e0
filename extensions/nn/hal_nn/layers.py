"""Layers beside attention, under the names that users of kernel_pytorch know."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hal_core import ContractError

from .arguments import need_tensor, need_whole
from .attention_modules import PhotonicFlashAttention

LEVELS = ("conservative", "balanced", "aggressive")


class AttentionLayer(PhotonicFlashAttention):
    """Multi-head attention on [batch, length, d_model]; see `PhotonicFlashAttention` for the call and its masks.

    Raises:
        ContractError: d_model that num_heads does not divide.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float = 0.1, bias: bool = True, **more: Any) -> None:
        super().__init__(d_model, num_heads, dropout, bias, **more)
        self.d_model = d_model


class OptimizedLinear(nn.Linear):
    """nn.Linear, with torch's product in a form that suits the processor.

    Args:
        in_features, out_features, bias: as nn.Linear's; so is the state dict.
        optimization_level: "conservative" is nn.Linear. "balanced" multiplies all rows of an input of many dimensions
            as one matrix. "aggressive" also computes float32 inputs in bfloat16 where no gradient is asked for, with a
            relative error of up to 2^-8 of each factor.

    Raises:
        ContractError: another level, sizes that are no whole numbers; by a call, an input of another width or dtype.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, optimization_level: str = "balanced", **more: Any
    ) -> None:
        if optimization_level not in LEVELS:
            raise ContractError(f"optimization_level {optimization_level!r} was given: use one of {', '.join(LEVELS)}")
        need_whole("in_features", in_features)
        need_whole("out_features", out_features)
        super().__init__(in_features, out_features, bias, **more)
        self.optimization_level = optimization_level

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in the input's dtype."""
        if self.optimization_level == "conservative":
            return super().forward(input)
        need_tensor("input", input, f"[..., {self.in_features}]")
        if not input.dim() or input.shape[-1] != self.in_features or not input.is_floating_point():
            raise ContractError(
                f"input {list(input.shape)} {input.dtype} was given: pass floats [..., {self.in_features}]"
            )
        rows = input.reshape(-1, self.in_features)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        narrow = self.optimization_level == "aggressive" and input.dtype == torch.float32
        if narrow and not (torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)):
            rows, weight = rows.bfloat16(), weight.bfloat16()
            bias = None if bias is None else bias.bfloat16()
        return F.linear(rows, weight, bias).to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, optimization_level={self.optimization_level!r}"


class FusedGELU(nn.Module):
    """x * Phi(x) by torch's one operator, whose backward keeps the input alone.

    Args:
        approximate: "none", the exact form, or "tanh" (Hendrycks & Gimpel 2016, section 2).

    Raises:
        ContractError: another form.
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ContractError(f"approximate {approximate!r} was given: use 'none' or 'tanh'")
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """The same shape and dtype as x.

        Raises:
            ContractError: x is no tensor of floats.
        """
        need_tensor("x", x, "of floats")
        if not x.is_floating_point():
            raise ContractError(f"x is {x.dtype}: cast it to a floating-point dtype")
        return F.gelu(x, approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"
