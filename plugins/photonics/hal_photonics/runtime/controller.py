"""The state of an open chip: switching on, calibrating, looking at the sensors, and refusing service."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from hal_core.plugin_api import Device, DeviceUnavailableError

from ..calibrate import CalibrationReport, calibrate, probe_snr
from ..simulator.chip import SimulatedDriver
from ..simulator.core import PhotonicCore
from ..simulator.thermal import Health, Signal, State, Supervisor, triggers
from .driver import Driver

_PILOT_SEED, _PILOT_ROWS = 0x9107, 256
_UPKEEP_STEP = 1.0  # s of simulated time between two looks at the sensors


class ChipController:
    """Runs a chip through its driver.

    Time passes only through the driver (a simulated one: `driver.advance`). `maintain`, called between calls, looks at
    the sensors and calibrates where a trigger asks for it.

    Args:
        changed: called after a change of state.

    Attributes:
        core: the products. driver: the chip. profile: of the chip. report: of the last calibration.
        supervisor: keeps the state. recalibrations: the reason of each calibration since opening.
    """

    def __init__(self, device: Device, driver: Driver, changed: Callable[[], None]) -> None:
        self.device, self.driver, self.profile = device, driver, driver.profile
        self.supervisor = Supervisor(self.profile)
        self.core = PhotonicCore(driver)
        self.report: CalibrationReport | None = None
        self.recalibrations: list[str] = []
        self._changed = changed
        self._pilot = 0.0
        self._lock = threading.RLock()

    @property
    def state(self) -> State:
        """The present state."""
        return self.supervisor.state

    @property
    def reason(self) -> str:
        """What led to the present state."""
        return self.supervisor.reason

    @property
    def condition(self) -> tuple[float, str]:
        """(duty, state) for a cost: the share of the time the chip may work, and its state, "" where it is ready."""
        return self.supervisor.duty, "" if self.state is State.READY else str(self.state)

    def power_on(self) -> State:
        """Switch on, warm up, calibrate. Returns the state."""
        with self._lock:
            self.driver.laser(True)
            self.supervisor.signal(Signal.POWER_ON, "switched on")
            return self._settle("switched on")

    def reset(self) -> State:
        """Acknowledge a trip: cool down, then calibrate. Returns the state."""
        with self._lock:
            self.supervisor.signal(Signal.RESET, "the trip was acknowledged")
            return self._settle("after a trip")

    def maintain(self) -> State:
        """Look at the sensors, follow the state, calibrate where a trigger asks for it. Returns the state."""
        with self._lock:
            before = self.state
            state = self._observe()
            if state.serves and (reasons := self.needs()):
                self.supervisor.signal(Signal.RECALIBRATE, "; ".join(reasons))
                state = self._calibrate("; ".join(reasons))
            elif not state.serves:
                state = self._settle(str(before))
            if state is not before:
                self._changed()
            return state

    def needs(self) -> list[str]:
        """Reasons to calibrate again now."""
        return triggers(self.profile, self.health())

    def health(self) -> Health:
        """What the triggers look at; the pilot is measured anew, with noise of its own.

        Raises:
            DeviceUnavailableError: the chip has never been calibrated.
        """
        sensed, report = self.driver.telemetry(), self.report
        if report is None:
            raise DeviceUnavailableError(f"{self.device.id} has no calibration, {self.unavailable()}")
        pilot = probe_snr(self.core, _PILOT_SEED, torch.Generator().manual_seed(_PILOT_SEED), _PILOT_ROWS)
        return Health(
            age=sensed.clock - report.clock,
            temperature_change=sensed.temperature - report.temperature,
            pilot_drop=self._pilot - pilot,
            clip_rate=self.core.clip_rate,
            laser=sensed.laser / max(report.laser, 1e-9),
        )

    def _observe(self) -> State:
        before, state = self.state, self.supervisor.observe(self.driver.telemetry())
        if state is State.TRIP and before is not State.TRIP:
            self.driver.laser(False)
        return state

    def _settle(self, why: str) -> State:
        """Follow the states until one that lasts. A simulated chip warms up and cools down meanwhile."""
        for _ in range(10_000):
            state = self._observe()
            if state is State.CALIBRATING:
                self.driver.laser(True)
                return self._calibrate(why)
            if state not in (State.WARMUP, State.COOLDOWN) or not isinstance(self.driver, SimulatedDriver):
                break
            self.driver.advance(_UPKEEP_STEP, load=1.0 if state is State.WARMUP else 0.0)
        self._changed()
        return self.state

    def _calibrate(self, why: str) -> State:
        corrections, report = calibrate(self.driver, seed=self.profile.chip)
        self.report = report
        self.recalibrations = [*self.recalibrations[-63:], why]
        if refusal := report.refusal(self.profile):
            self.supervisor.signal(Signal.CALIBRATION_FAILED, refusal)
            self._changed()
            return self.state
        self.core = PhotonicCore(self.driver, corrections if self.profile.calibrated else None)
        pilot_noise = torch.Generator().manual_seed(_PILOT_SEED)
        self._pilot = probe_snr(self.core, _PILOT_SEED, pilot_noise, _PILOT_ROWS)
        self.core.reset_counts()
        self.supervisor.signal(Signal.CALIBRATED, f"calibrated ({why})")
        self._observe()
        self._changed()
        return self.state

    def unavailable(self) -> str:
        """Why the chip does not serve now, and what leads out of it; "" where it serves."""
        if self.state.serves:
            return ""
        return f"it is in state {self.state} ({self.reason}): {self.supervisor.way_out}"

    def require_service(self) -> None:
        """Raise DeviceUnavailableError unless the chip serves: its state, and what leads out of it."""
        if why := self.unavailable():
            raise DeviceUnavailableError(f"{self.device.id} does not serve, {why}")
