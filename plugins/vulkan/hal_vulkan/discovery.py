"""Which Vulkan devices are present, or why none is. Absent hardware raises nothing, and CUDA is not initialised."""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

from hal_compute.processes import ProcessGuard

from hal_core.plugin_api import Device, Fidelity

from .paths import kernel_names
from .runtime._vk import Adapter, UnavailableError, adapters

NO_BINDINGS = "cuda-bindings is not installed: pip install 'hal-vulkan[cuda]'"


class Found(NamedTuple):
    """Adapters by device id, the devices, why there are none, and the process that loaded the driver."""

    adapters: dict[str, Adapter]
    devices: tuple[Device, ...]
    reason: str
    process: ProcessGuard


@lru_cache(maxsize=1)
def find() -> Found:
    """All Vulkan devices, GPUs first. Searched once in a process."""
    process = ProcessGuard()
    try:
        found = {f"vulkan:{n}": adapter for n, adapter in enumerate(adapters())}
    except UnavailableError as reason:
        return Found({}, (), str(reason), process)
    return Found(found, tuple(_describe(device_id, adapter) for device_id, adapter in found.items()), "", process)


def _describe(device_id: str, adapter: Adapter) -> Device:
    limits, (index, why) = adapter.limits, cuda_index(adapter)
    shared = [f"memory shared with cuda:{index}" if index is not None else f"no memory shared with CUDA: {why}"]
    features = [
        f"vendor {adapter.vendor}",
        f"Vulkan {'.'.join(map(str, adapter.api))}",
        f"subgroups of {limits['subgroupSize']}",
        f"{limits['maxComputeSharedMemorySize'] >> 10} KiB shared memory",
        f"{limits['maxStorageBufferRange'] >> 20} MiB per buffer range",
        *sorted(adapter.features),
        *(shared if adapter.vendor == "NVIDIA" else []),
        f"kernel: {kernel_names(adapter)}",
    ]
    return Device(
        id=device_id,
        family="vulkan",
        vendor=adapter.vendor,
        model=adapter.name,
        fidelity=Fidelity.EMULATED if adapter.is_cpu else Fidelity.HARDWARE,
        reads=("cpu",) if index is None else ("cpu", f"cuda:{index}"),
        memory=adapter.memory,
        driver=adapter.driver,
        features=tuple(features),
    )


def cuda_index(adapter: Adapter) -> tuple[int | None, str]:
    """(torch's index of the CUDA device that is this card, ""), or (None, why there is none). Raises nothing."""
    if adapter.vendor != "NVIDIA":
        return None, "not a card of NVIDIA's"
    if not {"memory_export", "timeline_export"} <= adapter.features:
        return None, "the Vulkan driver exports no memory or no timelines: update it"
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return None, NO_BINDINGS
    try:
        uuids = _visible(_uuids(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    except OSError as error:
        return None, f"the NVIDIA management library does not answer ({error})"
    wanted = adapter.uuid[32:]
    found = [n for n, uuid in enumerate(uuids) if uuid.removeprefix("GPU-").replace("-", "") == wanted]
    return (found[0], "") if found else (None, "CUDA does not see this card (CUDA_VISIBLE_DEVICES)")


def _uuids() -> list[str]:
    """ "GPU-..." of every GPU in PCI order. Raises OSError."""
    library = ctypes.CDLL("libnvidia-ml.so.1")
    number, handle, text = ctypes.c_uint(), ctypes.c_void_p(), ctypes.create_string_buffer(96)
    if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(number)):
        raise OSError("nvmlInit failed")
    found = []
    for place in range(number.value):
        if library.nvmlDeviceGetHandleByIndex_v2(place, ctypes.byref(handle)) or library.nvmlDeviceGetUUID(
            handle, text, 96
        ):
            raise OSError(f"GPU {place} does not say its UUID")
        found.append(text.value.decode())
    return found


def _visible(uuids: list[str], setting: str | None) -> list[str]:
    """The GPUs in CUDA's order: CUDA_VISIBLE_DEVICES lists numbers or beginnings of UUIDs; the first unknown one ends
    it.
    """
    if setting is None:
        return uuids
    chosen: list[str] = []
    for entry in (part.strip() for part in setting.split(",")):
        matches = uuids[int(entry) :][:1] if entry.isdigit() else [u for u in uuids if entry and u.startswith(entry)]
        if len(matches) != 1 or matches[0] in chosen:
            break
        chosen += matches
    return chosen
