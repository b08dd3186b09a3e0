"""Which OpenCL devices are present, or why none is. Absent hardware raises nothing."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, NamedTuple

import attrs
from hal_compute.cache import private_folder
from hal_compute.processes import ProcessGuard

from hal_core.plugin_api import Device, Fidelity

NO_DRIVER = "no OpenCL driver; install pocl-opencl-icd for a CPU device (Debian: apt-get install pocl-opencl-icd)"


class Found(NamedTuple):
    """Devices and their pyopencl handles by id, why there are none, and the process that loaded the driver."""

    handles: dict[str, Any]
    devices: tuple[Device, ...]
    reason: str
    process: ProcessGuard


@lru_cache(maxsize=1)
def find() -> Found:
    """All OpenCL devices of all platforms, GPUs first. Searched once in a process."""
    # PoCL's cache of compiled programs lies beside this project's. PoCL reads the variable when its driver is loaded;
    # without it, it uses a folder of its own in the user's home.
    if "POCL_CACHE_DIR" not in os.environ and (folder := private_folder("pocl")) is not None:
        os.environ["POCL_CACHE_DIR"] = str(folder)
    process = ProcessGuard()
    try:
        import pyopencl as cl
    except (ImportError, OSError) as error:
        return Found({}, (), f"pyopencl cannot be imported ({error}); install it with: pip install pyopencl", process)
    try:
        platforms = cl.get_platforms()
    except cl.Error:  # the loader reports "no platform" as an error
        platforms = []
    handles: list[Any] = []
    problems = []
    for platform in platforms:
        try:
            listed = platform.get_devices()
        except cl.Error as error:  # a platform without devices says so by an error
            problems.append(f"{platform.name.strip()}: {error}")
            continue
        for handle in listed:
            try:
                if handle.available and handle.compiler_available:
                    handles.append((is_cpu(handle), handle, _describe(handle)))
                else:
                    problems.append(f"{handle.name.strip()} is not available, or has no compiler")
            except cl.Error as error:
                problems.append(f"{platform.name.strip()}: {error}")
    if not handles:
        missing = f"no OpenCL platform has a device that can be used ({'; '.join(problems)})" if problems else NO_DRIVER
        return Found({}, (), missing, process)
    handles.sort(key=lambda found: found[0])
    devices = tuple(attrs.evolve(device, id=f"opencl:{n}") for n, (_, _, device) in enumerate(handles))
    return Found({f"opencl:{n}": handle for n, (_, handle, _) in enumerate(handles)}, devices, "", process)


def is_cpu(handle: Any) -> bool:
    """Whether the device is the host's processor and shares its memory."""
    import pyopencl as cl

    return bool(handle.type & cl.device_type.CPU)


def _describe(handle: Any) -> Device:
    """A device as its driver reports it. The number in its id is set once all are found."""
    cpu = is_cpu(handle)
    extensions = handle.extensions.split()
    features = [
        f"vendor {handle.vendor.strip()}",
        f"{handle.max_compute_units} compute units",
        f"{handle.local_mem_size >> 10} KiB local memory",
        f"float vectors of {handle.preferred_vector_width_float}",
        "cl_khr_fp16" if "cl_khr_fp16" in extensions else "no cl_khr_fp16 (float16 is loaded with vload_half)",
        "kernel: vector rows" if cpu else "kernel: local-memory tiles",
    ]
    return Device(
        id="opencl:",
        family="opencl",
        vendor=handle.vendor.strip(),
        model=handle.name.strip(),
        fidelity=Fidelity.EMULATED if cpu else Fidelity.HARDWARE,
        reads=("cpu",),
        memory=int(handle.global_mem_size),
        driver=f"{handle.platform.name.strip()} {handle.driver_version.strip()}",
        features=tuple(features),
    )
