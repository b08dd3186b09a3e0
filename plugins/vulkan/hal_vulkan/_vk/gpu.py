"""Command buffers, and the one queue that runs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hal_core import DeviceUnavailableError

from .adapter import Adapter
from .allocation import Bound
from .pipeline import COMPUTE_STAGE, DESCRIPTORS, Compiling, Pipeline

_TIMEOUT = 2


class Gpu(Compiling):
    """A logical device with one compute queue. Not thread-safe: the session holds its lock."""

    def __init__(self, adapter: Adapter, name: str, cache: Path | None) -> None:
        super().__init__(adapter, name, cache)
        ffi, lib = self._ffi, self._lib
        address = lib.vkGetDeviceProcAddr(self._device, ffi.new("char[]", b"vkCmdPushDescriptorSetKHR"))
        self._push = ffi.cast("PFN_vkCmdPushDescriptorSetKHR", address)
        self._commands = self._made("VkCommandPool*", "vkCreateCommandPool", "VkCommandPoolCreateInfo*",
                                    {"sType": 39, "flags": 2, "queueFamilyIndex": self._family})  # fmt: skip
        kind = ffi.new("VkSemaphoreTypeCreateInfo*", {"sType": 1000207002, "semaphoreType": 1})
        self._semaphore = ffi.new("VkSemaphore*")
        self._semaphore[0] = self._made("VkSemaphore*", "vkCreateSemaphore", "VkSemaphoreCreateInfo*",
                                        {"sType": 9, "pNext": kind})  # fmt: skip
        self._queries = self._made("VkQueryPool*", "vkCreateQueryPool", "VkQueryPoolCreateInfo*",
                                   {"sType": 11, "queryType": 2, "queryCount": 2})  # fmt: skip
        self._submitted = 0

    def begin(self) -> Any:
        """A command buffer that is being recorded; it may be submitted many times."""
        ffi, lib = self._ffi, self._lib
        made = ffi.new("VkCommandBuffer*")
        info = ffi.new(
            "VkCommandBufferAllocateInfo*", {"sType": 40, "commandPool": self._commands, "commandBufferCount": 1}
        )
        self._check(lib.vkAllocateCommandBuffers(self._device, info, made), "vkAllocateCommandBuffers")
        start = ffi.new("VkCommandBufferBeginInfo*", {"sType": 42})
        self._check(lib.vkBeginCommandBuffer(made[0], start), "vkBeginCommandBuffer")
        return made[0]

    def dispatch(
        self, commands: Any, pipeline: Pipeline, bound: Sequence[Bound], push: bytes, groups: Sequence[int]
    ) -> None:
        ffi, lib = self._ffi, self._lib
        lib.vkCmdBindPipeline(commands, 1, pipeline.handle)
        buffers = ffi.new("VkDescriptorBufferInfo[]", [
            {"buffer": b.block.buffer, "offset": b.offset, "range": b.size} for b in bound
        ])  # fmt: skip
        writes = ffi.new("VkWriteDescriptorSet[]", [
            {"sType": 35, "dstBinding": n, "descriptorCount": 1, "descriptorType": DESCRIPTORS[kind],
             "pBufferInfo": buffers + n}
            for n, kind in enumerate(pipeline.kinds)
        ])  # fmt: skip
        self._push(commands, 1, pipeline.layout, 0, len(bound), writes)
        lib.vkCmdPushConstants(commands, pipeline.layout, COMPUTE_STAGE, 0, len(push), ffi.from_buffer(push))
        lib.vkCmdDispatch(commands, *groups)

    def copy(self, commands: Any, source: Bound, target: Bound) -> None:
        region = self._ffi.new(
            "VkBufferCopy*", {"srcOffset": source.offset, "dstOffset": target.offset, "size": source.size}
        )
        self._lib.vkCmdCopyBuffer(commands, source.block.buffer, target.block.buffer, 1, region)

    def barrier(self, commands: Any) -> None:
        """What was recorded before is finished and visible to shaders, copies and the host after."""
        ffi, lib = self._ffi, self._lib
        reads, writes, host = 0x8 | 0x20 | 0x800, 0x40 | 0x1000, 0x2000
        memory = ffi.new("VkMemoryBarrier*", {
            "sType": 46, "srcAccessMask": writes | reads, "dstAccessMask": reads | writes | host,
        })  # fmt: skip
        before, after = 0x800 | 0x1000, 0x800 | 0x1000 | 0x4000
        lib.vkCmdPipelineBarrier(commands, before, after, 0, 1, memory, 0, ffi.NULL, 0, ffi.NULL)

    def stamp(self, commands: Any, place: int) -> None:
        """Write time stamp 0 (before everything) or 1 (after everything recorded so far)."""
        if self._timestamps:
            if place == 0:
                self._lib.vkCmdResetQueryPool(commands, self._queries, 0, 2)
            self._lib.vkCmdWriteTimestamp(commands, 1 if place == 0 else 0x2000, self._queries, place)

    def stamped_seconds(self) -> float | None:
        """Device time between the stamps of the last finished submission; None where the queue has no clock."""
        if not self._timestamps:
            return None
        ffi = self._ffi
        stamps = ffi.new("uint64_t[2]")
        result = self._lib.vkGetQueryPoolResults(self._device, self._queries, 0, 2, 16, stamps, 8, 1)
        if result:
            return None
        return float(stamps[1] - stamps[0]) * self.adapter.limits["timestampPeriod"] * 1e-12

    def end(self, commands: Any) -> None:
        self._check(self._lib.vkEndCommandBuffer(commands), "vkEndCommandBuffer")

    def submit(self, commands: Any) -> int:
        """Put recorded commands into the queue; the number to wait for."""
        ffi, lib = self._ffi, self._lib
        self._submitted += 1
        value = ffi.new("uint64_t[]", [self._submitted])
        timeline = ffi.new("VkTimelineSemaphoreSubmitInfo*", {
            "sType": 1000207003, "signalSemaphoreValueCount": 1, "pSignalSemaphoreValues": value,
        })  # fmt: skip
        buffers = ffi.new("VkCommandBuffer[]", [commands])
        info = ffi.new("VkSubmitInfo*", {
            "sType": 4, "pNext": timeline, "commandBufferCount": 1, "pCommandBuffers": buffers, "signalSemaphoreCount": 1,
            "pSignalSemaphores": self._semaphore,
        })  # fmt: skip
        self._check(lib.vkQueueSubmit(self._queue, 1, info, ffi.NULL), "vkQueueSubmit")
        return self._submitted

    def wait(self, number: int, what: str, timeout: float) -> None:
        """Until submission `number` is done.

        Raises:
            DeviceUnavailableError: after `timeout` seconds, naming `what`, or when the device is lost.
        """
        ffi = self._ffi
        value = ffi.new("uint64_t[]", [number])
        info = ffi.new("VkSemaphoreWaitInfo*", {
            "sType": 1000207004, "semaphoreCount": 1, "pSemaphores": self._semaphore, "pValues": value,
        })  # fmt: skip
        result = self._lib.vkWaitSemaphores(self._device, info, int(timeout * 1e9))
        if result == _TIMEOUT:
            raise DeviceUnavailableError(
                f"{self.name} did not {what} within {timeout:g} s: make the call smaller, or close and reopen the device"
            )
        self._check(result, what)

    def drop(self, commands: Any) -> None:
        """Give a command buffer back; it must not be running."""
        self._lib.vkFreeCommandBuffers(self._device, self._commands, 1, self._ffi.new("VkCommandBuffer[]", [commands]))

    @property
    def submitted(self) -> int:
        return self._submitted

    def close(self) -> None:
        """Destroy everything. All memory must have been freed."""
        ffi, lib, device = self._ffi, self._lib, self._device
        lib.vkDeviceWaitIdle(device)
        for pipeline in self._pipelines:
            lib.vkDestroyPipeline(device, pipeline.handle, ffi.NULL)
            lib.vkDestroyPipelineLayout(device, pipeline.layout, ffi.NULL)
            lib.vkDestroyDescriptorSetLayout(device, pipeline.slots, ffi.NULL)
        lib.vkDestroyPipelineCache(device, self._cache, ffi.NULL)
        lib.vkDestroyQueryPool(device, self._queries, ffi.NULL)
        lib.vkDestroySemaphore(device, self._semaphore[0], ffi.NULL)
        lib.vkDestroyCommandPool(device, self._commands, ffi.NULL)
        lib.vkDestroyDevice(device, ffi.NULL)
