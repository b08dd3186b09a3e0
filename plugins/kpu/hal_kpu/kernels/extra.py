"""Matrix products on the array beside attention: `matmul` and `linear`, with their values and what they cost.

Sums are kept in float32 in the processing elements and rounded to the operands' type when they are drained.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from hal_simulation import MeteredKernel, ProductSize, linear_size, matmul_size
from torch import Tensor

from hal_core.plugin_api import ContractError, Device, Estimate

from ..cost import product_cost
from ..profiles.profile import Profile
from ..simulator.products import values

#: What the array multiplies.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ProductKernel(MeteredKernel):
    """A product on the array. Inside `hal_core.meter` each call adds its modelled time and energy to the record."""

    def __init__(self, device: Device, profile: Profile) -> None:
        super().__init__(device)
        self.profile = profile

    def cost(self, *operands: Any, **options: Any) -> tuple[Estimate, int]:
        """Modelled from the profile: the product's time in the tile-level simulator, and its result's bytes."""
        size = self.size(*operands, **options)
        found = product_cost(self.profile, size.batch, size.rows, size.outputs, size.length, size.dtype)
        return found.estimate(memory=size.results * operands[0].element_size()), size.macs

    @abstractmethod
    def size(self, *operands: Any, **options: Any) -> ProductSize:
        """The size of a call. Raises ContractError where the shapes do not fit."""


class Matmul(ProductKernel):
    """matmul(a [..., M, K], b [..., K, N]) -> [..., M, N]; leading dimensions broadcast."""

    def run(self, a: Tensor, b: Tensor) -> Tensor:
        matmul_size(a, b)
        _check_dtypes(a=a, b=b)
        return values.matmul(a, b)

    def size(self, a: Tensor, b: Tensor) -> ProductSize:
        return matmul_size(a, b)


class Linear(ProductKernel):
    """linear(x [..., K], weight [N, K], bias [N] or None) -> [..., N]. The bias is added before sums are rounded."""

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        linear_size(x, weight, bias)
        _check_dtypes(x=x, weight=weight)
        return values.linear(x, weight, bias)

    def size(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> ProductSize:
        return linear_size(x, weight, bias)


KERNELS: dict[str, type[ProductKernel]] = {"matmul": Matmul, "linear": Linear}


def _check_dtypes(**operands: Tensor) -> None:
    found = {name: tensor.dtype for name, tensor in operands.items()}
    if len(set(found.values())) > 1 or next(iter(found.values())) not in DTYPES:
        given = " and ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in found.items())
        raise ContractError(f"{given} were given: pass the same of float32, bfloat16 or float16")
