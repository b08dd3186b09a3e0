"""`hal.attention` under an enabled router: what it may choose, what it says, what it learns."""

from __future__ import annotations

import json
import math
import random
import warnings
from typing import Any

import hal_router
import pytest
import torch
from fakes import full, quantity
from hal_router import control

import hal_core as hal
from hal_core.plugin_api import registry


def test_calls_move_to_the_device_that_is_faster_than_it_says(device: Any, router: Any, tensors: Any) -> None:
    device("modest", 4e-6, 1e-6)
    device("boaster", 2e-6, 8e-6)
    q, k, v = tensors()
    for _ in range(60):
        out = hal.attention(q, k, v)
    assert hal.explain(q, k, v).chosen == "modest:0"
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5)
    reason = hal.explain(q, k, v).reason
    assert "chosen by the policy of router: least time believed: modest:0" in reason
    assert "learned x" in reason
    assert "before boaster:0" in reason


def test_a_loaded_device_is_left_within_30_calls_and_taken_again_within_60(
    device: Any, router: Any, tensors: Any
) -> None:
    quick = device("quick", 1e-6)
    device("steady", 2e-6)
    q, k, v = tensors()

    def chosen(calls: int) -> list[str | None]:
        seen = []
        for _ in range(calls):
            with hal.watch() as watched:
                hal.attention(q, k, v)
            seen.append(watched.decision.chosen)
        return seen

    assert chosen(60)[-10:] == ["quick:0"] * 10
    quick.takes = lambda request: 4e-6
    chosen(30)
    assert chosen(20).count("steady:0") >= 17
    quick.takes = lambda request: 1e-6
    chosen(60)
    assert chosen(20).count("quick:0") >= 18


def test_without_enabling_nothing_is_routed(device: Any, tensors: Any) -> None:
    device("slow", 1e-6, 9e-6)
    device("fast", 2e-6, 1e-6)
    q, k, v = tensors()
    for _ in range(40):
        hal.attention(q, k, v)
    assert hal.explain(q, k, v).chosen == "slow:0"
    assert hal_router.state()["enabled"] is False
    assert "router" not in [each.plugin_name for each in registry.plugins.implementations("hal_call")]


def test_named_devices_use_and_error_bounds_are_never_overridden(device: Any, router: Any, tensors: Any) -> None:
    device("one", 3e-6, 9e-6)
    device("two", 1e-6, 1e-6)
    precise = full(numerics={name: hal.Numerics(relative=1e-9) for name in ("float32",)}, dtypes={"float32"})
    device("exact", 5e-6, 5e-6, capabilities=precise)
    device("model", 1e-9, 1e-9, fidelity="simulated")
    draw, called = random.Random(1), 0
    sizes = {n: tensors(n) for n in (2, 5, 16)}
    for _ in range(10_000):
        q, k, v = sizes[draw.choice([2, 5, 16])]
        name = draw.choice(["one", "two", "exact", "model"])
        way = draw.randrange(5)
        with hal.watch() as watched:
            if way == 0:
                hal.attention(q, k, v, backend=name)
            elif way == 1:
                with hal.use(name):
                    hal.attention(q, k, v)
            elif way == 2:
                hal.attention(q, k, v, max_error=1e-8)
            elif way == 3:
                with hal.prefer([name, "two"]):
                    hal.attention(q, k, v)
            else:
                hal.attention(q, k, v)
        chosen = watched.decision.chosen
        called += 1
        wanted = {0: f"{name}:0", 1: f"{name}:0", 2: "exact:0", 3: f"{name}:0"}.get(way, chosen)
        assert chosen == wanted
        assert chosen != "model:0" or way in (0, 1, 3)
    assert called == 10_000


def test_a_deadline_takes_the_least_energy_that_makes_it(device: Any, router: Any, tensors: Any) -> None:
    device("fast", 1e-3, energy=quantity(5.0))
    device("frugal", 5e-2, energy=quantity(1.0))
    q, k, v = tensors()
    for _ in range(12):
        hal.attention(q, k, v, backend="frugal")
        hal.attention(q, k, v, backend="fast")
    hal.attention(q, k, v)  # decided without a deadline, and kept
    with hal_router.deadline(0.5):
        assert hal.explain(q, k, v).chosen == "frugal:0"
        with hal.watch() as watched:
            hal.attention(q, k, v)
        assert watched.decision.chosen == "frugal:0"
    with hal_router.deadline(1e-3 * 5):
        assert hal.explain(q, k, v).chosen == "fast:0"
    with hal_router.deadline(1e-9):
        assert "no device is expected within" in hal.explain(q, k, v).reason
    assert hal.explain(q, k, v).chosen == "fast:0"
    for wrong in (0, -1.0, "soon", True, float("nan")):
        with pytest.raises(hal.ContractError), hal_router.deadline(wrong):
            pass


def test_other_lengths_of_a_bucket_are_not_taken_for_load(device: Any, router: Any, tensors: Any) -> None:
    device("only", lambda request: 1e-3 * request.len_q**2, lambda request: 1e-3 * request.len_q**2)
    for _ in range(10):
        for length in (16, 9, 12, 16, 10):
            hal.attention(*tensors(length))
    assert hal_router.state()["devices"]["only:0"]["load"] == pytest.approx(1.0, abs=0.1)


