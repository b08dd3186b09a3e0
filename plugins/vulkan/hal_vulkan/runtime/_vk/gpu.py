"""Command buffers, and the one queue that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from hal_core.plugin_api import DeviceUnavailableError

from .adapter import OPAQUE_FD, Adapter
from .allocation import Bound
from .logical import LOST
from .pipeline import COMPUTE_STAGE, DESCRIPTORS, Compiling, Pipeline

_TIMEOUT = 2
_ALL_COMMANDS = 0x10000
_SLICE = 1.0  # seconds after which a wait asks whether Python was interrupted
_SPIN = 3e-4  # seconds of asking again and again before a wait sleeps: waking up takes some 30 microseconds


class Timeline(NamedTuple):
    """A timeline semaphore: VkSemaphore*, a counter that rises."""

    handle: Any


class _Writes:
    """VkWriteDescriptorSet[] for pipelines of some kinds of bindings. The driver copies it, so that one serves them
    all.
    """

    def __init__(self, ffi: Any, kinds: str) -> None:
        self._buffers = ffi.new("VkDescriptorBufferInfo[]", len(kinds))
        self._writes = ffi.new(
            "VkWriteDescriptorSet[]",
            [
                {
                    "sType": 35,
                    "dstBinding": n,
                    "descriptorCount": 1,
                    "descriptorType": DESCRIPTORS[kind],
                    "pBufferInfo": self._buffers + n,
                }
                for n, kind in enumerate(kinds)
            ],
        )
        self._infos = [self._buffers[n] for n in range(len(kinds))]
        self._held: list[Bound | None] = [None] * len(kinds)

    def of(self, bound: Sequence[Bound]) -> Any:
        for n, there in enumerate(bound):
            if there is not self._held[n]:
                info, self._held[n] = self._infos[n], there
                info.buffer, info.offset, info.range = there.block.buffer, there.offset, there.size
        return self._writes


class Gpu(Compiling):
    """A logical device with one compute queue. Not thread-safe: the session holds its lock."""

    def __init__(self, adapter: Adapter, name: str, cache: Path | None) -> None:
        """Raises DeviceUnavailableError where the driver refuses; nothing of it stays."""
        try:
            super().__init__(adapter, name, cache)
            self._prepare()
        except BaseException:
            self._undo.close()
            raise

    def _prepare(self) -> None:
        """The command pool, the device's timeline, its time stamps, and what calls hand to the driver again and
        again.
        """
        ffi, adapter = self._ffi, self.adapter
        self._push = self._function("vkCmdPushDescriptorSetKHR")
        self._commands = self._held("CommandPool", {"sType": 39, "flags": 2, "queueFamilyIndex": self._family})
        self._done = self._timeline(exported="timeline_export" in adapter.features)
        self._queries = self._held("QueryPool", {"sType": 11, "queryType": 2, "queryCount": 4})
        self._submitted = 0
        reads, writes, host = 0x8 | 0x20 | 0x800, 0x40 | 0x1000, 0x2000
        self._visible = ffi.new(
            "VkMemoryBarrier*",
            {
                "sType": 46,
                "srcAccessMask": writes | reads,
                "dstAccessMask": reads | writes | host,
            },
        )
        self._writes: dict[str, _Writes] = {}
        self._constants = ffi.new("char[]", adapter.limits["maxPushConstantsSize"])
        self._recorded: Any = None  # the command buffer and the pipeline of the last dispatch
        # What a submission and a wait hand to the driver, made once: making structures takes longer than the calls.
        self._number, self._awaited = ffi.new("uint64_t[1]"), ffi.new("uint64_t[1]")
        self._reached = ffi.new("uint64_t[1]")
        self._spins = not adapter.is_cpu  # a CPU's device needs the processor itself
        self._after, self._running = ffi.new("uint64_t[1]"), ffi.new("VkCommandBuffer[1]")
        self._stages = ffi.new("uint32_t[]", [_ALL_COMMANDS])
        self._values = ffi.new(
            "VkTimelineSemaphoreSubmitInfo*",
            {
                "sType": 1000207003,
                "signalSemaphoreValueCount": 1,
                "pSignalSemaphoreValues": self._number,
                "pWaitSemaphoreValues": self._after,
            },
        )
        self._submission = ffi.new(
            "VkSubmitInfo*",
            {
                "sType": 4,
                "pNext": self._values,
                "commandBufferCount": 1,
                "pCommandBuffers": self._running,
                "signalSemaphoreCount": 1,
                "pSignalSemaphores": self._done.handle,
                "pWaitDstStageMask": self._stages,
            },
        )
        self._waiting = ffi.new(
            "VkSemaphoreWaitInfo*",
            {
                "sType": 1000207004,
                "semaphoreCount": 1,
                "pSemaphores": self._done.handle,
                "pValues": self._awaited,
            },
        )

    def _timeline(self, *, exported: bool) -> Timeline:
        ffi = self._ffi
        shared = ffi.new("VkExportSemaphoreCreateInfo*", {"sType": 1000077000, "handleTypes": OPAQUE_FD})
        kind = ffi.new(
            "VkSemaphoreTypeCreateInfo*",
            {
                "sType": 1000207002,
                "semaphoreType": 1,
                "pNext": shared if exported else ffi.NULL,
            },
        )
        handle = ffi.new("VkSemaphore*")
        handle[0] = self._held("Semaphore", {"sType": 9, "pNext": kind})
        return Timeline(handle)

    def foreign_timeline(self) -> Timeline:
        """A timeline that another interface signals; it lives as long as the device."""
        return self._timeline(exported=True)

    def export_timeline(self, timeline: Timeline | None = None) -> int:
        """A file descriptor of a foreign timeline, or of the device's own; whoever imports it owns it."""
        ffi, made = self._ffi, self._ffi.new("int*")
        handle = (timeline or self._done).handle[0]
        info = ffi.new("VkSemaphoreGetFdInfoKHR*", {"sType": 1000079001, "semaphore": handle, "handleType": OPAQUE_FD})
        self._check(self._function("vkGetSemaphoreFdKHR")(self._device, info, made), "vkGetSemaphoreFdKHR")
        return int(made[0])

    def begin(self, commands: Any = None) -> Any:
        """A command buffer that is being recorded, a new one or `commands` anew; it may be submitted many times."""
        ffi, lib = self._ffi, self._lib
        if commands is None:
            made = ffi.new("VkCommandBuffer*")
            info = ffi.new(
                "VkCommandBufferAllocateInfo*", {"sType": 40, "commandPool": self._commands, "commandBufferCount": 1}
            )
            self._check(lib.vkAllocateCommandBuffers(self._device, info, made), "vkAllocateCommandBuffers")
            commands = made[0]
        self._recorded = None
        start = ffi.new("VkCommandBufferBeginInfo*", {"sType": 42})
        self._check(lib.vkBeginCommandBuffer(commands, start), "vkBeginCommandBuffer")
        return commands

    def dispatch(
        self, commands: Any, pipeline: Pipeline, bound: Sequence[Bound], push: bytes, groups: Sequence[int]
    ) -> None:
        lib, writes = self._lib, self._writes.get(pipeline.kinds)
        if writes is None:
            writes = self._writes[pipeline.kinds] = _Writes(self._ffi, pipeline.kinds)
        if self._recorded != (commands, pipeline.handle):
            self._recorded = commands, pipeline.handle
            lib.vkCmdBindPipeline(commands, 1, pipeline.handle)
        self._push(commands, 1, pipeline.layout, 0, len(bound), writes.of(bound))
        constants = self._constants
        self._ffi.memmove(constants, push, len(push))
        lib.vkCmdPushConstants(commands, pipeline.layout, COMPUTE_STAGE, 0, len(push), constants)
        lib.vkCmdDispatch(commands, *groups)

    def copy(self, commands: Any, source: Bound, target: Bound) -> None:
        region = self._ffi.new(
            "VkBufferCopy*", {"srcOffset": source.offset, "dstOffset": target.offset, "size": source.size}
        )
        self._lib.vkCmdCopyBuffer(commands, source.block.buffer, target.block.buffer, 1, region)

    def fill(self, commands: Any, target: Bound, word: int) -> None:
        """Set every 32-bit word of a range whose size is a multiple of 4."""
        self._lib.vkCmdFillBuffer(commands, target.block.buffer, target.offset, target.size, word)

    def barrier(self, commands: Any) -> None:
        """What was recorded before is finished and visible to shaders, copies and the host after."""
        before, after = 0x800 | 0x1000, 0x800 | 0x1000 | 0x4000
        null = self._ffi.NULL
        self._lib.vkCmdPipelineBarrier(commands, before, after, 0, 1, self._visible, 0, null, 0, null)

    def stamp(self, commands: Any, place: int) -> None:
        """Write time stamp `place`, 0 to 3: an even one once the device is here, an odd one after all that was
        recorded.
        """
        if self._stamp_bits:
            self._lib.vkCmdResetQueryPool(commands, self._queries, place, 1)
            self._lib.vkCmdWriteTimestamp(commands, 0x2000 if place % 2 else 1, self._queries, place)

    def stamped_seconds(self, first: int = 0) -> float | None:
        """Device time between stamps `first` and `first` + 1 of the last finished submission; None without a clock."""
        if not self._stamp_bits:
            return None
        stamps = self._ffi.new("uint64_t[2]")
        if self._lib.vkGetQueryPoolResults(self._device, self._queries, first, 2, 16, stamps, 8, 1):
            return None
        passed = (stamps[1] - stamps[0]) % (1 << self._stamp_bits)  # the counter may start again in between
        return float(passed) * self.adapter.limits["timestampPeriod"] * 1e-12

    def end(self, commands: Any) -> None:
        self._check(self._lib.vkEndCommandBuffer(commands), "vkEndCommandBuffer")

    def submit(self, commands: Any, after: Timeline | None = None, value: int = 0) -> int:
        """Put recorded commands into the queue; the number to wait for. They start once `after` has reached `value`."""
        if self.lost:
            self._check(LOST, "an earlier call")
        number = self._submitted + 1
        self._number[0], self._running[0] = number, commands
        info, waits = self._submission, int(after is not None)
        info.waitSemaphoreCount = self._values.waitSemaphoreValueCount = waits
        if after is not None:
            info.pWaitSemaphores, self._after[0] = after.handle, value
        result = self._lib.vkQueueSubmit(self._queue, 1, info, self._ffi.NULL)
        if result:
            self._check(result, "vkQueueSubmit")
        self._submitted = number
        return number

    def wait(self, number: int, what: str, timeout: float) -> None:
        """Until submission `number` is done.

        Raises:
            DeviceUnavailableError: after `timeout` seconds, naming `what`, or when the device is lost.
        """
        lib, device = self._lib, self._device
        if self._spins:
            deadline = perf_counter() + min(timeout, _SPIN)
            while not lib.vkGetSemaphoreCounterValue(device, self._done.handle[0], self._reached):
                if self._reached[0] >= number:
                    return
                if perf_counter() > deadline:
                    break
        self._awaited[0], left, result = number, timeout, _TIMEOUT
        while result == _TIMEOUT and left >= 0:  # the driver itself cannot be interrupted
            result = lib.vkWaitSemaphores(device, self._waiting, int(min(left, _SLICE) * 1e9))
            left -= _SLICE
        if result == _TIMEOUT:
            raise DeviceUnavailableError(
                f"{self.name} did not {what} within {timeout:g} s: make the call smaller, or close and reopen the "
                "device"
            )
        if result:
            self._check(result, what)

    def drop(self, commands: Any) -> None:
        """Give a command buffer back; it must not be running."""
        self._lib.vkFreeCommandBuffers(self._device, self._commands, 1, self._ffi.new("VkCommandBuffer[]", [commands]))

    @property
    def submitted(self) -> int:
        return self._submitted

    def close(self) -> None:
        """Destroy everything. All memory must have been freed, and nothing be running."""
        ffi, lib, device = self._ffi, self._lib, self._device
        for pipeline in self._pipelines:
            lib.vkDestroyPipeline(device, pipeline.handle, ffi.NULL)
            lib.vkDestroyPipelineLayout(device, pipeline.layout, ffi.NULL)
            lib.vkDestroyDescriptorSetLayout(device, pipeline.slots, ffi.NULL)
        self._undo.close()
