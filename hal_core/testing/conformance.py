"""`check_backend`: everything a device is held to, with results as values.

CHECKS holds every check by name, in the order they run. A name says what is promised, so a failure names what is
broken.
"""

from __future__ import annotations

import difflib
import enum
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import attrs

from .. import AttentionBackend, ContractError, Device, Estimate, __version__
from ..capability import listing
from ..registry import registry
from . import behaviour as b, claims, memory_checks, runtime_checks, structure, tiling_checks
from .findings import Failure, Measure, Skip, raised_text
from .subject import Subject

CHECKS: dict[str, Callable[[Subject], Measure]] = {
    "contract": b.contract,
    **{subject: claims.claim_check(subject) for subject in claims.SUBJECTS},
    **{
        check.__name__: check
        for check in (
            claims.refusals,
            b.prepared_reuse,
            b.stale_keys,
            b.results_stay,
            b.huge_strides,
            b.inputs_unchanged,
            b.merges,
            b.repeats,
            b.threads,
            structure.structure,
            structure.lowest_mask,
            structure.isolation,
            memory_checks.dlpack,
            memory_checks.memory,
            memory_checks.peak_memory,
            tiling_checks.tilings,
            claims.options,
            b.reopen,
            b.leaks,
            runtime_checks.runs_where_it_says,
            runtime_checks.estimates,
            runtime_checks.costs,
            runtime_checks.discovery,
            runtime_checks.kernels,
        )
    },
}


METHODS = ("devices", "capabilities", "check", "estimate", "open")  # that a backend must have


