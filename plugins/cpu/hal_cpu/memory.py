"""The CPU's memory: the core's pool, workspaces of several buffers, and scratch memory that sequences share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from hal_core.plugin_api import DTYPE_BYTES, Buffer, MemoryManager, PooledMemory

#: Memory is counted in floating-point dtypes; others use the one of their size.
_SAME_SIZE = {"bool": "float8_e5m2", "int32": "float32", "int64": "float64"}


class ScratchMemory(Protocol):
    """What kernels need of a memory manager."""

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer: ...

    def free(self, buffer: Buffer) -> None: ...


class CpuMemory(PooledMemory):
    """Host memory: blocks of torch's CPU allocator, reused, within a limit."""

    def __init__(self, name: str, limit: int | None = None) -> None:
        super().__init__("cpu", name=name, limit=limit)


class SharedMemory:
    """Scratch memory of one call's sequences, which follow each other: a buffer that was freed serves later requests
    that are no larger.

    The pool reuses a block for its own size class alone, so without this every length of sequence would add a block. A
    context manager: leaving it gives all blocks back. For the methods that `Workspace` uses, it is a memory manager.
    """

    def __init__(self, memory: MemoryManager) -> None:
        self._memory = memory
        self._blocks: list[Buffer] = []
        self._free: list[Buffer] = []

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        """An uninitialised buffer in the smallest free block that holds it. Raises as `MemoryManager.allocate`."""
        needed = math.prod(shape) * DTYPE_BYTES[dtype]
        fitting = [block for block in self._free if block.nbytes >= needed]
        if fitting:
            block = min(fitting, key=lambda block: block.nbytes)
            self._free.remove(block)
        else:
            self._drop_free()
            block = self._memory.allocate((needed,), _SAME_SIZE["bool"])
            self._blocks.append(block)
        memory = self._memory.to_torch(block).view(torch.uint8)
        return Buffer(memory[:needed].view(getattr(torch, dtype)).view(tuple(shape)), self, 0, block)

    def free(self, buffer: Buffer) -> None:
        buffer.release()
        self._free.append(buffer.block)

    def _drop_free(self) -> None:
        """Free the blocks that are too small, past the pool: it does not keep what is referred to meanwhile."""
        for block in self._free:
            tensor = block.tensor
            self._memory.free(block)
            self._blocks.remove(block)
            del tensor
        self._free.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._free.clear()
        while self._blocks:
            self._memory.free(self._blocks.pop())


class Workspace:
    """Buffers of one call. A context manager: leaving it gives all of them back, also after an error.

    A block returns to the pool only if no tensor refers to it any more, so the tensors belong in the frame of a
    function that has returned by then.
    """

    __slots__ = ("_buffers", "_memory")

    def __init__(self, memory: ScratchMemory) -> None:
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
