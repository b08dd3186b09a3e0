"""Vulkan compute, and the only file that speaks Vulkan: devices, memory, pipelines, command buffers, one queue.

Built on the cffi layer of the `vulkan` package (`ffi` and `lib`, generated from the 1.3.275 headers), so that it can be
replaced without touching anything else. Structures newer than that are raw bytes here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hal_core import DeviceUnavailableError, MemoryLimitError

NO_LOADER = "no Vulkan loader (libvulkan.so.1); Debian: apt-get install libvulkan1"
NO_DRIVER = "loader found, no driver; install mesa-vulkan-drivers for a CPU device or set VK_DRIVER_FILES"
NO_PACKAGE = "the Python package vulkan is not installed; pip install vulkan"

_OUT_OF_MEMORY = {-1: "host", -2: "device"}
_LOST, _TIMEOUT, _NO_DRIVER = -4, 2, -9
_CPU = 4  # VkPhysicalDeviceType
_ORDER = {2: 0, 1: 1, 3: 2, 4: 3}  # discrete, integrated, virtual, CPU
_HOST_VISIBLE, _HOST_COHERENT, _DEVICE_LOCAL = 2, 4, 1
_DESCRIPTORS = {"s": 7, "u": 6}  # VkDescriptorType of a storage and a uniform buffer
_COMPUTE_STAGE = 0x20
_NV2_FEATURES = (
    "workgroup_scope", "flexible_dimensions", "reductions", "conversions", "per_element_operations", "tensor_addressing",
    "block_loads",
)  # fmt: skip


class UnavailableError(Exception):
    """Why there is no Vulkan here, in one sentence with the fix."""


class Adapter(NamedTuple):
    """A physical device.

    Attributes:
        handle: VkPhysicalDevice. is_cpu: a driver that runs on the host's processor. api: (major, minor, patch).
        uuid: of the driver and device, in hex. cache_uuid: of the pipeline caches that the driver takes.
        memory: bytes of the heap that programs work in. extensions: names.
        features: what this package may use, by name; each bit was asked for. limits: by name, see `_adapter`.
    """

    handle: Any
    name: str
    vendor: str
    is_cpu: bool
    api: tuple[int, int, int]
    driver: str
    uuid: str
    cache_uuid: bytes
    memory: int
    extensions: frozenset[str]
    features: frozenset[str]
    limits: dict[str, int]


@lru_cache(maxsize=1)
def _api() -> tuple[Any, Any]:
    """cffi's (ffi, lib). Raises UnavailableError."""
    try:
        from vulkan._vulkan import ffi, lib
    except ImportError as error:
        raise UnavailableError(f"{NO_PACKAGE} ({error})") from error
    except OSError as error:  # the package loads the loader when it is imported
        raise UnavailableError(NO_LOADER) from error
    return ffi, lib


@lru_cache(maxsize=1)
def _instance() -> Any:
    """One VkInstance for the process. Raises UnavailableError."""
    ffi, lib = _api()
    app = ffi.new("VkApplicationInfo*", {"sType": 0, "apiVersion": (1 << 22) | (3 << 12)})
    info = ffi.new("VkInstanceCreateInfo*", {"sType": 1, "pApplicationInfo": app})
    made = ffi.new("VkInstance*")
    result = lib.vkCreateInstance(info, ffi.NULL, made)
    if result == _NO_DRIVER:
        raise UnavailableError(NO_DRIVER)
    if result:
        raise UnavailableError(f"the Vulkan loader could not start (VkResult {result}); check the installed drivers")
    return made[0]


@lru_cache(maxsize=1)
def adapters() -> tuple[Adapter, ...]:
    """Physical devices with Vulkan 1.2 and a compute queue, GPUs first. Raises UnavailableError where there is none."""
    ffi, lib = _api()
    count = ffi.new("uint32_t*")
    result = lib.vkEnumeratePhysicalDevices(_instance(), count, ffi.NULL)
    if result or not count[0]:
        raise UnavailableError(NO_DRIVER)
    handles = ffi.new("VkPhysicalDevice[]", count[0])
    lib.vkEnumeratePhysicalDevices(_instance(), count, handles)
    found = []
    for handle in handles:
        adapter, kind = _adapter(ffi, lib, handle)
        if adapter.api >= (1, 2, 0) and "timeline_semaphore" in adapter.features:
            found.append((_ORDER.get(kind, 4), adapter))
    if not found:
        raise UnavailableError("no device with Vulkan 1.2 and timeline semaphores; update the driver")
    return tuple(adapter for _, adapter in sorted(found, key=lambda pair: pair[0]))


