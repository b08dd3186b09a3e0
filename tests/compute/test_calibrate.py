"""Calibrations: every dtype by its own rate, and files of before there was more than one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.calibration import calibrate, save
from hal_core.registry import registry

measuring = pytest.importorskip("hal_compute.calibrate", exc_type=ImportError)

OLD = {"call": 1e-3, "mac": 1e-9}  # of before dtypes, copies and gradients were measured
NEW = OLD | {
    "mac in float16": 1e-11,
    "gradient mac": 4e-9,
    "gradient mac in float16": 5e-9,
    "copied byte": 1e-8,
    "call from cuda": 5e-4,
}


def asked(dtype: str = "float32", place: str = "cpu", length: int = 256, **options: Any) -> hal.AttentionRequest:
    return hal.AttentionRequest(1, 8, 8, length, length, 64, 64, dtype, place, **options)


MACS = asked().visible_macs


@pytest.mark.parametrize(
    ("values", "request_", "want"),
    [
        (OLD, asked(), 1e-3 + MACS * 1e-9),
        (OLD, asked(grads=frozenset("q")), 1e-3 + MACS * 4e-9),
        (OLD, asked("float16"), None),
        (OLD, asked(place="cuda:0"), None),
        (NEW, asked("float16"), 1e-3 + 4 * 8 * 256 * 64 * 2 * 1e-8 + MACS * 1e-11),
        (NEW, asked("float16", "cuda:0"), 5e-4 + MACS * 1e-11),
        (NEW, asked("float16", "cuda:0", grads=frozenset("q")), 5e-4 + MACS * (1e-11 + 5e-9)),
        (NEW, asked("bfloat16"), None),
    ],
)
def test_a_call_takes_what_its_own_dtype_and_place_took(
    values: dict[str, float], request_: hal.AttentionRequest, want: float | None
) -> None:
    found = measuring.seconds(values, request_)
    assert found is None if want is None else found == pytest.approx(want)


class Known:
    """A session whose device takes what `rates` say for each multiply-accumulate, and `least` seconds at least."""

    def __init__(self, rates: dict[str, float], clock: bool = True, least: float = 0.0) -> None:
        self.rates, self.lengths, self._clock, self.device_seconds = rates, list[int](), clock, None
        self._least = least

    def bind(self, request: hal.AttentionRequest) -> Callable[..., Any]:
        self.lengths.append(request.len_q)

        def run(query: Any, key: Any, value: Any) -> Any:
            assert str(query.dtype) == f"torch.{request.dtype}"
            self._take(measuring.mac_in(request.dtype), request)
            return query, torch.zeros(1)

        return run

    def prepare_attention(self, query: Any, key: Any, value: Any, *, request: hal.AttentionRequest) -> Any:
        return request

    def compute_attention_backward(self, prepared: Any, *given: Any) -> None:
        self._take(measuring.mac_in(prepared.dtype, gradients=True), prepared)

    def _take(self, name: str, request: hal.AttentionRequest) -> None:
        taken = max(request.visible_macs * self.rates[name], self._least)
        self.device_seconds = taken if self._clock else None


def test_every_dtype_is_measured_by_itself_in_calls_that_are_long_enough() -> None:
    rates = {"mac": 1e-10, "mac in float16": 2e-12, "gradient mac": 1e-9, "gradient mac in float16": 1e-9}
    session = Known(rates)
    found = measuring.measure(session, ["cpu"], {"float32", "float16"}, 64, lambda text, share: None)
    assert {name: found[name] for name in rates} == pytest.approx(rates)
    assert max(session.lengths) == 512, "the first power of two at which 1024 * n^2 * 2e-12 s are 0.5 ms"
    assert set(found) == {*rates, "call", "copied byte"}


def test_lengths_grow_for_as_long_as_more_of_the_device_is_kept_busy() -> None:
    session = Known({"mac": 1e-11, "gradient mac": 1e-11}, least=8e-3)
    found = measuring.measure(session, ["cpu"], {"float32"}, 64, lambda text, share: None)
    assert found["mac"] == pytest.approx(1e-11)


def test_a_device_without_a_clock_is_timed_by_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10_000))
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 0.25))
    session = Known(dict.fromkeys(["mac", "gradient mac"], 1e-9), clock=False)
    found = measuring.measure(session, ["cpu"], {"float32"}, 64, lambda text, share: None)
    assert found["call"] == 0.25
    assert found["mac"] == pytest.approx(1e-9 / asked(length=64).visible_macs), "no longer than a call without work"


def test_every_dtype_of_a_calibrated_device_is_estimated_from_measurements(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = registry.find(device)[0]
    backend: Any = registry.backend_of(found)
    monkeypatch.setattr(type(backend), "calibration_length", 16)
    monkeypatch.setattr(measuring, "_ENOUGH", 0.0)
    stored = calibrate(device)
    for dtype in backend.capabilities(found).dtypes:
        assert backend.estimate(asked(dtype), found).time.basis == "measured"
        assert stored.values[measuring.mac_in(dtype)] > 0
        assert stored.values[measuring.mac_in(dtype, gradients=True)] > 0
    save(found, OLD)
    registry.refresh(device)
    assert backend.estimate(asked(), found).time.basis == "measured"
    assert backend.estimate(asked("float16"), found).time.basis == "declared", "it was not measured then"
