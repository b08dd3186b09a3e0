"""A memory manager over torch's allocator: a pool that reuses blocks within a limit."""

import math
import threading
from collections.abc import Sequence
from typing import Any, cast

from ..buffers import Buffer, MemoryStats
from ..errors import ContractError, MemoryLimitError
from ..request import DTYPE_BYTES, Tensor

_SMALLEST_BLOCK = 512


def pooled_size(nbytes: int) -> int:
    """The size class of a buffer: how many bytes `PooledMemory` takes for `nbytes`. Estimates of memory add these up.

    Powers of two up to 64 KiB, where they waste little; above, steps of an eighth, and of whole MiB from 8 MiB on.
    """
    size = max(_SMALLEST_BLOCK, 1 << max(nbytes - 1, 0).bit_length())
    step = max(size >> 4, 1 << 14) if size <= 1 << 23 else 1 << 20
    return size if size <= 1 << 16 else -(-nbytes // step) * step


class _Block:
    """Memory of one size class, and the typed view that it was last handed out as.

    `alone` is the use count of its storage while nobody but the block holds it.
    """

    __slots__ = ("alone", "count", "form", "size", "storage", "view")

    def __init__(self, size: int, device: str) -> None:
        import torch

        with torch.inference_mode(False):  # or autograd could not use the memory later
            self.view: Any = torch.empty(size, dtype=torch.uint8, device=device)
        self.size, self.form = size, cast(Any, None)
        self.storage = self.view.untyped_storage()._cdata
        self.count = torch._C._storage_Use_Count
        self.alone = self.count(self.storage)


class PooledMemory:
    """Blocks by size class, reused, within a limit.

    A freed block goes back to the pool only if nobody else holds its memory any more (a DLPack consumer may outlive the
    buffer); otherwise its last holder frees it. Thread-safe.

    Args:
        torch_device: where the memory lies. name: of the device in messages, for example "acme:0".
        limit: the most bytes in use and pooled at once, of all threads together; None for no limit of its own.
            `hal.configure(memory_limit=...)` is apart: the core holds each call's estimate to it before the call.
    """

    def __init__(self, torch_device: str = "cpu", *, name: str = "", limit: int | None = None) -> None:
        self._device, self._name, self.limit = torch_device, name or torch_device, limit
        self._free: dict[int, list[_Block]] = {}
        self._lock = threading.Lock()
        self._in_use = self._pooled = self._peak = self._allocations = self._reuses = self._copies = self._copied = 0

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        """An uninitialised buffer.

        Raises:
            ContractError: a negative size or an unknown dtype.
            MemoryLimitError: it would exceed the limit, pooled blocks given back first.
        """
        form = (tuple(shape), dtype)
        if dtype not in DTYPE_BYTES or min(form[0], default=0) < 0:
            raise ContractError(
                f"shape {form[0]} of {dtype} was given: use sizes >= 0 and one of {sorted(DTYPE_BYTES)}"
            )
        needed = math.prod(form[0]) * DTYPE_BYTES[dtype]
        size = pooled_size(needed)
        with self._lock:
            if pool := self._free.get(size):
                block = pool.pop()
                self._pooled, self._reuses = self._pooled - size, self._reuses + 1
            else:
                if self.limit is not None and self._in_use + self._pooled + size > self.limit:
                    self._drop_pool()
                    if self._in_use + size > self.limit:
                        raise MemoryLimitError(
                            self._name, size, self._in_use, self.limit, limited_by="the limit of its PooledMemory"
                        )
                block = _Block(size, self._device)
            self._allocations, self._in_use = self._allocations + 1, self._in_use + size
            self._peak = max(self._peak, self._in_use)
        if block.form != form:
            import torch

            empty: Any = torch.empty(0, dtype=getattr(torch, dtype), device=block.view.device)
            block.view, block.form = empty.set_(block.view.untyped_storage(), 0, form[0]), form
        return Buffer(block.view.detach(), self, size, block, form)

    def free(self, buffer: Buffer) -> None:
        """Give a buffer back. Freeing twice raises ContractError."""
        if buffer.owner is not self:
            raise ContractError("this buffer belongs to another memory manager: free it there")
        buffer.release()
        if (block := buffer.block) is not None:  # memory that came in through to_backend is its tensor's
            with self._lock:
                self._in_use -= block.size
                if block.count(block.storage) == block.alone:  # it is the last: nobody else reads this memory
                    self._free.setdefault(block.size, []).append(block)
                    self._pooled += block.size

    def to_backend(self, tensor: Tensor) -> Buffer:
        """A buffer that shares the tensor's memory where it lies on this device, a counted copy otherwise."""
        if str(tensor.device) == str(self._device) or tensor.device.type == self._device:
            return Buffer(tensor.detach(), self, 0)
        buffer = self.allocate(tensor.shape, str(tensor.dtype).removeprefix("torch."))
        buffer.tensor.copy_(tensor)
        self.count_copy(buffer.nbytes)
        return buffer

    def to_torch(self, buffer: Buffer) -> Tensor:
        """A tensor that shares the buffer's memory."""
        return buffer.tensor  # type: ignore[no-any-return]

    def count_copy(self, nbytes: int) -> None:
        """Add a copy of `nbytes` to the counters."""
        with self._lock:
            self._copies, self._copied = self._copies + 1, self._copied + nbytes

    def stats(self) -> MemoryStats:
        with self._lock:
            return MemoryStats(
                self._in_use,
                self._pooled,
                self._peak,
                self.limit,
                self._allocations,
                self._reuses,
                self._copies,
                self._copied,
            )

    def trim(self) -> int:
        """Drop every pooled block and reset the peak; returns the bytes given back."""
        with self._lock:
            self._peak = self._in_use
            return self._drop_pool()

    def _drop_pool(self) -> int:
        given_back, self._pooled = self._pooled, 0
        self._free.clear()
        return given_back
