"""Vulkan compute, and the only package that speaks Vulkan: devices, memory, pipelines, command buffers, one queue.

Built on the cffi layer of the `vulkan` package (`ffi` and `lib`, generated from the 1.3.275 headers), so that it can be
replaced without touching anything else. Structures newer than that are raw bytes here. One file per layer, each on the
one before it: matrices, adapter, logical, allocation, pipeline, gpu.
"""

from .adapter import Adapter, UnavailableError, adapters
from .allocation import Bound, Memory
from .gpu import Gpu, Timeline
from .matrices import MatrixShape
from .pipeline import Pipeline

__all__ = ["Adapter", "Bound", "Gpu", "MatrixShape", "Memory", "Pipeline", "Timeline", "UnavailableError", "adapters"]