def test_what_was_learned_is_read_again(device: Any, router: Any, tensors: Any) -> None:
    device("modest", 4e-6, 1e-6)
    device("boaster", 2e-6, 8e-6)
    q, k, v = tensors()
    for _ in range(60):
        hal.attention(q, k, v)
    learned = hal_router.state()["arms"]
    hal_router.disable()
    assert hal.explain(q, k, v).chosen == "boaster:0"
    hal_router.enable()
    assert hal.explain(q, k, v).chosen == "modest:0"
    for name, arm in learned.items():
        assert hal_router.state()["arms"][name]["factor"] == pytest.approx(arm["factor"], rel=1e-2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: "not json [",
        lambda data: json.dumps([]),
        lambda data: json.dumps(data | {"format": 99}),
        lambda data: json.dumps(data | {"machine": "another"}),
        lambda data: json.dumps({name: value for name, value in data.items() if name != "devices"}),
        lambda data: json.dumps(data | {"beliefs": [["only:0", -4, 1]]}),
        lambda data: json.dumps(data | {"beliefs": data["beliefs"] | {"devices": {"only:0": [-1.0] * 12}}}),
        lambda data: json.dumps(data | {"totals": {"only:0": [1]}}),
    ],
)
def test_a_state_file_that_cannot_be_used_is_said_once(device: Any, router: Any, tensors: Any, damage: Any) -> None:
    device("only", 1e-6)
    q, k, v = tensors()
    for _ in range(20):
        hal.attention(q, k, v)
    assert hal_router.save()
    store = control.store
    assert store is not None
    path = store.path
    hal_router.disable()
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.warns(RuntimeWarning, match="learning starts anew"):
        hal_router.enable()
    assert not hal_router.state()["arms"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hal.attention(q, k, v)
        assert hal_router.save()


def test_a_state_file_that_cannot_be_written_is_said_once(device: Any, router: Any, tensors: Any) -> None:
    device("only", 1e-6)
    store = control.store
    assert store is not None
    store.path = store.path.parent / "file" / "state.json"
    store.path.parent.parent.mkdir(exist_ok=True)
    store.path.parent.write_text("no folder")
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert not hal_router.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hal_router.save()
        hal.attention(*tensors())


def test_a_device_with_another_driver_is_learned_anew(device: Any, router: Any, tensors: Any) -> None:
    device("only", 1e-6, 5e-6)
    for _ in range(20):
        hal.attention(*tensors())
    hal_router.save()
    store = control.store
    assert store is not None
    path = store.path
    hal_router.disable()
    data = json.loads(path.read_text())
    data["devices"]["only:0"] = "another driver"
    path.write_text(json.dumps(data))
    hal_router.enable()
    assert "only:0" not in hal_router.state()["arms"]


def test_a_devices_own_tilings_are_tried_and_the_best_is_kept(router: Any, clock: Any, tensors: Any) -> None:
    q, k, v = (torch.randn(1, 2, 1024, 8) for _ in range(3))
    torch.set_num_threads(1)
    hal.session("cpu:0")
    names = {arm.name for arm in _arms(router, q, k, v)}
    assert {"cpu:0"} < names
    assert any("cpu(" in name for name in names)
    for arm in _arms(router, q, k, v):
        keys = _keys(q, k, v)
        for _ in range(20):
            seconds = 1e-4 if arm.name == sorted(names)[-1] else 1e-3
            router.chooser.observe(keys, arm, -9.0, math.log(seconds), False)
    decision = hal.explain(q, k, v, window=(64, 64), softcap=5.0)
    assert sorted(names)[-1] in decision.reason
    out = hal.attention(q, k, v, window=(64, 64), softcap=5.0)
    assert torch.allclose(out, hal.attention(q, k, v, window=(64, 64), softcap=5.0, backend="cpu"), atol=1e-5)


def _request(q: Any, k: Any, v: Any) -> Any:
    return hal.explain(q, k, v, window=(64, 64), softcap=5.0, backend="cpu:0")


def _arms(router: Any, q: Any, k: Any, v: Any) -> Any:
    decision = _request(q, k, v)
    return router.arms(decision.request, [decision.winner], hal.Policy())


def _keys(q: Any, k: Any, v: Any) -> Any:
    from hal_router.keys import Keys

    return Keys.of(_request(q, k, v).request)


def test_an_error_in_the_policy_leaves_calls_to_the_core_until_it_is_enabled_anew(
    device: Any, router: Any, tensors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device("modest", 4e-6, 1e-6)
    device("boaster", 2e-6, 8e-6)
    q, k, v = tensors()

    def broken(*given: Any) -> Any:
        raise KeyError("a device that is gone")

    with monkeypatch.context() as patch:
        patch.setattr(control.router, "policy", broken)
        patch.setenv("HAL_STRICT", "0")
        registry.changed()
        out = hal.attention(q, k, v)
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5)
    failure = registry.plugins.by_name["router"].failure
    assert failure is not None
    assert "a device that is gone" in failure.message
    assert "the policy of router" not in hal.explain(q, k, v).reason
    hal_router.enable()
    assert registry.plugins.by_name["router"].failure is None
    for _ in range(60):
        hal.attention(q, k, v)
    assert "chosen by the policy of router" in hal.explain(q, k, v).reason


def test_a_switched_off_plugin_cannot_be_enabled(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal_core.plugins import LoadFailure

    plugin = registry.plugins.by_name["router"]
    monkeypatch.setattr(plugin, "failure", LoadFailure("router", "", "disabled", "switched off by HAL_DISABLE"))
    with pytest.raises(hal.PluginError, match="switched off by HAL_DISABLE"):
        hal_router.enable()
