"""Everything that a plugin may import from the core, and nothing else is imported by one.

A name is imported when it is first used (PEP 562): a plugin's hook module loads neither torch nor a driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .access import current_caller as current_caller
    from .buffers import Buffer as Buffer
    from .buffers import MemoryStats as MemoryStats
    from .calibration import Calibration as Calibration
    from .calibration import cache_dir as cache_dir
    from .calibration import calibrate as calibrate
    from .calibration import write_whole as write_whole
    from .capability import FEATURES as FEATURES
    from .capability import Capabilities as Capabilities
    from .capability import Choice as Choice
    from .capability import Code as Code
    from .capability import Numerics as Numerics
    from .capability import Range as Range
    from .capability import Refusal as Refusal
    from .capability import listing as listing
    from .console import progress as progress
    from .console import show_table as show_table
    from .decision import Candidate as Candidate
    from .decision import Decision as Decision
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
    from .errors import UnsupportedError as UnsupportedError
    from .frontend.api import attention as attention
    from .frontend.execution import moved_to as moved_to
    from .frontend.validation import check_tables as check_tables
    from .hooks import API_VERSION as API_VERSION
    from .hooks import BackendSpec as BackendSpec
    from .hooks import CommandResult as CommandResult
    from .hooks import KernelSpec as KernelSpec
    from .hooks import Table as Table
    from .hooks import hookimpl as hookimpl
    from .options import Meter as Meter
    from .options import current_meter as current_meter
    from .options import merged_policy as merged_policy
    from .options import meter as meter
    from .options import meter_var as meter_var
    from .options import use as use
    from .plans import BlockPlan as BlockPlan
    from .plans import Tile as Tile
    from .plans import TilePlan as TilePlan
    from .plans import visible_keys as visible_keys
    from .protocols import AttentionBackend as AttentionBackend
    from .protocols import Autograd as Autograd
    from .protocols import MemoryManager as MemoryManager
    from .protocols import Progress as Progress
    from .protocols import Session as Session
    from .protocols import TilingStrategy as TilingStrategy
    from .registry import kernel as kernel
    from .registry import registry as registry
    from .request import DTYPE_BYTES as DTYPE_BYTES
    from .request import AttentionOutput as AttentionOutput
    from .request import AttentionRequest as AttentionRequest
    from .request import Causal as Causal
    from .request import Grads as Grads
    from .request import MaskKind as MaskKind
    from .request import SequenceMetadata as SequenceMetadata
    from .selection import check_all as check_all
    from .selection import decide as decide
    from .selection import tiling_limits as tiling_limits
    from .testing.bench_setup import BenchSetup as BenchSetup
    from .testing.bench_setup import Call as Call
    from .testing.bench_setup import Ceilings as Ceilings
    from .toolkit.masks import dense_mask as dense_mask
    from .toolkit.masks import expand_block_plan as expand_block_plan
    from .toolkit.masks import merge_partials as merge_partials
    from .toolkit.masks import slice_mask as slice_mask
    from .toolkit.memory import PooledMemory as PooledMemory
    from .toolkit.session import SessionBase as SessionBase
    from .toolkit.session import SimpleSession as SimpleSession
    from .toolkit.session import checked_buffer as checked_buffer
    from .toolkit.tiling import DenseTiling as DenseTiling
    from .version import __version__ as __version__

#: Names by the module that holds them.
_NAMES = {
    "version": "__version__",
    "errors": (
        "AccessDeniedError ContractError DeviceUnavailableError HalError MemoryLimitError PluginError UnsupportedError"
    ),
    "request": "DTYPE_BYTES AttentionOutput AttentionRequest Causal Grads MaskKind SequenceMetadata",
    "buffers": "Buffer MemoryStats",
    "plans": "BlockPlan Tile TilePlan visible_keys",
    "device_info": "Basis Device Estimate Fidelity Provenance Quantity",
    "capability": "FEATURES Capabilities Choice Code Numerics Range Refusal listing",
    "decision": "Candidate Decision PolicyChoice",
    "protocols": "AttentionBackend Autograd MemoryManager Progress Session TilingStrategy",
    "console": "progress show_table",
    "hooks": "API_VERSION BackendSpec CommandResult KernelSpec Table hookimpl",
    "access": "current_caller",
    "registry": "kernel",
    "selection": "check_all decide tiling_limits",
    "options": "Meter current_meter merged_policy meter_var meter use",
    "calibration": "Calibration cache_dir calibrate write_whole",
    "toolkit.session": "SessionBase SimpleSession checked_buffer",
    "toolkit.memory": "PooledMemory",
    "toolkit.tiling": "DenseTiling",
    "toolkit.masks": "dense_mask expand_block_plan merge_partials slice_mask",
    "frontend.api": "attention",
    "frontend.validation": "check_tables",
    "frontend.execution": "moved_to",
    "testing.bench_setup": "BenchSetup Call Ceilings",
}
_WHERE = {name: (module, name) for module, names in _NAMES.items() for name in names.split()} | {
    "load_calibration": ("calibration", "load"),
    "SequenceTables": ("request", "SequenceMetadata"),
    "registry": ("registry", "registry"),
}


def find_devices(name: str) -> list[Device]:
    """The devices of a backend name or device id. Raises UnknownBackendError, DeviceUnavailableError."""
    from .registry import registry

    return registry.find(name)


def open_session(device_id: str) -> Session:
    """The open session of a device. Raises as `hal_core.session`."""
    from .registry import registry

    return registry.session(device_id)


def register(what: BackendSpec | AttentionBackend, name: str | None = None) -> None:
    """Add a backend at run time. Raises PluginError for a name that is taken."""
    from .registry import registry

    registry.register(what, name)


def refresh(device_id: str) -> None:
    """Forget decisions and failures of a device's backend, for example after its profile changed."""
    from .registry import registry

    registry.refresh(device_id)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name]
    found = globals()[name] = getattr(import_module(f".{module}", __package__), attribute)
    return found
