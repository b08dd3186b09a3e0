"""One face, and one limit, over the memory managers of all devices."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import hal_core as hal
from hal_core import Buffer, ContractError, MemoryLimitError, MemoryManager

from ..arguments import is_number, shown


class UnifiedMemoryManager:
    """Tensors from the memory managers of devices (`hal_core.memory`), within one limit over all of them.

    Thread-safe. The limit is over what this manager has handed out and what the managers' pools keep. A tensor that
    nobody refers to any more is given back by itself.

    Args:
        max_memory_gb: the limit, in GiB. pool_size_mb: MiB that a device's pool may keep when a tensor comes back.
        gc_threshold: share of the limit from which pools are emptied before more is allocated.
    """

    def __init__(self, max_memory_gb: float = 16.0, pool_size_mb: int = 512, gc_threshold: float = 0.8) -> None:
        if not (is_number(gc_threshold) and 0 < gc_threshold <= 1):
            raise ContractError(f"gc_threshold {shown(gc_threshold)} was given: use a share above 0, up to 1")
        if not is_number(pool_size_mb) or pool_size_mb < 0:
            raise ContractError(f"pool_size_mb {shown(pool_size_mb)} was given: use 0 or more")
        self.pool_size, self.gc_threshold, self.limit = int(pool_size_mb) << 20, gc_threshold, 0
        self._lock = threading.RLock()
        #: By id of its tensor, what was handed out; the finalizer gives back a tensor that is dropped.
        self._held: dict[int, tuple[weakref.finalize[Any, Tensor], Buffer, str]] = {}
        self._managers: dict[str, MemoryManager] = {}
        self._in_use: dict[str, int] = {}
        self._peak = 0
        self._returned: deque[tuple[int, Buffer, str]] = deque()
        self.set_memory_limit(max_memory_gb)

    def set_memory_limit(self, gb: float) -> None:
        """Set the limit, in GiB. What is handed out already stays."""
        if not is_number(gb) or gb <= 0:
            raise ContractError(f"a memory limit of {shown(gb)} GB was given: use a number above 0")
        self.limit = int(gb * (1 << 30))

    def allocate(
        self, shape: Sequence[int], dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """An uninitialised tensor.

        Args:
            device: a torch device, a hal device ("vulkan:0") or a backend ("cpu").

        Raises:
            ContractError: sizes or a dtype that cannot be. MemoryLimitError: the limit would be exceeded with all pools
            empty. DeviceUnavailableError, UnknownBackendError: no such device.
        """
        name, kind = _device_id(device), str(dtype).removeprefix("torch.")
        if not isinstance(getattr(torch, kind, None), torch.dtype):
            raise ContractError(f"dtype {shown(dtype)} was given: use one of torch, such as torch.float32")
        if not isinstance(shape, Sequence) or not all(type(size) is int and size >= 0 for size in shape):
            raise ContractError(f"shape {shown(shape)} was given: use a sequence of whole numbers of 0 or more")
        with self._lock:
            self._collect()
            manager = self._managers.setdefault(name, hal.memory(name))
            size = torch.Size(shape).numel() * getattr(torch, kind).itemsize
            if self._total() + size > self.gc_threshold * self.limit:
                self.clear_pools()
            in_use = sum(self._in_use.values())
            if in_use + size > self.limit:
                raise MemoryLimitError(
                    name, size, in_use, self.limit, limited_by="the limit of the UnifiedMemoryManager over all devices"
                )
            buffer = manager.allocate(tuple(shape), kind)
            tensor: Tensor = manager.to_torch(buffer).detach()  # an object of its own, whose end is noticed
            end = weakref.finalize(tensor, self._returned.append, (id(tensor), buffer, name))
            end.atexit = False
            self._held[id(tensor)] = (end, buffer, name)
            self._in_use[name] = self._in_use.get(name, 0) + buffer.reserved
            self._peak = max(self._peak, sum(self._in_use.values()))
            return tensor

    def deallocate(self, t: Tensor) -> None:
        """Give a tensor back; its memory is reused once nobody else refers to it.

        Raises:
            ContractError: it is not from here, or was given back already.
        """
        with self._lock:
            self._collect()
            held = self._held.get(id(t))
            if held is None or (found := held[0].peek()) is None or found[0] is not t:
                raise ContractError(
                    "this tensor is not from this manager, or was given back: pass one that it handed out"
                )
            # A pool keeps a block that nobody else refers to, and the caller still has the tensor: its end frees it.
            self._forget(id(t))

    def _forget(self, key: int) -> None:
        _, buffer, name = self._held.pop(key)
        self._in_use[name] -= buffer.reserved

    def _collect(self) -> None:
        """Free the buffers whose tensors are gone."""
        while self._returned:
            key, buffer, name = self._returned.popleft()
            if key in self._held and self._held[key][1] is buffer:
                self._forget(key)
            manager = self._managers[name]
            manager.free(buffer)
            if manager.stats().pooled > self.pool_size:
                manager.trim()

    @contextmanager
    def temporary_allocation(
        self, shape: Sequence[int], dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"
    ) -> Iterator[Tensor]:
        """A tensor for a `with` block; given back at its end, also after an error."""
        tensor = self.allocate(shape, dtype, device)
        try:
            yield tensor
        finally:
            self.deallocate(tensor)

    def get_memory_stats(self) -> dict[str, Any]:
        """Bytes: "in_use" and "peak" over all devices, "limit", and "devices": by device id its "in_use" from here and
        its manager's own counters.
        """
        with self._lock:
            self._collect()
            devices = {
                name: {"in_use": self._in_use.get(name, 0), "manager": manager.stats()._asdict()}
                for name, manager in self._managers.items()
            }
            return {"in_use": sum(self._in_use.values()), "peak": self._peak, "limit": self.limit, "devices": devices}

    def clear_pools(self) -> int:
        """Empty the pools of all devices used so far; bytes given back."""
        with self._lock:
            self._collect()
            return sum(manager.trim() for manager in self._managers.values())

    def _total(self) -> int:
        return sum(self._in_use.values()) + sum(m.stats().pooled for m in self._managers.values())


def _device_id(device: torch.device | str) -> str:
    """The hal device of a torch device or of a name."""
    if isinstance(device, torch.device):
        device = f"{device.type}:{device.index or 0}"
    return hal.device(device).id
