"""The loader, the instance, and what each physical device reports."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any, NamedTuple

from .matrices import MatrixShape, matrix_shapes

NO_LOADER = "no Vulkan loader (libvulkan.so.1); Debian: apt-get install libvulkan1"
NO_DRIVER = "loader found, no driver; install mesa-vulkan-drivers for a CPU device or set VK_DRIVER_FILES"
NO_PACKAGE = "the Python package vulkan is not installed; pip install vulkan"

_NO_DRIVER = -9
_CPU = 4  # VkPhysicalDeviceType
_COMPUTE = 2  # VkQueueFlags
_ORDER = {2: 0, 1: 1, 3: 2, 4: 3}  # discrete, integrated, virtual, CPU
BFLOAT16_FEATURES = 1000141000  # VkStructureType: three bits, for the type, dot products and matrices
OPAQUE_FD = 1  # VkExternalMemoryHandleTypeFlags and VkExternalSemaphoreHandleTypeFlags of a file descriptor
NV2_FEATURES = (
    "workgroup_scope",
    "flexible_dimensions",
    "reductions",
    "conversions",
    "per_element_operations",
    "tensor_addressing",
    "block_loads",
)


class UnavailableError(Exception):
    """Why there is no Vulkan here, in one sentence with the fix."""


class Adapter(NamedTuple):
    """A physical device.

    Attributes:
        handle: VkPhysicalDevice. is_cpu: a driver that runs on the host's processor. api: (major, minor, patch).
        uuid: of the driver and device, in hex. cache_uuid: of the pipeline caches that the driver takes.
        memory: bytes of the heap that programs work in. extensions: names.
        features: what this package may use, by name; each bit was asked for. limits: by name, see `_adapter`.
        queue: the family of its compute queue, and the bits of that one's time stamps, 0 for none.
        matrices: products of cooperative matrices within a subgroup; none where the feature is not reported.
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
    queue: tuple[int, int]
    matrices: tuple[MatrixShape, ...] = ()


@lru_cache(maxsize=1)
def api() -> tuple[Any, Any]:
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
    ffi, lib = api()
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
    ffi, lib = api()
    count = ffi.new("uint32_t*")
    result = lib.vkEnumeratePhysicalDevices(_instance(), count, ffi.NULL)
    if result or not count[0]:
        raise UnavailableError(NO_DRIVER)
    handles = ffi.new("VkPhysicalDevice[]", count[0])
    lib.vkEnumeratePhysicalDevices(_instance(), count, handles)
    found = []
    for handle in handles:
        queue = _compute_queue(ffi, lib, handle)
        if queue is None:
            continue
        adapter, kind = _adapter(ffi, lib, handle, queue)
        if adapter.api >= (1, 2, 0) and "timeline_semaphore" in adapter.features:
            found.append((_ORDER.get(kind, 4), adapter))
    if not found:
        raise UnavailableError("no device with Vulkan 1.2, a compute queue and timeline semaphores; update the driver")
    return tuple(adapter for _, adapter in sorted(found, key=lambda pair: pair[0]))


def _compute_queue(ffi: Any, lib: Any, handle: Any) -> tuple[int, int] | None:
    """(family, bits of its time stamps) of the first queue that computes; None where there is none."""
    count = ffi.new("uint32_t*")
    lib.vkGetPhysicalDeviceQueueFamilyProperties(handle, count, ffi.NULL)
    listed = ffi.new("VkQueueFamilyProperties[]", count[0])
    lib.vkGetPhysicalDeviceQueueFamilyProperties(handle, count, listed)
    found = ((n, int(listed[n].timestampValidBits)) for n in range(count[0]) if listed[n].queueFlags & _COMPUTE)
    return next(found, None)


def _adapter(ffi: Any, lib: Any, handle: Any, queue: tuple[int, int]) -> tuple[Adapter, int]:
    driver = ffi.new("VkPhysicalDeviceDriverProperties*", {"sType": 1000196000})
    ids = ffi.new("VkPhysicalDeviceIDProperties*", {"sType": 1000071004, "pNext": driver})
    group = ffi.new("VkPhysicalDeviceSubgroupProperties*", {"sType": 1000094000, "pNext": ids})
    extensions = _extensions(ffi, lib, handle)
    imports = ffi.new("VkPhysicalDeviceExternalMemoryHostPropertiesEXT*", {"sType": 1000178002, "pNext": group})
    chain = imports if "VK_EXT_external_memory_host" in extensions else group
    properties = ffi.new("VkPhysicalDeviceProperties2*", {"sType": 1000059001, "pNext": chain})
    lib.vkGetPhysicalDeviceProperties2(handle, properties)
    base = properties.properties
    version = base.apiVersion
    memory = ffi.new("VkPhysicalDeviceMemoryProperties*")
    lib.vkGetPhysicalDeviceMemoryProperties(handle, memory)
    heaps = [memory.memoryHeaps[n] for n in range(memory.memoryHeapCount)]
    local = [int(h.size) for h in heaps if h.flags & 1] or [int(h.size) for h in heaps]
    limits = {
        name: int(getattr(base.limits, name))
        for name in (
            "maxStorageBufferRange",
            "maxTexelBufferElements",
            "maxComputeSharedMemorySize",
            "maxPushConstantsSize",
            "minStorageBufferOffsetAlignment",
            "maxComputeWorkGroupInvocations",
            "maxUniformBufferRange",
        )
    }
    limits |= {
        f"maxComputeWorkGroupCount{axis}": int(base.limits.maxComputeWorkGroupCount[n]) for n, axis in enumerate("XYZ")
    }
    limits["hostPointerAlignment"] = int(imports.minImportedHostPointerAlignment)  # 0: host memory is not taken
    limits["subgroupSize"], limits["subgroupOperations"] = int(group.subgroupSize), int(group.supportedOperations)
    name = ffi.string(driver.driverName).decode(), ffi.string(driver.driverInfo).decode()
    features = _features(ffi, lib, handle, extensions)
    adapter = Adapter(
        handle,
        ffi.string(base.deviceName).decode(),
        _VENDORS.get(base.vendorID, f"vendor {base.vendorID:#x}"),
        base.deviceType == _CPU,
        (version >> 22, version >> 12 & 0x3FF, version & 0xFFF),
        " ".join(filter(None, name)),
        bytes(ids.driverUUID).hex() + bytes(ids.deviceUUID).hex(),
        bytes(base.pipelineCacheUUID),
        max(local),
        extensions,
        features,
        limits | {"timestampPeriod": int(base.limits.timestampPeriod * 1000)},
        queue,
        matrix_shapes(ffi, lib, _instance(), handle) if "cooperative_matrix" in features else (),
    )
    return adapter, base.deviceType


