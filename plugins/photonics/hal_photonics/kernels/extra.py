"""The matrix products beside attention: `matmul` and `linear` on the optics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from hal_simulation import MeteredKernel, ProductSize, linear_size, matmul_size
from torch import Tensor

from hal_core.plugin_api import DTYPE_BYTES, Estimate

from ..cost import product_cost
from ..simulator.core import check_finite, drawn, generator

if TYPE_CHECKING:
    from ..session import PhotonicSession


def matmul_reference(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] in float64."""
    return a.double() @ b.double()


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K]^T + bias [N] in float64."""
    return torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


def sample_matmul(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Operands of `matmul`."""
    return torch.randn(70, 150, generator=generator), torch.randn(150, 40, generator=generator)


def sample_linear(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Operands of `linear`."""
    x, weight = torch.randn(3, 17, 150, generator=generator), torch.randn(40, 150, generator=generator)
    return x, weight, torch.randn(40, generator=generator)


class Product(MeteredKernel):
    """A product on an open chip, refused while the chip does not serve.

    Options of a call:
        rng: (seed, offset) of the readout noise; None draws a pair from torch's default generator.
    """

    def __init__(self, session: PhotonicSession) -> None:
        super().__init__(session.device)
        self._session = session

    def _product_cost(self, size: ProductSize, resident: bool) -> tuple[Estimate, int]:
        session = self._session
        state = "" if session.state == "ready" else str(session.state)
        cost = product_cost(session.profile, size, resident=resident, duty=session.supervisor.duty, state=state)
        return cost.estimate(memory=size.results * DTYPE_BYTES.get(size.dtype, 4)), cost.macs


class Matmul(Product):
    """matmul(a [..., M, K], b [..., K, N], *, rng=None) -> [..., M, N]; b is held as weights."""

    def run(self, *operands: Any, **options: Any) -> Tensor:
        self._session.require_service()
        a, b = operands
        return self._session.core.multiply(a, b, rng=drawn(options.get("rng")))

    def cost(self, *operands: Any, **options: Any) -> tuple[Estimate, int]:
        return self._product_cost(matmul_size(*operands), resident=False)


class Linear(Product):
    """linear(x [..., K], weight [N, K], bias [N] or None, *, rng=None) -> [..., N]; the bias is added digitally."""

    def run(self, *operands: Any, **options: Any) -> Tensor:
        self._session.require_service()
        linear_size(*operands)
        x, weight, bias = (*operands, None)[:3]
        check_finite(x=x, weight=weight)
        rows = x.reshape(1, -1, x.shape[-1]).float()
        with torch.no_grad():
            noise = generator(drawn(options.get("rng")))
            flat = self._session.core.product(rows, weight.float().unsqueeze(0), noise)
        result = flat.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)
        return result if bias is None else result + bias.to(result.dtype)

    def cost(self, *operands: Any, **options: Any) -> tuple[Estimate, int]:
        return self._product_cost(linear_size(*operands), resident=True)


KERNELS: dict[str, type[Product]] = {"matmul": Matmul, "linear": Linear}
