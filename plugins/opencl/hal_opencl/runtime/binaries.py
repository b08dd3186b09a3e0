"""The package's programs: compiled on demand, and kept on disk as the driver's binaries."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import pyopencl as cl
from hal_compute.cache import keep, private_folder, read

_NO_CACHE: Any = False  # pyopencl's own cache holds pickles, and not for every platform


class Programs:
    """Compiled programs of one device, kept for all its sessions. A file's name is a digest of the driver, device,
    source and options.
    """

    def __init__(self, context: Any, handle: Any) -> None:
        self._context, self._handle = context, handle
        self._built: dict[tuple[str, ...], Any] = {}
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
        """programs/<program>.cl with options, from the cache if it holds an intact binary that the driver accepts.

        Raises:
            pyopencl.Error: the driver cannot compile it.
        """
        key = (program, *options)
        if key in self._built:
            return self._built[key]
        source = _source(program)
        path = self.path(source, options)
        built = self._load(path)
        if built is None:
            with warnings.catch_warnings():  # compilers remark on correct programs too
                warnings.simplefilter("ignore", cl.CompilerWarning)
                built = cl.Program(self._context, source).build(["-w", *options], cache_dir=_NO_CACHE)
            self._save(path, built)
        self._built[key] = built
        return built

    def path(self, source: str, options: Sequence[str]) -> Path | None:
        """The file of a program's binary; None where there is no safe folder for it."""
        key = hashlib.sha256("\0".join((self._driver, source, *options)).encode()).hexdigest()
        folder = private_folder("opencl")
        return None if folder is None else folder / f"{key}.program"

    def _load(self, path: Path | None) -> Any:
        """None where there is no file, a damaged one, or one that the driver refuses."""
        binary = read(path)
        if not binary:
            return None
        try:
            return cl.Program(self._context, [self._handle], [binary]).build(["-w"])
        except cl.Error:
            return None

    def _save(self, path: Path | None, built: Any) -> None:
        if path is not None:
            keep(path, bytes(built.get_info(cl.program_info.BINARIES)[0]))


@lru_cache(maxsize=8)
def _source(program: str) -> str:
    folder = resources.files("hal_opencl") / "kernels" / "programs"
    shared = "" if program == "kernels" else (folder / "problem.h").read_text(encoding="utf-8")
    return shared + (folder / f"{program}.cl").read_text(encoding="utf-8")
