"""What policies, observers, meters and access rules see and may do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeSession, full, quantity
from installed import Site
from test_attention import draw

import hal_core as hal

RUN = """
import json, torch, hal_core as hal
q = torch.randn(1, 2, 3, 4)
"""


FIVE_CALLS = """
import router_hook as router
[hal.attention(q, q, q) for _ in range(5)]
print(json.dumps(len(router.asked)))
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_policy_may_ask_to_be_asked_again(site: Site) -> None:
    site.add("one", time=1e-9)
    site.add("two", time=1e-9)
    site.add(
        "router",
        """
        from hal_core import PolicyChoice, hookimpl
        asked = []
        @hookimpl
        def hal_policy(request, candidates):
            asked.append(request)
            return PolicyChoice(sorted(c.device.id for c in candidates)[len(asked) % 2], seconds=SECONDS)
        """.replace("SECONDS", "0.0"),
    )
    got = site.run(RUN + FIVE_CALLS)
    assert got >= 5
    text = (site.folder / "router_hook.py").read_text().replace("seconds=0.0", "seconds=1e9")
    (site.folder / "router_hook.py").write_text(text)
    got = site.run(RUN + FIVE_CALLS)
    assert got == 1


def test_observers_are_told_of_every_call_and_its_duration(site: Site) -> None:
    site.add("good")
    site.add(
        "watch",
        """
        import hal_core as hal
        seen = []
        @hal.hookimpl
        def hal_call(operands, decision, seconds):
            seen.append([decision.chosen, seconds > 0, hal.current_caller(), operands[0].shape[2]])
        """,
    )
    code = "import watch_hook as watch\nwith hal.caller('trainer'):\n    [hal.attention(q, q, q) for _ in range(3)]\n"
    assert site.run(RUN + code + "print(json.dumps(watch.seen))") == [["good:0", True, "trainer", 3]] * 3


