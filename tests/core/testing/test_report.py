"""What a report says: statuses, expectations, and that whatever a device raises becomes a finding."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

import hal_core as hal
from hal_core.registry import registry
from hal_core.testing import CHECKS, check_backend
from hal_core.testing.conformance import Status
from hal_core.testing.faulty_backends import FAULTS, DenseBackend, DenseSession

QUICK: dict[str, Any] = {"quick": True}


def status(report: Any, name: str) -> Status:
    return report[name].status  # type: ignore[no-any-return]


def test_passes_skips_and_failures(seed: int) -> None:
    report = check_backend(FAULTS["wrong scale"].make(), checks=["masks", "scale", "paged"], seed=seed, **QUICK)
    assert [r.name for r in report.results] == ["masks", "scale", "paged"]
    assert [r.status for r in report.results] == [Status.PASSED, Status.FAILED, Status.SKIPPED]
    assert not report.passed
    assert report["masks"].error <= report["masks"].bound == 1e-5
    assert report["scale"].error > report["scale"].bound
    assert "scale" in report["scale"].detail
    assert str(seed) in str(report)
    assert "FAILED: 1 passed, 1 failed, 1 skipped" in str(report)


def test_unsupported_is_not_run_and_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "scale", lambda subject: pytest.fail("it was run"))
    report = check_backend(DenseBackend(), checks=["scale"], unsupported={"scale": "fixed in the optics"}, **QUICK)
    assert status(report, "scale") is Status.UNSUPPORTED
    assert report["scale"].detail == "fixed in the optics"
    assert report.passed


def test_an_expected_failure_passes_and_keeps_the_finding() -> None:
    report = check_backend(FAULTS["wrong scale"].make(), checks=["scale"], expected_failure={"scale": "known"}, **QUICK)
    assert status(report, "scale") is Status.EXPECTED_FAILURE
    assert report["scale"].detail.startswith("known (2 of 2 cases")
    assert report.passed


def test_an_unexpected_pass_fails() -> None:
    report = check_backend(DenseBackend(), checks=["scale"], expected_failure={"scale": "known"}, **QUICK)
    assert status(report, "scale") is Status.UNEXPECTED_PASS
    assert not report.passed


def test_a_skip_stays_a_skip_where_a_failure_was_expected() -> None:
    report = check_backend(DenseBackend(), checks=["paged"], expected_failure={"paged": "known"}, **QUICK)
    assert status(report, "paged") is Status.SKIPPED
    assert report.passed


class Declares(DenseBackend):
    """A right device, or one that multiplies by another scale, that says beforehand which checks it does not pass."""

    def __init__(self, session: Any = DenseSession, reasons: Any = None) -> None:
        super().__init__("declares", session)
        self.reasons = reasons

    def nonconformance(self, device: hal.Device) -> Any:
        if isinstance(self.reasons, Exception):
            raise self.reasons
        return self.reasons


def _wrong_scale() -> Any:
    return type(FAULTS["wrong scale"].make().open(DenseBackend().devices()[0]))


def test_a_declared_failure_is_a_failure_with_its_reason(seed: int) -> None:
    reasons = {"scale": "it is not calibrated", "structure": "it is not calibrated"}
    backend = Declares(_wrong_scale(), reasons)
    report = check_backend(backend, checks=["scale", "structure", "masks"], seed=seed, **QUICK)
    assert [status(report, name) for name in ("scale", "structure", "masks")] == ["failed", "failed", "passed"]
    assert not report.passed
    assert "does not conform, as its plugin declares: it is not calibrated (scale, structure)" in str(report)
    assert json.loads(report.to_json())["declared"] == reasons


def test_a_declaration_explains_no_other_failure(seed: int) -> None:
    backend = Declares(_wrong_scale(), {"structure": "it is not calibrated"})
    report = check_backend(backend, checks=["scale", "structure"], seed=seed, **QUICK)
    assert "it is not calibrated (structure)" in str(report)
    assert "not declared by its plugin: scale" in str(report)


def test_a_declared_failure_that_passes_is_not_spoken_of(seed: int) -> None:
    report = check_backend(Declares(reasons={"scale": "it is not calibrated"}), checks=["scale"], seed=seed, **QUICK)
    assert report.passed
    assert "not calibrated" not in str(report)


@pytest.mark.parametrize("reasons", [None, 5, {"lekas": "no check"}, {"scale": 5}, RuntimeError("broken")])
def test_a_declaration_that_cannot_be_read_is_a_warning_and_explains_nothing(reasons: Any, seed: int) -> None:
    report = check_backend(Declares(_wrong_scale(), reasons), checks=["scale"], seed=seed, **QUICK)
    assert status(report, "scale") is Status.FAILED
    assert not report.declared
    assert "WARNING: nonconformance()" in str(report)


@pytest.mark.parametrize("where", ["checks", "unsupported", "expected_failure"])
def test_an_unknown_check_is_refused_with_the_closest_name(where: str) -> None:
    names: Any = ["lekas"] if where == "checks" else {"lekas": "reason"}
    with pytest.raises(hal.ContractError, match="leaks"):
        check_backend(DenseBackend(), **{where: names})


def test_an_unknown_or_absent_backend_is_the_callers_error() -> None:
    with pytest.raises(hal.UnknownBackendError):
        check_backend("nowhere")


def test_an_object_is_registered_only_while_it_is_checked() -> None:
    seen: list[Any] = []

    def progress(text: str, share: float) -> None:
        seen.append((text, share, registry.devices()))

    check_backend(DenseBackend("passing"), checks=["scale"], quick=True, progress=progress)
    assert [(text, share) for text, share, _ in seen] == [("scale", 0.0), ("done", 1.0)]
    assert "passing:0" in [device.id for device in seen[0][2]]
    assert "passing:0" not in [device.id for device in registry.devices()]


def test_whatever_a_device_raises_is_a_finding() -> None:
    class Crashes(DenseSession):
        def attend(self, *args: Any) -> Any:
            raise ZeroDivisionError("the device is on fire")

    report = check_backend(DenseBackend("crashes", Crashes), checks=["contract", "scale", "threads"], **QUICK)
    assert "a plain call raised ZeroDivisionError: the device is on fire (testing/test_report.py:" in str(report)
    assert not report.passed


def test_what_only_some_calls_raise_is_found_by_their_checks() -> None:
    class Crashes(DenseSession):
        def attend(self, query: Any, key: Any, value: Any, mask: Any, r: Any, *rest: Any) -> Any:
            return super().attend(query, key, value, mask, r, *rest) if r.scale is None else 1 // 0

    report = check_backend(DenseBackend("crashes", Crashes), checks=["contract", "scale", "threads"], **QUICK)
    assert [r.status for r in report.results] == [Status.PASSED, Status.FAILED, Status.PASSED]
    assert "raised ZeroDivisionError" in report["scale"].detail


class WithoutEstimate(DenseBackend):
    estimate = None  # type: ignore[assignment]


class WithoutTwo(DenseBackend):
    estimate = check = None  # type: ignore[assignment]


class EstimatesByName(DenseBackend):
    def estimate(self, request: Any, device: Any) -> Any:
        return request.no_such_field


class EstimatesNothing(DenseBackend):
    def estimate(self, request: Any, device: Any) -> Any:
        return None


def locked() -> Any:
    raise OSError("held by another process")


@pytest.mark.parametrize(
    ("backend", "says"),
    [
        (WithoutEstimate(), "the backend has no method `estimate`"),
        (WithoutTwo(), "the backend has no method `check` or `estimate`"),
        (EstimatesByName(), "no_such_field' (testing/test_report.py:"),
        (EstimatesNothing(), "estimate() gave None: give an Estimate"),
        (DenseBackend("locked", locked), "held by another process"),
    ],
    ids=["a method", "two methods", "a typing error", "no estimate", "a locked device"],
)
def test_what_every_check_needs_is_tried_once(backend: Any, says: str) -> None:
    report = check_backend(backend, **QUICK)
    assert [r.status for r in report.results] == [Status.FAILED] + [Status.NOT_RUN] * (len(CHECKS) - 1)
    assert not report.passed
    assert says in report["contract"].detail
    assert f"; {len(CHECKS) - 1} checks were not run" in report["contract"].detail
    assert str(report).count("\n") == 2
    assert f"FAILED: 1 failed, {len(CHECKS) - 1} not run" in str(report)
    assert json.loads(report.to_json())["results"][1]["status"] == "not_run"


def test_an_expected_failure_does_not_excuse_a_backend_that_cannot_be_checked() -> None:
    report = check_backend(WithoutEstimate(), checks=["contract"], expected_failure={"contract": "known"}, **QUICK)
    assert not report.passed


def test_the_largest_errors_are_listed_by_dtype_and_quantity(seed: int) -> None:
    names = ["dtypes", "log_sum_exp", "gradients"]
    report = check_backend(DenseBackend(), checks=names, seed=seed, **QUICK)
    assert set(report.errors) == {"float32", "bfloat16"}
    for dtype, bounds in DenseBackend().capabilities(report.device).numerics.items():
        found = report.errors[dtype]
        assert set(found) == {"out", "log-sum-exp", "gradient"}
        assert {what: bound for what, (_, bound) in found.items()} == {
            "out": bounds.relative,
            "log-sum-exp": bounds.lse,
            "gradient": bounds.gradient,
        }
        assert all(0 < error <= bound for error, bound in found.values())
    error, bound = report.errors["float32"]["log-sum-exp"]
    assert f"log-sum-exp {error:.2g} of {bound:.2g}" in str(report)
    assert json.loads(report.to_json())["errors"]["float32"]["log-sum-exp"] == [error, bound]


def test_json_is_strict_even_for_an_infinite_error() -> None:
    report = check_backend(FAULTS["NaN in rows without keys"].make(), checks=["masks"], **QUICK)
    assert report["masks"].error == math.inf

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(report.to_json(), parse_constant=refuse)
    assert data["passed"] is False
    assert data["device"]["id"] == "faulty:0"
    assert data["results"][0]["error"] is None
    assert data["results"][0]["status"] == "failed"


def test_a_seed_draws_the_same_inputs_again() -> None:
    first, again, other = (check_backend(DenseBackend(), checks=["dtypes"], seed=n, **QUICK) for n in (1, 1, 2))
    assert first["dtypes"].error == again["dtypes"].error != other["dtypes"].error
