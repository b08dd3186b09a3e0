"""What attention weights are: rows of 0 or more that sum to 1."""

from __future__ import annotations

import torch
from torch import Tensor

from hal_core import ContractError


def check_stochastic(pattern: Tensor) -> None:
    """Raise ContractError where a pattern [..., n, n] has entries below 0 or rows that do not sum to 1."""
    if pattern.dim() < 2 or pattern.shape[-1] != pattern.shape[-2] or not pattern.is_floating_point():
        raise ContractError(
            f"a pattern {list(pattern.shape)} of {pattern.dtype} was given: use row-stochastic floats [..., n, n]"
        )
    off = (pattern.double().sum(-1) - 1).abs()
    allowed = 64 * torch.finfo(pattern.dtype).eps * pattern.shape[-1] ** 0.5
    if pattern.numel() and not (bool((pattern >= 0).all()) and bool(off.max() <= allowed)):
        raise ContractError(
            f"a pattern was given whose rows are off by up to {float(off.max()):.3g} or have entries below 0: pass "
            "attention weights, rows of 0 or more that sum to 1 (softmax(scores, -1))"
        )
