"""Beliefs and choices on simulated devices: wrong estimates, loads, cold starts, outliers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hal_router.choice import LONGEST, Arm, Chooser
from hal_router.estimator import Estimator
from hal_router.keys import Keys
from hal_router.line import MEMORY, Line

#: (seconds of a call, multiply-accumulates per second)
RATES = {"gpu:0": (40e-6, 2e13), "gpu:0 small": (30e-6, 1.2e13), "cpu:0": (5e-6, 2e11), "npu:0": (100e-6, 5e13)}


class Result(NamedTuple):
    regret: float
    geometric: float
    chooser: Chooser
    log: list[tuple[str, float, float, bool]]  # arm, true seconds, best, explored


def replay(
    seed: int,
    *,
    prior: Callable[[str], float] = lambda arm: 1.0,
    load: Callable[[int, str], float] = lambda call, arm: 1.0,
    calls: int = 3000,
    noise: float = 0.08,
    sizes: tuple[int, int] = (12, 30),
) -> Result:
    """Requests of random sizes in time order; regret is against the arm that is truly the fastest at that moment."""
    draw = random.Random(seed)
    chooser = Chooser(Estimator())
    log = []
    for call in range(calls):
        bits = draw.randint(*sizes)
        plain = {arm: fixed + 2**bits / rate for arm, (fixed, rate) in RATES.items()}
        true = {arm: seconds * load(call, arm) for arm, seconds in plain.items()}
        arms = [Arm(arm, arm.split()[0], seconds * prior(arm)) for arm, seconds in plain.items()]
        found = chooser.choose(Keys("float32", bits + 1, (bits,)), arms)
        arm = found.chosen.arm
        measured = true[arm.name] * math.exp(draw.gauss(0, noise)) * (5 if draw.random() < 0.01 else 1)
        chooser.observe(
            Keys("float32", bits + 1, (bits,)), arm, found.best.log_seconds, math.log(measured), bool(found.why)
        )
        log.append((arm.name, true[arm.name], min(true.values()), bool(found.why)))
    total = sum(seconds for _, seconds, _, _ in log) / sum(best for _, _, best, _ in log) - 1
    geometric = math.exp(sum(math.log(seconds / best) for _, seconds, best, _ in log) / calls) - 1
    return Result(total, geometric, chooser, log)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("wrong", [1.0, 4.0])
def test_a_prior_wrong_by_four_costs_little(seed: int, wrong: float) -> None:
    high = random.Random(seed).sample(sorted(RATES), 2)
    result = replay(seed, prior=lambda arm: wrong if arm in high else 1.0)
    assert result.regret <= 0.07


@pytest.mark.parametrize("seed", range(3))
def test_a_device_four_times_slower_for_a_third_of_the_run_costs_little(seed: int) -> None:
    result = replay(
        seed, calls=6000, load=lambda call, arm: 4.0 if arm.startswith("gpu") and 2000 <= call < 4000 else 1.0
    )
    assert result.regret <= 0.07


@pytest.mark.parametrize("seed", range(5))
def test_a_load_is_found_within_30_calls_and_forgotten_within_30(seed: int) -> None:
    begin, end = 1000, 1500
    # Requests for which the GPU is the best, four times slower for a while.
    result = replay(
        seed,
        calls=2500,
        sizes=(28, 30),
        load=lambda call, arm: 1.3 if arm == "npu:0" else 4.0 if arm[0] == "g" and begin <= call < end else 1.0,
    )
    gpu = [arm.startswith("gpu") for arm, _, _, _ in result.log]
    assert sum(gpu[begin - 100 : begin]) >= 95
    assert sum(gpu[begin + 30 : end]) <= 0.15 * (end - begin - 30)
    assert sum(gpu[end + 30 : end + 130]) >= 95


@pytest.mark.parametrize("seed", range(3))
def test_after_50_calls_a_cold_start_costs_a_tenth_of_the_steady_state_at_most(seed: int) -> None:
    # Clocks, caches and allocators warm up: ten times the time at first, on every device.
    result = replay(seed, calls=1000, sizes=(16, 28), load=lambda call, arm: 1.0 + 9.0 * math.exp(-call / 8))
    after = result.log[50:]
    assert sum(seconds for _, seconds, _, _ in after) <= 1.1 * sum(best for _, _, best, _ in after)


@pytest.mark.parametrize("seed", range(3))
def test_exploration_keeps_to_its_budget_and_never_takes_a_large_request(seed: int) -> None:
    result = replay(seed, prior=lambda arm: random.Random(arm).choice([0.25, 1.0, 4.0]))
    chooser = result.chooser
    assert chooser.explored > 0
    assert chooser.spent <= 0.02 * chooser.served + 5e-3
    explored = [seconds for _, seconds, _, why in result.log if why]
    assert max(explored) <= LONGEST
    every = sorted(best for _, _, best, _ in result.log)
    assert sum(best > every[len(every) * 3 // 4] for _, _, best, why in result.log[50:] if why) == 0


def test_one_outlier_moves_neither_the_load_nor_the_choice() -> None:
    chooser, keys = Chooser(Estimator()), Keys("float32", 20, (1,))
    arms = [Arm("one:0", "one:0", 1e-3), Arm("two:0", "two:0", 1.2e-3)]
    for _ in range(30):
        for arm in arms:
            chooser.observe(keys, arm, math.log(1e-3), math.log(arm.seconds), False)
    chooser.observe(keys, arms[0], math.log(1e-3), math.log(50e-3), False)
    assert abs(chooser.estimator.load("one:0").value) < 0.05
    assert chooser.choose(keys, arms, may_explore=False).chosen.arm.name == "one:0"


def test_a_simulated_device_is_not_learned_from() -> None:
    chooser, keys = Chooser(Estimator()), Keys("float32", 20, (1,))
    arm = Arm("kpu:0", "kpu:0", 1e-3, learns=False)
    chooser.observe(keys, arm, math.log(1e-3), math.log(2.0), False)
    assert chooser.rank(keys, [arm])[0].seconds == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("objective", "deadline", "chosen"),
    [
        ("time", None, "fast:0"),
        ("energy", None, "frugal:0"),
        ("error", None, "exact:0"),
        ("time", 1.0, "frugal:0"),
        ("time", 5e-3, "exact:0"),
        ("time", 1e-6, "fast:0"),
    ],
)
def test_objectives_and_deadlines(objective: str, deadline: float | None, chosen: str) -> None:
    chooser, keys = Chooser(Estimator()), Keys("float32", 20, (1,))
    arms = [
        Arm("fast:0", "fast:0", 1e-3, energy=3.0, error=1e-2),
        Arm("exact:0", "exact:0", 2e-3, energy=2.0, error=1e-6),
        Arm("frugal:0", "frugal:0", 0.1, energy=1.0, error=1e-3),
        Arm("imagined:0", "imagined:0", 1e-2, energy=1e-9, energy_rank=2, error=1e-2, learns=False),
    ]
    for arm in arms:
        for _ in range(20):
            chooser.observe(keys, arm, math.log(1e-3), math.log(arm.seconds), False)
    found = chooser.choose(keys, arms, objective, deadline)
    assert found.chosen.arm.name == chosen
    if deadline == 1e-6:
        assert "no device is expected within" in found.aim


def test_beliefs_survive_a_round_trip_and_damage_is_refused() -> None:
    estimator, keys = Estimator(), Keys("float32", 20, (1,))
    for seconds in (1e-4, 1e-3, 2e-3):
        for _ in range(3):
            estimator.learn("one:0 t", "one:0", keys, seconds, 0.7)
    other, data = Estimator(), json.loads(json.dumps(estimator.to_dict()))
    other.read(data)
    for seconds in (1e-5, 1e-3, 1e-1):
        assert other.believe("one:0 t", keys, seconds).residual == pytest.approx(
            estimator.believe("one:0 t", keys, seconds).residual, abs=1e-3
        )
    line, arms = data["devices"]["one:0"], data["arms"]
    for damage in (
        None,
        [],
        {},
        data | {"devices": {"one:0": line[1:]}},
        data | {"devices": {"one:0": [math.nan, *line[1:]]}},
        data | {"devices": {"one:0": [1e9, *line[1:]]}},
        data | {"devices": {"one:0": [line[0], 0.0, 0.0, *line[3:]]}},
        data | {"arms": {"one:0": {}}},
        data | {"arms": {"one:0": arms["one:0 t"] | {"kinds": {"a": {"line": line, "sizes": {"b": [1, 0]}}}}}},
        data | {"arms": {"one:0": arms["one:0 t"] | {"kinds": {"a": {"line": line, "sizes": {"1": [-1, 0]}}}}}},
    ):
        with pytest.raises(ValueError, match="no belief"):
            other.read(damage)
        assert other.arms
    other.forget(["one:0"])
    assert not other.arms
    assert not other.kinds


@pytest.mark.parametrize("seed", range(3))
def test_a_quick_choice_is_the_one_that_weighing_everything_gives(seed: int) -> None:
    draw, chooser, quick = random.Random(seed), Chooser(Estimator()), 0
    rates = {"one:0": (40e-6, 1e-11), "two:0": (5e-6, 4e-11)}
    for _ in range(400):
        size = draw.randint(10, 24)
        keys = Keys("float32", size, (size, draw.randint(0, 3)))
        arms = [Arm(name, name, 1e-5 + 2**size * rate) for name, (_, rate) in rates.items()]
        found = chooser.choose(keys, arms)
        fast = chooser.quick(keys, [(arm.name, arm.seconds) for arm in arms])
        if fast is not None:
            quick += 1
            assert not found.why
            assert fast[0] == found.chosen.arm.name
            assert fast[1] == pytest.approx(found.chosen.seconds)
            assert f"before {found.ranked[1].arm.name}" in fast[2]
        arm = draw.choice(arms)
        fixed, rate = rates[arm.name]
        seconds = (fixed + 2**size * rate) * math.exp(draw.gauss(0, 0.1))
        chooser.observe(keys, arm, found.best.log_seconds, math.log(seconds), False)
    assert quick > 100


def test_a_line_tells_a_constant_of_each_call_from_a_factor() -> None:
    line = Line()
    for _ in range(10):
        for estimate in (1e-6, 1e-5, 1e-4, 1e-3):
            line.learn(estimate, 5e-5 + 3 * estimate, 1.0, 0.0, 1.0)
    for estimate in (1e-6, 3e-5, 1e-2):
        assert line.fixed + line.factor * estimate == pytest.approx(5e-5 + 3 * estimate, rel=0.15)
    assert line.calls == MEMORY