_VENDORS = {
    0x1002: "AMD",
    0x10DE: "NVIDIA",
    0x8086: "Intel",
    0x13B5: "Arm",
    0x5143: "Qualcomm",
    0x106B: "Apple",
    0x10005: "Mesa",
}


def _extensions(ffi: Any, lib: Any, handle: Any) -> frozenset[str]:
    count = ffi.new("uint32_t*")
    lib.vkEnumerateDeviceExtensionProperties(handle, ffi.NULL, count, ffi.NULL)
    listed = ffi.new("VkExtensionProperties[]", max(count[0], 1))
    lib.vkEnumerateDeviceExtensionProperties(handle, ffi.NULL, count, listed)
    return frozenset(ffi.string(listed[n].extensionName).decode() for n in range(count[0]))


def _features(ffi: Any, lib: Any, handle: Any, extensions: frozenset[str]) -> frozenset[str]:
    """The features that are reported, bit by bit; extension structures are passed only where the extension is
    listed.
    """
    raw = ffi.new("char[48]")
    chain = ffi.NULL
    has_nv2 = "VK_NV_cooperative_matrix2" in extensions
    if has_nv2:
        ffi.memmove(raw, struct.pack("IIQ", 1000593000, 0, 0), 16)
        chain = ffi.cast("void*", raw)
    matrix = ffi.new("VkPhysicalDeviceCooperativeMatrixFeaturesKHR*", {"sType": 1000506000, "pNext": chain})
    if "VK_KHR_cooperative_matrix" in extensions:
        chain = matrix
    sizes = ffi.new("VkPhysicalDeviceSubgroupSizeControlFeatures*", {"sType": 1000225002, "pNext": chain})
    if "VK_EXT_subgroup_size_control" in extensions:
        chain = sizes
    brain = ffi.new("char[32]")
    if "VK_KHR_shader_bfloat16" in extensions:
        ffi.memmove(brain, struct.pack("IIQ", BFLOAT16_FEATURES, 0, int(ffi.cast("uintptr_t", chain))), 16)
        chain = ffi.cast("void*", brain)
    v12 = ffi.new("VkPhysicalDeviceVulkan12Features*", {"sType": 51, "pNext": chain})
    v11 = ffi.new("VkPhysicalDeviceVulkan11Features*", {"sType": 49, "pNext": v12})
    features = ffi.new("VkPhysicalDeviceFeatures2*", {"sType": 1000059000, "pNext": v11})
    lib.vkGetPhysicalDeviceFeatures2(handle, features)
    found = {
        "timeline_semaphore": v12.timelineSemaphore,
        "float16": v12.shaderFloat16,
        "storage16": v11.storageBuffer16BitAccess,
        "memory_model": v12.vulkanMemoryModel,
        "cooperative_matrix": matrix.cooperativeMatrix,
        "full_subgroups": sizes.computeFullSubgroups,
        "device_scope": v12.vulkanMemoryModelDeviceScope,
    }
    found |= {
        "memory_export": "VK_KHR_external_memory_fd" in extensions,
        "timeline_export": _exports_timelines(ffi, lib, handle, extensions),
    }
    types, _, matrices = struct.unpack("3I", bytes(ffi.buffer(brain, 28))[16:28])
    found["bfloat16_matrix"] = types and matrices
    if has_nv2:
        bits = struct.unpack("7I", bytes(ffi.buffer(raw, 44))[16:44])
        found |= {f"nv2_{name}": bit for name, bit in zip(NV2_FEATURES, bits, strict=True)}
    return frozenset(name for name, bit in found.items() if bit)


def _exports_timelines(ffi: Any, lib: Any, handle: Any, extensions: frozenset[str]) -> bool:
    """Whether another interface can be handed a timeline semaphore: some drivers export binary ones alone."""
    if "VK_KHR_external_semaphore_fd" not in extensions:
        return False
    kind = ffi.new("VkSemaphoreTypeCreateInfo*", {"sType": 1000207002, "semaphoreType": 1})
    asked = ffi.new(
        "VkPhysicalDeviceExternalSemaphoreInfo*", {"sType": 1000076000, "pNext": kind, "handleType": OPAQUE_FD}
    )
    told = ffi.new("VkExternalSemaphoreProperties*", {"sType": 1000076001})
    lib.vkGetPhysicalDeviceExternalSemaphoreProperties(handle, asked, told)
    return bool(told.externalSemaphoreFeatures & 1)
