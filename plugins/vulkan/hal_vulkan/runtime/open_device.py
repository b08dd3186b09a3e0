"""An open Vulkan device: queue, pools, pipelines, the card that shares it, and what happens when it hangs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from hal_compute import waits
from hal_compute.memory import ComputeMemory
from hal_compute.pool import Region
from torch import Tensor

from hal_core.plugin_api import Device, DeviceUnavailableError, MemoryLimitError

from ..paths import IMPORT_FROM
from ._vk import Adapter, Bound, Gpu, Memory
from .pipelines import VulkanShaderManager, cache_path
from .pool import VulkanMemoryPool
from .sharing import SharedCard
from .staging import StagingRing

#: Bytes from which a tensor passes through the staging ring.
STREAM_FROM = 4 << 20

_IDLE_CHECK = 0.05  # seconds to ask whether a card is idle
_COUNTER_BYTES = 4096


class OpenDevice(ABC):
    """An open device, without the recordings of its calls. Not thread-safe: the session holds its lock.

    Attributes:
        mapped: whether the device's memory is the host's. shares: index of the CUDA device that is the same card, or
            None.
        most_groups: at most, work groups of a dispatch along x, y and z.
        memory: the session's memory manager, for scratch memory on the host and for counting copies. Set by the
            session.
    """

    memory: ComputeMemory

    def __init__(self, device: Device, adapter: Adapter, limit: int | None = None) -> None:
        self.device, self.adapter = device, adapter
        places = device.reads if torch.backends.cuda.is_built() else ()
        self.shares = next((int(place[5:]) for place in places if place.startswith("cuda:")), None)
        self._card: SharedCard | None = None
        self.gpu = Gpu(adapter, device.id, cache_path(adapter))
        self.shaders = VulkanShaderManager(self.gpu)
        self.mapped = adapter.is_cpu
        self.most_groups = tuple(adapter.limits[f"maxComputeWorkGroupCount{axis}"] for axis in "XYZ")
        borrows = self.mapped and self.shares is None and adapter.limits["hostPointerAlignment"] > 0
        self.pool = VulkanMemoryPool(
            self.gpu,
            device.id,
            host=self.mapped,
            limit=limit,
            exported=self.shares is not None,
            free=self._free,
            memory=(lambda: self.memory) if borrows else None,
        )
        # Where the device's memory is not mapped, operands pass through host-visible memory of the driver's.
        self.staging = VulkanMemoryPool(self.gpu, device.id, host=True, limit=limit)
        self.ring = StagingRing(self.gpu)
        self._counters: Bound | None = None
        self._stuck = ""
        self.closed = False

    # What the recordings of calls hold

    @abstractmethod
    def forget(self) -> bool:
        """Release every recording that is kept; returns whether there was one. Their memory stays pooled."""

    @abstractmethod
    def _drop_users(self, block: Memory) -> None:
        """Release the recordings that use tensors of a block, which is about to be freed."""

    @abstractmethod
    def _release_left(self) -> None:
        """Release the calls that were given up while they ran, and have ended since."""

    # Memory

    def cut(self, pool: VulkanMemoryPool, nbytes: int) -> Region:
        """A region of a pool. Kept recordings are released where it needs their memory."""
        try:
            return pool.allocate(nbytes)
        except MemoryLimitError:
            if nbytes > pool.largest or not self.forget():
                raise
        pool.trim()
        return pool.allocate(nbytes)

    @property
    def counters(self) -> Bound:
        """Memory that all recordings share, since they run one after another: zero before each and after it."""
        if self._counters is None:
            made = Bound(self.gpu.allocate(_COUNTER_BYTES, host=False), 0, _COUNTER_BYTES)
            zeroing = self.gpu.begin()
            self.gpu.fill(zeroing, made, 0)
            self.gpu.barrier(zeroing)
            self.gpu.end(zeroing)
            self.gpu.wait(self.gpu.submit(zeroing), "zero its counters", waits.TIMEOUT)
            self.gpu.drop(zeroing)
            self._counters = made
        return self._counters

    def _free(self, block: Memory) -> None:
        self._drop_users(block)
        if self._card is not None:
            self._card.forget(block)
        self.gpu.free(block)

    def streams(self, nbytes: int, card: SharedCard | None) -> bool:
        """Whether a tensor passes through the staging ring: a large one, between host and memory that is not mapped."""
        return nbytes >= STREAM_FROM and not self.mapped and card is None

    def import_host(self, tensor: Tensor) -> Bound | None:
        """The tensor's own memory as the device's; None where the device is no CPU, or the tensor is small or
        unaligned.
        """
        limits = self.adapter.limits
        page, nbytes = limits["hostPointerAlignment"], tensor.numel() * tensor.element_size()
        if not (self.mapped and page and IMPORT_FROM <= nbytes <= self.pool.largest and tensor.is_contiguous()):
            return None
        address = tensor.data_ptr()
        if address % limits["minStorageBufferOffsetAlignment"]:
            return None
        start = address // page * page
        block = self.gpu.import_host(start, -(-(address + nbytes - start) // page) * page)
        return None if block is None else Bound(block, address - start, -(-nbytes // 4) * 4)

    # The card that shares the memory

    def card_of(self, given: Sequence[Tensor | None]) -> SharedCard | None:
        """The card on which the tensors of a call lie; None for the host."""
        first = given[0] if given else None  # all of a call lie together
        if first is None or (self._card is None and (self.shares is None or not first.is_cuda)):
            return None
        card = self.card
        return card if card is not None and first.device.type == card.kind else None

    @property
    def card(self) -> SharedCard | None:
        """The other interface of this card, opened when it is first needed; None where none shares its memory."""
        if self._card is None and self.shares is not None:
            from .cuda import CudaCard

            self._card = CudaCard(self.gpu, self.shares)
        return self._card

    def lies(self, tensor: Tensor | None) -> bool:
        """Whether a tensor lies in shared memory, where shaders can use it for as long as it lives."""
        return tensor is not None and self._card is not None and self._card.bound_of(tensor) is not None

    def settle(self) -> None:
        """Wait until nothing that was submitted, here or to the sharing card, can touch memory that is about to be
        freed.
        """
        if not self.gpu.lost:  # nothing runs on a lost one
            self.synchronize()
        if self._card is not None and not self._card.settle(waits.TIMEOUT):
            self.give_up(f"torch's work on {self._card.place}")
            self.check_alive()

    # Time

    @property
    def device_seconds(self) -> float | None:
        """Device time of the last call's shaders, without copies; None without a clock."""
        return self.gpu.stamped_seconds() if self.gpu.submitted else None

    @property
    def device_seconds_in_all(self) -> float | None:
        """Device time of all recorded commands of the last call, copies included; None without a clock."""
        return self.gpu.stamped_seconds(2) if self.gpu.submitted else None

    # A device that hangs

    def give_up(self, what: str) -> None:
        """Note that a wait for `what` was too long: calls are refused for as long as the device still runs it."""
        if not self.gpu.lost:  # nothing runs on a lost one
            self._stuck = f"{self.device.id} did not end what was given up ({what})"

    def check_alive(self) -> None:
        """Raise DeviceUnavailableError while the device hangs."""
        if self.stuck:
            raise DeviceUnavailableError(f"{self._stuck}: close the session of {self.device.id} and open it again")

    @property
    def stuck(self) -> bool:
        """Whether something that was given up still runs, so that no memory may be freed. Asks the device again."""
        return bool(self._stuck) and not self._ended(0.0)

    def _ended(self, patience: float) -> bool:
        """Whether nothing runs any more, after waiting for it; what was given up before is released then."""
        try:
            self.gpu.wait(self.gpu.submitted, "finish before it is closed", patience)
        except DeviceUnavailableError:
            if not self.gpu.lost:
                return False
        if self._card is not None and not self._card.settle(max(patience, _IDLE_CHECK)):
            return False
        self._stuck = ""
        self._release_left()
        return True

    def synchronize(self) -> None:
        self.gpu.wait(self.gpu.submitted, "finish what was queued", waits.TIMEOUT)

    def trim(self) -> int:
        """Release kept recordings and the staging ring; returns the ring's bytes.

        On a device that hangs nothing is released: interfaces that share its memory would wait for it.
        """
        if self._stuck:
            return 0
        self.forget()
        return self.ring.trim()

    def stop(self) -> None:
        """Wait a last time for what was submitted, before `close`. On a device that hangs, what is in use stays."""
        if not self._ended(waits.GRACE) and not self._stuck:
            self.give_up("what was queued")

    def close(self) -> None:
        """Destroy everything. On a device that hangs, what is in use stays: the driver would end the process."""
        self.shaders.save(cache_path(self.adapter))
        if self._stuck:
            return
        self.closed = True
        self.trim()
        self.pool.trim()
        self.staging.trim()
        if self._card is not None:
            self._card.close()
        self.pool.abandon()
        if self._counters is not None:
            self.gpu.free(self._counters.block)
        self.gpu.close()
