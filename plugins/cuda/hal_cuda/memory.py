"""CUDA memory as the core's protocol: torch's caching allocator, or CuPy's pool, exchanged by DLPack without a copy."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from hal_core.plugin_api import (
    DTYPE_BYTES,
    Buffer,
    ContractError,
    MemoryLimitError,
    MemoryManager,
    MemoryStats,
    checked_buffer,
)

if TYPE_CHECKING:
    from torch import Tensor

Source = Literal["torch", "cupy"]

#: Streams that have a workspace, float32 numbers of its partial results, and its counters.
STREAMS, PARTIAL, COUNTERS = 16, 1 << 18, 1024
_MOST_KNOWN = 1 << 14
#: A dtype of a memory manager for each item size: other dtypes of that size are views of it.
_OF_SIZE = {8: "float64", 4: "float32", 2: "float16", 1: "float8_e5m2"}


class CudaMemory:
    """Buffers of one CUDA device.

    Blocks come from a caching allocator (torch's, or CuPy's pool), which knows streams and graphs: a buffer is ready on
    the stream that is current when it is allocated, may be freed as soon as the work that uses it is queued on that
    stream, and is then handed out again in the order of that stream; inside the capture of a CUDA graph it comes from
    the graph's own pool. Memory of the other allocator is taken in by `to_backend` without a copy and stays its own.

    Args:
        index: torch's CUDA index.
        name: the device id, for messages.
        source: whose allocator `allocate` uses where it is not given an array.
        limit: bytes that may be in use; None for no limit.
    """

    def __init__(self, index: int, *, name: str = "", source: Source = "torch", limit: int | None = None) -> None:
        if source not in ("torch", "cupy"):
            raise ContractError(f"memory source {source!r} was given: use 'torch' or 'cupy'")
        self.index, self.source, self.limit, self._name = index, source, limit, name or f"cuda:{index}"
        self._device = f"cuda:{index}"
        self._lock = threading.Lock()
        self._sources: set[Source] = {source}  # whose blocks were handed out
        self._known: set[int] = set()  # addresses that were handed out since the last trim
        self._in_use = self._peak = self._allocations = self._reuses = self._copies = self._copied = 0

    def allocate(self, shape: Sequence[int], dtype: str, *, like: Any = None) -> Buffer:
        """An uninitialised buffer, ready on the current stream.

        Args:
            shape: sizes, each 0 or more.
            dtype: a name out of `DTYPE_BYTES`.
            like: an array from whose allocator the block comes: CuPy's pool for a CuPy array, torch's for a torch
                tensor, the manager's own source for anything else.

        Raises:
            ContractError: a negative size or an unknown dtype.
            MemoryLimitError: it would pass the limit, or the device is full; nothing was allocated.
        """
        import torch

        form = (tuple(shape), dtype)
        if dtype not in DTYPE_BYTES or min(form[0], default=0) < 0:
            raise ContractError(
                f"shape {form[0]} of {dtype} was given: use sizes >= 0 and one of {sorted(DTYPE_BYTES)}"
            )
        needed = math.prod(form[0]) * DTYPE_BYTES[dtype]
        source = self.source if like is None else self._source_of(like)
        with self._lock:
            if self.limit is not None and self._in_use + needed > self.limit:
                raise MemoryLimitError(self._name, needed, self._in_use, self.limit)
            if source == "torch":
                try:
                    if torch.is_inference_mode_enabled():  # or autograd could not use the memory later
                        with torch.inference_mode(False):
                            tensor = torch.empty(form[0], dtype=getattr(torch, dtype), device=self._device)
                    else:
                        tensor = torch.empty(form[0], dtype=getattr(torch, dtype), device=self._device)
                except torch.OutOfMemoryError as error:
                    raise self._full(needed) from error
            else:
                tensor = self._from_cupy(needed).view(getattr(torch, dtype)).view(form[0])
                self._sources.add(source)
            self._in_use += needed
            self._peak = max(self._peak, self._in_use)
            self._allocations += 1
            address = tensor.data_ptr()
            if address in self._known:
                self._reuses += 1
            elif needed:
                if len(self._known) >= _MOST_KNOWN:
                    self._known.clear()
                self._known.add(address)
        return Buffer(tensor, self, needed, None, form)

    def _source_of(self, array: Any) -> Source:
        library = type(array).__module__.partition(".")[0]
        return "cupy" if library == "cupy" else "torch" if library == "torch" else self.source

    def _from_cupy(self, needed: int) -> Tensor:
        """Bytes of CuPy's pool, ordered by torch's current stream."""
        import torch
        from torch.utils.dlpack import from_dlpack

        cupy = _cupy()
        stream = cupy_stream(cupy, torch.cuda.current_stream(self.index))
        try:
            with cupy.cuda.Device(self.index), stream:
                return from_dlpack(cupy.empty(needed, dtype=cupy.uint8))
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise self._full(needed) from error

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
        copy, which is counted.
        """
        import torch
        from torch.utils.dlpack import from_dlpack

        if not isinstance(tensor, torch.Tensor):
            tensor = from_dlpack(tensor)
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
        """Counters. `pooled` is what the allocators hold beyond what is in use anywhere in the process; `reuses` counts
        buffers at an address that was handed out before.
        """
        with self._lock:
            pooled = sum(_pooled(source, self.index) for source in self._sources)
            used = (self._in_use, pooled, self._peak, self.limit)
            return MemoryStats(*used, self._allocations, self._reuses, self._copies, self._copied)

    def trim(self) -> int:
        """Give what the allocators keep unused back to the driver and reset the peak; returns the bytes."""
        import torch

        with self._lock:
            self._peak = self._in_use
            self._known.clear()
            if not torch.cuda.is_initialized():
                return 0
            before = sum(_reserved(source, self.index) for source in self._sources)
            if "torch" in self._sources:
                torch.cuda.empty_cache()
            if "cupy" in self._sources:
                _cupy().get_default_memory_pool().free_all_blocks()
            return before - sum(_reserved(source, self.index) for source in self._sources)


