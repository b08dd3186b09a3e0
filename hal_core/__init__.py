"""One attention API over every accelerator.

    import hal_core as hal
    out = hal.attention(query, key, value, is_causal=True)   # the fastest device that is right for this call
    print(hal.explain(query, key, value))                    # why that one, and why no other

Importing this package imports neither torch nor a driver: a name is imported when it is first used (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _moved

if TYPE_CHECKING:
    from . import testing as testing
    from .access import caller as caller
    from .access import current_caller as current_caller
    from .buffers import Buffer as Buffer
    from .buffers import MemoryStats as MemoryStats
    from .calibration import Calibration as Calibration
    from .calibration import cache_dir as cache_dir
    from .capability import FEATURES as FEATURES
    from .capability import Capabilities as Capabilities
    from .capability import Choice as Choice
    from .capability import Code as Code
    from .capability import Numerics as Numerics
    from .capability import Range as Range
    from .capability import Refusal as Refusal
    from .decision import Candidate as Candidate
    from .decision import Decision as Decision
    from .decision import Policy as Policy
    from .decision import PolicyChoice as PolicyChoice
    from .device_info import Basis as Basis
    from .device_info import Device as Device
    from .device_info import Estimate as Estimate
    from .device_info import Fidelity as Fidelity
    from .device_info import Provenance as Provenance
    from .device_info import Quantity as Quantity
    from .errors import AccessDeniedError as AccessDeniedError
    from .errors import ContractError as ContractError
    from .errors import DeviceUnavailableError as DeviceUnavailableError
    from .errors import HalError as HalError
    from .errors import MemoryLimitError as MemoryLimitError
    from .errors import PluginError as PluginError
    from .errors import SelectionChangedError as SelectionChangedError
    from .errors import UnknownBackendError as UnknownBackendError
    from .errors import UnsupportedError as UnsupportedError
    from .frontend.api import attention as attention
    from .frontend.api import bind as bind
    from .frontend.api import explain as explain
    from .hooks import API_VERSION as API_VERSION
    from .hooks import BackendSpec as BackendSpec
    from .hooks import CommandResult as CommandResult
    from .hooks import KernelSpec as KernelSpec
    from .hooks import Table as Table
    from .hooks import hookimpl as hookimpl
    from .options import Meter as Meter
    from .options import MeterRecord as MeterRecord
    from .options import configure as configure
    from .options import current_meter as current_meter
    from .options import meter as meter
    from .options import prefer as prefer
    from .options import use as use
    from .plans import BlockPlan as BlockPlan
    from .plans import Tile as Tile
    from .plans import TilePlan as TilePlan
    from .protocols import AttentionBackend as AttentionBackend
    from .protocols import MemoryManager as MemoryManager
    from .protocols import Session as Session
    from .protocols import TilingStrategy as TilingStrategy
    from .registry import capabilities as capabilities
    from .registry import device as device
    from .registry import devices as devices
    from .registry import kernel as kernel
    from .registry import memory as memory
    from .registry import register as register
    from .registry import session as session
    from .registry import unregister as unregister
    from .request import AttentionOutput as AttentionOutput
    from .request import AttentionRequest as AttentionRequest
    from .request import Causal as Causal
    from .request import Grads as Grads
    from .request import MaskKind as MaskKind
    from .request import SequenceMetadata as SequenceMetadata
    from .selection import check_all as check_all
    from .selection import replay as replay
    from .toolkit.masks import dense_mask as dense_mask
    from .toolkit.masks import expand_block_plan as expand_block_plan
    from .toolkit.masks import merge_partials as merge_partials
    from .toolkit.masks import slice_mask as slice_mask
    from .toolkit.memory import PooledMemory as PooledMemory
    from .toolkit.session import SessionBase as SessionBase
    from .toolkit.session import SimpleSession as SimpleSession
    from .toolkit.tiling import DenseTiling as DenseTiling
    from .version import __version__ as __version__

#: Public names by the module that holds them.
_PUBLIC = {
    "version": "__version__",
    "errors": (
        "AccessDeniedError ContractError DeviceUnavailableError HalError MemoryLimitError PluginError "
        "SelectionChangedError UnknownBackendError UnsupportedError"
    ),
    "request": "AttentionOutput AttentionRequest Causal Grads MaskKind SequenceMetadata",
    "buffers": "Buffer MemoryStats",
    "plans": "BlockPlan Tile TilePlan",
    "device_info": "Basis Device Estimate Fidelity Provenance Quantity",
    "capability": "FEATURES Capabilities Choice Code Numerics Range Refusal",
    "decision": "Candidate Decision Policy PolicyChoice",
    "protocols": "AttentionBackend MemoryManager Session TilingStrategy",
    "hooks": "API_VERSION BackendSpec CommandResult KernelSpec Table hookimpl",
    "access": "caller current_caller",
    "registry": "capabilities device devices kernel memory register session unregister",
    "selection": "check_all replay",
    "options": "Meter MeterRecord configure current_meter meter prefer use",
    "calibration": "Calibration cache_dir",
    "toolkit.session": "SessionBase SimpleSession",
    "toolkit.memory": "PooledMemory",
    "toolkit.tiling": "DenseTiling",
    "toolkit.masks": "dense_mask expand_block_plan merge_partials slice_mask",
    "frontend.api": "attention bind explain",
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name == "testing":  # the conformance kit
        return import_module(".testing", __name__)
    if name == "SequenceTables":
        _moved.warn("hal_core.SequenceTables", "hal_core.SequenceMetadata")
        name = "SequenceMetadata"
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    return found


_moved.install()
