"""Values of matrix products as the array computes them: float32 sums, rounded to the operands' type at the end."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, K] @ b [..., K, N] -> [..., M, N] in the operands' dtype."""
    with torch.no_grad():
        return torch.matmul(a.float(), b.float()).to(a.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] @ weight [N, K]^T + bias [N] -> [..., N] in the dtype of x."""
    with torch.no_grad():
        added = None if bias is None else bias.float()
        return torch.nn.functional.linear(x.float(), weight.float(), added).to(x.dtype)
