"""A logical device: its extensions and features, its queue, and how failures become sentences."""

from __future__ import annotations

import struct
from contextlib import ExitStack
from typing import Any

from hal_compute.pool import OutOfMemoryError

from hal_core.plugin_api import DeviceUnavailableError

from .adapter import BFLOAT16_FEATURES, NV2_FEATURES, Adapter, api

_OUT_OF_MEMORY = {-1: "host", -2: "device"}
LOST = -4
#: Extensions that are switched on where they are listed.
OPTIONAL = ("VK_KHR_external_memory_fd", "VK_KHR_external_semaphore_fd", "VK_EXT_external_memory_host")


class LogicalDevice:
    """A VkDevice with one compute queue."""

    def __init__(self, adapter: Adapter, name: str) -> None:
        self._undo = ExitStack()  # what destroys all that was made, the latest first
        self.adapter, self.name, self.lost = adapter, name, False
        self._ffi, self._lib = api()
        self._family, self._stamp_bits = adapter.queue  # 0 bits: no clock
        self._device = self._make_device()
        self._undo.callback(self._lib.vkDestroyDevice, self._device, self._ffi.NULL)
        queue = self._ffi.new("VkQueue*")
        self._lib.vkGetDeviceQueue(self._device, self._family, 0, queue)
        self._queue = queue[0]

    def _function(self, name: str) -> Any:
        """An extension's function; only where the extension is listed."""
        address = self._lib.vkGetDeviceProcAddr(self._device, self._ffi.new("char[]", name.encode()))
        return self._ffi.cast(f"PFN_{name}", address)

    def _make_device(self) -> Any:
        ffi, adapter = self._ffi, self.adapter
        if "VK_KHR_push_descriptor" not in adapter.extensions:
            raise DeviceUnavailableError(f"{self.name} has no VK_KHR_push_descriptor: update its driver")
        optional = [name for name in OPTIONAL if name in adapter.extensions]
        wanted, chain, keep = [b"VK_KHR_push_descriptor", *(name.encode() for name in optional)], ffi.NULL, []
        if "cooperative_matrix" in adapter.features:
            chain = ffi.new(
                "VkPhysicalDeviceCooperativeMatrixFeaturesKHR*", {"sType": 1000506000, "cooperativeMatrix": 1}
            )
            keep.append(chain)
            wanted.append(b"VK_KHR_cooperative_matrix")
            if any(name.startswith("nv2_") for name in adapter.features):
                raw = ffi.new("char[48]")
                bits = [int(f"nv2_{name}" in adapter.features) for name in NV2_FEATURES]
                after = int(ffi.cast("uintptr_t", chain))
                ffi.memmove(raw, struct.pack("IIQ7I", 1000593000, 0, after, *bits), 44)
                chain = ffi.cast("void*", raw)
                keep.append(raw)
                wanted.append(b"VK_NV_cooperative_matrix2")
        has = adapter.features.__contains__
        if has("full_subgroups"):
            sizes = {"sType": 1000225002, "pNext": chain, "computeFullSubgroups": 1}
            chain = ffi.new("VkPhysicalDeviceSubgroupSizeControlFeatures*", sizes)
            keep.append(chain)
            wanted.append(b"VK_EXT_subgroup_size_control")
        if has("bfloat16_matrix"):
            raw = ffi.new("char[32]")
            ffi.memmove(raw, struct.pack("IIQ3I", BFLOAT16_FEATURES, 0, int(ffi.cast("uintptr_t", chain)), 1, 0, 1), 28)
            chain = ffi.cast("void*", raw)
            keep.append(raw)
            wanted.append(b"VK_KHR_shader_bfloat16")
        v12 = ffi.new(
            "VkPhysicalDeviceVulkan12Features*",
            {
                "sType": 51,
                "pNext": chain,
                "timelineSemaphore": 1,
                "shaderFloat16": has("float16"),
                "vulkanMemoryModel": has("memory_model"),
                "vulkanMemoryModelDeviceScope": has("device_scope"),
            },
        )
        v11 = ffi.new(
            "VkPhysicalDeviceVulkan11Features*",
            {
                "sType": 49,
                "pNext": v12,
                "storageBuffer16BitAccess": has("storage16"),
            },
        )
        features = ffi.new("VkPhysicalDeviceFeatures2*", {"sType": 1000059000, "pNext": v11})
        priority = ffi.new("float[]", [1.0])
        queue = ffi.new(
            "VkDeviceQueueCreateInfo*",
            {
                "sType": 2,
                "queueFamilyIndex": self._family,
                "queueCount": 1,
                "pQueuePriorities": priority,
            },
        )
        names = [ffi.new("char[]", name) for name in wanted]
        pointers = ffi.new("char*[]", names)
        return self._made(
            "VkDevice*",
            "vkCreateDevice",
            "VkDeviceCreateInfo*",
            {
                "sType": 3,
                "pNext": features,
                "queueCreateInfoCount": 1,
                "pQueueCreateInfos": queue,
                "enabledExtensionCount": len(names),
                "ppEnabledExtensionNames": pointers,
            },
            first=adapter.handle,
        )

    def _check(self, result: int, what: str, nbytes: int = 0) -> None:
        """Raise what a VkResult means; `what` was being done, `nbytes` asked for. The sentences name the way out."""
        if not result:
            return
        if result in _OUT_OF_MEMORY:
            raise OutOfMemoryError(self.name, _OUT_OF_MEMORY[result], what, nbytes, self.adapter.memory)
        if result == LOST:
            self.lost = True
            raise DeviceUnavailableError(f"{self.name} was lost during {what}: close its session and open it again")
        raise DeviceUnavailableError(
            f"{self.name} failed in {what} (VkResult {result}): update its driver, or report it"
        )

    def _held(self, name: str, info: dict[str, Any]) -> Any:
        """The object vkCreate`name` makes, which is destroyed with the device."""
        handle = self._made(f"Vk{name}*", f"vkCreate{name}", f"Vk{name}CreateInfo*", info)
        self._undo.callback(getattr(self._lib, f"vkDestroy{name}"), self._device, handle, self._ffi.NULL)
        return handle

    def _made(self, kind: str, call: str, info_kind: str, info: dict[str, Any], first: Any = None) -> Any:
        """The object that vkCreate...(device, info, NULL, &object) makes."""
        ffi = self._ffi
        made = ffi.new(kind)
        owner = self._device if first is None else first
        self._check(getattr(self._lib, call)(owner, ffi.new(info_kind, info), ffi.NULL, made), call)
        return made[0]
