"""Everything a plugin may import from the core, and nothing else is imported by one.

Names are imported when they are used (PEP 562): a plugin's hook module loads neither torch nor a driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration import Calibration as Calibration
    from .calibration import cache_dir as cache_dir
    from .calibration import write_whole as write_whole
    from .capabilities import Capabilities as Capabilities
    from .capabilities import Choice as Choice
    from .capabilities import Code as Code
    from .capabilities import Numerics as Numerics
    from .capabilities import Range as Range
    from .capabilities import Refusal as Refusal
    from .capabilities import listing as listing
    from .console import progress as progress
    from .console import show_table as show_table
    from .context import meter_var as meter_var
    from .contract import check_tables as check_tables
    from .device import Basis as Basis
    from .device import Device as Device
    from .device import Estimate as Estimate
    from .device import Fidelity as Fidelity
    from .device import Provenance as Provenance
    from .device import Quantity as Quantity
    from .errors import ContractError as ContractError
    from .errors import DeviceUnavailableError as DeviceUnavailableError
    from .errors import HalError as HalError
    from .errors import MemoryLimitError as MemoryLimitError
    from .errors import PluginError as PluginError
    from .errors import UnsupportedError as UnsupportedError
    from .hooks import BackendSpec as BackendSpec
    from .hooks import CommandResult as CommandResult
    from .hooks import Table as Table
    from .hooks import hookimpl as hookimpl
    from .kernels import KernelSpec as KernelSpec
    from .memory import Buffer as Buffer
    from .memory import MemoryStats as MemoryStats
    from .memory import PooledMemory as PooledMemory
    from .protocols import AttentionBackend as AttentionBackend
    from .protocols import MemoryManager as MemoryManager
    from .protocols import Session as Session
    from .protocols import SimpleSession as SimpleSession
    from .protocols import TilingStrategy as TilingStrategy
    from .registry import registry as registry
    from .request import DTYPE_BYTES as DTYPE_BYTES
    from .request import AttentionOutput as AttentionOutput
    from .request import AttentionRequest as AttentionRequest
    from .request import Causal as Causal
    from .request import Grads as Grads
    from .request import MaskKind as MaskKind
    from .request import SequenceTables as SequenceTables
    from .route import moved_to as moved_to
    from .tiling import BlockPlan as BlockPlan
    from .tiling import DenseTiling as DenseTiling
    from .tiling import Tile as Tile
    from .tiling import TilePlan as TilePlan
    from .tiling import dense_mask as dense_mask
    from .tiling import expand_block_plan as expand_block_plan
    from .tiling import merge_partials as merge_partials
    from .testing.bench_setup import BenchSetup as BenchSetup
    from .testing.bench_setup import Call as Call
    from .testing.bench_setup import Ceilings as Ceilings
    from .tiling import visible_keys as visible_keys

_WHERE = {
    "calibration": ("Calibration", "cache_dir", "write_whole"),
    "capabilities": ("Capabilities", "Choice", "Code", "Numerics", "Range", "Refusal", "listing"),
    "console": ("progress", "show_table"),
    "context": ("meter_var",),
    "contract": ("check_tables",),
    "device": ("Basis", "Device", "Estimate", "Fidelity", "Provenance", "Quantity"),
    "errors": (
        "ContractError",
        "DeviceUnavailableError",
        "HalError",
        "MemoryLimitError",
        "PluginError",
        "UnsupportedError",
    ),
    "hooks": ("BackendSpec", "CommandResult", "Table", "hookimpl"),
    "kernels": ("KernelSpec",),
    "memory": ("Buffer", "MemoryStats", "PooledMemory"),
    "protocols": ("AttentionBackend", "MemoryManager", "Session", "SimpleSession", "TilingStrategy"),
    "registry": ("registry",),
    "request": (
        "DTYPE_BYTES",
        "AttentionOutput",
        "AttentionRequest",
        "Causal",
        "Grads",
        "MaskKind",
        "SequenceTables",
    ),
    "route": ("moved_to",),
    "testing.bench_setup": ("BenchSetup", "Call", "Ceilings"),
    "tiling": (
        "BlockPlan",
        "DenseTiling",
        "Tile",
        "TilePlan",
        "dense_mask",
        "expand_block_plan",
        "merge_partials",
        "visible_keys",
    ),
}


def __getattr__(name: str) -> Any:
    if name == "load_calibration":
        return import_module(".calibration", __package__).load
    for module, names in _WHERE.items():
        if name in names:
            return getattr(import_module(f".{module}", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
