"""Both sides of a device's claims: what is claimed works, and everything else is refused.

What each subject's check promises:
    dtypes: every claimed dtype and head size is within its numerics. lengths: so are ragged, short, long and empty
        ones.
    strides: tensors may lie in memory in any claimed way. scale: a given scale is used.
    masks: masks of every claimed kind and shape are applied, and rows without any key give 0.
    causal: diagonals lie where they were asked, for more queries than keys too. window: so do both ends of a window.
    softcap: scores are capped after scale and before the mask.
    grouped_heads: query head h reads key head h // (heads_q // heads_kv). value_dim: values may have their own size.
    log_sum_exp: it is natural, and -inf for a row without keys. gradients: they are right, and 0 where no key is read.
    mask_gradient: it has the mask's own shape. lse_gradient: gradients flow through the log-sum-exp.
    dropout: weights are dropped at the asked rate, by (seed, offset) alone, and kept ones scaled.
    packed: sequences do not see each other. paged: a cache is read through its table, up to each sequence's length.
    used_lengths: keys behind a sequence's own are not read.
    fp8_cache: it is multiplied by its scales. block_plan: its pairs are read, and no others.
    combinations: every two claims hold together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import attrs
import torch
from torch import Tensor

from ..capability import Code, Range
from ..errors import UnsupportedError
from .cases import Case
from .corners import SUBJECT_OF, unclaimed_cases
from .findings import Failure, Measure, Skip, raised_text
from .subject import Subject

SUBJECTS = (
    "dtypes",
    "lengths",
    "strides",
    "scale",
    "masks",
    "causal",
    "window",
    "softcap",
    "grouped_heads",
    "value_dim",
    "packed",
    "log_sum_exp",
    "gradients",
    "mask_gradient",
    "lse_gradient",
    "dropout",
    "paged",
    "used_lengths",
    "fp8_cache",
    "block_plan",
    "combinations",
)


def claim_check(subject: str) -> Callable[[Subject], Measure]:
    """The check that runs a subject's cases."""

    def check(s: Subject) -> Measure:
        cases = s.cases.get(subject, [])
        if not cases:
            if claimed := [f for f in s.capabilities.features if SUBJECT_OF.get(f, f) == subject]:
                raise Failure(f"{claimed[0]} is claimed, and the other claims leave no request that uses it")
            raise Skip("not claimed")
        accepted = [case for case in cases if s.accepts(case.request)]
        if refused := {case.claim for case in cases} - {case.claim for case in accepted}:
            raise Failure(f"{', '.join(sorted(refused))}: claimed, and check() refuses every case of it")
        worst, failures = Measure(), []
        for case in accepted:
            try:
                worst = s.worse(worst, s.hold(case) if case.request.dropout == 0 else _hold_dropout(s, case))
            except Failure as failure:
                failures.append(failure)
            except Exception as error:  # whatever a device raises for a case it claims is a finding
                failures.append(Failure(f"{case}: raised {raised_text(error)}"))
        if failures:
            raise Failure(
                f"{len(failures)} of {len(accepted)} cases: {failures[0]}", failures[0].error, failures[0].bound
            )
        left_out = f", {len(cases) - len(accepted)} refused by check()" if len(cases) > len(accepted) else ""
        return worst._replace(detail=f"{len(accepted)} cases{left_out}")

    return check


def _hold_dropout(s: Subject, case: Case) -> Measure:
    """Identity matrices as values show which weights were kept; the reference with those is what the call must give."""
    inputs, p = case.draw(s.seed), case.request.dropout
    reading = attrs.evolve(case, request=replace(case.request, grads=frozenset()))

    def kept(draw: int) -> Tensor:
        parts = []
        for start in range(0, case.request.len_k, case.request.dim_v):
            places = torch.arange(start, min(start + case.request.dim_v, case.request.len_k))
            value = torch.zeros_like(inputs.value)
            value[..., places, places - start] = 1
            parts.append(s.by_session(reading, inputs._replace(value=value), draw).out[..., : len(places)] != 0)
        return torch.cat(parts, dim=-1)

    keep = kept(0)
    rate, slack = 1 - float(keep.double().mean()), 5 * (p * (1 - p) / keep.numel()) ** 0.5
    if abs(rate - p) > slack:
        raise Failure(f"{case}: a share of {rate:.3f} was dropped, {p:g} ± {slack:.3f} wanted", abs(rate - p), slack)
    if torch.equal(keep, kept(1)) or (keep.shape[:2] != (1, 1) and torch.equal(keep[0, 0], keep[-1, -1])):
        raise Failure(f"{case}: another offset, or another head, dropped the same weights")
    return s.hold(case, inputs, keep)


