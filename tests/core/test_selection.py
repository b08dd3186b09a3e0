"""Which device runs a call, and why: order of wishes, honest comparison, messages, records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import FakeBackend, draw, full, plain, quantity

import hal_core as hal
from hal_core import (
    AttentionRequest,
    Choice,
    Code,
    ContractError,
    DeviceUnavailableError,
    Range,
    Refusal,
    UnknownBackendError,
    UnsupportedError,
)
from hal_core.decision import Decision
from hal_core.options import merged_policy
from hal_core.selection import decide

Fake = Callable[..., FakeBackend]

#: Tensors that lie where only these tests' devices read them: real devices stay out of automatic selection.
HERE = "fakeland:0"
REQUEST = AttentionRequest(
    batch=2, heads_q=4, heads_kv=4, len_q=16, len_k=16, dim_qk=64, dim_v=64, dtype="float32", device=HERE
)


@pytest.fixture
def local(fake: Fake) -> Fake:
    """`fake`, whose devices read the tensors of `REQUEST` where they lie."""
    return lambda name, **traits: fake(name, **({"reads": ("fakeland",)} | traits))


def choose(request: AttentionRequest = REQUEST, **wish: Any) -> Decision:
    wishes = ("backend", "objective", "allow_simulated", "transfer")
    return decide(request, merged_policy(*(wish.get(name) for name in wishes)))


# The order of wishes


def test_the_nearest_wish_names_the_device(local: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, name in enumerate(("by_argument", "by_use", "by_configure", "by_environment", "by_nobody")):
        local(name, time=1.0 / 10**n)  # the automatic choice is the last
    seen = [(choose().chosen, choose().origin)]
    monkeypatch.setenv("HAL_BACKEND", "by_environment")
    hal.configure()
    seen.append((choose().chosen, choose().origin))
    hal.configure("by_configure")
    seen.append((choose().chosen, choose().origin))
    with hal.use("by_use"):
        seen.append((choose().chosen, choose().origin))
        seen.append((choose(backend="by_argument").chosen, choose(backend="by_argument").origin))
    seen.append((choose().chosen, choose().origin))
    assert seen == [
        ("by_nobody:0", "automatic"),
        ("by_environment:0", "environment"),
        ("by_configure:0", "configure"),
        ("by_use:0", "use"),
        ("by_argument:0", "argument"),
        ("by_configure:0", "configure"),
    ]


def test_the_order_holds_for_calls_too(fake: Fake, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = {n: fake(n, time=t) for n, t in (("one", 1e-12), ("two", 1e-11), ("three", 1e-10), ("four", 1e-9))}
    tensors = draw(generator)
    monkeypatch.setenv("HAL_BACKEND", "four")
    hal.configure()
    hal.attention(*tensors)
    hal.configure("three")
    hal.attention(*tensors)
    with hal.use("two"):
        hal.attention(*tensors)
        hal.attention(*tensors, backend="one")
        assert {name: len(b.ran) for name, b in backends.items()} == {"one": 1, "two": 1, "three": 1, "four": 1}
        with hal.use("four"):
            hal.attention(*tensors)
        hal.attention(*tensors)
    assert {name: len(b.ran) for name, b in backends.items()} == {"one": 1, "two": 2, "three": 1, "four": 2}


@pytest.mark.parametrize("level", ["argument", "use", "configure", "environment"])
def test_a_named_device_never_falls_through(local: Fake, monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    local("able", time=1e-12)
    local("narrow", capabilities=plain(length=Range(1, 8)))
    if level == "environment":
        monkeypatch.setenv("HAL_BACKEND", "narrow")
    if level == "configure":
        hal.configure("narrow")
    with hal.use("narrow" if level == "use" else None):
        decision = choose(backend="narrow" if level == "argument" else None)
    assert decision.chosen is None
    assert decision.origin == level
    assert [c.device.id for c in decision.candidates] == ["narrow:0"]
    with pytest.raises(UnsupportedError, match=r"len_q +16 asked, 1 to 8 offered") as caught:
        _ = decision.winner
    assert caught.value.decision is decision
    assert "able:0" in str(caught.value)


@pytest.mark.parametrize("level", ["argument", "use", "configure", "environment"])
def test_a_named_device_that_is_absent_never_falls_through(
    local: Fake, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    local("able", time=1e-12)
    local("ghost", absent="no card in slot 3")
    if level == "environment":
        monkeypatch.setenv("HAL_BACKEND", "ghost")
    if level == "configure":
        hal.configure("ghost")
    with hal.use("ghost" if level == "use" else None), pytest.raises(DeviceUnavailableError, match="no card in slot 3"):
        choose(backend="ghost" if level == "argument" else None)


def test_a_backend_s_name_means_any_of_its_devices_and_an_id_one(local: Fake) -> None:
    local("pair", count=2, time=lambda request: 1.0)
    assert choose(backend="pair").chosen in ("pair:0", "pair:1")
    assert {choose(backend=f"pair:{i}").chosen for i in range(2)} == {"pair:0", "pair:1"}


def test_preferences_fall_through_in_order_and_over_what_is_absent(local: Fake) -> None:
    local("first", capabilities=plain(length=Range(1, 8)))
    local("ghost", absent="no card")
    local("second", time=1.0)
    local("third", time=1e-12)
    with hal.prefer(["first", "ghost", "second", "third"]):
        decision = choose()
        assert (decision.chosen, decision.origin) == ("second:0", "prefer")
        assert [c.device.id for c in decision.candidates] == ["first:0", "second:0"]
        assert choose(replace(REQUEST, len_q=8, len_k=8)).chosen == "first:0"


def test_preferences_give_the_reasons_of_all_where_nobody_can(local: Fake) -> None:
    local("first", capabilities=plain(length=Range(1, 8)))
    local("second", capabilities=plain(head_dim=Choice({32})))
    local("third")
    with hal.prefer(["first", "second"]):
        decision = choose()
    with pytest.raises(UnsupportedError) as caught:
        _ = decision.winner
    for part in ("first:0 cannot", "len_k", "second:0 cannot", "head_dim", "third:0"):
        assert part in str(caught.value)


def test_a_preference_for_what_nobody_installed_is_an_error(local: Fake) -> None:
    local("alpha")
    with pytest.raises(UnknownBackendError, match="did you mean 'alpha'"), hal.prefer(["alpha", "alpah"]):
        pass


def test_preferences_do_not_depend_on_what_was_called_before(fake: Fake, generator: torch.Generator) -> None:
    narrow, wide = fake("narrow", capabilities=full(length=Range(1, 40))), fake("wide")
    with hal.prefer(["narrow", "wide"]):
        for length in (64, 40, 33, 41, 64, 40):
            hal.attention(*draw(generator, len_q=length))
    assert [r.len_q for _, r in narrow.ran] == [40, 33, 40]
    assert [r.len_q for _, r in wide.ran] == [64, 41, 64]


# Automatic


def test_automatic_takes_the_fastest_that_supports_the_call(local: Fake) -> None:
    local("slow", time=2.0)
    local("fast", time=1.0)
    local("fastest", time=0.1, capabilities=plain(head_dim=Choice({32})))
    decision = choose()
    assert decision.chosen == "fast:0"
    by_id = {c.device.id: c for c in decision.candidates}
    assert [r.code for r in by_id["fastest:0"].refusals] == [Code.HEAD_DIM]
    assert by_id["slow:0"].estimate is not None


@pytest.mark.parametrize("fidelity", ["emulated", "simulated"])
def test_automatic_never_takes_what_is_not_hardware_unless_allowed(local: Fake, fidelity: str) -> None:
    local("model", fidelity=fidelity, time=1e-12)
    local("silicon", time=1.0)
    decision = choose()
    assert decision.chosen == "silicon:0"
    refused = next(c for c in decision.candidates if c.device.id == "model:0").refusals
    assert [(r.code, r.offered) for r in refused] == [(Code.FIDELITY, fidelity)]
    assert choose(allow_simulated=True).chosen == "model:0"
    assert choose(backend="model").chosen == "model:0"
    with hal.use(allow_simulated=True):
        assert choose().chosen == "model:0"
        assert choose(allow_simulated=False).chosen == "silicon:0"
    hal.configure(allow_simulated=True)
    assert choose().chosen == "model:0"


def test_where_only_a_model_could_the_message_says_how_to_allow_it(local: Fake) -> None:
    local("model", fidelity="simulated")
    with pytest.raises(
        UnsupportedError, match="not hardware, left out: model:0   -> pass allow_simulated=True, or name one"
    ):
        _ = choose().winner


def test_the_objective_is_minimised(local: Fake) -> None:
    local("quick", time=1.0, energy=quantity(3.0), error=quantity(1e-2))
    local("frugal", time=2.0, energy=quantity(1.0), error=quantity(1e-3))
    local("exact", time=3.0, energy=quantity(2.0), error=quantity(1e-6))
    assert choose().chosen == "quick:0"
    assert choose(objective="energy").chosen == "frugal:0"
    assert choose(objective="error").chosen == "exact:0"
    with hal.use(objective="energy"):
        assert choose().chosen == "frugal:0"
        assert choose(objective="time").chosen == "quick:0"
    hal.configure(objective="error")
    assert choose().chosen == "exact:0"


def test_the_error_of_a_device_that_estimates_none_is_its_declared_numerics(local: Fake) -> None:
    local("declared", capabilities=full(), time=1.0)  # 1e-5 in float32
    local("estimated", error=quantity(1e-7), time=2.0)
    assert choose(objective="error").chosen == "estimated:0"


@pytest.mark.parametrize("objective", ["speed", "", 3])
def test_an_unknown_objective_is_refused(local: Fake, objective: Any) -> None:
    for ask in (
        lambda: choose(objective=objective),
        lambda: hal.use(objective=objective),
        lambda: hal.configure(objective=objective),
    ):
        with pytest.raises(ContractError, match="'time', 'energy' or 'error'"):
            ask()


def test_the_basis_decides_between_overlapping_intervals_alone(local: Fake) -> None:
    local("guess", time=quantity(0.5, 2.0, "declared"))
    local("model", time=quantity(1.0, 2.0, "modelled"))
    local("clock", time=quantity(1.9, 2.2, "measured"))
    assert choose().chosen == "clock:0"  # all overlap: the best origin, though not the least middle
    local("far", time=quantity(3.0, 4.0, "measured"))
    assert choose().chosen == "clock:0"
    local("sure", time=quantity(0.1, 0.4, "declared"))
    assert choose().chosen == "sure:0"  # below all others: its basis does not matter


def test_among_equals_the_middle_decides_and_then_the_priority(local: Fake) -> None:
    local("wide", time=quantity(0.0, 4.0))
    local("narrow", time=quantity(0.0, 2.0))
    assert choose().chosen == "narrow:0"


def test_simulated_joules_are_never_compared_with_measured_ones(local: Fake) -> None:
    local("silicon", energy=quantity(5.0, basis="measured"))
    local("model", fidelity="simulated", energy=quantity(1e-9, basis="modelled"))
    assert choose(objective="energy", allow_simulated=True).chosen == "silicon:0"
    local("other", fidelity="simulated", energy=quantity(1e-12, basis="modelled"))
    hal.unregister("silicon")
    assert choose(objective="energy", allow_simulated=True).chosen == "other:0"


def test_a_device_without_energy_is_not_chosen_for_energy(local: Fake) -> None:
    local("silent", time=1e-12)
    decision = choose(objective="energy")
    assert decision.chosen is None
    with pytest.raises(UnsupportedError, match="states its energy: ask for objective='time'"):
        _ = decision.winner
    local("honest", energy=quantity(9.0))
    assert choose(objective="energy").chosen == "honest:0"
    assert choose(backend="silent", objective="energy").chosen == "silent:0"  # it was named


def test_a_simulators_estimate_is_asked_for_only_where_it_may_be_chosen(local: Fake) -> None:
    """It may take a simulation: the first automatic call on a machine with simulators must not wait for it."""
    asked: list[int] = []

    def slow(request: AttentionRequest) -> float:
        asked.append(request.len_k)
        return 1e-12

    local("silicon")
    local("model", fidelity="simulated", time=slow)
    assert choose().chosen == "silicon:0"
    assert not asked
    assert choose(allow_simulated=True).chosen == "model:0"
    assert choose(backend="model").chosen == "model:0"
    assert len(asked) == 2


# Where tensors lie


def test_nothing_is_moved_silently(fake: Fake) -> None:
    fake("far", reads=("elsewhere",), time=1e-12)
    decision = choose()
    assert decision.chosen != "far:0"
    refused = next(c for c in decision.candidates if c.device.id == "far:0").refusals
    assert [(r.code, r.wanted, r.offered) for r in refused] == [(Code.PLACEMENT, HERE, "elsewhere")]
    moved = choose(transfer=True)
    assert moved.chosen == "far:0"
    assert moved.winner.transfer
    assert choose(backend="far").winner.transfer  # it was named
    assert choose(backend="far", transfer=False).chosen is None
    with hal.use(transfer=True):
        assert choose().chosen == "far:0"


def test_check_all_gives_a_composite_every_reason_of_an_inner_device(local: Fake) -> None:
    reason = Refusal("device", "phase", "7", "6 bits")
    local("inner", capabilities=plain(), check=lambda request, device: [reason])
    assert hal.check_all(REQUEST, "inner:0") == (reason,)
    codes = [r.code for r in hal.check_all(replace(REQUEST, dim_v=32, dtype="float16"), "inner")]
    assert codes == [Code.DTYPE, Code.VALUE_DIM]  # check() is asked only within what data allows
    assert [r.code for r in hal.check_all(replace(REQUEST, device="cpu"), "inner")] == [Code.PLACEMENT]
    assert [r.code for r in hal.check_all(replace(REQUEST, device="cpu"), "inner", transfer=True)] == [Code.DEVICE]


# Messages


def test_the_message_of_a_refusal_is_a_sentence_to_act_on(local: Fake) -> None:
    local("vk", capabilities=full(dtypes={"float16", "float32"}, head_dim=Choice({32, 64, 96, 128, 256})))
    local("able")
    request = replace(
        REQUEST,
        heads_q=32,
        heads_kv=8,
        len_q=4096,
        len_k=4096,
        dim_qk=80,
        dim_v=80,
        dtype="bfloat16",
        causal=hal.Causal.TOP_LEFT,
    )
    with pytest.raises(UnsupportedError) as caught:
        _ = choose(request, backend="vk").winner
    assert str(caught.value).splitlines() == [
        "vk:0 cannot run this attention (batch 2, heads 32/8, 4096 x 4096, head_dim 80, bfloat16, causal):",
        "  dtype      bfloat16 asked, float16 or float32 offered   -> cast to float32",
        "  head_dim   80 asked, 32, 64, 96, 128 or 256 offered     -> pad to 96",
        "Other devices that can: able:0. Nothing was run.",
    ]


def test_a_refusal_of_a_call_names_the_call_s_own_lengths(fake: Fake, generator: torch.Generator) -> None:
    fake("narrow", capabilities=plain(length=Range(1, 16)))
    with pytest.raises(UnsupportedError) as caught:
        hal.attention(*draw(generator, len_q=5, len_k=17), backend="narrow")
    assert "5 x 17" in str(caught.value)
    assert "17 asked, 1 to 16 offered" in str(caught.value)
    with pytest.raises(UnsupportedError, match="5 x 7"):
        hal.attention(*draw(generator, len_q=5, len_k=7, dtype=torch.float64), backend="narrow")


def test_where_no_device_is_near_the_message_says_what_would_help() -> None:
    with pytest.raises(UnsupportedError, match=r"nowhere:0|install a plugin"):
        _ = choose(replace(REQUEST, device="nowhere:0")).winner


def test_a_decision_prints_every_candidate(local: Fake) -> None:
    local("fast", time=quantity(1e-3, 2e-3, "measured", "measured-silicon"), energy=quantity(5e-3))
    local("narrow", capabilities=plain(head_dim=Choice({32})))
    text = str(choose())
    assert "fast:0 for batch 2, heads 4, 16 x 16" in text
    assert "* fast:0" in text
    assert "1 to 2 ms (measured, measured-silicon), energy 5 mJ (declared, assumed)" in text
    assert "head_dim  64 asked, 32 offered  -> " not in text
    assert "head_dim  64 asked, 32 offered" in text


# Records


def test_a_decision_survives_json_and_can_be_replayed(local: Fake) -> None:
    local("fast", time=1.0, energy=quantity(2.0))
    local("slow", time=2.0)
    local("narrow", capabilities=plain(head_dim=Choice({32})))
    request = replace(REQUEST, window=(4, None), grads=frozenset({"q"}), causal=hal.Causal.BOTTOM_RIGHT)
    decision = choose(request, objective="time")
    record = json.loads(decision.to_json())
    assert record["chosen"] == "fast:0"
    assert record["format"] == 2
    assert record["core"] == hal.__version__
    refused = next(c for c in record["candidates"] if c["device"]["id"] == "narrow:0")["refusals"]
    assert {r["code"] for r in refused} >= {"head_dim", "window", "backward", "causal"}
    for form in (decision, decision.to_dict(), decision.to_json(), record):
        assert hal.replay(form) == decision
    hal.unregister("fast")
    assert hal.replay(record).chosen == "slow:0"


def test_a_replay_keeps_the_policy_of_its_time(local: Fake) -> None:
    local("one", time=2.0)
    local("two", time=1.0)
    with hal.prefer(["one", "two"], objective="error"):
        decision = choose()
    again = hal.replay(decision.to_json())
    assert (again.chosen, again.origin, again.objective) == ("one:0", "prefer", "error")


@pytest.mark.parametrize("record", ["", "no json", "[]", "{}", '{"format": 1}', {"format": 1, "request": {}}, [], 7])
def test_what_is_no_record_is_refused(record: Any) -> None:
    with pytest.raises(ContractError, match="record"):
        hal.replay(record)


def test_a_record_with_damaged_values_is_refused(local: Fake) -> None:
    local("one")
    good = choose().to_dict()
    for path, value in ((("request", "mask"), "velvet"), (("policy", "objective"), "speed"), (("ranked",), [1])):
        record = json.loads(json.dumps(good))
        place = record
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(ContractError):
            hal.replay(record)


def test_a_record_of_a_newer_format_is_refused(local: Fake) -> None:
    local("one")
    with pytest.raises(ContractError, match="upgrade"):
        hal.replay(choose().to_dict() | {"format": 3})


def test_explain_is_the_decision_that_runs(fake: Fake, generator: torch.Generator) -> None:
    one, two = fake("one", time=1e-12), fake("two", time=lambda r: 1e-13 if r.len_q <= 8 else 1.0)
    for length in (3, 8, 9, 100):
        tensors = draw(generator, len_q=length)
        before = (len(one.ran), len(two.ran))
        decision = hal.explain(*tensors)
        assert (len(one.ran), len(two.ran)) == before
        assert (decision.request.len_q, decision.request.len_k) == (length, length)
        hal.attention(*tensors)
        ran = "one:0" if len(one.ran) > before[0] else "two:0"
        assert decision.chosen == ran == ("two:0" if length <= 8 else "one:0")


def test_explain_says_why_nobody_can_without_raising(fake: Fake, generator: torch.Generator) -> None:
    fake("narrow", capabilities=plain())
    decision = hal.explain(*draw(generator), backend="narrow", window=(1, 1), return_lse=True)
    assert decision.chosen is None
    assert {r.code for c in decision.candidates for r in c.refusals} == {Code.WINDOW, Code.LSE}


# Lengths at a limit inside a bucket


def lengths_that_run(call: Callable[[int], Any], lengths: list[int]) -> list[int]:
    ran = []
    for length in lengths:
        try:
            call(length)
            ran.append(length)
        except hal.HalError:
            pass
    return ran


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("lengths", [Range(1, 5000), Range(100, 5000), Range(48, None, multiple=48), Range(0, 4096)])
def test_lengths_are_refused_exactly_beyond_the_claim(fake: Fake, lengths: Range, order: int) -> None:
    quick = hal.SimpleSession(lambda query, key, value, mask, request: (torch.zeros_like(query), None))
    fake("narrow", capabilities=plain(length=lengths), open=lambda backend, device: quick)
    asked = [0, 1, 47, 48, 64, 65, 96, 99, 100, 101, 128, 4095, 4096, 4097, 4999, 5000, 5001, 8191, 8192, 9000][::order]

    def call(length: int) -> None:
        hal.attention(*(torch.zeros(1, 1, length, 1),) * 3, backend="narrow")

    def explained(length: int) -> None:
        _ = hal.explain(*(torch.zeros(1, 1, length, 1),) * 3, backend="narrow").winner

    assert lengths_that_run(call, asked) == [n for n in asked if n in lengths]
    assert lengths_that_run(explained, asked) == [n for n in asked if n in lengths]


def test_a_bound_call_keeps_to_the_claimed_lengths(fake: Fake) -> None:
    fake("narrow", capabilities=plain(length=Range(32, 256, multiple=16)))
    example = torch.zeros(1, 1, 64, 8)
    call = hal.bind(example, example, example, backend="narrow", max_len_q=128, max_len_k=128)

    def run(length: int) -> None:
        tensor = torch.zeros(1, 1, length, 8)
        call(tensor, tensor, tensor)

    asked = [0, 16, 17, 31, 32, 33, 64, 100, 112, 128, 129, 144, 256]
    assert lengths_that_run(run, asked) == [32, 64, 112, 128]


@pytest.mark.parametrize("order", [1, -1])
def test_a_device_s_own_limit_on_lengths_is_exact(fake: Fake, order: int) -> None:
    def check(request: AttentionRequest, device: hal.Device) -> list[Refusal]:
        return [Refusal("device", "len_k", str(request.len_k), "up to 37")] if request.len_k > 37 else []

    fake("narrow", check=check)
    asked = [30, 33, 36, 37, 38, 40, 63, 64, 65][::order]

    def call(length: int) -> None:
        tensor = torch.zeros(1, 1, length, 4)
        hal.attention(tensor[:, :, :1], tensor, tensor, backend="narrow")

    assert lengths_that_run(call, asked) == [n for n in asked if n <= 37]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("where", ["device", "configure"])
def test_memory_limits_are_exact(fake: Fake, where: str, order: int) -> None:
    backend = fake("narrow", memory=lambda r: r.len_q * 100, device_memory=5000 * 100 if where == "device" else None)
    if where == "configure":
        hal.configure(memory_limit={"narrow:0": 5000 * 100})
    asked = [4096, 4097, 4999, 5000, 5001, 8192, 8193][::order]

    def call(length: int) -> None:
        hal.attention(torch.zeros(1, 1, length, 4), *(torch.zeros(1, 1, 1, 4),) * 2, backend="narrow")

    assert lengths_that_run(call, asked) == [n for n in asked if n <= 5000]
    assert len(backend.ran) == len([n for n in asked if n <= 5000])


def test_growing_lengths_meet_few_decisions(fake: Fake) -> None:
    estimates = []
    fake("one", time=lambda request: estimates.append(request.len_k) or 1e-13)
    query = torch.zeros(1, 1, 1, 4)
    for length in range(1, 300):
        key = torch.zeros(1, 1, length, 4)
        hal.attention(query, key, key, backend="one")
    assert len(estimates) <= 30


def test_a_cold_call_asks_each_device_that_can_for_one_estimate(fake: Any, generator: torch.Generator) -> None:
    asked: list[str] = []

    def time(name: str) -> Any:
        return lambda request: asked.append(name) or 1e-12

    fake("one", time=time("one"))
    fake("two", time=time("two"))
    hal.attention(*draw(generator))
    assert sorted(asked) == ["one", "two"]


def test_a_failure_belongs_to_the_request_and_is_forgotten_with_it(fake: Any, generator: torch.Generator) -> None:
    failing: list[Exception] = []

    def check(request: hal.AttentionRequest, device: hal.Device) -> Any:
        if failing:
            raise failing[0]
        return ()

    backend = fake("one", check=check)
    for error in (MemoryError("no room"), ZeroDivisionError("pages"), OverflowError("2**600")):
        failing[:] = [error]
        with pytest.raises(UnsupportedError, match=f"failed on this request .*{re.escape(str(error))}"):
            hal.attention(*draw(generator), backend="one")
    failing.clear()
    hal.attention(*draw(generator), backend="one")
    assert backend.ran


@pytest.mark.parametrize("answer", [[1, "x"], ["no"], 5])
def test_what_is_no_refusal_is_a_refusal_of_the_device(fake: Any, generator: torch.Generator, answer: Any) -> None:
    fake("odd", time=1e-15, check=lambda request, device: answer)
    good = fake("good", time=1e-12)
    hal.attention(*draw(generator))
    assert good.ran
    with pytest.raises(UnsupportedError, match="failed on this request"):
        hal.attention(*draw(generator), backend="odd")


def test_a_session_that_serves_less_than_was_claimed_is_passed_over_and_named_where_asked_for(
    fake: Any, generator: torch.Generator
) -> None:
    fake("claims", time=1e-15, autograd="none")
    good = fake("good", time=1e-12)
    tensors = [t.requires_grad_() for t in draw(generator)]
    hal.attention(*tensors).sum().backward()
    assert good.ran
    with pytest.raises(hal.PluginError, match="must not claim 'backward'"):
        hal.attention(*tensors, backend="claims")


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda out: out[:, :, :-1], r"out \[2, 4, 6, 8\]"),
        (lambda out: out.double(), "float64"),
        (lambda out: None, "out NoneType"),
        (lambda out: out.to("meta"), "on meta"),
    ],
)
def test_a_result_of_another_form_is_the_plugin_s_error(
    fake: Any, generator: torch.Generator, spoil: Any, what: str
) -> None:
    from fakes import BoundSession

    class Lying(BoundSession):
        def bind(self, request: hal.AttentionRequest) -> Any:
            run = super().bind(request)
            return lambda *given: spoil(run(*given))

    fake("liar", open=Lying)
    with pytest.raises(hal.PluginError, match=what):
        hal.attention(*draw(generator, len_q=7), backend="liar")


def test_what_a_device_can_do_is_asked_by_its_id(fake: Any) -> None:
    fake("one", capabilities=plain(), count=2)
    assert hal.device("one:1").id == "one:1"
    assert hal.device("one").id == "one:0"
    assert hal.capabilities("one:1").dtypes == {"float32"}
    assert hal.memory("one:1") is hal.session("one:1").memory
    with pytest.raises(hal.UnknownBackendError):
        hal.device("three")
