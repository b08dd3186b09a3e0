"""Compiling kernels before their launch, and launching them with little host time: what speaks to Triton's inside.

A kernel is compiled for a signature written out here, never specialised on the values of arguments: one binary serves
all lengths and strides. Triton's disk cache keeps binaries under a hash of their source, constants, options and tool
chain.
"""

from __future__ import annotations

import hashlib
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from hal_core.plugin_api import DeviceUnavailableError

from . import kept

#: Versions whose launcher and Gluon dialect this package was run with. Others take Triton's own, slower launch.
TESTED_TRITON = ("3.6",)
INTERPRETED = bool(knobs.runtime.interpret)

_lock = threading.Lock()
_kernels: dict[Any, Kernel | Unloaded] = {}
_ahead: dict[str, int] = {}


def tested() -> bool:
    """Whether this Triton is one of `TESTED_TRITON`."""
    return ".".join(triton.__version__.split(".")[:2]) in TESTED_TRITON


def is_gluon(fn: Any) -> bool:
    return bool(getattr(fn, "is_gluon", lambda: False)())


def compile_for(
    fn: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: GPUTarget,
    divisible: Mapping[str, int] = MappingProxyType({}),
    edit: Callable[[str], str] | None = None,
    **options: Any,
) -> Any:
    """A Triton CompiledKernel; needs no GPU.

    Args:
        fn: the jitted function. signature: Triton type of each run-time argument ("*bf16", "i64" ...), in any order.
        constants: the constexpr arguments. divisible: what arguments are known to be multiples of (pointers in bytes).
        edit: what to do to the PTX before it is assembled. options: num_warps, launch_pdl, maxnreg.

    Raises:
        DeviceUnavailableError: the kernel cache cannot be written.
    """
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kind = GluonASTSource if is_gluon(fn) else ASTSource
    typed = {name: "constexpr" if name in constants else signature[name] for name in fn.arg_names}
    attributes = {
        (place,): [["tt.divisibility", divisible[name]]] for place, name in enumerate(fn.arg_names) if name in divisible
    }
    try:
        source = kind(fn, typed, dict(constants), attributes)
        known = kept.key(fn.__module__, fn.__name__, typed, constants, attributes, target, options, edit is not None)
        found = kept.find(known, source)
        if found is not None:
            return found
        made = triton.compile(source, target=target, options=options)
        # Right but slower without: where Triton is told, or was when this was cached, to keep binaries alone, and where
        # it is told to take code from a folder of overrides, which goes before this one.
        if edit is not None and "ptx" in made.asm and not knobs.compilation.override:
            options["ir_override"] = _kept(made, edit(made.asm["ptx"]))
            made = triton.compile(source, target=target, options=options)
        kept.keep(known, made)
        return made
    except OSError as error:
        raise DeviceUnavailableError(
            f"the kernel cache {knobs.cache.dir} cannot be used ({error}): set TRITON_CACHE_DIR to a writable folder"
        ) from error


def _kept(made: Any, ptx: str) -> str:
    """Path of PTX kept in Triton's cache beside its kernel. Its name holds a hash of the text: Triton's key for the
    second compilation holds the path alone."""
    from triton.runtime.cache import get_cache_manager

    name = f"{made.name}.{hashlib.sha256(ptx.encode()).hexdigest()[:16]}.ptx"
    cache = get_cache_manager(made.hash)
    return str(cache.get_file(name) or cache.put(ptx, name, binary=False))


