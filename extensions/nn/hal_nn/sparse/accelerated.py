"""Kernels of planning that a device brings: `hal.kernel` by the torch device that tensors lie on."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import hal_core as hal


def device_kernel(name: str, tensor: Tensor) -> Callable[..., Any] | None:
    """The kernel of a name on an accelerator; None on the CPU, and where the device has no such kernel."""
    return None if tensor.is_cpu else _kernel(name, tensor.device)


@lru_cache(maxsize=64)
def _kernel(name: str, device: torch.device) -> Callable[..., Any] | None:
    try:
        return hal.kernel(name, backend=str(device))
    except hal.HalError:
        return None
