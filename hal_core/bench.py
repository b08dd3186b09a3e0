"""Deprecated: what a backend adds to `hal bench` is in `hal_core.plugin_api`, and the command in `hal_cli.bench`."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

_MOVED = {
    "hal_core.testing.bench_setup": ("BenchSetup", "Benchmarked", "Call", "Ceilings"),
    "hal_cli.bench": ("SECONDS", "BenchRun", "bench"),
    "hal_cli.bench_picture": ("draw", "draw_run", "rate"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MOVED.items():
        if name in names:
            warnings.warn(f"hal_core.bench.{name} is now {module}.{name}", DeprecationWarning, stacklevel=2)
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
