"""What a compiled model's programs cost, added to `hal_core.meter` as the work of kpu:0."""

from __future__ import annotations

from hal_core.plugin_api import HalError, current_meter, find_devices, open_session

from ...cost import Cost
from ...profiles.profile import Profile
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
    meter = current_meter()
    if meter is None or not run.plans:
        return
    try:
        device, session = find_devices(DEVICE)[0], open_session(DEVICE)
    except HalError:
        return
    profile = getattr(session, "profile", None)
    if not isinstance(profile, Profile):
        return
    fidelity = run.fidelity or TRANSACTIONAL
    for plan in run.plans:
        kept = profile == current_profile()  # the plan keeps its time on the process's machine
        stats = plan.time(fidelity) if kept else time_program(plan.program, fidelity, profile, fuse=True)
        stated = Cost(stats=stats, energy=energy(stats, profile), profile=profile).estimate()
        wall, moved = run.kpu_wall / len(run.plans), run.boundary_bytes // len(run.plans)
        meter.add(device, wall, stated.time, stated.energy, plan.macs, moved)
