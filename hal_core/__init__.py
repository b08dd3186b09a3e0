"""One attention API over every accelerator.

    import hal_core as hal
    out = hal.attention(query, key, value, is_causal=True)   # the fastest device that is right for this call
    print(hal.explain(query, key, value))                    # why that one, and why no other

Importing this package imports neither torch nor a driver.
"""

from typing import TYPE_CHECKING, Any

from .attention import attention, bind, explain
from .capabilities import FEATURES, Capabilities, Choice, Code, Numerics, Range, Refusal
from .context import configure, meter, prefer, use
from .device import Basis, Device, Estimate, Fidelity, Provenance, Quantity
from .errors import ContractError, DeviceUnavailableError, HalError, MemoryLimitError, PluginError

# isort: split
from .errors import SelectionChangedError, UnknownBackendError, UnsupportedError
from .hooks import API_VERSION, BackendSpec, hookimpl
from .kernels import KernelSpec, kernel
from .protocols import AttentionBackend, MemoryManager, Session, SimpleSession, TilingStrategy
from .registry import devices, register, session, unregister
from .request import AttentionOutput, AttentionRequest, Causal, Grads, MaskKind, SequenceTables
from .selection import Candidate, Decision, check_all, replay

if TYPE_CHECKING:
    from . import testing as testing
    from .calibration import Calibration, cache_dir
    from .memory import Buffer, MemoryStats, PooledMemory
    from .tiling import BlockPlan, DenseTiling, Tile, TilePlan

    # isort: split
    from .tiling import dense_mask, expand_block_plan, merge_partials, slice_mask

from .version import __version__


#: What is imported when it is first used.
_LATER = {
    "calibration": ("Calibration", "cache_dir"),
    "memory": ("Buffer", "MemoryStats", "PooledMemory"),
    "tiling": (
        "BlockPlan",
        "DenseTiling",
        "Tile",
        "TilePlan",
        "dense_mask",
        "expand_block_plan",
        "merge_partials",
        "slice_mask",
    ),
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "testing":  # the conformance kit
        return importlib.import_module(".testing", __name__)
    for module, names in _LATER.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "API_VERSION",
    "FEATURES",
    "AttentionBackend",
    "AttentionOutput",
    "AttentionRequest",
    "BackendSpec",
    "Basis",
    "BlockPlan",
    "Buffer",
    "Calibration",
    "Candidate",
    "Capabilities",
    "Causal",
    "Choice",
    "Code",
    "ContractError",
    "Decision",
    "DenseTiling",
    "Device",
    "DeviceUnavailableError",
    "Estimate",
    "Fidelity",
    "Grads",
    "HalError",
    "KernelSpec",
    "MaskKind",
    "MemoryLimitError",
    "MemoryManager",
    "MemoryStats",
    "Numerics",
    "PluginError",
    "PooledMemory",
    "Provenance",
    "Quantity",
    "Range",
    "Refusal",
    "SelectionChangedError",
    "SequenceTables",
    "Session",
    "SimpleSession",
    "Tile",
    "TilePlan",
    "TilingStrategy",
    "UnknownBackendError",
    "UnsupportedError",
    "attention",
    "bind",
    "cache_dir",
    "check_all",
    "configure",
    "dense_mask",
    "devices",
    "expand_block_plan",
    "explain",
    "hookimpl",
    "kernel",
    "merge_partials",
    "meter",
    "prefer",
    "register",
    "replay",
    "session",
    "slice_mask",
    "unregister",
    "use",
]
