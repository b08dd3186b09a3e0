"""The state machine, searched exhaustively; hysteresis, faults, triggers, and what they do to selection."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hal_photonics.profiles.profile import Profile
from hal_photonics.runtime.driver import Telemetry
from hal_photonics.simulator.chip import Fault, SimulatedDriver
from hal_photonics.simulator.thermal import TRANSITIONS, Health, Signal, State, Supervisor, step, triggers

import hal_core as hal
from hal_core import Code, DeviceUnavailableError, UnsupportedError
from hal_core.registry import registry

ALARMS = (Signal.ABOVE_TRIP, Signal.SENSOR_FAILED, Signal.LASER_FAILED)


@pytest.fixture
def session() -> Iterator[Any]:
    """The generic device's session, opened afresh and closed."""
    registry.close()
    yield hal.session("photonic:0")
    registry.close()


def paths_without_calibration(start: State) -> set[State]:
    """All states that any sequence of signals reaches from `start` without passing CALIBRATING."""
    reached, front = {start}, [start]
    while front:
        state = front.pop()
        for signal in Signal:
            after = step(state, signal)
            if after not in reached and after is not State.CALIBRATING:
                reached.add(after)
                front.append(after)
    return reached


def test_no_path_leads_from_trip_to_service_without_a_calibration() -> None:
    assert not any(state.serves for state in paths_without_calibration(State.TRIP))
    assert not any(state.serves for state in paths_without_calibration(State.OFF))


def test_only_a_good_calibration_leads_out_of_calibrating_into_service() -> None:
    into = {(state, signal) for (state, signal), after in TRANSITIONS.items() if after.serves and not state.serves}
    into -= {(State.THROTTLED, Signal.BELOW_THROTTLE), (State.THROTTLED, Signal.BELOW_DERATE)}
    assert into == {(State.CALIBRATING, Signal.CALIBRATED)}


def test_every_state_has_an_exit_and_can_reach_service_again() -> None:
    for start in State:
        assert any(step(start, signal) is not start for signal in Signal)
        reached, front = {start}, [start]
        while front:
            for signal in Signal:
                after = step(front[0], signal)
                if after not in reached:
                    reached.add(after)
                    front.append(after)
            front.pop(0)
        assert reached == set(State)


def test_a_trip_is_latched_against_everything_but_reset() -> None:
    assert {signal for signal in Signal if step(State.TRIP, signal) is not State.TRIP} == {Signal.RESET}


def test_alarms_trip_every_powered_state() -> None:
    for state, alarm in itertools.product(set(State) - {State.OFF}, ALARMS):
        assert step(state, alarm) is State.TRIP


def supervisor(profile: Profile, state: State) -> Supervisor:
    found = Supervisor(profile)
    found.state = state
    return found


def sensed(temperature: float, **other: float) -> Telemetry:
    return Telemetry(**({"temperature": temperature, "reading_age": 0.0, "laser": 1.0, "clock": 0.0} | other))


def test_limits_have_hysteresis(generic: Profile) -> None:
    derate, gap = generic["thermal.derate"], generic["thermal.hysteresis"]
    s = supervisor(generic, State.READY)
    assert s.observe(sensed(derate - 0.1)) is State.READY
    assert s.observe(sensed(derate)) is State.DERATED
    assert s.duty == generic["thermal.derated_duty"]
    assert s.observe(sensed(derate - gap + 0.1)) is State.DERATED
    assert s.observe(sensed(derate - gap - 0.1)) is State.READY
    throttle = generic["thermal.throttle"]
    assert s.observe(sensed(throttle)) is State.THROTTLED
    assert s.observe(sensed(throttle - gap + 0.1)) is State.THROTTLED
    assert s.observe(sensed(throttle - gap - 0.1)) is State.DERATED
    assert s.observe(sensed(generic["thermal.trip"])) is State.TRIP
    assert s.observe(sensed(20.0)) is State.TRIP


@pytest.mark.parametrize("state", [s for s in State if s not in (State.OFF, State.TRIP)])
@pytest.mark.parametrize(
    ("changed", "named"), [({"temperature": math.nan}, "nan"), ({"reading_age": 60.0}, "60 s old")]
)
def test_a_broken_or_stale_sensor_is_a_trip_that_says_so(
    generic: Profile, state: State, changed: dict[str, float], named: str
) -> None:
    s = supervisor(generic, state)
    assert s.observe(sensed(**({"temperature": 45.0} | changed))) is State.TRIP
    assert named in s.reason


