"""Buffers that travel by DLPack, and a pool that reuses them within a limit."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from .errors import ContractError, MemoryLimitError
from .request import DTYPE_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from .protocols import MemoryManager

_SMALLEST_BLOCK = 512


@attrs.frozen(kw_only=True)
class MemoryStats:
    """Bytes unless said otherwise.

    Attributes:
        in_use: held by live buffers. pooled: kept for reuse. peak: highest in_use so far.
        limit: None for none. allocations, reuses: buffers handed out in all, and out of the pool.
        copies, copied: copies that to_backend and to_torch had to make, and their bytes.
    """

    in_use: int
    pooled: int
    peak: int
    limit: int | None
    allocations: int
    reuses: int
    copies: int
    copied: int


class Buffer:
    """Memory on a device, [shape] of dtype, exported without a copy by DLPack."""

    def __init__(self, tensor: Any, owner: MemoryManager, reserved: int) -> None:
        self._tensor, self.owner, self.reserved = tensor, owner, reserved
        self.shape, self.dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    @property
    def freed(self) -> bool:
        return self._tensor is None

    @property
    def nbytes(self) -> int:
        return int(math.prod(self.shape)) * DTYPE_BYTES.get(self.dtype, 1)

    @property
    def tensor(self) -> Any:
        """The memory as a torch tensor that shares it; valid for as long as that tensor lives."""
        if self._tensor is None:
            raise ContractError("this buffer was freed: allocate a new one")
        return self._tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, index = self.tensor.__dlpack_device__()
        return int(kind), int(index)

    def release(self) -> Any:
        """Give the tensor up. For memory managers."""
        tensor, self._tensor = self._tensor, None
        return tensor


class PooledMemory:
    """A memory manager over torch's allocator: blocks by size class, reused, within a limit.

    A freed block goes back to the pool only if nobody else holds its memory any more (a DLPack consumer may outlive the
    buffer); otherwise its last holder frees it.
    """

    def __init__(self, torch_device: str = "cpu", *, name: str = "", limit: int | None = None) -> None:
        self._device, self._name, self.limit = torch_device, name or torch_device, limit
        self._free: dict[int, list[Any]] = defaultdict(list)
        self._lock = threading.Lock()
        self._count = dict.fromkeys(("in_use", "pooled", "peak", "allocations", "reuses", "copies", "copied"), 0)

    def allocate(self, shape: Sequence[int], dtype: str) -> Buffer:
        """An uninitialised buffer.

        Raises:
            ContractError: a negative size or an unknown dtype.
            MemoryLimitError: it would pass the limit, pooled blocks given back first.
        """
        import torch

        if dtype not in DTYPE_BYTES or any(size < 0 for size in shape):
            raise ContractError(
                f"shape {tuple(shape)} of {dtype} was given: use sizes >= 0 and one of {sorted(DTYPE_BYTES)}"
            )
        needed = math.prod(shape) * DTYPE_BYTES[dtype]
        size = max(_SMALLEST_BLOCK, 1 << max(needed - 1, 0).bit_length())
        if size > 1 << 22:  # powers of two waste too much here: whole MiB instead
            size = -(-needed // (1 << 20)) << 20
        with self._lock:
            count, pool = self._count, self._free[size]
            if self.limit is not None and not pool and count["in_use"] + count["pooled"] + size > self.limit:
                self._drop_pool()
            if self.limit is not None and count["in_use"] + size > self.limit:
                raise MemoryLimitError(self._name, size, count["in_use"], self.limit)
            if pool:
                block = pool.pop()
                count["pooled"] -= size
                count["reuses"] += 1
            else:
                block = torch.empty(size, dtype=torch.uint8, device=self._device)
            count["allocations"] += 1
            count["in_use"] += size
            count["peak"] = max(count["peak"], count["in_use"])
        return Buffer(block[:needed].view(getattr(torch, dtype)).view(tuple(shape)), self, size)

    def free(self, buffer: Buffer) -> None:
        """Give a buffer back. Freeing twice raises ContractError."""
        import torch

        if buffer.owner is not self:
            raise ContractError("this buffer belongs to another memory manager: free it there")
        storage = buffer.tensor.untyped_storage()
        buffer.release()
        if buffer.reserved == 0:  # memory that came in through to_backend is its tensor's
            return
        with self._lock:
            self._count["in_use"] -= buffer.reserved
            if torch._C._storage_Use_Count(storage._cdata) == 1:  # ours is the last: nobody else reads this memory
                block = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
                self._free[buffer.reserved].append(block)
                self._count["pooled"] += buffer.reserved

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
        with self._lock:
            self._count["copies"] += 1
            self._count["copied"] += nbytes

    def stats(self) -> MemoryStats:
        with self._lock:
            return MemoryStats(limit=self.limit, **self._count)

    def trim(self) -> int:
        """Drop every pooled block; returns the bytes given back."""
        with self._lock:
            return self._drop_pool()

    def _drop_pool(self) -> int:
        given_back, self._count["pooled"] = self._count["pooled"], 0
        for pool in self._free.values():
            pool.clear()
        return given_back
