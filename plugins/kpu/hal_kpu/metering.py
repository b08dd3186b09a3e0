"""What a compiled model's programs cost, added to `hal_core.meter` as the work of kpu:0."""

from __future__ import annotations

from hal_core.context import meter_var
from hal_core.errors import HalError
from hal_core.registry import registry

from .cost import Cost
from .coverage import Run
from .energy import energy
from .runtime import TRANSACTIONAL, current_profile

DEVICE = "kpu:0"


def meter_run(run: Run) -> None:
    """Add a compiled graph's run to the meter of the current context; nothing where there is none, or no kpu:0.

    Time and energy are modelled at tile level also where the run took its values in BEHAVIORAL: a simulated device's own
    clock is no time of its. What the host ran is not the device's.
    """
    meter = meter_var.get()
    if meter is None or not run.plans:
        return
    try:
        device = registry.find(DEVICE)[0]
    except HalError:
        return
    profile = current_profile()
    for plan in run.plans:
        stats = plan.time(run.fidelity or TRANSACTIONAL)
        stated = Cost(stats=stats, energy=energy(stats, profile), profile=profile).estimate()
        wall, moved = run.kpu_wall / len(run.plans), run.boundary_bytes // len(run.plans)
        meter.add(device, wall, stated.time, stated.energy, plan.macs, moved)
