"""Kernels of attention and of fields for x86 processors, compiled from C++ and called through a C interface.

    import hal_cpu_native

    if hal_cpu_native.available():
        out = hal_cpu_native.attention(query, key, value, band=(None, 0))

Importing this package loads nothing: neither torch nor the compiled library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .call import Kernel, NativeRefusal, workspace_bytes
    from .face import attention, attention_backward, read
    from .fields import euler, fields_workspace_bytes, reaction_diffusion, ricci
    from .library import available, instruction_sets, why_absent

_HOME = {
    "Kernel": "call",
    "NativeRefusal": "call",
    "attention": "face",
    "attention_backward": "face",
    "available": "library",
    "euler": "fields",
    "fields_workspace_bytes": "fields",
    "instruction_sets": "library",
    "reaction_diffusion": "fields",
    "read": "face",
    "ricci": "fields",
    "why_absent": "library",
    "workspace_bytes": "call",
}

__all__ = [
    "Kernel",
    "NativeRefusal",
    "attention",
    "attention_backward",
    "available",
    "euler",
    "fields_workspace_bytes",
    "instruction_sets",
    "reaction_diffusion",
    "read",
    "ricci",
    "why_absent",
    "workspace_bytes",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
