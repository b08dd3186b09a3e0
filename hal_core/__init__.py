"""One attention API over every accelerator.

    import hal_core as hal
    out = hal.attention(query, key, value, is_causal=True)   # the fastest device that is right for this call
    print(hal.explain(query, key, value))                    # why that one, and why no other

Importing this package imports neither torch nor a driver: a name is imported when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _moved

if TYPE_CHECKING:
    from . import testing as testing
    from .access import current_caller as current_caller
    from .buffers import Buffer as Buffer, MemoryStats as MemoryStats
    from .calibration import cache_dir as cache_dir
    from .capability import (
        FEATURES as FEATURES,
        Capabilities as Capabilities,
        Choice as Choice,
        Code as Code,
        Numerics as Numerics,
        Range as Range,
        Refusal as Refusal,
    )
    from .decision import Candidate as Candidate, Decision as Decision, Policy as Policy, PolicyChoice as PolicyChoice
    from .device_info import (
        Basis as Basis,
        Calibration as Calibration,
        Device as Device,
        Estimate as Estimate,
        Fidelity as Fidelity,
        MeterRecord as MeterRecord,
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
        SelectionChangedError as SelectionChangedError,
        UnknownBackendError as UnknownBackendError,
        UnsupportedError as UnsupportedError,
    )
    from .frontend.api import attention as attention, bind as bind, explain as explain
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
        caller as caller,
        configure as configure,
        current_meter as current_meter,
        meter as meter,
        prefer as prefer,
        use as use,
        watch as watch,
    )
    from .plans import BlockPlan as BlockPlan, Tile as Tile, TilePlan as TilePlan
    from .protocols import (
        AttentionBackend as AttentionBackend,
        MemoryManager as MemoryManager,
        Session as Session,
        TilingStrategy as TilingStrategy,
    )
    from .registry import (
        capabilities as capabilities,
        device as device,
        devices as devices,
        kernel as kernel,
        memory as memory,
        register as register,
        session as session,
        unregister as unregister,
    )
    from .request import (
        AttentionOutput as AttentionOutput,
        AttentionRequest as AttentionRequest,
        Causal as Causal,
        Grads as Grads,
        MaskKind as MaskKind,
        SequenceMetadata as SequenceMetadata,
    )
    from .selection import check_all as check_all, replay as replay
    from .toolkit.caches import (
        QuantizedCache as QuantizedCache,
        dequantized as dequantized,
        quantize_cache as quantize_cache,
    )
    from .toolkit.masks import (
        dense_mask as dense_mask,
        expand_block_plan as expand_block_plan,
        merge_partials as merge_partials,
        slice_mask as slice_mask,
    )
    from .toolkit.memory import PooledMemory as PooledMemory
    from .toolkit.session import SessionBase as SessionBase, SimpleSession as SimpleSession
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
    "device_info": "Basis Calibration Device Estimate Fidelity MeterRecord Provenance Quantity",
    "capability": "FEATURES Capabilities Choice Code Numerics Range Refusal",
    "decision": "Candidate Decision Policy PolicyChoice",
    "protocols": "AttentionBackend MemoryManager Session TilingStrategy",
    "hooks": "API_VERSION BackendSpec CommandResult KernelSpec Table hookimpl",
    "access": "current_caller",
    "registry": "capabilities device devices kernel memory register session unregister",
    "selection": "check_all replay",
    "options": "Meter caller configure current_meter meter prefer use watch",
    "calibration": "cache_dir",
    "toolkit.session": "SessionBase SimpleSession",
    "toolkit.memory": "PooledMemory",
    "toolkit.tiling": "DenseTiling",
    "toolkit.caches": "QuantizedCache dequantized quantize_cache",
    "toolkit.masks": "dense_mask expand_block_plan merge_partials slice_mask",
    "frontend.api": "attention bind explain",
}
_WHERE = {name: module for module, names in _PUBLIC.items() for name in names.split()}
if not TYPE_CHECKING:  # type checkers take the imports above
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
