"""How exactly a KPU is simulated."""

from __future__ import annotations

from typing import Any

from hal_core.plugin_api import ContractError

BEHAVIORAL, TRANSACTIONAL, CYCLE_ACCURATE = 0, 1, 2
FIDELITIES = ("behavioral", "transactional", "cycle_accurate")


def check_fidelity(fidelity: Any) -> int:
    """The fidelity, if it is one.

    Raises:
        ContractError: it is none.
    """
    if isinstance(fidelity, bool) or fidelity not in (BEHAVIORAL, TRANSACTIONAL, CYCLE_ACCURATE):
        raise ContractError(
            f"fidelity {fidelity!r} was given: use BEHAVIORAL (0), TRANSACTIONAL (1) or CYCLE_ACCURATE (2)"
        )
    return int(fidelity)
