"""NVIDIA GPUs as devices of hal_core, and PyTorch's own attention calls on their kernels.

This module holds the hooks, and names that are imported when they are first used (PEP 562): neither torch nor a driver
is loaded before.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hal_core.plugin_api import BackendSpec, KernelSpec, hookimpl

if TYPE_CHECKING:
    from .frontend.activation import (
        activate_sdpa as activate_sdpa,
        deactivate_sdpa as deactivate_sdpa,
        sdpa_statistics as sdpa_statistics,
    )
    from .frontend.varlen import varlen_attn as varlen_attn

#: Public names by the module that holds them.
_NAMES = {
    ".frontend.activation": "activate_sdpa deactivate_sdpa sdpa_statistics",
    ".frontend.varlen": "varlen_attn",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_WHERE)


@hookimpl
def hal_backends(api_version: tuple[int, int]) -> list[BackendSpec]:
    return [
        BackendSpec(
            name="cuda",
            target="hal_cuda.backend:CudaBackend",
            requirements=(
                "an NVIDIA GPU of compute capability 8.0 or higher",
                "its driver",
                "torch 2.11 or newer with CUDA",
            ),
            install_hint="pip install 'hal-cuda[torch]'",
        )
    ]


@hookimpl
def hal_kernels() -> list[KernelSpec]:
    from .kernels.extra.specs import KERNELS

    return KERNELS


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
