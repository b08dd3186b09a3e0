"""The states of a chip by temperature, faults and calibration: a transition table, and the supervisor that drives it.

    OFF -> WARMUP -> CALIBRATING -> READY <-> DERATED <-> THROTTLED;  any -> TRIP -> COOLDOWN -> CALIBRATING

TRIP is latched: the laser is off, and only `reset` leads out, through COOLDOWN and a calibration. A broken or stale
sensor is a TRIP, because the temperature is then unknown.
"""

from __future__ import annotations

import enum
import math
from typing import NamedTuple

from ..profiles.profile import Profile
from ..runtime.driver import Telemetry


class State(enum.StrEnum):
    """What a chip is doing."""

    OFF = "off"
    WARMUP = "warmup"
    CALIBRATING = "calibrating"
    READY = "ready"
    DERATED = "derated"  # serves, with its duty cut
    THROTTLED = "throttled"  # does not serve: work goes elsewhere
    TRIP = "trip"  # laser off, latched
    COOLDOWN = "cooldown"

    @property
    def serves(self) -> bool:
        """Whether calls are run in this state."""
        return self in (State.READY, State.DERATED)


class Signal(enum.StrEnum):
    """What can change the state."""

    POWER_ON = "power_on"
    POWER_OFF = "power_off"
    WARM = "warm"  # from the working temperature on
    CALIBRATED = "calibrated"
    CALIBRATION_FAILED = "calibration_failed"  # below the floor, or too many faults
    RECALIBRATE = "recalibrate"
    ABOVE_DERATE = "above_derate"
    BELOW_DERATE = "below_derate"  # by the hysteresis, as the others
    ABOVE_THROTTLE = "above_throttle"
    BELOW_THROTTLE = "below_throttle"
    ABOVE_TRIP = "above_trip"
    SENSOR_FAILED = "sensor_failed"
    LASER_FAILED = "laser_failed"
    RESET = "reset"
    COOLED = "cooled"


_POWERED = (State.WARMUP, State.CALIBRATING, State.READY, State.DERATED, State.THROTTLED, State.COOLDOWN)
_ALARMS = (Signal.ABOVE_TRIP, Signal.SENSOR_FAILED, Signal.LASER_FAILED)

#: The state after a signal. A signal that is not listed for a state changes nothing.
TRANSITIONS: dict[tuple[State, Signal], State] = {
    (State.OFF, Signal.POWER_ON): State.WARMUP,
    (State.WARMUP, Signal.WARM): State.CALIBRATING,
    (State.CALIBRATING, Signal.CALIBRATED): State.READY,
    (State.CALIBRATING, Signal.CALIBRATION_FAILED): State.OFF,
    (State.CALIBRATING, Signal.ABOVE_THROTTLE): State.COOLDOWN,
    (State.READY, Signal.RECALIBRATE): State.CALIBRATING,
    (State.READY, Signal.ABOVE_DERATE): State.DERATED,
    (State.READY, Signal.ABOVE_THROTTLE): State.THROTTLED,
    (State.DERATED, Signal.RECALIBRATE): State.CALIBRATING,
    (State.DERATED, Signal.BELOW_DERATE): State.READY,
    (State.DERATED, Signal.ABOVE_THROTTLE): State.THROTTLED,
    (State.THROTTLED, Signal.BELOW_THROTTLE): State.DERATED,
    (State.THROTTLED, Signal.BELOW_DERATE): State.READY,
    (State.TRIP, Signal.RESET): State.COOLDOWN,
    (State.COOLDOWN, Signal.COOLED): State.CALIBRATING,
    **{(state, Signal.POWER_OFF): State.OFF for state in _POWERED},
    **{(state, alarm): State.TRIP for state in _POWERED for alarm in _ALARMS},
}


def step(state: State, signal: Signal) -> State:
    """The state after a signal."""
    return TRANSITIONS.get((state, signal), state)