def _adapter(ffi: Any, lib: Any, handle: Any) -> tuple[Adapter, int]:
    driver = ffi.new("VkPhysicalDeviceDriverProperties*", {"sType": 1000196000})
    ids = ffi.new("VkPhysicalDeviceIDProperties*", {"sType": 1000071004, "pNext": driver})
    group = ffi.new("VkPhysicalDeviceSubgroupProperties*", {"sType": 1000094000, "pNext": ids})
    properties = ffi.new("VkPhysicalDeviceProperties2*", {"sType": 1000059001, "pNext": group})
    lib.vkGetPhysicalDeviceProperties2(handle, properties)
    base = properties.properties
    version = base.apiVersion
    memory = ffi.new("VkPhysicalDeviceMemoryProperties*")
    lib.vkGetPhysicalDeviceMemoryProperties(handle, memory)
    heaps = [memory.memoryHeaps[n] for n in range(memory.memoryHeapCount)]
    local = [int(h.size) for h in heaps if h.flags & 1] or [int(h.size) for h in heaps]
    extensions = _extensions(ffi, lib, handle)
    limits = {
        name: int(getattr(base.limits, name)) for name in (
            "maxStorageBufferRange", "maxTexelBufferElements", "maxComputeSharedMemorySize", "maxPushConstantsSize",
            "minStorageBufferOffsetAlignment", "maxComputeWorkGroupInvocations", "maxUniformBufferRange",
        )
    }  # fmt: skip
    limits["subgroupSize"], limits["subgroupOperations"] = int(group.subgroupSize), int(group.supportedOperations)
    name = ffi.string(driver.driverName).decode(), ffi.string(driver.driverInfo).decode()
    adapter = Adapter(
        handle, ffi.string(base.deviceName).decode(), _VENDORS.get(base.vendorID, f"vendor {base.vendorID:#x}"),
        base.deviceType == _CPU, (version >> 22, version >> 12 & 0x3FF, version & 0xFFF), " ".join(filter(None, name)),
        bytes(ids.driverUUID).hex() + bytes(ids.deviceUUID).hex(), bytes(base.pipelineCacheUUID), max(local), extensions,
        _features(ffi, lib, handle, extensions), limits | {"timestampPeriod": int(base.limits.timestampPeriod * 1000)},
    )  # fmt: skip
    return adapter, base.deviceType


_VENDORS = {
    0x1002: "AMD", 0x10DE: "NVIDIA", 0x8086: "Intel", 0x13B5: "Arm", 0x5143: "Qualcomm", 0x106B: "Apple", 0x10005: "Mesa",
}  # fmt: skip


def _extensions(ffi: Any, lib: Any, handle: Any) -> frozenset[str]:
    count = ffi.new("uint32_t*")
    lib.vkEnumerateDeviceExtensionProperties(handle, ffi.NULL, count, ffi.NULL)
    listed = ffi.new("VkExtensionProperties[]", max(count[0], 1))
    lib.vkEnumerateDeviceExtensionProperties(handle, ffi.NULL, count, listed)
    return frozenset(ffi.string(listed[n].extensionName).decode() for n in range(count[0]))


def _features(ffi: Any, lib: Any, handle: Any, extensions: frozenset[str]) -> frozenset[str]:
    """The features that are reported, bit by bit; extension structures are passed only where the extension is listed."""
    raw = ffi.new("char[48]")
    chain = ffi.NULL
    has_nv2 = "VK_NV_cooperative_matrix2" in extensions
    if has_nv2:
        ffi.memmove(raw, struct.pack("IIQ", 1000593000, 0, 0), 16)
        chain = ffi.cast("void*", raw)
    matrix = ffi.new("VkPhysicalDeviceCooperativeMatrixFeaturesKHR*", {"sType": 1000506000, "pNext": chain})
    if "VK_KHR_cooperative_matrix" in extensions:
        chain = matrix
    v12 = ffi.new("VkPhysicalDeviceVulkan12Features*", {"sType": 51, "pNext": chain})
    v11 = ffi.new("VkPhysicalDeviceVulkan11Features*", {"sType": 49, "pNext": v12})
    features = ffi.new("VkPhysicalDeviceFeatures2*", {"sType": 1000059000, "pNext": v11})
    lib.vkGetPhysicalDeviceFeatures2(handle, features)
    found = {
        "timeline_semaphore": v12.timelineSemaphore, "float16": v12.shaderFloat16, "storage16": v11.storageBuffer16BitAccess,
        "memory_model": v12.vulkanMemoryModel, "cooperative_matrix": matrix.cooperativeMatrix,
    }  # fmt: skip
    if has_nv2:
        bits = struct.unpack("7I", bytes(ffi.buffer(raw, 44))[16:44])
        found |= {f"nv2_{name}": bit for name, bit in zip(_NV2_FEATURES, bits, strict=True)}
    return frozenset(name for name, bit in found.items() if bit)


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


