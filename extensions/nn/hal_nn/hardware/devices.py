"""Which torch devices there are, and how much memory they have left."""

from __future__ import annotations

import os

import torch

#: Kinds of torch devices that are looked for, the fastest first.
KINDS = ("cuda", "xpu", "mps", "cpu")


def detect_available_devices() -> dict[str, list[torch.device]]:
    """Every torch device that is present, by kind; a kind that is absent has an empty list.

    Returns:
        For example {"cuda": [], "xpu": [], "mps": [], "cpu": [device(type="cpu")]}. AMD cards are "cuda" in torch.
        Devices that torch does not know (Vulkan, OpenCL, simulated ones) are listed by `hal_core.devices()`; they read
        the CPU's tensors.
    """
    found: dict[str, list[torch.device]] = {}
    for kind in KINDS:
        module = getattr(torch, kind, None)
        if kind == "cpu":
            found[kind] = [torch.device("cpu")]
        elif module is None or not module.is_available():
            found[kind] = []
        else:
            found[kind] = [torch.device(kind, number) for number in range(module.device_count())]
    return found


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: what the system calls available, or what is free on an accelerator."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
