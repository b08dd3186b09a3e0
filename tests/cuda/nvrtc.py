"""NVRTC by ctypes: CUDA C++ compiled to a GPU's code where there is no GPU."""

from __future__ import annotations

import ctypes
import glob
import os
import sysconfig
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from ctypes.util import find_library
from typing import Any


def libraries() -> list[str]:
    """Files that may be NVRTC: HAL_NVRTC's, those of NVIDIA's Python packages, the system's."""
    packages = sysconfig.get_paths()["purelib"]
    found = [os.environ.get("HAL_NVRTC", "")]
    found += sorted(glob.glob(f"{packages}/nvidia/*/lib/libnvrtc.so.*"), reverse=True)
    found.append(find_library("nvrtc") or "")
    return [path for path in found if path]


class Nvrtc:
    """The first of `libraries` that loads. Raises OSError where none does."""

    def __init__(self) -> None:
        self._library: Any = None
        for path in libraries():
            try:
                self._library = ctypes.CDLL(path)
                break
            except OSError:
                continue
        if self._library is None:
            raise OSError("no NVRTC: pip install nvidia-cuda-nvrtc, or name its library in HAL_NVRTC")
        major, minor = c_int(), c_int()
        self._library.nvrtcVersion(byref(major), byref(minor))
        self.version = (major.value, minor.value)

    def compile(self, source: str, arch: str, *options: str) -> bytes:
        """The code for an architecture ("sm_90"). Raises RuntimeError with the compiler's log."""
        program = c_void_p()
        create = self._library.nvrtcCreateProgram
        create.argtypes = (POINTER(c_void_p), c_char_p, c_char_p, c_int, c_void_p, c_void_p)
        assert create(byref(program), source.encode(), b"source.cu", 0, None, None) == 0
        given = [f"--gpu-architecture={arch}".encode(), *(option.encode() for option in options)]
        wrong = self._library.nvrtcCompileProgram(program, len(given), (c_char_p * len(given))(*given))
        size = c_size_t()
        self._library.nvrtcGetProgramLogSize(program, byref(size))
        log = ctypes.create_string_buffer(size.value)
        self._library.nvrtcGetProgramLog(program, log)
        self.log = log.value.decode()
        if wrong:
            raise RuntimeError(self.log)
        self._library.nvrtcGetCUBINSize(program, byref(size))
        code = ctypes.create_string_buffer(size.value)
        self._library.nvrtcGetCUBIN(program, code)
        self._library.nvrtcDestroyProgram(byref(program))
        return code.raw