class Pipeline(NamedTuple):
    handle: Any
    layout: Any
    slots: Any
    kinds: str


class Gpu:
    """A logical device with one compute queue. Not thread-safe: the session holds its lock."""

    def __init__(self, adapter: Adapter, name: str, cache: Path | None) -> None:
        """`cache` is the file of the pipeline cache; None for none. A cache from another driver is ignored."""
        self.adapter, self.name, self._cache_path = adapter, name, cache
        self._ffi, self._lib = _api()
        ffi, lib = self._ffi, self._lib
        families = ffi.new("uint32_t*")
        lib.vkGetPhysicalDeviceQueueFamilyProperties(adapter.handle, families, ffi.NULL)
        listed = ffi.new("VkQueueFamilyProperties[]", families[0])
        lib.vkGetPhysicalDeviceQueueFamilyProperties(adapter.handle, families, listed)
        self._family = next(n for n in range(families[0]) if listed[n].queueFlags & 2)
        self._timestamps = listed[self._family].timestampValidBits > 0
        self._device = self._make_device()
        queue = ffi.new("VkQueue*")
        lib.vkGetDeviceQueue(self._device, self._family, 0, queue)
        self._queue = queue[0]
        address = lib.vkGetDeviceProcAddr(self._device, ffi.new("char[]", b"vkCmdPushDescriptorSetKHR"))
        self._push = ffi.cast("PFN_vkCmdPushDescriptorSetKHR", address)
        self._memory_types = ffi.new("VkPhysicalDeviceMemoryProperties*")
        lib.vkGetPhysicalDeviceMemoryProperties(adapter.handle, self._memory_types)
        self._commands = self._made("VkCommandPool*", "vkCreateCommandPool", "VkCommandPoolCreateInfo*",
                                    {"sType": 39, "flags": 2, "queueFamilyIndex": self._family})  # fmt: skip
        kind = ffi.new("VkSemaphoreTypeCreateInfo*", {"sType": 1000207002, "semaphoreType": 1})
        self._semaphore = ffi.new("VkSemaphore*")
        self._semaphore[0] = self._made("VkSemaphore*", "vkCreateSemaphore", "VkSemaphoreCreateInfo*",
                                        {"sType": 9, "pNext": kind})  # fmt: skip
        self._queries = self._made("VkQueryPool*", "vkCreateQueryPool", "VkQueryPoolCreateInfo*",
                                   {"sType": 11, "queryType": 2, "queryCount": 2})  # fmt: skip
        self._submitted = 0
        self._pipelines: list[Pipeline] = []
        self._cache = self._open_cache()

    def _make_device(self) -> Any:
        ffi, adapter = self._ffi, self.adapter
        if "VK_KHR_push_descriptor" not in adapter.extensions:
            raise DeviceUnavailableError(f"{self.name} has no VK_KHR_push_descriptor: update its driver")
        wanted, chain, keep = [b"VK_KHR_push_descriptor"], ffi.NULL, []
        if "cooperative_matrix" in adapter.features:
            chain = ffi.new("VkPhysicalDeviceCooperativeMatrixFeaturesKHR*", {"sType": 1000506000, "cooperativeMatrix": 1})
            keep.append(chain)
            wanted.append(b"VK_KHR_cooperative_matrix")
            if any(name.startswith("nv2_") for name in adapter.features):
                raw = ffi.new("char[48]")
                bits = [int(f"nv2_{name}" in adapter.features) for name in _NV2_FEATURES]
                after = int(ffi.cast("uintptr_t", chain))
                ffi.memmove(raw, struct.pack("IIQ7I", 1000593000, 0, after, *bits), 44)
                chain = ffi.cast("void*", raw)
                keep.append(raw)
                wanted.append(b"VK_NV_cooperative_matrix2")
        has = adapter.features.__contains__
        v12 = ffi.new("VkPhysicalDeviceVulkan12Features*", {
            "sType": 51, "pNext": chain, "timelineSemaphore": 1, "shaderFloat16": has("float16"),
            "vulkanMemoryModel": has("memory_model"),
        })  # fmt: skip
        v11 = ffi.new("VkPhysicalDeviceVulkan11Features*", {
            "sType": 49, "pNext": v12, "storageBuffer16BitAccess": has("storage16"),
        })  # fmt: skip
        features = ffi.new("VkPhysicalDeviceFeatures2*", {"sType": 1000059000, "pNext": v11})
        priority = ffi.new("float[]", [1.0])
        queue = ffi.new("VkDeviceQueueCreateInfo*", {
            "sType": 2, "queueFamilyIndex": self._family, "queueCount": 1, "pQueuePriorities": priority,
        })  # fmt: skip
        names = [ffi.new("char[]", name) for name in wanted]
        pointers = ffi.new("char*[]", names)
        return self._made("VkDevice*", "vkCreateDevice", "VkDeviceCreateInfo*", {
            "sType": 3, "pNext": features, "queueCreateInfoCount": 1, "pQueueCreateInfos": queue,
            "enabledExtensionCount": len(names), "ppEnabledExtensionNames": pointers,
        }, first=adapter.handle)  # fmt: skip

    def _check(self, result: int, what: str, nbytes: int = 0) -> None:
        if not result:
            return
        if result in _OUT_OF_MEMORY:
            raise MemoryLimitError(self.name, nbytes, 0, self.adapter.memory)
        if result == _LOST:
            raise DeviceUnavailableError(f"{self.name} was lost during {what}: close its session and open it again")
        raise DeviceUnavailableError(f"{self.name} failed in {what} (VkResult {result}): update its driver, or report it")

    def _made(self, kind: str, call: str, info_kind: str, info: dict[str, Any], first: Any = None) -> Any:
        """The object that vkCreate...(device, info, NULL, &object) makes."""
        ffi = self._ffi
        made = ffi.new(kind)
        owner = self._device if first is None else first
        self._check(getattr(self._lib, call)(owner, ffi.new(info_kind, info), ffi.NULL, made), call)
        return made[0]

    # Memory

    def allocate(self, nbytes: int, *, host: bool) -> Memory:
        """Memory that shaders read and write; mapped where `host`."""
        ffi, lib = self._ffi, self._lib
        usage = 0x10 | 0x20 | 1 | 2  # uniform, storage, copy source and target
        buffer = self._made("VkBuffer*", "vkCreateBuffer", "VkBufferCreateInfo*", {"sType": 12, "size": nbytes, "usage": usage})
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

    # Pipelines

    def _open_cache(self) -> Any:
        data = b""
        if self._cache_path is not None:
            try:
                data = self._cache_path.read_bytes()
            except OSError:
                data = b""
        info: dict[str, Any] = {"sType": 17}
        if data[16:32] == self.adapter.cache_uuid:  # the header's place for it; another driver's cache is left alone
            info |= {"initialDataSize": len(data), "pInitialData": self._ffi.from_buffer(data)}
        return self._made("VkPipelineCache*", "vkCreatePipelineCache", "VkPipelineCacheCreateInfo*", info)

    def cache_data(self) -> bytes:
        """The pipeline cache's bytes."""
        size = self._ffi.new("size_t*")
        self._lib.vkGetPipelineCacheData(self._device, self._cache, size, self._ffi.NULL)
        data = self._ffi.new("char[]", max(size[0], 1))
        self._lib.vkGetPipelineCacheData(self._device, self._cache, size, data)
        return bytes(self._ffi.buffer(data, size[0]))

    def pipeline(self, spirv: bytes, kinds: str, push_bytes: int, constants: Sequence[int]) -> Pipeline:
        """A compute pipeline. `kinds` has "s" (storage buffer) or "u" (uniform buffer) for each binding from 0, `constants`
        the specialisation constants from 0."""
        ffi, lib, device = self._ffi, self._lib, self._device
        code = ffi.new("uint32_t[]", len(spirv) // 4)
        ffi.memmove(code, spirv, len(spirv))
        module = self._made("VkShaderModule*", "vkCreateShaderModule", "VkShaderModuleCreateInfo*",
                            {"sType": 16, "codeSize": len(spirv), "pCode": code})  # fmt: skip
        slots = ffi.new("VkDescriptorSetLayoutBinding[]", [
            {"binding": n, "descriptorType": _DESCRIPTORS[kind], "descriptorCount": 1, "stageFlags": _COMPUTE_STAGE}
            for n, kind in enumerate(kinds)
        ])  # fmt: skip
        sets = ffi.new("VkDescriptorSetLayout*")
        sets[0] = self._made("VkDescriptorSetLayout*", "vkCreateDescriptorSetLayout", "VkDescriptorSetLayoutCreateInfo*",
                             {"sType": 32, "flags": 1, "bindingCount": len(kinds), "pBindings": slots})  # fmt: skip
        push = ffi.new("VkPushConstantRange*", {"stageFlags": _COMPUTE_STAGE, "offset": 0, "size": push_bytes})
        layout = self._made("VkPipelineLayout*", "vkCreatePipelineLayout", "VkPipelineLayoutCreateInfo*", {
            "sType": 30, "setLayoutCount": 1, "pSetLayouts": sets, "pushConstantRangeCount": 1, "pPushConstantRanges": push,
        })  # fmt: skip
        data = ffi.new("int32_t[]", list(constants) or [0])
        places = [{"constantID": n, "offset": 4 * n, "size": 4} for n in range(len(constants))]
        entries = ffi.new("VkSpecializationMapEntry[]", places)
        special = ffi.new("VkSpecializationInfo*", {
            "mapEntryCount": len(constants), "pMapEntries": entries, "dataSize": 4 * len(constants), "pData": data,
        })  # fmt: skip
        entry = ffi.new("char[]", b"main")
        info = ffi.new("VkComputePipelineCreateInfo*", {
            "sType": 29, "layout": layout,
            "stage": {"sType": 18, "stage": _COMPUTE_STAGE, "module": module, "pName": entry, "pSpecializationInfo": special},
        })  # fmt: skip
        made = ffi.new("VkPipeline*")
        result = lib.vkCreateComputePipelines(device, self._cache, 1, info, ffi.NULL, made)
        lib.vkDestroyShaderModule(device, module, ffi.NULL)
        self._check(result, "vkCreateComputePipelines")
        self._pipelines.append(Pipeline(made[0], layout, sets[0], kinds))
        return self._pipelines[-1]

    # Commands

    def begin(self) -> Any:
        """A command buffer that is being recorded; it may be submitted many times."""
        ffi, lib = self._ffi, self._lib
        made = ffi.new("VkCommandBuffer*")
        info = ffi.new("VkCommandBufferAllocateInfo*", {"sType": 40, "commandPool": self._commands, "commandBufferCount": 1})
        self._check(lib.vkAllocateCommandBuffers(self._device, info, made), "vkAllocateCommandBuffers")
        start = ffi.new("VkCommandBufferBeginInfo*", {"sType": 42})
        self._check(lib.vkBeginCommandBuffer(made[0], start), "vkBeginCommandBuffer")
        return made[0]

    def dispatch(self, commands: Any, pipeline: Pipeline, bound: Sequence[Bound], push: bytes, groups: Sequence[int]) -> None:
        ffi, lib = self._ffi, self._lib
        lib.vkCmdBindPipeline(commands, 1, pipeline.handle)
        buffers = ffi.new("VkDescriptorBufferInfo[]", [
            {"buffer": b.block.buffer, "offset": b.offset, "range": b.size} for b in bound
        ])  # fmt: skip
        writes = ffi.new("VkWriteDescriptorSet[]", [
            {"sType": 35, "dstBinding": n, "descriptorCount": 1, "descriptorType": _DESCRIPTORS[kind],
             "pBufferInfo": buffers + n}
            for n, kind in enumerate(pipeline.kinds)
        ])  # fmt: skip
        self._push(commands, 1, pipeline.layout, 0, len(bound), writes)
        lib.vkCmdPushConstants(commands, pipeline.layout, _COMPUTE_STAGE, 0, len(push), ffi.from_buffer(push))
        lib.vkCmdDispatch(commands, *groups)

    def copy(self, commands: Any, source: Bound, target: Bound) -> None:
        region = self._ffi.new("VkBufferCopy*", {"srcOffset": source.offset, "dstOffset": target.offset, "size": source.size})
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

