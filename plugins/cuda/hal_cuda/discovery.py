"""Which GPUs this process may use, found without initialising CUDA, and what the kernels need to know of one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import attrs

from hal_core.plugin_api import Device, Fidelity

from .runtime import nvml

LEAST_CAPABILITY = (8, 0)
LEAST_CUDA = (12, 0)  # of the driver: what torch 2.11's oldest CUDA build needs


class Found(NamedTuple):
    """Devices by torch's index, with their compute capabilities, and why there are no (more) of them."""

    devices: tuple[Device, ...]
    capabilities: tuple[tuple[int, int], ...]
    gpus: tuple[nvml.Gpu, ...]
    reason: str


def find() -> Found:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, with the reason where there is none. Never raises for absent
    hardware.
    """
    try:
        gpus = visible([nvml.Gpu(place) for place in range(nvml.count())], os.environ.get("CUDA_VISIBLE_DEVICES"))
        driver, cuda = nvml.driver_version(), nvml.cuda_version()
    except nvml.NvmlError as error:
        return _absent(f"{error}: install the NVIDIA driver")
    if not gpus:
        hidden = " (CUDA_VISIBLE_DEVICES hides them)" if os.environ.get("CUDA_VISIBLE_DEVICES") is not None else ""
        return _absent(f"no NVIDIA GPU is visible{hidden}")
    if cuda < LEAST_CUDA:
        wanted = ".".join(map(str, LEAST_CUDA))
        return _absent(f"driver {driver} supports CUDA {cuda[0]}.{cuda[1]} and {wanted} is needed: upgrade the driver")
    if reason := _torch_lacks_cuda():
        return _absent(reason)
    devices, capabilities, kept, too_old = [], [], [], []
    for index, gpu in enumerate(gpus):
        if gpu.capability < LEAST_CAPABILITY:
            too_old.append(
                f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]} and 8.0 is needed"
            )
            continue
        devices.append(_device(index, gpu, driver))
        capabilities.append(gpu.capability)
        kept.append(gpu)
    return Found(tuple(devices), tuple(capabilities), tuple(kept), "; ".join(too_old))


def _absent(reason: str) -> Found:
    return Found((), (), (), reason)


def _device(index: int, gpu: nvml.Gpu, driver: str) -> Device:
    return Device(
        id=f"cuda:{index}",
        family="cuda",
        vendor="NVIDIA",
        model=gpu.name,
        fidelity=Fidelity.HARDWARE,
        reads=(f"cuda:{index}",),
        memory=gpu.memory,
        driver=f"NVIDIA {driver}",
        features=(f"compute capability {gpu.capability[0]}.{gpu.capability[1]}",),
    )


def visible(gpus: Sequence[nvml.Gpu], setting: str | None) -> list[nvml.Gpu]:
    """The GPUs that CUDA would number 0, 1, ... under a value of CUDA_VISIBLE_DEVICES.

    Entries are places or beginnings of UUIDs; as in CUDA, the first entry that names no GPU ends the list.
    """
    if setting is None:
        return list(gpus)
    chosen: list[nvml.Gpu] = []
    for entry in (part.strip() for part in setting.split(",")):
        if entry.isdigit():
            found = gpus[int(entry)] if int(entry) < len(gpus) else None
        else:
            matches = [gpu for gpu in gpus if entry and gpu.uuid.startswith(entry)]
            found = matches[0] if len(matches) == 1 else None
        if found is None or found in chosen:
            break
        chosen.append(found)
    return chosen


def _torch_lacks_cuda() -> str:
    """Why torch cannot use a GPU; "" where it can."""
    try:
        import torch
    except ImportError:
        return "torch is not installed: pip install 'hal-cuda[torch]'"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    return ""


@attrs.frozen(kw_only=True)
class Chip:
    """A device as its kernels see it.

    Attributes:
        index: torch's CUDA index.
        capability: compute capability, (major, minor).
        multiprocessors: how many the chip has.
        shared_memory: bytes that one program may have.
        bandwidth: bytes a second that a kernel reads of the device's memory.
        torch_attention: whether torch's own fused attention runs on the device.
    """

    index: int
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    bandwidth: float = 4.4e12
    torch_attention: bool = True

    @classmethod
    def of(cls, index: int) -> Chip:
        """The chip of an initialised CUDA device."""
        import torch

        facts: Any = torch.cuda.get_device_properties(index)
        # Kilohertz and bits; data moves at both edges of the clock, and kernels reach 92% of that.
        peak = 2e3 * getattr(facts, "memory_clock_rate", 0) * getattr(facts, "memory_bus_width", 0) / 8
        return cls(
            index=index,
            capability=(facts.major, facts.minor),
            multiprocessors=facts.multi_processor_count,
            shared_memory=facts.shared_memory_per_block_optin,
            bandwidth=0.92 * peak or 4.4e12,
        )
