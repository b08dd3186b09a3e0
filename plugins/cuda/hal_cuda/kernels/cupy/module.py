"""CUDA C++ sources compiled by NVRTC at first use and launched through CuPy. The only file that speaks to CuPy."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hal_core.plugin_api import ContractError, DeviceUnavailableError

from ...memory import cupy_stream

_FOLDER = Path(__file__).parent
_INSTALL = "pip install 'hal-cuda[cupy]'"
_MOST_BLOCKS = (1 << 31) - 1
_lock = threading.Lock()
_functions: dict[Any, Any] = {}

#: C++ names of dtypes in the sources.
ELEMENTS = {torch.float32: "float", torch.float16: "fp16", torch.bfloat16: "bf16"}


def source(name: str) -> str:
    """The text of a source, "reductions", with what all of them begin with."""
    return "\n".join((_FOLDER / file).read_text(encoding="utf-8") for file in ("types.cuh", f"{name}.cu"))


def options(definitions: Mapping[str, str]) -> tuple[str, ...]:
    """What NVRTC is given beside the architecture. definitions: macros of the source."""
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in definitions.items()))


@lru_cache(maxsize=1)
def cupy() -> Any:
    """CuPy, with an NVRTC that it can use.

    Raises:
        DeviceUnavailableError: CuPy or NVRTC is missing, or NVRTC is of another major version than CuPy was built for,
            or than the driver runs.
    """
    try:
        import cupy as found
        from cupy.cuda import nvrtc, runtime
    except ImportError as error:
        raise DeviceUnavailableError(
            f"CuPy, which compiles these kernels, cannot be imported ({first_line(error)}): {_INSTALL}, or use the "
            "triton_ function of the same name"
        ) from error
    wanted = _built_for(runtime)
    try:
        have = tuple(nvrtc.getVersion())
    except Exception as error:  # CuPy raises what the loader of libraries raised
        raise DeviceUnavailableError(
            f"NVRTC {wanted or ''} is wanted by CuPy {found.__version__} and was not found ({first_line(error)}): "
            f"pip install {_package(wanted)}"
        ) from error
    check_versions(found.__version__, wanted, have, runtime.driverGetVersion() // 1000)
    return found


def check_versions(release: str, wanted: int, have: tuple[int, ...], driver: int) -> None:
    """Refuse an NVRTC that cannot serve.

    Args:
        release: of CuPy. wanted: CUDA's major version that CuPy was built for; 0: unknown. have: NVRTC's version.
        driver: the newest major version of CUDA that the driver runs.

    Raises:
        DeviceUnavailableError: as `cupy`.
    """
    version = ".".join(map(str, have))
    if wanted and have[0] != wanted:
        raise DeviceUnavailableError(
            f"NVRTC {wanted} is wanted, which CuPy {release} was built for, and NVRTC {version} was found: "
            f"pip install {_package(wanted)}, or the CuPy of CUDA {have[0]} (cupy-cuda{have[0]}x)"
        )
    if have[0] > driver:
        raise DeviceUnavailableError(
            f"NVRTC {version} was found, and the driver runs CUDA {driver} at most: upgrade the driver, or pip install "
            f"cupy-cuda{driver}x and {_package(driver)}"
        )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _package(major: int) -> str:
    """The Python package that has NVRTC for a major version of CUDA."""
    return "nvidia-cuda-nvrtc-cu12" if major == 12 else "nvidia-cuda-nvrtc"


def _built_for(runtime: Any) -> int:
    """The major version of CUDA that CuPy was built for; 0 where it does not say."""
    try:
        return _by_name() or int(runtime.runtimeGetVersion()) // 1000
    except Exception:  # its runtime library is missing too
        return 0


def _by_name() -> int:
    """CUDA's major version from the name of the installed distribution, "cupy-cuda13x"."""
    from importlib.metadata import packages_distributions

    for name in packages_distributions().get("cupy", ()):
        digits = name.lower().partition("cuda")[2].rstrip("x")
        if digits.isdigit():
            return int(digits[:2])
    return 0


def function(name: str, entry: str, definitions: Mapping[str, str], index: int) -> Any:
    """A source's kernel, compiled for the chip with this CUDA index and loaded on it.

    Raises:
        DeviceUnavailableError: as `cupy`, or NVRTC refused the source.
    """
    key = (name, entry, tuple(definitions.items()), index)
    found = _functions.get(key)
    if found is None:
        library = cupy()
        with _lock, library.cuda.Device(index):
            found = _functions.get(key)
            if found is None:
                try:
                    module = library.RawModule(code=source(name), options=options(definitions), backend="nvrtc")
                    module.compile()
                    found = module.get_function(entry)
                except library.cuda.compiler.CompileException as error:
                    raise DeviceUnavailableError(
                        f"NVRTC {'.'.join(map(str, library.cuda.nvrtc.getVersion()))} did not compile {name}.cu for "
                        f"cuda:{index}: {first_line(error)}"
                    ) from error
                _functions[key] = found
    return found


@lru_cache(maxsize=64)
def _stream(handle: int, index: int) -> Any:
    """Torch's current stream, whose handle this is, as CuPy takes it."""
    return cupy_stream(cupy(), torch.cuda.current_stream(index))


def launch(made: Any, index: int, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
    """Launch on torch's current stream of a device. arguments: tensors, None for a null pointer, and numpy scalars.

    Raises:
        ContractError: more blocks than a launch may have.
    """
    if blocks > _MOST_BLOCKS:
        raise ContractError(f"a kernel of {blocks} blocks was asked for: use smaller tensors")
    given = tuple(
        np.uint64(0 if x is None else x.data_ptr()) if x is None or isinstance(x, torch.Tensor) else x
        for x in arguments
    )
    with cupy().cuda.Device(index), _stream(torch._C._cuda_getCurrentRawStream(index), index):
        made((blocks,), (threads,), given)
