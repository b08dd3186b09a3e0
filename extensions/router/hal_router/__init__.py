"""Routing that learns: which device, and which of its tilings, serves a call fastest here and now.

    import hal_router
    hal_router.enable()                       # hal.attention is routed from now on
    print(hal.explain(query, key, value))     # what the router believed, and why

    with hal_router.deadline(0.005): ...      # the least energy among devices that make it in time
    pool = hal_router.Pool()                  # many requests at once, over all devices
    hal_router.state()                        # beliefs, breakers, queues, as plain data

Importing this package imports no torch: a name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hal_core import __version__ as __version__

#: Public names by the module that holds them.
_NAMES = {
    "adaptive": "AdaptiveRouter PerformanceMetrics WorkloadCharacteristics",
    "results": "cached",
    "control": "believed disable enable save state",
    "objective": "deadline",
    "pool": "Pool QueueFullError",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
