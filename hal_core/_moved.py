"""Old module names, importable for one minor version with a DeprecationWarning that names the new place.

They are aliases in sys.modules, not files: a module `hal_core.memory` on disk would replace the function of that name.
"""

import sys
import warnings
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

#: Old module name: where its names are now, looked through in order.
_PLACES = {
    "attention": "frontend.api",
    "bench": "testing.bench_setup hal_cli.bench hal_cli.bench_picture",
    "capabilities": "capability",
    "cli": "hal_cli.command_line",
    "console": "hal_cli.console",
    "context": "options",
    "contract": "frontend.validation",
    "device": "device_info",
    "kernels": "hooks registry",
    "library": "frontend.torch_ops",
    "memory": "buffers toolkit.memory",
    "route": "frontend.execution",
    "tiling": "plans toolkit.tiling toolkit.masks",
}


def warn(old: str, new: str) -> None:
    warnings.warn(f"{old} has moved: use {new}", DeprecationWarning, stacklevel=3)


def _moved_name(old: str, places: list[str], name: str) -> Any:
    """The name of an old module, from where it is now."""
    for place in places if not name.startswith("__") else ():
        if hasattr(module := import_module(place), name):
            public = hasattr(sys.modules["hal_core"], name)
            warn(f"{old}.{name}", f"hal_core.{name}" if public else f"{place}.{name}")
            return getattr(module, name)
    raise AttributeError(f"module {old!r} has no attribute {name!r}")


def install() -> None:
    for old, places in _PLACES.items():
        full = [place if place.startswith("hal_") else f"hal_core.{place}" for place in places.split()]
        alias = sys.modules.setdefault(f"hal_core.{old}", ModuleType(f"hal_core.{old}"))
        vars(alias).update(__path__=[], __getattr__=partial(_moved_name, alias.__name__, full))