class Status(enum.StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"  # there is nothing to look at: the feature is not claimed
    UNSUPPORTED = "unsupported"  # not run: the device cannot pass it by design
    EXPECTED_FAILURE = "expected_failure"  # fails for a known reason that will be mended
    UNEXPECTED_PASS = "unexpected_pass"  # was expected to fail: remove the expectation
    NOT_RUN = "not_run"  # a call of the backend fails that every check needs; the first result says which


@attrs.frozen(kw_only=True)
class CheckResult:
    """What one check found.

    Attributes:
        name: a key of `CHECKS`. status: see `Status`. detail: the finding, or the reason for not running.
        error, bound: the error that was closest to its bound, or broke it; None where nothing was compared.
        warning: what does not fail the device, and its owner should know; "" for nothing.
        seconds: how long it took.
    """

    name: str
    status: Status
    detail: str = ""
    error: float | None = None
    bound: float | None = None
    warning: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """False for a failure, for an unexpected pass, and for what could not be run."""
        return self.status not in (Status.FAILED, Status.UNEXPECTED_PASS, Status.NOT_RUN)


@attrs.frozen(kw_only=True)
class Report:
    """All results for one device. Prints as a table.

    Attributes:
        core: the core's version. seed: draws the same inputs again. quick: fewer cases and draws.
        errors: for each dtype and quantity ("out", "log-sum-exp", "gradient"), the largest error that was found and the
            declared bound.
        declared: reasons by failed check, where the backend's `nonconformance` names it. They excuse nothing.
        warning: of the whole report; "" for none.
    """

    device: Device
    core: str
    seed: int
    quick: bool
    results: tuple[CheckResult, ...]
    errors: Mapping[str, Mapping[str, tuple[float, float]]] = attrs.field(factory=dict)
    declared: Mapping[str, str] = attrs.field(factory=dict)
    warning: str = ""

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    def __getitem__(self, name: str) -> CheckResult:
        return next(result for result in self.results if result.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite error, which JSON cannot say, is None."""
        return {
            "passed": self.passed,
            **attrs.asdict(self, value_serializer=lambda _, __, v: None if v == math.inf else v),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        d = self.device
        lines = [f"conformance of {d.id} ({d.fidelity}, {d.vendor} {d.model}), seed {self.seed}"]
        for r in (result for result in self.results if result.status is not Status.NOT_RUN):
            figures = "" if r.error is None or r.bound is None else f"{r.error:.2g} of {r.bound:.2g}"
            lines.append(f"  {r.name:18} {r.status:17} {figures:20} {r.seconds:6.2f} s  {r.detail}".rstrip())
        if self.errors:
            lines.append("largest errors, for Numerics:")
        for dtype, by_quantity in self.errors.items():
            found = ", ".join(f"{what} {error:.2g} of {bound:.2g}" for what, (error, bound) in by_quantity.items())
            lines.append(f"  {dtype:9} {found}")
        lines += [f"  WARNING, {r.name}: {r.warning}" for r in self.results if r.warning]
        lines += [f"  WARNING: {self.warning}"] if self.warning else []
        counts = [(sum(r.status is status for r in self.results), status.replace("_", " ")) for status in Status]
        total = ", ".join(f"{count} {status}" for count, status in counts if count)
        return "\n".join([*lines, f"{'passed' if self.passed else 'FAILED'}: {total}", *self._explanation()])

    def _explanation(self) -> list[str]:
        """Why the device does not conform by its plugin's own account, and which failures that account leaves out."""
        if not self.declared:
            return []
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.declared.items():
            by_reason.setdefault(reason, []).append(name)
        given = "; ".join(f"{reason} ({', '.join(names)})" for reason, names in by_reason.items())
        lines = [f"{self.device.id} does not conform, as its plugin declares: {given}"]
        others = [r.name for r in self.results if r.status is Status.FAILED and r.name not in self.declared]
        return [*lines, f"not declared by its plugin: {', '.join(others)}"] if others else lines


def check_backend(
    backend: str | AttentionBackend,
    *,
    unsupported: Mapping[str, str] | None = None,
    expected_failure: Mapping[str, str] | None = None,
    quick: bool = False,
    seed: int | None = None,
    checks: Sequence[str] | None = None,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Report:
    """Test that a device does what it claims, refuses everything else, and behaves as a device must.

    Args:
        backend: device id, backend name (its first device), or a backend object, registered for as long as this takes.
        unsupported: reasons by check, for checks that the device cannot pass by design; they are not run.
        expected_failure: reasons by check, for failures that will be mended; a pass then fails.
        quick: fewer cases and draws. seed: of a report, to draw the same again; None for fresh inputs.
        checks: names to run; None for all. progress: called with a check's name and the share done, 0 to 1.

    Returns:
        A report; it never raises for what a device does.

    Raises:
        UnknownBackendError, DeviceUnavailableError: there is no such device here. ContractError: an unknown check.
    """
    unsupported, expected, names = unsupported or {}, expected_failure or {}, list(CHECKS) if checks is None else checks
    for name in (*names, *unsupported, *expected):
        if name not in CHECKS:
            close = difflib.get_close_matches(name, CHECKS) or list(CHECKS)
            raise ContractError(f"check {name!r} was given: use {listing(close)}")
    results, seed = [], secrets.randbits(32) if seed is None else seed
    with ExitStack() as undo:
        if not isinstance(backend, str):
            registry.register(backend)
            backend = backend.devices()[0].id
            undo.callback(registry.unregister, backend)
        device = registry.find(backend)[0]
        reasons, warning = _declared(device)
        run = [name for name in names if name not in unsupported]
        subject, obstacle = _begun(device, seed, quick) if run else (None, "")
        for place, name in enumerate(names):
            progress(name, place / len(names))
            if name in unsupported:
                results.append(CheckResult(name=name, status=Status.UNSUPPORTED, detail=unsupported[name]))
                continue
            if subject is not None:
                results.append(_judged(_run(name, subject), expected.get(name)))
            elif name == run[0]:
                left = f"; {len(run) - 1} checks were not run" if len(run) > 1 else ""
                results.append(CheckResult(name=name, status=Status.FAILED, detail=obstacle + left))
            else:
                results.append(CheckResult(name=name, status=Status.NOT_RUN, detail=obstacle))
    progress("done", 1.0)
    errors, failed = {} if subject is None else subject.largest, {r.name for r in results if r.status is Status.FAILED}
    declared = {name: reason for name, reason in reasons.items() if name in failed}
    return Report(
        device=device,
        core=__version__,
        seed=seed,
        quick=quick,
        results=tuple(results),
        errors=errors,
        declared=declared,
        warning=warning,
    )


def _declared(device: Device) -> tuple[Mapping[str, str], str]:
    """The backend's reasons by check for what it does not pass, and a warning where they cannot be read."""
    ask = getattr(registry.backend_of(device), "nonconformance", None)
    if ask is None:
        return {}, ""
    try:
        reasons = ask(device)
    except Exception as error:  # whatever a device raises is a finding
        return {}, f"nonconformance() raised {raised_text(error)}"
    if isinstance(reasons, Mapping) and all(n in CHECKS and isinstance(r, str) for n, r in reasons.items()):
        return reasons, ""
    return {}, f"nonconformance() gave {reasons!r}: give reasons by the names of checks, {{}} for none"


def _begun(device: Device, seed: int, quick: bool) -> tuple[Subject | None, str]:
    """The device under test, or None and why no check can run: each method of the backend and one plain call are tried.

    Whether the call's result is right is left to the checks.
    """
    backend = registry.backend_of(device)
    if missing := [name for name in METHODS if not callable(getattr(backend, name, None))]:
        return None, f"the backend has no method {listing([f'`{name}`' for name in missing])}"
    step = "capabilities()"
    try:
        subject = Subject(device, seed=seed, quick=quick)
        case = subject.probe()
        step = "check()"
        list(backend.check(case.request, device))
        step = "estimate()"
        if not isinstance(estimate := backend.estimate(case.request, device), Estimate):
            return None, f"estimate() gave {estimate!r}: give an Estimate"
        step = "open()"
        session = subject.session
        step = "a plain call"
        subject.by_session(case, case.draw(seed), session=session)
    except Failure as failure:
        return None, str(failure)
    except Exception as error:  # whatever a device raises is a finding
        return None, f"{step} raised {raised_text(error)}"
    return subject, ""


def _run(name: str, subject: Subject) -> CheckResult:
    """One check's result. Whatever the device raises is the check's finding."""
    start, status, measure = time.monotonic(), Status.PASSED, Measure()
    try:
        measure = CHECKS[name](subject)
    except Skip as reason:
        status, measure = Status.SKIPPED, Measure(detail=str(reason))
    except Failure as failure:
        status, measure = Status.FAILED, Measure(failure.error, failure.bound, str(failure))
    except Exception as raised:  # a device may raise anything, and the other checks must still run
        status, measure = Status.FAILED, Measure(detail=raised_text(raised))
    return CheckResult(name=name, status=status, seconds=time.monotonic() - start, **measure._asdict())


def _judged(result: CheckResult, expected: str | None) -> CheckResult:
    if expected is None or result.status is Status.SKIPPED:
        return result
    if result.status is Status.PASSED:
        return attrs.evolve(
            result, status=Status.UNEXPECTED_PASS, detail=f"it passes, and was expected to fail: {expected}"
        )
    return attrs.evolve(result, status=Status.EXPECTED_FAILURE, detail=f"{expected} ({result.detail})")
