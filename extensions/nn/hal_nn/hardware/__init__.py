"""Devices, memory and batch sizes of a model: what is there, what a step takes, what fits."""

from __future__ import annotations

from .abstraction import HardwareAbstractionLayer as HardwareAbstractionLayer
from .batch_size import BatchSize as BatchSize, optimal_batch_size as optimal_batch_size
from .devices import available_memory as available_memory, detect_available_devices as detect_available_devices
from .memory_estimate import (
    LayerMemory as LayerMemory,
    MemoryEstimate as MemoryEstimate,
    estimate_memory as estimate_memory,
    sample_of as sample_of,
)
from .unified_memory import UnifiedMemoryManager as UnifiedMemoryManager