def refusal_codes(error: UnsupportedError) -> list[str]:
    """The codes of all refusals behind an error."""
    decision: Any = error.decision
    return [str(r.code) for c in decision.candidates for r in c.refusals] if decision else []


def refusals(s: Subject) -> Measure:
    """Everything outside the claims is refused, with its reason, before anything runs."""
    found = unclaimed_cases(s.capabilities, s.device)
    for case, code in found:
        if code not in {refusal.code for refusal in s.capabilities.refusals(case.request)}:
            raise Failure(f"{case}: not claimed, and not refused with {str(code)!r}")
        try:
            s.by_attention(case, case.draw(s.seed))
        except UnsupportedError as error:
            if code not in (reasons := refusal_codes(error)):
                raise Failure(f"{case}: refused for {reasons}, {str(code)!r} is the reason") from error
        else:
            raise Failure(f"{case}: not claimed ({code}), and run all the same")
    return Measure(detail=f"{len(found)} requests refused")


def options(s: Subject) -> Measure:
    """Declared device options are accepted with their values, in one dtype at least, and keep the declared numerics, or
    the error that the estimate states; others are refused. `check` may refuse a declared one by its own code."""
    worst, tried, offered = Measure(), 0, s.capabilities.options
    plain = s.probe()
    for name, values in sorted(offered.items()):
        for value in _some(values):
            case = attrs.evolve(plain, request=replace(plain.request, options=((name, value),)))
            dtypes = (d for d in sorted(s.capabilities.dtypes) if s.accepts(replace(case.request, dtype=d)))
            case = attrs.evolve(case, request=replace(case.request, dtype=next(dtypes, case.request.dtype)))
            if not s.accepts(case.request):
                reasons = [*s.capabilities.refusals(case.request), *s.backend.check(case.request, s.device)]
                if all(reason.code is Code.OPTION for reason in reasons):
                    continue  # what data cannot say: this device does not have it
                raise Failure(f"option {name}={value!r} is declared, and refused: {'; '.join(map(str, reasons))}")
            try:
                worst, tried = s.worse(worst, s.hold(case)), tried + 1
            except Failure as failure:
                raise Failure(f"option {name}={value!r}: {failure}", failure.error, failure.bound) from failure
    for name, value in [("no_such_option", 1), *((name, _outside(values)) for name, values in sorted(offered.items()))]:
        case = attrs.evolve(plain, request=replace(plain.request, options=((name, value),)))
        try:
            s.by_attention(case, case.draw(s.seed))
        except UnsupportedError as error:
            if Code.OPTION not in (codes := refusal_codes(error)):
                raise Failure(
                    f"option {name}={value!r} is refused for {codes}, {str(Code.OPTION)!r} is the reason"
                ) from error
        else:
            raise Failure(f"option {name}={value!r} is not declared, and the call ran all the same")
    return worst._replace(detail=f"{tried} values of {len(offered)} options")


def _some(values: Range | tuple[Any, ...]) -> list[Any]:
    """A few values: both ends and one between."""
    if isinstance(values, Range):
        low, high = values.next_up(values.low) or 0, values.high
        return sorted(
            {
                low,
                values.next_up(low + 1) or low,
                *([] if high is None else [high // values.multiple * values.multiple]),
            }
        )
    return [*dict.fromkeys((values[0], values[len(values) // 2], values[-1]))]


def _outside(values: Range | tuple[Any, ...]) -> Any:
    if not isinstance(values, Range):
        return "no such value"
    return values.low - 1 if values.high is None else values.high + values.multiple
