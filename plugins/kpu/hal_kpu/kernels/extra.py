"""Matrix products on the array beside attention: `matmul` and `linear`, with their values and what they cost.

Sums are kept in float32 in the processing elements and rounded to the operands' type when they are drained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import ContractError, Device, Estimate, meter_var

from ..cost import product_cost
from ..profiles.profile import Profile

#: What the array multiplies.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Kernel(ABC):
    """A kernel of an open device. Inside `hal_core.meter` each call adds its modelled time and energy to the record."""

    def __init__(self, device: Device, profile: Profile) -> None:
        self.device, self.profile = device, profile

    def estimate(self, *operands: Any) -> Estimate:
        """What a call with these operands costs."""
        batch, rows, outputs, length, dtype = self._size(*operands)
        return product_cost(self.profile, batch, rows, outputs, length, dtype).estimate(
            memory=batch * rows * outputs * operands[0].element_size()
        )

    def _metered(self, start: float, *operands: Any) -> None:
        meter = meter_var.get()
        if meter is None:
            return
        batch, rows, outputs, length, _ = self._size(*operands)
        estimate = self.estimate(*operands)
        wall = perf_counter() - start
        meter.add(self.device, wall, estimate.time, estimate.energy, batch * rows * outputs * length, 0)

    @abstractmethod
    def _size(self, *operands: Any) -> tuple[int, int, int, int, str]:
        """(batch, rows, outputs, length, dtype): `batch` products [rows, length] @ [length, outputs]."""

    @abstractmethod
    def __call__(self, *operands: Any) -> Tensor: ...


class Matmul(Kernel):
    """matmul(a [..., M, K], b [..., K, N]) -> [..., M, N]; leading dimensions broadcast."""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        start = perf_counter()
        if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
            raise ContractError(f"a {list(a.shape)} and b {list(b.shape)} were given: pass [..., M, K] and [..., K, N]")
        _check_dtypes(a=a, b=b)
        with torch.no_grad():
            result = torch.matmul(a.float(), b.float()).to(a.dtype)
        self._metered(start, a, b)
        return result

    def _size(self, a: Tensor, b: Tensor) -> tuple[int, int, int, int, str]:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]).numel()
        return batch, a.shape[-2], b.shape[-1], a.shape[-1], _name(a)


class Linear(Kernel):
    """linear(x [..., K], weight [N, K], bias [N] or None) -> [..., N]; the bias joins the sums before they are
    rounded.
    """

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        start = perf_counter()
        if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
            raise ContractError(
                f"x {list(x.shape)} and weight {list(weight.shape)} were given: pass [..., K] and [N, K]"
            )
        _check_dtypes(x=x, weight=weight)
        with torch.no_grad():
            added = None if bias is None else bias.float()
            result = torch.nn.functional.linear(x.float(), weight.float(), added).to(x.dtype)
        self._metered(start, x, weight)
        return result

    def _size(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[int, int, int, int, str]:
        return 1, x.numel() // max(x.shape[-1], 1), weight.shape[0], x.shape[-1], _name(x)


KERNELS: dict[str, type[Kernel]] = {"matmul": Matmul, "linear": Linear}


def _check_dtypes(**operands: Tensor) -> None:
    found = {name: tensor.dtype for name, tensor in operands.items()}
    if len(set(found.values())) > 1 or next(iter(found.values())) not in DTYPES:
        given = " and ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in found.items())
        raise ContractError(f"{given} were given: pass the same of float32, bfloat16 or float16")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
