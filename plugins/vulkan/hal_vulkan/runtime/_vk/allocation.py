"""Memory of a device: allocated, mapped, and seen by shaders through one buffer over all of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from hal_core.plugin_api import DeviceUnavailableError

from .adapter import OPAQUE_FD, Adapter
from .logical import LogicalDevice

_DEVICE_LOCAL, _HOST_VISIBLE, _HOST_COHERENT, _HOST_CACHED = 1, 2, 4, 8
_EXPORTED_UNIT = 2 << 20
_HOST_ALLOCATION = 0x80  # VkExternalMemoryHandleTypeFlags


class Memory(NamedTuple):
    """One allocation of `nbytes`: VkDeviceMemory, a VkBuffer over all of it, and its bytes where mapped (None
    elsewhere).
    """

    memory: Any
    buffer: Any
    mapped: Any
    nbytes: int


class Bound(NamedTuple):
    """A range of memory that a shader sees as a storage or uniform buffer."""

    block: Memory
    offset: int
    size: int


class Allocating(LogicalDevice):
    """Allocates, imports, exports and frees memory."""

    def __init__(self, adapter: Adapter, name: str) -> None:
        super().__init__(adapter, name)
        self._memory_types = self._ffi.new("VkPhysicalDeviceMemoryProperties*")
        self._lib.vkGetPhysicalDeviceMemoryProperties(adapter.handle, self._memory_types)
        if "VK_EXT_external_memory_host" in adapter.extensions:
            self._pointer_properties = self._function("vkGetMemoryHostPointerPropertiesEXT")

    def allocate(self, nbytes: int, *, host: bool, exported: bool = False) -> Memory:
        """Memory that shaders read and write, in one buffer.

        Args:
            host: mapped, in the processor's caches where the device has such memory (reading from any other is slow).
            exported: that `export` can hand to another interface of the same card.
        """
        if exported:
            nbytes = -(-nbytes // _EXPORTED_UNIT) * _EXPORTED_UNIT  # no rest that the other interface would not map
        usage, handle = _HOST_VISIBLE | _HOST_COHERENT if host else _DEVICE_LOCAL, OPAQUE_FD if exported else 0
        buffer, needs = self._buffer(nbytes, handle)
        chain = self._ffi.NULL
        if exported:  # dedicated, since this buffer has all of it
            whole = self._ffi.new("VkMemoryDedicatedAllocateInfo*", {"sType": 1000127001, "buffer": buffer})
            chain = self._ffi.new(
                "VkExportMemoryAllocateInfo*", {"sType": 1000072002, "pNext": whole, "handleTypes": handle}
            )
        try:
            kind = self._kind(needs.memoryTypeBits, usage, host)
        except DeviceUnavailableError:
            self._lib.vkDestroyBuffer(self._device, buffer, self._ffi.NULL)
            raise
        return self._bound(nbytes, buffer, needs.size, kind, chain, host)

    def import_host(self, address: int, nbytes: int) -> Memory | None:
        """The program's own memory as the device's, until it is freed; None where the driver does not take it.

        Both must be multiples of the limit "hostPointerAlignment".
        """
        ffi = self._ffi
        properties = ffi.new("VkMemoryHostPointerPropertiesEXT*", {"sType": 1000178001})
        pointer = ffi.cast("void*", address)
        if self._pointer_properties(self._device, _HOST_ALLOCATION, pointer, properties):
            return None
        buffer, needs = self._buffer(nbytes, _HOST_ALLOCATION)
        bits = needs.memoryTypeBits & properties.memoryTypeBits
        if not bits or needs.size > nbytes:
            self._lib.vkDestroyBuffer(self._device, buffer, ffi.NULL)
            return None
        chain = ffi.new(
            "VkImportMemoryHostPointerInfoEXT*",
            {
                "sType": 1000178000,
                "handleType": _HOST_ALLOCATION,
                "pHostPointer": pointer,
            },
        )
        return self._bound(nbytes, buffer, nbytes, (bits & -bits).bit_length() - 1, chain, False)

    def _buffer(self, nbytes: int, handle: int) -> tuple[Any, Any]:
        """(VkBuffer, its VkMemoryRequirements); `handle` is the VkExternalMemoryHandleTypeFlags of its memory, or 0."""
        ffi = self._ffi
        outside = ffi.new("VkExternalMemoryBufferCreateInfo*", {"sType": 1000072000, "handleTypes": handle})
        usage = 0x10 | 0x20 | 1 | 2  # uniform, storage, copy source and target
        buffer = self._made(
            "VkBuffer*",
            "vkCreateBuffer",
            "VkBufferCreateInfo*",
            {
                "sType": 12,
                "size": nbytes,
                "usage": usage,
                "pNext": outside if handle else ffi.NULL,
            },
        )
        needs = ffi.new("VkMemoryRequirements*")
        self._lib.vkGetBufferMemoryRequirements(self._device, buffer, needs)
        return buffer, needs

    def _kind(self, bits: int, wanted: int, cached: bool) -> int:
        """Index of a memory type among `bits` that has the wanted properties; the processor's caches where `cached`."""
        types = [self._memory_types.memoryTypes[n].propertyFlags for n in range(self._memory_types.memoryTypeCount)]
        fit = [n for n, flags in enumerate(types) if bits >> n & 1 and flags & wanted == wanted]
        if not fit:
            raise DeviceUnavailableError(
                f"{self.name} has no memory of properties {wanted:#x} for buffers: update its driver"
            )
        return next((n for n in fit if types[n] & _HOST_CACHED), fit[0]) if cached else fit[0]

    def _bound(self, nbytes: int, buffer: Any, size: int, kind: int, chain: Any, mapped: bool) -> Memory:
        """Allocate, bind and map; nothing is left behind where one of them fails."""
        ffi, lib, device = self._ffi, self._lib, self._device
        memory, pointer = ffi.new("VkDeviceMemory*"), ffi.new("void**")
        info = ffi.new(
            "VkMemoryAllocateInfo*", {"sType": 5, "pNext": chain, "allocationSize": size, "memoryTypeIndex": kind}
        )
        what = "vkAllocateMemory"
        result = lib.vkAllocateMemory(device, info, ffi.NULL, memory)
        if not result:
            what = "vkBindBufferMemory"
            result = lib.vkBindBufferMemory(device, buffer, memory[0], 0)
        if not result and mapped:
            what = "vkMapMemory"
            result = lib.vkMapMemory(device, memory[0], 0, nbytes, 0, pointer)
        if result:
            self.free(Memory(memory[0], buffer, None, nbytes))
            self._check(result, what, nbytes)
        return Memory(memory[0], buffer, ffi.buffer(pointer[0], nbytes) if mapped else None, nbytes)

    def export(self, block: Memory) -> int:
        """A file descriptor of memory allocated with `exported`; whoever imports it owns it."""
        ffi = self._ffi
        made = ffi.new("int*")
        info = ffi.new("VkMemoryGetFdInfoKHR*", {"sType": 1000074002, "memory": block.memory, "handleType": OPAQUE_FD})
        self._check(self._function("vkGetMemoryFdKHR")(self._device, info, made), "vkGetMemoryFdKHR")
        return int(made[0])

    def free(self, block: Memory) -> None:
        ffi, lib = self._ffi, self._lib
        lib.vkDestroyBuffer(self._device, block.buffer, ffi.NULL)
        lib.vkFreeMemory(self._device, block.memory, ffi.NULL)
