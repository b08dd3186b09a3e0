"""What a call costs on a device that was not calibrated."""

from __future__ import annotations

from typing import Any

from .discovery import is_cpu


def assumed(handle: Any) -> tuple[tuple[float, float], tuple[float, float]]:
    """(least, most) seconds of a call without work, and (least, most) multiply-accumulates per second."""
    units = handle.max_compute_units
    return (5e-5, 2e-3), (2e9 * units, 4e10 * units if is_cpu(handle) else 1e11 * units)
