"""Deprecated: the `hal` command is `hal_cli.command_line`."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    found = getattr(importlib.import_module("hal_cli.command_line"), name)
    warnings.warn("hal_core.cli is now hal_cli.command_line: import it from there", DeprecationWarning, stacklevel=2)
    return found
