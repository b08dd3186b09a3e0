"""The hooks of hal-router that are always there. Light: imports no torch. `enable` adds the others, and
HAL_ROUTER=1 enables at the first decision.
"""

from __future__ import annotations

import os
from typing import Any

from hal_core.plugin_api import Table, hookimpl


@hookimpl
def hal_commands(subparsers: Any) -> None:
    """Add `hal router`."""
    from . import command

    command.add_parser(subparsers)


@hookimpl
def hal_doctor() -> list[Table]:
    """Breakers that are not closed, and what is wrong with the state file."""
    from . import command

    return command.doctor_tables()


if os.environ.get("HAL_ROUTER") == "1":

    @hookimpl
    def hal_policy(request: Any, candidates: Any, policy: Any) -> Any:
        """Enable the router, whose own hook is asked from now on, and decide this call by it."""
        from . import control

        control.enable()
        return control.router and control.router.policy(request, candidates, policy)
