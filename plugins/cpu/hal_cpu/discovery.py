"""What the operating system says about the processor: model, cores, caches, memory, instruction sets."""

from __future__ import annotations

import functools
import os
import platform
import sys
from pathlib import Path

import attrs

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

#: Instruction sets that change which path is fastest, by their names in /proc/cpuinfo.
_SIMD = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16")


@attrs.frozen(kw_only=True)
class Machine:
    """The processor this process runs on.

    Attributes:
        vendor, model: as the operating system reports them.
        cores: processors this process may run on.
        frequency: cycles per second; assumed where `frequency_known` is False.
        l2, l3: bytes of one core's second-level and of one third-level cache; assumed where the system does not say.
        memory: bytes of memory this process may use (the control group's limit where it is lower); None if unknown.
        simd: instruction sets found, a subset of the names that matter here.
    """

    vendor: str
    model: str
    cores: int
    frequency: float
    frequency_known: bool
    l2: int
    l3: int
    memory: int | None
    simd: tuple[str, ...]

    @property
    def simd_bytes(self) -> int:
        """Width of a vector register."""
        return 64 if "avx512f" in self.simd else 32 if "avx2" in self.simd else 16

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether it has products of bfloat16 that sum in float32."""
        return any(name in self.simd for name in ("avx512_bf16", "amx_bf16"))

    @property
    def multiplies_float16(self) -> bool:
        """Whether it has products of float16; without them torch's float16 products are far slower than float32
        ones.
        """
        return any(name in self.simd for name in ("avx512_fp16", "amx_fp16"))


def torch_threads() -> int:
    """The threads that torch computes with; where torch is not imported yet, those that it will start with."""
    if (torch := sys.modules.get("torch")) is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(int(limit), 1) if limit.isdigit() else this_machine().cores


@functools.cache
def this_machine() -> Machine:
    """Read once per process. Never raises: what cannot be read is assumed, with values of a common desktop core."""
    fields = _cpuinfo()
    caches = _cache_sizes()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    megahertz = fields.get("cpu MHz", "")
    known = megahertz.replace(".", "", 1).isdigit()
    return Machine(
        vendor=fields.get("vendor_id", platform.machine() or "unknown"),
        model=fields.get("model name") or platform.processor() or platform.machine() or "unknown",
        cores=_cores(),
        frequency=float(megahertz) * 1e6 if known else 2.5e9,
        frequency_known=known,
        l2=caches.get(2, 1 << 20),
        l3=caches.get(3, 8 << 20),
        memory=_memory(),
        simd=tuple(name for name in _SIMD if name in flags),
    )


def _cpuinfo() -> dict[str, str]:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cache_sizes() -> dict[int, int]:
    sizes: dict[int, int] = {}
    for index in sorted(_CACHES.glob("index*")):
        try:
            kind, level = (index / "type").read_text().strip(), int((index / "level").read_text())
            size = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if kind != "Instruction" and size[:-1].isdigit():
            sizes[level] = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(size[-1], 1)
    return sizes


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    limits = []
    try:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # not POSIX
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        limits += [int(limit)] * limit.isdigit()
    except OSError:  # no control group, or an older hierarchy
        pass
    return min(limits)
