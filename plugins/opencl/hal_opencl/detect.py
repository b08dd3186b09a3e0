"""Which OpenCL devices there are, or why there are none. Nothing here raises for absent hardware."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hal_core import Device, Fidelity, cache_dir

NO_DRIVER = "no OpenCL driver; install pocl-opencl-icd for a CPU device (Debian: apt-get install pocl-opencl-icd)"


class Found(NamedTuple):
    """Devices by id, with pyopencl's handles, and why there are none (or why some were left out)."""

    handles: dict[str, Any]
    devices: tuple[Device, ...]
    reason: str


@lru_cache(maxsize=1)
def find() -> Found:
    """All OpenCL devices of all platforms, GPUs first. Looked for once in a process."""
    # PoCL keeps compiled programs where the rest of our caches lie. It reads the variable when its driver is loaded.
    if "POCL_CACHE_DIR" not in os.environ:
        folder = Path(cache_dir()) / "pocl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["POCL_CACHE_DIR"] = str(folder)
        except OSError:
            pass  # a cache that cannot be written is PoCL's own default then; it compiles without one too
    try:
        import pyopencl as cl
    except (ImportError, OSError) as error:
        return Found({}, (), f"pyopencl cannot be imported ({error}); install it with: pip install pyopencl")
    try:
        platforms = cl.get_platforms()
    except cl.Error:  # the loader reports "no platform" as an error
        platforms = []
    handles: list[Any] = []
    problems = []
    for platform in platforms:
        try:
            handles += [h for h in platform.get_devices() if h.available and h.compiler_available]
        except cl.Error as error:  # a platform without devices says so by an error
            problems.append(f"{platform.name.strip()}: {error}")
    if not handles:
        reason = "; ".join(problems)
        return Found({}, (), f"{NO_DRIVER} ({reason})" if reason else NO_DRIVER)
    handles.sort(key=lambda h: bool(h.type & cl.device_type.CPU))
    devices = tuple(_describe(f"opencl:{n}", handle) for n, handle in enumerate(handles))
    return Found(dict(zip((d.id for d in devices), handles, strict=True)), devices, "")


def is_cpu(handle: Any) -> bool:
    import pyopencl as cl

    return bool(handle.type & cl.device_type.CPU)


def _describe(device_id: str, handle: Any) -> Device:
    cpu = is_cpu(handle)
    extensions = handle.extensions.split()
    features = [
        f"{handle.max_compute_units} compute units",
        f"{handle.local_mem_size >> 10} KiB local memory",
        f"float vectors of {handle.preferred_vector_width_float}",
        "cl_khr_fp16" if "cl_khr_fp16" in extensions else "no cl_khr_fp16 (float16 is loaded with vload_half)",
        "kernel: vector rows" if cpu else "kernel: local-memory tiles",
    ]
    return Device(
        id=device_id, family="opencl", vendor=handle.vendor.strip(), model=handle.name.strip(),
        fidelity=Fidelity.EMULATED if cpu else Fidelity.HARDWARE, reads=("cpu",), memory=int(handle.global_mem_size),
        driver=f"{handle.platform.name.strip()} {handle.driver_version.strip()}", features=tuple(features),
    )  # fmt: skip
