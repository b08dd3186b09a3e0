"""What a compiled model's programs cost, added to `hal_core.meter` as the work of kpu:0."""

from __future__ import annotations

from typing import Any

from hal_core.plugin_api import HalError, meter_var, registry

from ...cost import Cost
from ...runtime.settings import current_profile
from ...runtime.timing import time_program
from ...simulator.energy import energy
from ...simulator.fidelity import TRANSACTIONAL
from .coverage import Run

DEVICE = "kpu:0"


def meter_run(run: Run) -> None:
    """Add a compiled graph's run to the meter of the current context; nothing where there is none, or no kpu:0.

    Time and energy are modelled on the machine of kpu:0, at tile level also where values were BEHAVIORAL: the host's
    clock is not the device's, nor is what the host ran.
    """
    meter = meter_var.get()
    if meter is None or not run.plans:
        return
    try:
        device = registry.find(DEVICE)[0]
    except HalError:
        return
    backend: Any = registry.backend_of(device)
    profile, fidelity = backend.profile, run.fidelity or TRANSACTIONAL
    for plan in run.plans:
        kept = profile == current_profile()  # the plan keeps its time on the process's machine
        stats = plan.time(fidelity) if kept else time_program(plan.program, fidelity, profile)
        stated = Cost(stats=stats, energy=energy(stats, profile), profile=profile).estimate()
        wall, moved = run.kpu_wall / len(run.plans), run.boundary_bytes // len(run.plans)
        meter.add(device, wall, stated.time, stated.energy, plan.macs, moved)
