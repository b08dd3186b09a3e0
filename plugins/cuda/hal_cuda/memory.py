"""CUDA memory as the core's protocol: torch's allocator, or CuPy's pool, exchanged by DLPack without a copy."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hal_core.plugin_api import DTYPE_BYTES, Buffer, ContractError, MemoryLimitError, MemoryStats

if TYPE_CHECKING:
    from torch import Tensor


Source = Literal["torch", "cupy"]


class CudaMemory:
    """Buffers of one CUDA device.

    Blocks come from a caching allocator (torch's, or CuPy's pool), so freeing gives memory back to that cache, ordered
    by the current stream. Memory of the other allocator is taken in by `to_backend` without a copy and stays its own.

    Args:
        index: torch's CUDA index. name: the device id for messages. limit: bytes, None for none.
        source: whose allocator, where `allocate` is not told by an array.
    """

    def __init__(self, index: int, *, name: str = "", source: Source = "torch", limit: int | None = None) -> None:
        if source not in ("torch", "cupy"):
            raise ContractError(f"memory source {source!r} was given: use 'torch' or 'cupy'")
        self.index, self.source, self.limit, self._name = index, source, limit, name or f"cuda:{index}"
        self._lock = threading.Lock()
        self._sources: set[Source] = {source}  # whose blocks were handed out
        self._in_use = self._peak = self._allocations = self._reuses = self._copies = self._copied = 0

    def allocate(self, shape: Sequence[int], dtype: str, *, like: Any = None) -> Buffer:
        """An uninitialised buffer, ready on the current stream.

        Args:
            like: an array from whose allocator the block comes: CuPy's pool for a CuPy array, torch's for a torch
                tensor, the manager's own source for anything else.

        Raises:
            ContractError: a negative size or an unknown dtype.
            MemoryLimitError: it would pass the limit, or the device is full; nothing was allocated.
        """
        import torch

        if dtype not in DTYPE_BYTES or any(size < 0 for size in shape):
            raise ContractError(
                f"shape {tuple(shape)} of {dtype} was given: use sizes >= 0 and one of {sorted(DTYPE_BYTES)}"
            )
        needed, source = math.prod(shape) * DTYPE_BYTES[dtype], self._source_of(like)
        with self._lock:
            if self.limit is not None and self._in_use + needed > self.limit:
                raise MemoryLimitError(self._name, needed, self._in_use, self.limit)
            reserved = _reserved(source, self.index)
            block = self._take(needed, source)
            self._sources.add(source)
            self._in_use += needed
            self._peak = max(self._peak, self._in_use)
            self._allocations += 1
            self._reuses += _reserved(source, self.index) == reserved
        return Buffer(block.view(getattr(torch, dtype)).view(tuple(shape)), self, needed)

    def _source_of(self, array: Any) -> Source:
        library = type(array).__module__.partition(".")[0]
        return "cupy" if library == "cupy" else "torch" if library == "torch" else self.source

    def _take(self, needed: int, source: Source) -> Any:
        import torch

        if source == "torch":
            take: Callable[[], Any] = lambda: torch.empty(needed, dtype=torch.uint8, device=f"cuda:{self.index}")  # noqa: E731
        else:
            take = self._from_cupy(needed)
        try:
            return take()
        except torch.OutOfMemoryError as error:
            raise self._full(needed) from error

    def _from_cupy(self, needed: int) -> Callable[[], Any]:
        import torch

        cupy = _cupy()

        def take() -> Any:
            stream = _stream(cupy, torch.cuda.current_stream(self.index))
            try:
                with cupy.cuda.Device(self.index), stream:
                    return torch.from_dlpack(cupy.empty(needed, dtype=cupy.uint8))
            except cupy.cuda.memory.OutOfMemoryError as error:
                raise self._full(needed) from error

        return take

    def _full(self, needed: int) -> MemoryLimitError:
        import torch

        free, total = torch.cuda.mem_get_info(self.index)
        return MemoryLimitError(self._name, needed, total - free, total)

    def free(self, buffer: Buffer) -> None:
        """Give a buffer back to its allocator once nobody else reads it. Freeing twice raises ContractError."""
        if buffer.owner is not self:
            raise ContractError("this buffer belongs to another memory manager: free it there")
        if buffer.freed:
            raise ContractError("this buffer was freed: allocate a new one")
        buffer.release()
        with self._lock:
            self._in_use -= buffer.reserved

    def to_backend(self, tensor: Any) -> Buffer:
        """A buffer that shares the memory of a torch tensor, CuPy array or other DLPack export on this device; else a
        copy.
        """
        import torch

        if not isinstance(tensor, torch.Tensor):
            tensor = torch.from_dlpack(tensor)
        if tensor.is_cuda and tensor.device.index == self.index:
            return Buffer(tensor.detach(), self, 0)
        buffer = self.allocate(tensor.shape, str(tensor.dtype).removeprefix("torch."))
        buffer.tensor.copy_(tensor)
        with self._lock:
            self._copies += 1
            self._copied += buffer.nbytes
        return buffer

    def to_torch(self, buffer: Buffer) -> Tensor:
        """A tensor that shares the buffer's memory."""
        tensor: Tensor = buffer.tensor
        return tensor

    def stats(self) -> MemoryStats:
        """`pooled` is what the allocator holds beyond what is in use anywhere in the process."""
        with self._lock:
            pooled = sum(_pooled(source, self.index) for source in self._sources)
            return MemoryStats(
                in_use=self._in_use,
                pooled=pooled,
                peak=self._peak,
                limit=self.limit,
                allocations=self._allocations,
                reuses=self._reuses,
                copies=self._copies,
                copied=self._copied,
            )

    def trim(self) -> int:
        """Give what the allocator keeps unused back to the driver; returns the bytes."""
        import torch

        if not torch.cuda.is_initialized():
            return 0
        with self._lock:
            before = sum(_reserved(source, self.index) for source in self._sources)
            if "torch" in self._sources:
                torch.cuda.empty_cache()
            if "cupy" in self._sources:
                _cupy().get_default_memory_pool().free_all_blocks()
            return before - sum(_reserved(source, self.index) for source in self._sources)


def _reserved(source: Source, index: int) -> int:
    """Bytes that an allocator holds of the driver."""
    import torch

    if source == "cupy":
        with _cupy().cuda.Device(index):
            return int(_cupy().get_default_memory_pool().total_bytes())
    return torch.cuda.memory_reserved(index) if torch.cuda.is_initialized() else 0


def _pooled(source: Source, index: int) -> int:
    """Bytes that an allocator holds and nobody uses."""
    import torch

    if source == "cupy":
        with _cupy().cuda.Device(index):
            return int(_cupy().get_default_memory_pool().free_bytes())
    if not torch.cuda.is_initialized():
        return 0
    return torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)


def _stream(cupy: Any, current: Any) -> Any:
    """Torch's stream as CuPy takes it: by the protocol that newer versions read, else by its address."""
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(current, "__cuda_stream__"):
        return cupy.cuda.Stream.from_external(current)
    return cupy.cuda.ExternalStream(current.cuda_stream)


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ContractError(
            "memory source 'cupy' was given and CuPy is not installed: pip install 'hal-cuda[cupy]'"
        ) from error
    return cupy
