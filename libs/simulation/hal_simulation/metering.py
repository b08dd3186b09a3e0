"""Kernels whose calls are metered by a model: the host's clock is not the simulated device's."""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from time import perf_counter
from typing import TYPE_CHECKING, Any

from hal_core.plugin_api import ContractError, Device, Estimate, current_meter

if TYPE_CHECKING:
    from torch import Tensor


class MeteredKernel(ABC):
    """A kernel of an open device. Inside `hal_core.meter` each call adds its modelled time and energy to the device.

    A subclass defines `run` and `cost`. The parameters of its `run` are the operands and options that a call may have;
    messages call the kernel by the name of its class.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    def __call__(self, *operands: Any, **options: Any) -> Tensor:
        """Run the kernel, and add its cost to the meter of the current context, where there is one.

        Raises:
            ContractError: operands or options that the kernel does not have, with those that it has.
        """
        self._check_call(operands, options)
        start = perf_counter()
        result = self.run(*operands, **options)
        if (meter := current_meter()) is not None:
            estimate, macs = self.cost(*operands, **options)
            meter.add(self.device, perf_counter() - start, estimate.time, estimate.energy, macs, 0)
        return result

    def estimate(self, *operands: Any, **options: Any) -> Estimate:
        """What a call with these operands and options costs. Raises ContractError as a call does."""
        self._check_call(operands, options)
        return self.cost(*operands, **options)[0]

    def _check_call(self, operands: Sequence[Any], options: Mapping[str, Any]) -> None:
        name, signature = type(self).__name__.lower(), _signature(type(self).run)
        try:
            signature.bind(*operands, **options)
        except TypeError as error:
            known = [parameter.name for parameter in signature.parameters.values()]
            for option in options:
                if option not in known:
                    close, takes = difflib.get_close_matches(option, known, 1), f"takes {', '.join(known)}"
                    wanted = f"did you mean {close[0]!r}? It {takes}" if close else f"leave it out; it {takes}"
                    raise ContractError(f"option {option!r} was given to {name}: {wanted}") from None
            raise ContractError(f"{name}: {error}: call {name}{signature}") from None

    @abstractmethod
    def run(self, *operands: Any, **options: Any) -> Tensor:
        """The result of a call."""

    @abstractmethod
    def cost(self, *operands: Any, **options: Any) -> tuple[Estimate, int]:
        """The estimate of a call, and its multiply-accumulates."""


@cache
def _signature(run: Callable[..., Any]) -> inspect.Signature:
    """The parameters of a kernel's `run`, without self and annotations."""
    parameters = list(inspect.signature(run).parameters.values())[1:]
    return inspect.Signature([parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters])
