"""The NVIDIA management library, by ctypes: what GPUs there are and what they draw. The only file that speaks to it.

It ships with the driver, needs no Python package, and answers without a CUDA context.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

_NAMES = ("libnvidia-ml.so.1", "nvml.dll")
_CLOCKS = {"graphics": 0, "sm": 1, "memory": 2}
_lock = threading.Lock()
_library: Any = None


class NvmlError(Exception):
    """The library is not there, or a call failed; the text says which."""


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _load() -> Any:
    """The initialised library. Raises NvmlError."""
    global _library
    with _lock:
        if _library is None:
            for name in _NAMES:
                try:
                    library = ctypes.CDLL(name)
                    break
                except OSError:
                    continue
            else:
                raise NvmlError("no NVIDIA driver is installed (its management library was not found)")
            _check(library, library.nvmlInit_v2(), "nvmlInit")
            _library = library
    return _library


def _check(library: Any, code: int, call: str) -> None:
    if code:
        library.nvmlErrorString.restype = ctypes.c_char_p
        text = library.nvmlErrorString(code).decode()
        raise NvmlError(f"the NVIDIA driver's management library failed in {call}: {text}")


def _call(name: str, *arguments: Any) -> None:
    library = _load()
    _check(library, getattr(library, name)(*arguments), name)


def _text(name: str, *arguments: Any) -> str:
    buffer = ctypes.create_string_buffer(96)
    _call(name, *arguments, buffer, 96)
    return buffer.value.decode()


def driver_version() -> str:
    return _text("nvmlSystemGetDriverVersion")


def cuda_version() -> tuple[int, int]:
    """(major, minor) of CUDA that the driver supports."""
    version = ctypes.c_int()
    _call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def count() -> int:
    number = ctypes.c_uint()
    _call("nvmlDeviceGetCount_v2", ctypes.byref(number))
    return number.value


class Gpu:
    """One GPU by its place in PCI order.

    Attributes:
        name, uuid: as the driver reports them. capability: (major, minor). memory: bytes.
    """

    def __init__(self, place: int) -> None:
        self._handle = ctypes.c_void_p()
        _call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(place), ctypes.byref(self._handle))
        self.name, self.uuid = _text("nvmlDeviceGetName", self._handle), _text("nvmlDeviceGetUUID", self._handle)
        major, minor = ctypes.c_int(), ctypes.c_int()
        _call("nvmlDeviceGetCudaComputeCapability", self._handle, ctypes.byref(major), ctypes.byref(minor))
        self.capability = (major.value, minor.value)
        held = _Memory()
        _call("nvmlDeviceGetMemoryInfo", self._handle, ctypes.byref(held))
        self.memory = held.total

    def clock(self, domain: str) -> int:
        """Present clock of "graphics", "sm" or "memory" in MHz."""
        return self._number("nvmlDeviceGetClockInfo", ctypes.c_int(_CLOCKS[domain]))

    def power(self) -> float:
        """Watts drawn now."""
        return self._number("nvmlDeviceGetPowerUsage") / 1e3

    def energy(self) -> float:
        """Joules since the driver was loaded. About 5 ms a call: outside any timed region."""
        millijoules = ctypes.c_ulonglong()
        _call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    def _number(self, name: str, *arguments: Any) -> int:
        number = ctypes.c_uint()
        _call(name, self._handle, *arguments, ctypes.byref(number))
        return number.value