def test_heat_flows_as_the_equation_says(generic: Profile) -> None:
    driver = SimulatedDriver(generic)
    ambient, rise = generic["thermal.ambient"], generic["thermal.heat"] * generic["thermal.resistance"]
    driver.advance(generic["thermal.time_constant"], load=1.0)
    assert driver.telemetry().temperature == pytest.approx(ambient + rise * (1 - math.exp(-1)))
    driver.advance(1e6, load=1.0)
    assert driver.telemetry().temperature == pytest.approx(ambient + rise)


@pytest.mark.parametrize(
    ("health", "named"),
    [
        (Health(1e6, 0, 0, 0), "s old"),
        (Health(0, -9, 0, 0), "-9.0 K"),
        (Health(0, 0, 3, 0), "3.0 dB"),
        (Health(0, 0, 0, 0.02), "2.0%"),
        (Health(0, 0, 0, 0, laser=0.7), "70%"),
    ],
)
def test_each_trigger_is_named(generic: Profile, health: Health, named: str) -> None:
    assert len(found := triggers(generic, health)) == 1
    assert named in found[0]
    assert triggers(generic, Health(0, 0, 0, 0)) == []


def attend(**options: object) -> torch.Tensor:
    q = torch.ones(1, 1, 8, 16)
    result: torch.Tensor = hal.attention(q, q, q, backend="photonic:0", rng=(1, 1), **options)
    return result


def test_a_hot_device_says_its_state_in_estimate_and_decision(session: Any) -> None:
    q = torch.ones(1, 1, 8, 16)
    normal = hal.explain(q, q, q, backend="photonic:0").winner.estimate
    s = session
    s.driver.heat_to(72.0)
    assert s.maintain() is State.DERATED
    decision = hal.explain(q, q, q, backend="photonic:0")
    derated = decision.winner.estimate
    assert derated.parts["derating"] > 0
    assert derated.time.middle > normal.time.middle
    assert "derated" in derated.time.source
    attend()
    s.driver.heat_to(82.0)
    assert s.maintain() is State.THROTTLED
    refused = hal.explain(q, q, q, backend="photonic:0")
    assert refused.chosen is None
    reasons = refused.candidates[0].refusals
    assert [r.code for r in reasons] == [Code.DEVICE]
    assert "throttled" in reasons[0].offered
    assert "below 75 degC" in reasons[0].fix
    with pytest.raises(UnsupportedError, match="throttled"):
        attend()
    with hal.prefer(["photonic:0", "cpu:0"]):
        assert hal.explain(q, q, q).chosen == "cpu:0"


def test_a_tripped_device_refuses_with_its_state_and_the_way_out(session: Any) -> None:
    s = session
    s.driver.inject(Fault.NAN_SENSOR)
    assert s.maintain() is State.TRIP
    prepared = s.prepare_attention(
        *[torch.ones(1, 1, 2, 4)] * 3, request=hal.AttentionRequest(1, 1, 1, 2, 2, 4, 4, "float32")
    )
    with pytest.raises(
        DeviceUnavailableError, match=r"state trip \(the temperature sensor reads nan\).*session\.reset\(\)"
    ):
        s.compute_attention(prepared)
    assert s.driver.telemetry().laser == 0
    before = len(s.recalibrations)
    assert s.reset() is State.TRIP, "the cause is still there"
    s.driver.heal()
    assert s.reset() is State.READY
    assert len(s.recalibrations) == before + 1
    attend()


def test_a_stale_sensor_trips_as_time_passes(session: Any) -> None:
    session.driver.inject(Fault.STALE_SENSOR)
    session.driver.advance(5.0, load=1.0)
    assert session.maintain() is State.TRIP
    assert "5 s old" in session.reason


def test_lost_laser_power_recalibrates_and_then_trips(session: Any) -> None:
    session.driver.inject(Fault.LASER_LOSS, 0.8)
    assert session.maintain() is State.READY
    assert "80% of the power" in session.recalibrations[-1]
    assert session.needs() == [], "calibrated at that power"
    session.driver.inject(Fault.LASER_LOSS, 0.3)
    assert session.maintain() is State.TRIP
    assert "laser gives 30%" in session.reason


def test_age_and_drift_lead_to_a_recalibration(session: Any) -> None:
    session.driver.advance(4000.0, load=1.0)
    assert session.maintain() is State.READY
    assert "s old" in session.recalibrations[-1]
    assert session.health().age == 0
