"""Programs of the package, compiled on demand and kept on disk as the driver's binaries."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import pyopencl as cl
from hal_compute.cache import keep

from hal_core.plugin_api import cache_dir

_MAGIC = b"hal-opencl 1\n"
_DIGEST = 32  # bytes of a SHA-256


class Programs:
    """Compiled programs of one device. A file's name is made of driver, device, source and options."""

    def __init__(self, context: Any, handle: Any) -> None:
        self._context, self._handle = context, handle
        platform = handle.platform
        self._driver = "\0".join(
            (
                platform.vendor,
                platform.name,
                platform.version,
                handle.vendor,
                handle.name,
                handle.version,
                handle.driver_version,
            )
        )

    def build(self, program: str, options: Sequence[str]) -> Any:
        """programs/<program>.cl with options: from the cache where it holds an intact binary that the driver takes.

        Raises:
            pyopencl.Error: the driver cannot compile it.
        """
        source = _source(program)
        path = self.path(source, options)
        built = self._load(path)
        if built is None:
            # pyopencl has a cache too, of pickles, and not for every platform: False leaves it out.
            with warnings.catch_warnings():  # of remarks that compilers make about programs that are right
                warnings.simplefilter("ignore", cl.CompilerWarning)
                built = cl.Program(self._context, source).build(["-w", *options], cache_dir=False)
            self._save(path, built)
        return built

    def path(self, source: str, options: Sequence[str]) -> Path:
        key = hashlib.sha256("\0".join((self._driver, source, *options)).encode()).hexdigest()
        return cache_dir() / "opencl" / f"{key}.program"

    def _load(self, path: Path) -> Any:
        """None where there is no file, a damaged one, or one that the driver refuses."""
        try:
            data = path.read_bytes()
        except OSError:
            return None
        digest, binary = data[len(_MAGIC) : len(_MAGIC) + _DIGEST], data[len(_MAGIC) + _DIGEST :]
        if not data.startswith(_MAGIC) or hashlib.sha256(binary).digest() != digest:
            return None
        try:
            return cl.Program(self._context, [self._handle], [binary]).build(["-w"])
        except cl.Error:
            return None

    def _save(self, path: Path, built: Any) -> None:
        binary = bytes(built.get_info(cl.program_info.BINARIES)[0])
        keep(path, _MAGIC + hashlib.sha256(binary).digest() + binary)


@lru_cache(maxsize=8)
def _source(program: str) -> str:
    folder = resources.files("hal_opencl") / "programs"
    shared = "" if program == "kernels" else (folder / "problem.h").read_text(encoding="utf-8")
    return shared + (folder / f"{program}.cl").read_text(encoding="utf-8")
