"""Matrix products on the optics beside attention: `matmul` and `linear`, with what they mean in float64 and what they
cost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hal_core.plugin_api import ContractError, Estimate, meter_var

from .core import check_finite, drawn, generator
from .cost import Cost, product_cost

if TYPE_CHECKING:
    from .session import PhotonicSession


def matmul_reference(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] in float64."""
    return a.double() @ b.double()


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K]^T + bias [N] in float64."""
    return torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


def sample_matmul(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(70, 150, generator=generator), torch.randn(150, 40, generator=generator)


def sample_linear(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = torch.randn(3, 17, 150, generator=generator), torch.randn(40, 150, generator=generator)
    return x, weight, torch.randn(40, generator=generator)


class Kernel(ABC):
    """A kernel of an open chip. Inside `hal_core.meter` each call adds its modelled time and energy to the device's
    record.
    """

    def __init__(self, session: PhotonicSession) -> None:
        self._session = session

    def estimate(self, *operands: Any) -> Estimate:
        """What a call with these operands costs."""
        result, cost = self._cost(*operands)
        return cost.estimate(memory=result)

    @abstractmethod
    def _cost(self, *operands: Any) -> tuple[int, Cost]:
        """(bytes of the result, cost) of a call."""

    @abstractmethod
    def __call__(self, *operands: Any, **options: Any) -> Tensor: ...

    def _product_cost(
        self, batch: int, rows: int, outputs: int, length: int, dtype: torch.dtype, resident: bool
    ) -> Cost:
        session = self._session
        return product_cost(
            session.profile,
            batch,
            rows,
            outputs,
            length,
            dtype=str(dtype).removeprefix("torch."),
            resident=resident,
            duty=session.supervisor.duty,
            state="" if session.state == "ready" else str(session.state),
        )

    def _metered(self, start: float, *operands: Any) -> None:
        meter = meter_var.get()
        if meter is None:
            return
        cost = self._cost(*operands)[1]
        estimate = cost.estimate()
        meter.add(self._session.device, perf_counter() - start, estimate.time, estimate.energy, cost.macs, 0)


class Matmul(Kernel):
    """matmul(a [..., M, K], b [..., K, N], *, rng=None) -> [..., M, N]; b is held as weights."""

    def __call__(self, a: Tensor, b: Tensor, *, rng: tuple[int, int] | None = None) -> Tensor:
        start = perf_counter()
        self._session.require_service()
        result = self._session.core.multiply(a, b, rng=drawn(rng))
        self._metered(start, a, b)
        return result

    def _cost(self, a: Tensor, b: Tensor) -> tuple[int, Cost]:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]).numel()
        rows, outputs = a.shape[-2], b.shape[-1]
        size = batch * rows * outputs * a.element_size()
        return size, self._product_cost(batch, rows, outputs, a.shape[-1], a.dtype, resident=False)


class Linear(Kernel):
    """linear(x [..., K], weight [N, K], bias [N] or None, *, rng=None) -> [..., N]; the bias is added digitally."""

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, rng: tuple[int, int] | None = None
    ) -> Tensor:
        start = perf_counter()
        self._session.require_service()
        if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
            raise ContractError(
                f"x {list(x.shape)} and weight {list(weight.shape)} were given: pass [..., K] and [N, K]"
            )
        check_finite(x=x, weight=weight)
        rows = x.reshape(1, -1, x.shape[-1]).float()
        with torch.no_grad():
            flat = self._session.core.product(rows, weight.float().unsqueeze(0), generator(drawn(rng)))
        result = flat.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)
        if bias is not None:
            result = result + bias.to(result.dtype)
        self._metered(start, x, weight)
        return result

    def _cost(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[int, Cost]:
        rows, outputs = x.numel() // max(x.shape[-1], 1), weight.shape[0]
        return rows * outputs * x.element_size(), self._product_cost(
            1, rows, outputs, x.shape[-1], x.dtype, resident=True
        )


KERNELS: dict[str, type[Kernel]] = {"matmul": Matmul, "linear": Linear}