class Workspace(NamedTuple):
    """What the launches of one stream leave to those after them.

    partial: float32 [PARTIAL], of any content. arrived: int32 [COUNTERS], 0 between launches.
    """

    partial: Tensor
    arrived: Tensor


class StreamWorkspaces:
    """A workspace for each stream, because launches on two streams may run at once: 16 MiB of a session's memory.

    A workspace stays with its stream's handle until the session closes; torch ends none of its streams.

    Args:
        memory: where the workspaces come from, at the first use or in `prepare`, neither of which may lie in the
            capture of a graph.
    """

    def __init__(self, memory: MemoryManager) -> None:
        self._memory = memory
        self._buffers: list[Buffer] = []
        self._by_stream: dict[int, Workspace] = {}
        self._lock = threading.Lock()

    def on(self, stream: int) -> Workspace | None:
        """The workspace of a stream's handle; None where `STREAMS` other streams have theirs."""
        found = self._by_stream.get(stream)
        if found is None and len(self._by_stream) < STREAMS:
            self.prepare()
            with self._lock:
                place = len(self._by_stream)
                if stream not in self._by_stream and place < STREAMS and self._buffers:
                    partial, arrived = (buffer.tensor[place] for buffer in self._buffers)
                    self._by_stream[stream] = Workspace(partial, _as(arrived, "int32"))
                found = self._by_stream.get(stream)
        return found

    def prepare(self) -> None:
        """Take the memory, if that was not done yet."""
        import torch

        with self._lock:
            if self._buffers:
                return
            shapes = ((STREAMS, PARTIAL), (STREAMS, COUNTERS))
            self._buffers = [
                checked_buffer(self._memory.allocate(shape, "float32"), shape, "float32") for shape in shapes
            ]
            arrived = self._buffers[1].tensor.zero_()
            if arrived.is_cuda:
                torch.cuda.current_stream(arrived.device).synchronize()  # other streams will not wait for the zeros

    @property
    def idle(self) -> bool:
        """Whether every counter is 0, as it is between launches. Waits for the device."""
        return not self._buffers or not bool(_as(self._buffers[1].tensor, "int32").any())

    def close(self) -> None:
        """Wait for the device and give the memory back."""
        import torch

        with self._lock:
            self._by_stream.clear()
            buffers, self._buffers = self._buffers, []
        if buffers and buffers[0].tensor.is_cuda:
            torch.cuda.synchronize(buffers[0].tensor.device)  # launches on other streams may still use them
        for buffer in buffers:
            self._memory.free(buffer)


class Borrowed:
    """Tensors of any dtype from a memory manager, given back together on exit: `with borrowing(memory) as borrow:
    tensor = borrow(shape, dtype)`.

    Work on the tensors that is queued on the current stream may still be running then: see `CudaMemory`.
    """

    __slots__ = ("_buffers", "_memory")

    def __init__(self, memory: MemoryManager) -> None:
        self._memory = memory
        self._buffers: list[Buffer] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        while self._buffers:
            self._memory.free(self._buffers.pop())

    def __call__(self, shape: Sequence[int], dtype: Any) -> Tensor:
        """An uninitialised tensor of a torch dtype.

        Raises:
            PluginError: the memory manager gave less than was asked for. MemoryLimitError: as `allocate`.
        """
        name = _OF_SIZE[dtype.itemsize]
        buffer = self._memory.allocate(shape, name)
        self._buffers.append(buffer)
        tensor: Tensor = checked_buffer(buffer, shape, name).tensor
        return tensor.view(dtype)


#: A class of few lines, because a generator's context takes longer to enter than all else that it does.
borrowing = Borrowed


def _as(tensor: Any, name: str) -> Any:
    """The tensor's bits in another dtype of the same size."""
    import torch

    return tensor.view(getattr(torch, name))


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


def cupy_stream(cupy: Any, current: Any) -> Any:
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
