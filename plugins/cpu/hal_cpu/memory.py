"""The CPU's memory: the core's pool, and workspaces of several buffers that are given back together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from hal_core.plugin_api import Buffer, MemoryManager, PooledMemory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Memory is counted in floating-point dtypes; others use the one of their size.
_SAME_SIZE = {"bool": "float8_e5m2", "int32": "float32", "int64": "float64"}


class CpuMemory(PooledMemory):
    """Host memory: blocks of torch's CPU allocator, reused, within a limit."""

    def __init__(self, name: str, limit: int | None = None) -> None:
        super().__init__("cpu", name=name, limit=limit)


class Workspace:
    """Buffers of one call. A context manager: leaving it gives all of them back, also after an error.

    A block returns to the pool only if no tensor refers to it any more, so the tensors belong in the frame of a
    function that has returned by then.
    """

    __slots__ = ("_buffers", "_memory")

    def __init__(self, memory: MemoryManager) -> None:
        self._memory = memory
        self._buffers: list[Buffer] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor. Raises MemoryLimitError as `MemoryManager.allocate`."""
        name = str(dtype).removeprefix("torch.")
        buffer = self._memory.allocate(shape, _SAME_SIZE.get(name, name))
        self._buffers.append(buffer)
        tensor: Tensor = buffer.tensor
        return tensor.view(dtype) if name in _SAME_SIZE else tensor

    def copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous copy of a tensor, converted to `dtype`."""
        return self.take(tensor.shape, dtype or tensor.dtype).copy_(tensor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        while self._buffers:
            self._memory.free(self._buffers.pop())
