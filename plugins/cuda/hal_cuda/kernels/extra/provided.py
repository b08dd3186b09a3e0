"""The kernels beside attention as a session offers them, by the names of their specifications."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from . import specs


def names() -> frozenset[str]:
    """What can run here: the Triton kernels, and those in CUDA C++ where CuPy is installed."""
    own = frozenset(specs.SIGNATURES)
    offered = own | {"vector_add", "reduce_sum"}  # which several devices offer; hal_compute specifies them
    if find_spec("cupy") is not None:
        return offered
    return frozenset(name for name in offered if name.startswith("triton_") or name == "flash_attention_forward")


def kernel(name: str, index: int) -> Callable[..., Any]:
    """The callable of a name on a CUDA device."""
    found: Callable[..., Any] = getattr(import_module("hal_cuda.kernels"), name)
    if name == "reduce_sum":  # of all elements, as on every device
        return lambda x: found(x, None)
    if name.endswith("rope_precompute_freqs"):
        return partial(found, device=f"cuda:{index}")
    return found
