"""Kernels whose calls are metered by a model: the host's clock is not the simulated device's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from time import perf_counter
from typing import TYPE_CHECKING, Any

from hal_core.plugin_api import Device, Estimate, current_meter

if TYPE_CHECKING:
    from torch import Tensor


class MeteredKernel(ABC):
    """A kernel of an open device. Inside `hal_core.meter` each call adds its modelled time and energy to the device.

    A subclass defines `run` and `cost`.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def __call__(self, *operands: Any, **options: Any) -> Tensor:
        """Run the kernel, and add its cost to the meter of the current context, where there is one."""
        start = perf_counter()
        result = self.run(*operands, **options)
        if (meter := current_meter()) is not None:
            estimate, macs = self.cost(*operands, **options)
            meter.add(self.device, perf_counter() - start, estimate.time, estimate.energy, macs, 0)
        return result

    def estimate(self, *operands: Any, **options: Any) -> Estimate:
        """What a call with these operands and options costs."""
        return self.cost(*operands, **options)[0]

    @abstractmethod
    def run(self, *operands: Any, **options: Any) -> Tensor:
        """The result of a call."""

    @abstractmethod
    def cost(self, *operands: Any, **options: Any) -> tuple[Estimate, int]:
        """The estimate of a call, and its multiply-accumulates."""
