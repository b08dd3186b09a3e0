"""The compiled library: where it is, whether this processor can run it, and whose threads it works on."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import struct
import sys
from pathlib import Path
from typing import NamedTuple

#: Instruction sets by the C interface's numbers, each with what those before it have.
ISAS = {"avx2": 1, "avx512": 2, "avx512_bf16": 3}

#: A call: hal_attention of src/hal_cpu_native.h.
STRUCT = struct.Struct("@8Pq12q4q4q2q7q2q2f5i4x")

#: What a backward pass has after its forward call: hal_backward.
BACKWARD = struct.Struct("@5P12q")

_NAMES = ("libhal_cpu_native.so", "libhal_cpu_native.dylib", "hal_cpu_native.dll")
_HINT = "pip install hal-cpu-native (a C++17 compiler builds it where there is no wheel)"


class Loaded(NamedTuple):
    """The library, or None and why it is not there; the highest instruction set of this processor, 0 for none."""

    library: ctypes.CDLL | None
    why: str
    isa: int


@functools.cache
def load() -> Loaded:
    """Load the library once per process. Never raises."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return Loaded(None, f"hal-cpu-native has kernels for x86-64 alone, and this is {platform.machine()}", 0)
    folder = Path(__file__).parent
    found = next((folder / name for name in _NAMES if (folder / name).is_file()), None)
    if found is None:
        return Loaded(None, f"hal-cpu-native is installed without its compiled library: {_HINT}", 0)
    try:
        library = _declared(ctypes.CDLL(str(found)))
    except (OSError, AttributeError) as error:  # another system's file, or another version's
        return Loaded(None, f"the library {found} cannot be loaded ({error}): {_HINT}", 0)
    size = (library.hal_cpu_native_call_bytes(), library.hal_cpu_native_backward_bytes())
    if size != (STRUCT.size, STRUCT.size + BACKWARD.size):  # it would read a call's fields at other places
        found_size = f"calls of {size[0]} bytes, not {STRUCT.size}"
        return Loaded(None, f"the library {found} was built from another version's sources ({found_size}): {_HINT}", 0)
    isa = library.hal_cpu_native_isa()
    if not isa:
        return Loaded(None, "hal-cpu-native needs a processor with AVX2, FMA and F16C, and this one lacks them", 0)
    return Loaded(library, "", isa)


def available() -> bool:
    """Whether the compiled kernels can run here."""
    return load().library is not None


def why_absent() -> str:
    """Why they cannot, in a sentence with the fix; "" where they can."""
    return load().why


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets of this processor that there are kernels for, lowest first."""
    return tuple(name for name, number in ISAS.items() if number <= load().isa)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    library.hal_cpu_native_call_bytes.restype = ctypes.c_int64
    library.hal_cpu_native_isa.restype = ctypes.c_int
    library.hal_cpu_native_workspace.argtypes = [ctypes.c_char_p]
    library.hal_cpu_native_workspace.restype = ctypes.c_int64
    library.hal_cpu_native_kernel.argtypes = [ctypes.c_char_p]
    library.hal_cpu_native_kernel.restype = ctypes.c_int
    library.hal_cpu_native_attention.argtypes = [ctypes.c_char_p]
    library.hal_cpu_native_attention.restype = ctypes.c_int
    library.hal_cpu_native_backward_bytes.restype = ctypes.c_int64
    library.hal_cpu_native_backward_workspace.argtypes = [ctypes.c_char_p]
    library.hal_cpu_native_backward_workspace.restype = ctypes.c_int64
    library.hal_cpu_native_attention_backward.argtypes = [ctypes.c_char_p]
    library.hal_cpu_native_attention_backward.restype = ctypes.c_int
    library.hal_cpu_native_message.argtypes = [ctypes.c_int]
    library.hal_cpu_native_message.restype = ctypes.c_char_p
    library.hal_cpu_native_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    library.hal_cpu_native_read.restype = ctypes.c_uint64
    pointer, count, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    library.hal_cpu_native_fields_workspace.argtypes = [small, count, count, count, small]
    library.hal_cpu_native_fields_workspace.restype = count
    room = (pointer, count)  # the workspace and its bytes
    sizes = (count,) * 4
    library.hal_cpu_native_reaction_diffusion.argtypes = (*(pointer,) * 4, *room, *sizes, pointer, small, small)
    library.hal_cpu_native_ricci.argtypes = (*(pointer,) * 2, *room, *sizes, ctypes.c_double, small, small)
    library.hal_cpu_native_euler.argtypes = (*(pointer,) * 3, *room, *sizes, small, small)
    library.hal_cpu_native_set_runner.argtypes = [ctypes.c_void_p]
    library.hal_cpu_native_set_runner.restype = None
    return library


@functools.cache
def share_torchs_threads() -> bool:
    """Let torch's OpenMP threads do the work, where torch uses libgomp: between its own calls that library's threads
    spin for a while, and a second pool beside them would wait for a processor. Returns whether they do now.
    """
    library = load().library
    runner = None if library is None else _gomp_parallel()
    if library is None or runner is None:
        return False
    library.hal_cpu_native_set_runner(runner)
    return True


def _gomp_parallel() -> ctypes.c_void_p | None:
    """The address of GOMP_parallel in the libgomp that torch brought; None where it uses another OpenMP."""
    torch = sys.modules.get("torch")
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    paths = sorted({line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line})
    site = str(Path(torch.__file__).parent.parent) if torch is not None and torch.__file__ else ""
    own = [path for path in paths if site and path.startswith(site)]
    chosen = own or paths
    if len(chosen) != 1:  # none, or which of them torch uses is not known
        return None
    try:
        gomp = ctypes.CDLL(chosen[0], mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        return ctypes.cast(gomp.GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None
