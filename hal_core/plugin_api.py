"""Everything that a plugin may import from the core, and nothing else is imported by one.

A name is imported when it is first used (PEP 562): a plugin's hook module loads neither torch nor a driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .access import current_caller as current_caller
    from .buffers import Buffer as Buffer, MemoryStats as MemoryStats
    from .calibration import (
        Calibration as Calibration,
        cache_dir as cache_dir,
        calibrate as calibrate,
        write_whole as write_whole,
    )
    from .capability import (
        FEATURES as FEATURES,
        Capabilities as Capabilities,
        Choice as Choice,
        Code as Code,
        Numerics as Numerics,
        Range as Range,
        Refusal as Refusal,
        listing as listing,
    )
    from .decision import Candidate as Candidate, Decision as Decision, PolicyChoice as PolicyChoice
    from .device_info import (
        Basis as Basis,
        Device as Device,
        Estimate as Estimate,
        Fidelity as Fidelity,
        Provenance as Provenance,
        Quantity as Quantity,
    )
    from .errors import (
        AccessDeniedError as AccessDeniedError,
        ContractError as ContractError,
        DeviceUnavailableError as DeviceUnavailableError,
        HalError as HalError,
        MemoryLimitError as MemoryLimitError,
        PluginError as PluginError,
        UnsupportedError as UnsupportedError,
    )
    from .frontend.api import attention as attention
    from .frontend.execution import moved_to as moved_to
    from .frontend.validation import check_tables as check_tables
    from .hooks import (
        API_VERSION as API_VERSION,
        BackendSpec as BackendSpec,
        CommandResult as CommandResult,
        KernelSpec as KernelSpec,
        Table as Table,
        hookimpl as hookimpl,
    )
    from .options import (
        Meter as Meter,
        current_meter as current_meter,
        merged_policy as merged_policy,
        meter as meter,
        meter_var as meter_var,
        use as use,
    )
    from .plans import BlockPlan as BlockPlan, Tile as Tile, TilePlan as TilePlan, visible_keys as visible_keys
    from .protocols import (
        AttentionBackend as AttentionBackend,
        Autograd as Autograd,
        MemoryManager as MemoryManager,
        Progress as Progress,
        Session as Session,
        TilingStrategy as TilingStrategy,
    )
    from .registry import kernel as kernel, registry as registry
    from .request import (
        DTYPE_BYTES as DTYPE_BYTES,
        AttentionOutput as AttentionOutput,
        AttentionRequest as AttentionRequest,
        Causal as Causal,
        Grads as Grads,
        MaskKind as MaskKind,
        SequenceMetadata as SequenceMetadata,
    )
    from .selection import check_all as check_all, decide as decide, tiling_limits as tiling_limits
    from .testing.bench_setup import BenchSetup as BenchSetup, Call as Call, Ceilings as Ceilings
    from .toolkit.masks import (
        dense_mask as dense_mask,
        expand_block_plan as expand_block_plan,
        merge_partials as merge_partials,
        slice_mask as slice_mask,
    )
    from .toolkit.memory import PooledMemory as PooledMemory, pooled_size as pooled_size
    from .toolkit.session import (
        SessionBase as SessionBase,
        SimpleSession as SimpleSession,
        checked_buffer as checked_buffer,
    )
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
    "hooks": "API_VERSION BackendSpec CommandResult KernelSpec Table hookimpl",
    "access": "current_caller",
    "registry": "kernel",
    "selection": "check_all decide tiling_limits",
    "options": "Meter current_meter merged_policy meter_var meter use",
    "calibration": "Calibration cache_dir calibrate write_whole",
    "toolkit.session": "SessionBase SimpleSession checked_buffer",
    "toolkit.memory": "PooledMemory pooled_size",
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
