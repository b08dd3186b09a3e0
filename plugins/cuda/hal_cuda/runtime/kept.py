"""Compiled kernels found again in Triton's cache without Triton's own key, which takes most of a second to compute: it
hashes the whole of Triton.

A note beside the kernels says where one lies, under a key of what it is compiled from: this package's sources, Triton's
version and library, the signature, the constants, the target, the options and the settings that change what is
compiled. A note of which nothing remains is ignored.
"""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._C import libtriton
from triton.runtime.cache import get_cache_manager

_NOTE = "hal_cuda.txt"


@cache
def sources() -> str:
    """Of everything that all kernels are compiled from."""
    hashed = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        hashed.update(path.name.encode() + path.read_bytes())
    library = os.stat(libtriton.__file__)
    hashed.update(f"{triton.__version__} {triton.__file__} {library.st_size} {library.st_mtime_ns}".encode())
    return hashed.hexdigest()


def key(*what: Any) -> str:
    """The key of a kernel. what: texts, numbers, dtypes, tuples and dicts of these, whose `repr` tells them apart."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    settings = sorted(get_cache_invalidating_env_vars().items())
    tools = knobs.nvidia.ptxas.path, os.environ.get("TRITON_PTXAS_PATH")
    return hashlib.sha256(repr((sources(), settings, tools, what)).encode()).hexdigest()


def find(key: str, source: Any) -> Any:
    """The compiled kernel of a key, as `triton.compile` returns it; None where none is kept."""
    from triton.compiler import CompiledKernel

    if knobs.compilation.always_compile or knobs.compilation.override or knobs.compilation.listener:
        return None
    note = get_cache_manager(key).get_file(_NOTE)
    if note is None:
        return None
    hash = Path(note).read_text(encoding="ascii").strip()
    name = f"{source.name[:150]}.json"
    files = get_cache_manager(hash).get_group(name) or {}
    binary = any(file.endswith(".cubin") for file in files)
    if name not in files or not binary or not all(Path(path).exists() for path in files.values()):
        return None
    return CompiledKernel(source, files, hash)


def keep(key: str, made: Any) -> None:
    """Note where a compiled kernel lies."""
    get_cache_manager(key).put(made.hash, _NOTE, binary=False)


__all__ = ["find", "keep", "key", "sources"]