class Kernel:
    """A compiled kernel, loaded on the current device, with a launch that converts nothing.

    Attributes:
        registers, spills: of one thread, as the driver reports them.
    """

    def __init__(self, compiled: Any) -> None:
        run = compiled.run  # loads the binary
        if run.global_scratch_size or run.profile_scratch_size:
            raise DeviceUnavailableError(
                "this Triton build instruments kernels (scratch memory is asked for): unset its profiling variables"
            )
        launch = run.launch
        if launch.__class__.__name__ == "function":  # wrapped to build tensor maps at each launch; ours are kept
            cells = (cell.cell_contents for cell in launch.__closure__)
            launch = dict(zip(launch.__code__.co_freevars, cells, strict=True))["launcher"]
        self._launch, self._function = launch, compiled.function
        self._flags = (
            run.launch_cooperative_grid,
            run.launch_pdl,
            None,
            None,
            compiled.packed_metadata,
            None,
            None,
            None,
        )
        self.registers, self.spills = compiled.n_regs, compiled.n_spills
        self.maps = _maps(compiled)
        self.constants = _constants(compiled)

    def __call__(self, grid: tuple[int, int, int], stream: int, arguments: Sequence[Any]) -> None:
        """Launch. Arguments in the kernel's order: pointers as integers, tensor maps followed by shape and strides."""
        self._launch(*grid, stream, self._function, *self._flags, *arguments)


class Unloaded:
    """A kernel that was compiled ahead: what a launch is built from, without a device. Launching it does nothing.

    Raises:
        OutOfResources: it needs more shared memory than the chip has, as Triton finds when it loads a kernel.
    """

    def __init__(self, compiled: Any, shared_memory: int) -> None:
        if compiled.metadata.shared > shared_memory:
            raise OutOfResources(compiled.metadata.shared, shared_memory, "shared memory")
        _build_launcher(compiled)
        self.maps = _maps(compiled)
        self.constants = _constants(compiled)

    def __call__(self, grid: tuple[int, int, int], stream: int, arguments: Sequence[Any]) -> None:
        """Nothing: no kernel outlives `compiling_ahead`."""


def _build_launcher(compiled: Any) -> None:
    """Build the C function that launches a kernel, and Triton's calls of the driver, into Triton's cache: both cost a
    run of the C compiler where a kernel is first loaded. Nothing where the driver's library is not installed, which
    they are linked to.
    """
    from triton.backends.nvidia import driver

    try:
        driver.library_dirs()
    except (AssertionError, OSError, subprocess.SubprocessError):
        return
    driver.CudaUtils()
    driver.CudaLauncher(compiled.src, compiled.metadata)


def _maps(compiled: Any) -> list[Any]:
    """Layouts of a kernel's tensor maps, in its order."""
    return getattr(compiled.metadata, "tensordesc_meta", None) or []


def _constants(compiled: Any) -> list[str]:
    """Names of a kernel's constexpr arguments."""
    return [name for name in compiled.src.fn.arg_names if compiled.src.signature[name] == "constexpr"]


def kernel(key: Any, make: Callable[[], Any]) -> Any:
    """The loaded kernel of a key, a Kernel; compiled once in a process. Unloaded where it is compiled ahead."""
    found = _kernels.get(key)
    if found is None:
        with _lock:
            found = _kernels.get(key)
            if found is None:
                made = make()
                found = _kernels[key] = Unloaded(made, _ahead["shared_memory"]) if _ahead else Kernel(made)
    return found


@contextmanager
def compiling_ahead(shared_memory: int) -> Iterator[Callable[[], int]]:
    """In this context kernels of the whole process are compiled, not loaded, and their launches do nothing: calls on
    tensors without memory compile what they need. No GPU is needed. For processes that do nothing else.

    Args:
        shared_memory: bytes that one program may have on the chip that the kernels are for.

    Yields:
        How many kernels were made in it.
    """
    from unittest import mock

    before = dict(_kernels)
    _kernels.clear()
    _ahead["shared_memory"] = shared_memory
    try:
        # Builds of torch without CUDA have no streams, and elsewhere asking for one takes memory of the device.
        with mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0, create=True):
            yield lambda: len(_kernels)
    finally:
        _ahead.clear()
        _kernels.clear()
        _kernels.update(before)


def tensor_map(pointer: int, shape: Sequence[int], strides: Sequence[int], meta: Mapping[str, Any]) -> Any:
    """A CUtensorMap as Triton's launcher takes it; holds addresses alone, so it may outlive the tensor."""
    if _ahead:
        return None
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
    from triton.runtime import driver

    return driver.active.utils.fill_tma_descriptor(
        pointer,
        meta["swizzle"],
        meta["elem_size"],
        TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]],
        meta["block_size"],
        list(shape),
        list(strides),
        0,
    )
