"""The router on times that were recorded on an H200 and its host: no time of this machine decides anything."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import router_replay


@pytest.fixture(scope="module")
def devices() -> router_replay.Table:
    """cpu:0 and cuda:0 on tensors of the host: cpu:0 is best for two thirds of the requests."""
    return router_replay.Table(router_replay.FOLDER / "h200-devices.json")


@pytest.fixture(scope="module")
def paths() -> router_replay.Table:
    """Paths of cuda:0, of which two share the requests."""
    return router_replay.Table(router_replay.FOLDER / "h200-paths.json")


def test_regret_with_planning_charged_is_at_most_5_percent(devices: router_replay.Table) -> None:
    found = router_replay.mean([router_replay.replay(devices, seed) for seed in range(3)])
    assert found["second arm's share"] >= 0.2
    assert found["router"] <= 0.05
    assert found["router"] < min(found["best single"], found["estimates only"])


def test_regret_on_shapes_not_trained_on_is_at_most_5_percent(devices: router_replay.Table) -> None:
    assert router_replay.mean([router_replay.halves(devices, seed) for seed in range(3)])["router"] <= 0.05


def test_paths_of_one_device_are_told_apart_on_shapes_not_trained_on(paths: router_replay.Table) -> None:
    """Planning alone costs 3.4% there: calls of 30 us, and 3 us charged for each."""
    found = router_replay.mean([router_replay.halves(paths, seed) for seed in range(3)])
    assert found["second arm's share"] >= 0.2
    assert found["router"] <= 0.05
    assert found["router"] < min(found[name] for name in ("best single", "threshold"))


def test_while_one_device_is_loaded_every_fixed_rule_is_beaten(devices: router_replay.Table) -> None:
    found = router_replay.mean([router_replay.replay(devices, seed, loaded=True) for seed in range(5)])
    assert found["second arm's share"] >= 0.2
    assert found["router"] < min(found[name] for name in ("best single", "threshold", "estimates only"))


@pytest.mark.parametrize("case", [{"wrong": lambda arm: 4.0 if arm == "cpu:0" else 1.0}, {"slow": 4.0}])
def test_wrong_estimates_and_a_slow_third_cost_at_most_7_percent(devices: router_replay.Table, case: dict) -> None:
    assert router_replay.mean([router_replay.replay(devices, seed, **case) for seed in range(3)])["router"] <= 0.07
