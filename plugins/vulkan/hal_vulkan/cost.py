"""What a call costs on a device that was not calibrated."""

from __future__ import annotations

from .paths import matrix_step
from .runtime._vk import Adapter


def assumed(adapter: Adapter) -> tuple[tuple[float, float], tuple[float, float]]:
    """(least, most) seconds of a call without work, and (least, most) multiply-accumulates per second."""
    fastest = 2e14 if matrix_step(adapter, "float16") else 2e13
    return (1e-4, 2e-2), (5e8, 2e10) if adapter.is_cpu else (1e11, fastest)
