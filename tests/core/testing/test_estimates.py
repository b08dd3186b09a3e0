"""Estimated times against the clock: a busy host is no failure of the device, a gross error is one anywhere."""

from __future__ import annotations

from typing import Any

import pytest

from hal_core.testing import Comparison, check_backend, runtime_checks
from hal_core.testing.benchmark import summarize
from hal_core.testing.dense_backend import DenseBackend

DECLARED_HIGH = 1e-2  # seconds that the honest device declares for a tiny call, at the most


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """timed(seconds, spread): every call takes this long; torch's own varies by this factor, on an idle host."""
    monkeypatch.setattr(runtime_checks, "_others_wait", lambda: False)

    def set_times(seconds: float, spread: float) -> None:
        call = summarize("call", [1e3 * seconds] * 5)
        yardstick = summarize("yardstick", [1.0, spread, spread, spread])
        compared = Comparison(baseline="call", results={"call": call, "yardstick": yardstick}, ratios={})
        monkeypatch.setattr(runtime_checks.BenchmarkRunner, "compare", lambda *_, **__: compared)

    return set_times


def result(**options: Any) -> Any:
    return check_backend(DenseBackend(**options), checks=["estimates"], quick=True, seed=1)["estimates"]


@pytest.mark.parametrize(
    ("factor", "spread", "passes", "warns"),
    [(1, 1.0, True, False), (88, 1.0, False, False), (88, 3.0, True, True), (3000, 3.0, False, False)],
)
def test_only_a_quiet_host_or_a_gross_error_fails(
    timed: Any, factor: float, spread: float, passes: bool, warns: bool
) -> None:
    timed(DECLARED_HIGH * factor, spread)
    found = result()
    assert found.passed == passes, found.detail
    assert ("the host was busy" in found.warning) == warns
    assert passes or "measured" in found.detail


def test_more_threads_than_cores_are_a_busy_host(timed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(88 * DECLARED_HIGH, 1.0)
    monkeypatch.setattr(runtime_checks, "_others_wait", lambda: True)
    assert "the host was busy" in result().warning
