"""Memory of a device: allocated, mapped, and seen by shaders through one buffer over all of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from .adapter import Adapter
from .logical import LogicalDevice

_HOST_VISIBLE, _HOST_COHERENT, _DEVICE_LOCAL = 2, 4, 1


class Memory(NamedTuple):
    """One allocation: VkDeviceMemory, a VkBuffer over all of it, and its bytes where mapped (None elsewhere)."""

    memory: Any
    buffer: Any
    mapped: Any


class Bound(NamedTuple):
    """A range of memory that a shader sees as a storage or uniform buffer."""

    block: Memory
    offset: int
    size: int


class Allocating(LogicalDevice):
    """Allocates and frees."""

    def __init__(self, adapter: Adapter, name: str) -> None:
        super().__init__(adapter, name)
        self._memory_types = self._ffi.new("VkPhysicalDeviceMemoryProperties*")
        self._lib.vkGetPhysicalDeviceMemoryProperties(adapter.handle, self._memory_types)

    def allocate(self, nbytes: int, *, host: bool) -> Memory:
        """Memory that shaders read and write; mapped where `host`."""
        ffi, lib = self._ffi, self._lib
        usage = 0x10 | 0x20 | 1 | 2  # uniform, storage, copy source and target
        buffer = self._made(
            "VkBuffer*", "vkCreateBuffer", "VkBufferCreateInfo*", {"sType": 12, "size": nbytes, "usage": usage}
        )
        needs = ffi.new("VkMemoryRequirements*")
        lib.vkGetBufferMemoryRequirements(self._device, buffer, needs)
        wanted = (_HOST_VISIBLE | _HOST_COHERENT) if host else _DEVICE_LOCAL
        types = [self._memory_types.memoryTypes[n].propertyFlags for n in range(self._memory_types.memoryTypeCount)]
        index = next(n for n, flags in enumerate(types) if needs.memoryTypeBits >> n & 1 and flags & wanted == wanted)
        made = ffi.new("VkDeviceMemory*")
        info = ffi.new("VkMemoryAllocateInfo*", {"sType": 5, "allocationSize": needs.size, "memoryTypeIndex": index})
        result = lib.vkAllocateMemory(self._device, info, ffi.NULL, made)
        if result:
            lib.vkDestroyBuffer(self._device, buffer, ffi.NULL)
            self._check(result, "vkAllocateMemory", nbytes)
        self._check(lib.vkBindBufferMemory(self._device, buffer, made[0], 0), "vkBindBufferMemory")
        mapped = None
        if host:
            pointer = ffi.new("void**")
            self._check(lib.vkMapMemory(self._device, made[0], 0, nbytes, 0, pointer), "vkMapMemory")
            mapped = ffi.buffer(pointer[0], nbytes)
        return Memory(made[0], buffer, mapped)

    def free(self, block: Memory) -> None:
        ffi, lib = self._ffi, self._lib
        lib.vkDestroyBuffer(self._device, block.buffer, ffi.NULL)
        lib.vkFreeMemory(self._device, block.memory, ffi.NULL)