def test_a_device_with_a_timer_reports_when_it_knows(
    fake: Any, generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    told: list[float] = []
    waiting: list[Any] = []

    class Timed(FakeSession):
        def timer(self, report: Any) -> Any:
            return lambda: waiting.append(report)

    fake("late", open=Timed)

    class Hooks:
        @hal.hookimpl
        def hal_call(self, seconds: float) -> None:
            told.append(seconds)

    Attached(request, Hooks())
    hal.attention(*draw(generator), backend="late")
    assert told == []
    waiting[0](0.25)
    assert told[-1] == 0.25


class Attached:
    """Hooks that a test attaches to the running registry; taken out again at its end."""

    def __init__(self, request: pytest.FixtureRequest, hooks: Any) -> None:
        from hal_core.plugins import Plugin
        from hal_core.registry import registry

        registry.plugins.by_name["attached"] = Plugin("attached", "")
        registry.plugins.manager.register(hooks, "attached")
        registry.changed()
        request.addfinalizer(self.detach)

    def detach(self) -> None:
        from hal_core.registry import registry

        registry.plugins.manager.unregister(name="attached")
        del registry.plugins.by_name["attached"]
        registry.changed()


def test_a_policy_gives_its_reason_its_tiling_and_when_to_ask_again(
    fake: Any, generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    class Cutting(FakeSession):
        def prepare_attention(self, *given: Any, plan: Any = None, **more: Any) -> Any:
            plans.append(plan)
            return super().prepare_attention(*given, **more)

    plans: list[Any] = []
    fake("first", time=1e-9, capabilities=full(tile_sizes=hal.Range(1)), open=Cutting)
    fake("second", time=1e-9)
    asked: list[hal.Policy] = []
    stale = [False]

    class Hooks:
        @hal.hookimpl
        def hal_policy(self, candidates: Any, policy: hal.Policy) -> hal.PolicyChoice:
            asked.append(policy)
            return hal.PolicyChoice(
                "first:0", reason="it is Monday", tiling=hal.DenseTiling(2, 2), expired=lambda: stale[0]
            )

    Attached(request, Hooks())
    q, k, v = draw(generator)
    decision = hal.explain(q, k, v, objective="error")
    assert decision.reason == "chosen by the policy of attached: it is Monday"
    assert asked[-1].objective == "error"
    assert decision.policy.tiling.name == hal.DenseTiling(2, 2).name
    assert "expired" not in decision.to_dict()
    hal.attention(q, k, v)
    assert (plans[-1].block_q, plans[-1].block_k) == (2, 2)
    before = len(asked)
    hal.attention(q, k, v)
    assert len(asked) == before
    stale[0] = True
    hal.attention(q, k, v)
    assert len(asked) > before
    before = len(asked)
    hal.attention(q, k, v, backend="second")
    assert len(asked) == before


def test_observers_are_told_of_what_a_device_raises(
    fake: Any, generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    class Failing(FakeSession):
        def compute_attention(self, *given: Any, **more: Any) -> Any:
            raise OSError("the link is down")

    fake("failing", open=Failing)
    told: list[tuple[str | None, Exception]] = []

    class Hooks:
        @hal.hookimpl
        def hal_error(self, decision: hal.Decision, error: Exception) -> None:
            told.append((decision.chosen, error))

    Attached(request, Hooks())
    with pytest.raises(OSError, match="link is down"):
        hal.attention(*draw(generator), backend="failing")
    [(chosen, error)] = told
    assert chosen == "failing:0"
    assert isinstance(error, OSError)


def test_a_device_that_is_avoided_is_passed_over_and_still_runs_when_named(
    fake: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hal_core.plugin_api import LoadFailure
    from hal_core.registry import registry

    fake("first", time=1e-9)
    fake("second", time=1e-6)
    q, k, v = draw(generator)
    assert hal.explain(q, k, v).chosen == "first:0"
    monkeypatch.setitem(registry.avoided, "first:0", LoadFailure("first:0", "", "breaker", "3 calls failed"))
    registry.changed()
    decision = hal.explain(q, k, v)
    assert decision.chosen != "first:0"
    assert "3 calls failed" in str(decision)
    with hal.prefer(["first", "second"]):
        assert hal.explain(q, k, v).chosen == "second:0"
    assert hal.explain(q, k, v, backend="first").chosen == "first:0"
    assert not hal.check_all(decision.request, "first:0")


def test_a_meter_asks_the_session_what_the_call_cost(fake: Any, generator: torch.Generator) -> None:
    class Counting(FakeSession):
        def cost(self, prepared: Any) -> hal.Estimate:
            return hal.Estimate(time=quantity(2.0), energy=quantity(7.0))

    fake("counting", open=Counting, fidelity="simulated", time=1.0, energy=quantity(1.0))
    fake("guessing", fidelity="simulated", time=1.0, energy=quantity(1.0))
    with hal.meter() as meter:
        for name in ("counting", "guessing"):
            hal.attention(*draw(generator), backend=name)
    counted, guessed = meter.records["counting:0"], meter.records["guessing:0"]
    assert counted.energy is not None
    assert counted.time is not None
    assert guessed.energy is not None
    assert (counted.energy.middle, counted.time.middle, guessed.energy.middle) == (7.0, 2.0, 1.0)
    assert not meter.costs


ACCESS = """
[default]
devices = ["open:*"]
[callers.trainer]
devices = ["*"]
kernels = ["matmul"]
register = true
"""


def test_access_is_denied_where_the_policy_does_not_allow_it(site: Site) -> None:
    site.add("open", time=1e-6)
    site.add("secret", time=1e-9)
    (site.folder / "access.toml").write_text(ACCESS)
    (site.folder / "access.toml").chmod(0o600)
    code = """
def outcome(f):
    try:
        f(); return "done"
    except hal.HalError as error:
        return type(error).__name__
def decided(**named): return hal.explain(q, q, q, **named).chosen
print(json.dumps([
    decided(), outcome(lambda: hal.session("secret")), outcome(lambda: hal.attention(q, q, q, backend="secret")),
    outcome(lambda: hal.kernel("matmul")), outcome(lambda: hal.unregister("open") or hal.register(
        hal.BackendSpec(name="mine", target="a:b"))),
]))
"""
    denied = ["open:0", "AccessDeniedError", "UnsupportedError", "AccessDeniedError", "AccessDeniedError"]
    assert site.run(RUN + code, HAL_ACCESS=str(site.folder / "access.toml")) == denied
    allowed = RUN + "block = hal.caller('trainer'); block.__enter__()\n" + code
    got = site.run(allowed, HAL_ACCESS=str(site.folder / "access.toml"))
    assert got == ["secret:0", "done", "done", "UnsupportedError", "done"]


@pytest.mark.parametrize(
    "damage",
    ["not toml [", "[default]\ndevice = ['*']", "[default]\ndevices = 5", "callers = 3", "[default.devices]\na = 1"],
)
def test_a_damaged_access_policy_denies_everything(site: Site, damage: str) -> None:
    site.add("open")
    path = site.folder / "access.toml"
    path.write_text(damage)
    path.chmod(0o600)
    assert site.run(RUN + "print(json.dumps(hal.explain(q, q, q).chosen))", HAL_ACCESS=str(path)) is None
    assert site.run(RUN + "print(json.dumps(hal.explain(q, q, q).chosen))", HAL_ACCESS=str(path) + ".gone") is None


def test_an_access_policy_that_others_may_write_denies_everything(site: Site) -> None:
    site.add("open")
    path = site.folder / "access.toml"
    path.write_text('[default]\ndevices = ["*"]')
    path.chmod(0o666)
    assert site.run(RUN + "print(json.dumps(hal.explain(q, q, q).chosen))", HAL_ACCESS=str(path)) is None
    path.chmod(0o644)
    assert site.run(RUN + "print(json.dumps(hal.explain(q, q, q).chosen))", HAL_ACCESS=str(path)) == "open:0"