class Supervisor:
    """Reads the sensors, and keeps the state with its reason.

    Attributes:
        state: now. reason: what led to it, in words. history: (state, reason), oldest first, the latest 64.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self.state, self.reason = State.OFF, "never switched on"
        self.history: list[tuple[State, str]] = []

    def signal(self, signal: Signal, reason: str = "") -> State:
        """Apply a signal. Returns the state after it."""
        after = step(self.state, signal)
        if after is not self.state:
            self.state, self.reason = after, reason or str(signal).replace("_", " ")
            self.history = [*self.history[-63:], (after, self.reason)]
        return self.state

    def observe(self, sensed: Telemetry) -> State:
        """Apply what the sensors say: alarms first, then limits with their hysteresis. Returns the state."""
        p, hot = self._profile, sensed.temperature
        if not math.isfinite(hot):
            return self.signal(Signal.SENSOR_FAILED, f"the temperature sensor reads {hot}")
        if sensed.reading_age > p["thermal.sensor_timeout"]:
            why = f"the temperature is {sensed.reading_age:g} s old, {p['thermal.sensor_timeout']:g} s are allowed"
            return self.signal(Signal.SENSOR_FAILED, why)
        if hot >= p["thermal.trip"]:
            return self.signal(Signal.ABOVE_TRIP, f"{hot:.1f} degC, the limit is {p['thermal.trip']:g}")
        if self.state in (State.CALIBRATING, State.READY, State.DERATED) and sensed.laser < 0.5:
            return self.signal(Signal.LASER_FAILED, f"the laser gives {sensed.laser:.0%} of its power")
        gap = p["thermal.hysteresis"]
        for limit, above, below in (
            ("throttle", Signal.ABOVE_THROTTLE, Signal.BELOW_THROTTLE),
            ("derate", Signal.ABOVE_DERATE, Signal.BELOW_DERATE),
        ):
            bound = p[f"thermal.{limit}"]
            if hot >= bound:
                return self.signal(above, f"{hot:.1f} degC, {limit} starts at {bound:g}")
            if hot < bound - gap:
                self.signal(below, f"{hot:.1f} degC, below {bound - gap:g}")
        if hot >= p["thermal.working"] or self.state is State.WARMUP:
            self._warm_or_wait(hot)
        if self.state is State.COOLDOWN and hot < p["thermal.derate"] - gap:
            self.signal(Signal.COOLED, f"{hot:.1f} degC, cool enough to calibrate")
        return self.state

    def _warm_or_wait(self, hot: float) -> None:
        if hot >= self._profile["thermal.working"]:
            self.signal(Signal.WARM, f"{hot:.1f} degC, working temperature")

    @property
    def duty(self) -> float:
        """Share of the time the chip may work."""
        return self._profile["thermal.derated_duty"] if self.state is State.DERATED else 1.0

    @property
    def way_out(self) -> str:
        """What leads out of a state that does not serve."""
        p = self._profile
        cool = f"below {p['thermal.derate'] - p['thermal.hysteresis']:g} degC"
        calm = f"below {p['thermal.throttle'] - p['thermal.hysteresis']:g} degC"
        return {
            State.OFF: "switch it on: session.power_on()",
            State.WARMUP: f"wait until it is at {p['thermal.working']:g} degC",
            State.CALIBRATING: "wait for the calibration to end: session.maintain()",
            State.THROTTLED: f"let it cool {calm}, and use another device meanwhile",
            State.TRIP: f"mend the cause, call session.reset(); it calibrates again once it is {cool}",
            State.COOLDOWN: f"wait until it is {cool}; it calibrates then",
        }.get(self.state, "")


class Health(NamedTuple):
    """What the recalibration triggers look at.

    Attributes:
        age: s since the calibration. temperature_change: K since then. pilot_drop: dB below the SNR it had then.
        clip_rate: share of readouts at the rails since then. laser: power over what it was then.
    """

    age: float
    temperature_change: float
    pilot_drop: float
    clip_rate: float
    laser: float = 1.0


def triggers(profile: Profile, health: Health) -> list[str]:
    """Reasons to calibrate again; empty for none."""
    p, found = profile, []
    if health.age > p["calibration.max_age"]:
        found.append(f"the calibration is {health.age:.0f} s old, {p['calibration.max_age']:g} s are allowed")
    if abs(health.temperature_change) > p["calibration.max_temperature_change"]:
        limit = p["calibration.max_temperature_change"]
        found.append(f"the temperature changed by {health.temperature_change:+.1f} K, {limit:g} K are allowed")
    if health.pilot_drop >= p["calibration.pilot_drop"]:
        found.append(f"the pilot fell by {health.pilot_drop:.1f} dB, {p['calibration.pilot_drop']:g} dB are allowed")
    if health.clip_rate > p["calibration.clip_limit"]:
        found.append(f"{health.clip_rate:.1%} of the readouts clip, {p['calibration.clip_limit']:.1%} are allowed")
    if health.laser < 0.9:
        found.append(f"the laser gives {health.laser:.0%} of the power it had")
    return found
