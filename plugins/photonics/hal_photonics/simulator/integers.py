"""Exact products of converter codes, in float32 where it holds every sum, in eight-bit integers where it is faster."""

from __future__ import annotations

import torch
from torch import Tensor

from .converters import Converters

#: float32 holds every whole number up to here, so sums of codes below it are exact in any order.
_EXACT = 1 << 24
#: Multiply-accumulates from which eight-bit products gain more than splitting the codes costs.
_WORTHWHILE = 1 << 22
#: Bits of the lower part of a split input code.
_SPLIT = 4


def integer_product(x: Tensor, w: Tensor, converters: Converters) -> Tensor:
    """x @ w^T of codes, exact: in float32 where every partial sum is a whole number that float32 holds."""
    largest = x.shape[-1] * converters.input_levels * converters.weight_levels
    if largest < _EXACT:
        return torch.matmul(x, w.transpose(-1, -2))
    return torch.matmul(x.double(), w.double().transpose(-1, -2)).float()


class HeldWeights:
    """Weight codes held for exact products with blocks of input codes.

    Args:
        codes: [batch, N, K], whole numbers up to the weight's levels, float32. rows: input rows that will be
            multiplied.

    For large products an input code is split into 16 high + low, each of which fits eight bits, as the weight codes do;
    the two products are sums of int32.
    """

    def __init__(self, codes: Tensor, rows: int, converters: Converters) -> None:
        self._codes, self._converters, self._bytes = codes, converters, None
        if codes.shape[0] == 1 and rows * codes.numel() >= _WORTHWHILE and _eight_bits(codes, converters):
            self._bytes = codes[0].to(torch.int8).contiguous().t()

    def product(self, x: Tensor) -> Tensor:
        """x @ codes^T, exact: x [batch, rows, K], up to the input's levels; float32."""
        if self._bytes is None:
            return integer_product(x, self._codes, self._converters)
        whole = x[0].to(torch.int16)
        high = torch._int_mm((whole >> _SPLIT).to(torch.int8), self._bytes)
        low = torch._int_mm((whole & (1 << _SPLIT) - 1).to(torch.int8), self._bytes)
        return low.add_(high, alpha=1 << _SPLIT).float().unsqueeze(0)


def _eight_bits(codes: Tensor, converters: Converters) -> bool:
    """Whether the codes fit eight bits, and the processor multiplies those fast."""
    fits = converters.weight_levels < 128 and converters.input_levels < 128 << _SPLIT
    fast = hasattr(torch, "_int_mm") and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return fits and fast and codes.device.type == "cpu"
