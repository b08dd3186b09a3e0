"""An open device: its queue, pools and pipelines, and the recordings that calls of a known shape run again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import count

import torch
from hal_compute.pool import Region
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, Device, DeviceUnavailableError, MemoryLimitError

from . import commands as recording
from ._vk import Adapter, Bound, Gpu, Memory
from .commands import Given, VulkanCommandBuffer
from .memory import VulkanMemoryPool
from .pipelines import VulkanShaderManager, cache_path
from .sharing import SharedCard
from .staging import StagingRing

#: Recordings that are kept with their memory, and the bytes of them all; on a card this part of its memory where that
#: is more.
KEPT, KEPT_BYTES, KEPT_PART = 128, 256 << 20, 64
#: Fragmentation of the device's memory from which recordings that lie in the way are dropped.
FRAGMENTED = 0.25
#: Bytes from which a tensor on the host is read where it lies, where the device can: below, importing costs more than a
#: copy.
IMPORT_FROM = 1 << 20
#: Bytes from which a tensor passes through the staging ring.
STREAM_FROM = 4 << 20

_GLANCE = 0.05  # seconds to ask whether a card is idle

_COUNTERS = 4096  # bytes
_numbers = count()


@lru_cache(maxsize=4096)
def number(request: AttentionRequest) -> int:
    """Stands for a request in keys: hashing the request itself takes longer than finding a recording."""
    return next(_numbers)


class Recorder:
    """An open device. The session serialises calls."""

    def __init__(self, device: Device, adapter: Adapter, limit: int | None = None) -> None:
        self.device, self.adapter = device, adapter
        #: The CUDA device that is the same card.
        places = device.reads if torch.backends.cuda.is_built() else ()
        self.shares = next((int(place[5:]) for place in places if place.startswith("cuda:")), None)
        self._card: SharedCard | None = None
        self.gpu = Gpu(adapter, device.id, cache_path(adapter))
        self.shaders = VulkanShaderManager(self.gpu)
        self.mapped = adapter.is_cpu  # the device's memory is the host's
        #: Work groups of a dispatch, at most, along x, y and z.
        self.most_groups = tuple(adapter.limits[f"maxComputeWorkGroupCount{axis}"] for axis in "XYZ")
        self.copies = self.copied = 0
        self.pool = VulkanMemoryPool(
            self.gpu, device.id, host=self.mapped, limit=limit, exported=self.shares is not None, free=self._free
        )
        # Where the device's memory is not mapped, operands pass through host-visible memory of the driver's.
        self.staging = VulkanMemoryPool(self.gpu, device.id, host=True, limit=limit)
        self.ring = StagingRing(self.gpu)
        self._counters: Bound | None = None
        self._kept: OrderedDict[Hashable, VulkanCommandBuffer] = OrderedDict()
        self.kept_bytes = 0  # of memory that kept recordings hold
        self.last_steps: dict[str, Hashable] = {}  # key of the last call of each kernel that is told floats
        self._stuck = ""
        self._left: list[VulkanCommandBuffer] = []  # that were given up while they ran
        self.closed = False

    # Recordings

    def key(self, kind: str, number: int, given: Given) -> Hashable:
        """What a recording depends on besides the device.

        Args:
            number: see `number`. given: query, key, value, mask and the rest: their shapes count, and the places of
                those that are read where they lie.
        """
        shapes = tuple([None if t is None else t.shape for t in given])
        mask = None if given[3] is None else (given[3].stride(), given[3].dtype)
        card = self.card_of(given)
        lying = None if card is None else tuple([None if t is None else card.address(t) for t in given])
        return kind, number, shapes, mask, lying

    def find(self, key: Hashable | None) -> VulkanCommandBuffer | None:
        """The recording of a key, ready to run. Raises DeviceUnavailableError while the device hangs."""
        self._check_alive()
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
        return kept

    @contextmanager
    def call(self, what: str, given: Given = (), key: Hashable = None) -> Iterator[VulkanCommandBuffer]:
        """Record and run a call; see `VulkanCommandBuffer`. It is kept for `key` if it can be, else given back.

        Kept recordings are dropped, the one used longest ago first, where they become too many, too large or too
        scattered.
        """
        self._check_alive()
        commands = VulkanCommandBuffer(self, what, given)
        keep = False
        try:
            yield commands
            keep = key is not None and commands.fixed and commands.nbytes <= self._room // 4
        finally:
            if keep:
                self._kept[key], commands.kept = commands, True
                self.kept_bytes += commands.nbytes
            else:
                self._release(commands)
            self._evict(KEPT, self._room, FRAGMENTED)

    @property
    def _room(self) -> int:
        return KEPT_BYTES if self.mapped else max(KEPT_BYTES, self.pool.limit // KEPT_PART)

    def give_up(self, what: str) -> None:
        """A wait for `what` was too long: calls are refused from now on, for as long as the device still runs it."""
        if not self.gpu.lost:  # nothing runs on a lost one
            self._stuck = f"{self.device.id} did not end what was given up ({what})"

    def _check_alive(self) -> None:
        if self.stuck:
            raise DeviceUnavailableError(f"{self._stuck}: close the session of {self.device.id} and open it again")

    def _evict(self, most: int, most_bytes: int, most_fragmented: float = 1.0) -> None:
        # A device that hangs is waited for once: what is kept for it stays until it is closed.
        while (
            self._kept
            and not self._stuck
            and (len(self._kept) > most or self.kept_bytes > most_bytes or self.pool.fragmentation > most_fragmented)
        ):
            self._drop(next(iter(self._kept)))

    def forget(self) -> None:
        """Give all kept recordings up; their memory stays pooled."""
        self._evict(0, 0)

    def _drop(self, key: Hashable) -> None:
        commands = self._kept.pop(key)
        self.kept_bytes -= commands.nbytes
        self._release(commands)

    def _release(self, commands: VulkanCommandBuffer) -> None:
        if self._stuck:  # waited for already
            self._left.append(commands)
        elif not commands.release():
            self._left.append(commands)
            self.give_up(commands.what)

    # Memory

    def cut(self, pool: VulkanMemoryPool, nbytes: int) -> Region:
        """A region; kept recordings are given up for it if they must be."""
        try:
            return pool.allocate(nbytes)
        except MemoryLimitError:
            if nbytes > pool.largest or not self._kept:
                raise
        self.forget()
        pool.trim()
        return pool.allocate(nbytes)

    @property
    def counters(self) -> Bound:
        """Memory that all recordings share, since they run one after another: zero before each and after it."""
        if self._counters is None:
            made = Bound(self.gpu.allocate(_COUNTERS, host=False), 0, _COUNTERS)
            zeroing = self.gpu.begin()
            self.gpu.fill(zeroing, made, 0)
            self.gpu.barrier(zeroing)
            self.gpu.end(zeroing)
            self.gpu.wait(self.gpu.submit(zeroing), "zero its counters", recording.TIMEOUT)
            self.gpu.drop(zeroing)
            self._counters = made
        return self._counters

    def card_of(self, given: Given) -> SharedCard | None:
        """The card that the tensors of a call lie on; None for the host."""
        first = given[0] if given else None  # all of a call lie together
        if first is None or (self._card is None and (self.shares is None or not first.is_cuda)):
            return None
        card = self.card
        return card if card is not None and first.device.type == card.kind else None

    @property
    def card(self) -> SharedCard | None:
        """What shares this device's memory, opened when it is first needed; None where nothing does."""
        if self._card is None and self.shares is not None:
            from .cuda import CudaCard

            self._card = CudaCard(self.gpu, self.shares)
        return self._card

    def lies(self, tensor: Tensor | None) -> bool:
        """Whether a tensor lies in memory that is shared, where shaders can use it for as long as it lives."""
        return tensor is not None and self._card is not None and self._card.bound_of(tensor) is not None

    def settle(self) -> None:
        """Wait until nothing of what was queued, here or with the sharing card, can touch memory that is given back."""
        if not self.gpu.lost:  # nothing runs on a lost one
            self.synchronize()
        if self._card is not None and not self._card.settle(recording.TIMEOUT):
            self.give_up(f"torch's work on {self._card.place}")
            self._check_alive()

    def _free(self, block: Memory) -> None:
        for key in [key for key, commands in self._kept.items() if commands.uses(block)]:
            self._drop(key)
        if self._card is not None:
            self._card.forget(block)
        self.gpu.free(block)

    def streams(self, nbytes: int, card: SharedCard | None) -> bool:
        """Whether a tensor passes through the staging ring: large, and between the host and memory that is not
        mapped.
        """
        return nbytes >= STREAM_FROM and not self.mapped and card is None

    def import_host(self, tensor: Tensor) -> Bound | None:
        """The tensor's own memory as the device's, where that is a CPU that takes it and the tensor is large and
        aligned.
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

    @property
    def device_seconds(self) -> float | None:
        """What the last call's shaders took by the device's clock, copies not counted; None where it has none."""
        return self.gpu.stamped_seconds() if self.gpu.submitted else None

    @property
    def device_seconds_in_all(self) -> float | None:
        """What all recorded commands of the last call took by the device's clock, copies counted; None where it has
        none.
        """
        return self.gpu.stamped_seconds(2) if self.gpu.submitted else None

    def trim(self) -> int:
        """Give kept recordings and idle memory back to the driver; returns the bytes of the memory.

        Nothing on a device that hangs: interfaces that share its memory wait for it before they let go.
        """
        if self._stuck:
            return 0
        self.forget()
        return self.pool.trim() + self.staging.trim() + self.ring.trim()

    def synchronize(self) -> None:
        self.gpu.wait(self.gpu.submitted, "finish what was queued", recording.TIMEOUT)

    @property
    def stuck(self) -> bool:
        """Whether something that was given up still runs, so that no memory may be taken back. Asks the device anew."""
        return bool(self._stuck) and not self._ended(0.0)

    def stop(self) -> None:
        """Wait a last time for what was queued, before `close`; on a device that hangs what is in use stays."""
        if not self._ended(recording.GRACE) and not self._stuck:
            self.give_up("what was queued")

    def _ended(self, patience: float) -> bool:
        """Whether nothing runs any more, after waiting for it; what was given up before goes back then."""
        try:
            self.gpu.wait(self.gpu.submitted, "finish before it is closed", patience)
        except DeviceUnavailableError:
            if not self.gpu.lost:
                return False
        if self._card is not None and not self._card.settle(max(patience, _GLANCE)):
            return False
        self._stuck, left, self._left = "", self._left, []
        for commands in left:
            self._release(commands)
        return True

    def close(self) -> None:
        """Destroy everything, but on a device that hangs: what is in use there stays, or the process would go with
        it.
        """
        self.shaders.save(cache_path(self.adapter))
        if self._stuck:
            return
        self.closed = True
        self.trim()
        if self._card is not None:
            self._card.close()
        self.pool.abandon()
        if self._counters is not None:
            self.gpu.free(self._counters.block)
        self.gpu.close()
