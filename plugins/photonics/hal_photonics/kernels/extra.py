"""The matrix products beside attention: `matmul` and `linear` on the optics."""

from __future__ import annotations

from typing import Any

import torch
from hal_simulation import MeteredKernel, ProductSize, linear_size, matmul_size
from torch import Tensor

from hal_core.plugin_api import DTYPE_BYTES, Estimate

from ..cost import product_cost
from ..runtime.controller import ChipController
from ..simulator.core import check_options, drawn

Rng = tuple[int, int] | None


class Product(MeteredKernel):
    """A product on an open chip, refused while the chip does not serve.

    Options of a call:
        rng: (seed, offset) of the readout noise; None draws a pair from torch's default generator.
        passes: of the optics, averaged; their time and energy are those of so many products.
        gain: in front of the readouts; None for the profile's.
    """

    def __init__(self, chip: ChipController) -> None:
        super().__init__(chip.device)
        self._chip = chip

    def _product_cost(
        self, size: ProductSize, resident: bool, passes: int = 1, gain: float | None = None, **others: Any
    ) -> tuple[Estimate, int]:
        check_options(passes, gain)
        duty, state = self._chip.condition
        cost = product_cost(self._chip.profile, size, resident=resident, passes=passes, duty=duty, state=state)
        return cost.estimate(memory=size.results * DTYPE_BYTES.get(size.dtype, 4)), cost.macs


class Matmul(Product):
    """matmul(a [..., M, K], b [..., K, N], *, rng=None, passes=1, gain=None) -> [..., M, N]; b is held as weights."""

    def run(self, a: Tensor, b: Tensor, *, rng: Rng = None, passes: int = 1, gain: float | None = None) -> Tensor:
        self._chip.require_service()
        with torch.no_grad():
            return self._chip.core.multiply(a, b, rng=drawn(rng), passes=passes, gain=gain)

    def cost(self, a: Tensor, b: Tensor, **options: Any) -> tuple[Estimate, int]:
        return self._product_cost(matmul_size(a, b), resident=False, **options)


class Linear(Product):
    """linear(x [..., K], weight [N, K], bias [N] or None, *, rng=None, passes=1, gain=None) -> [..., N].

    The bias is added digitally.
    """

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        rng: Rng = None,
        passes: int = 1,
        gain: float | None = None,
    ) -> Tensor:
        self._chip.require_service()
        with torch.no_grad():
            return self._chip.core.linear(x, weight, bias, rng=drawn(rng), passes=passes, gain=gain)

    def cost(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> tuple[Estimate, int]:
        return self._product_cost(linear_size(x, weight, bias), resident=True, **options)


KERNELS: dict[str, type[Product]] = {"matmul": Matmul, "linear": Linear}
