"""The `hal` command: it asks the core, and prints what commands return.

    hal devices            # which devices are present
    hal doctor             # every plugin: found, loaded, failed, and what to do
    python -m hal_core     # the same command

Importing this package imports neither torch nor a plugin.
"""

from __future__ import annotations

from .command_line import main

__all__ = ["main"]
