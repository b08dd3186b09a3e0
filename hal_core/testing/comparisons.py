"""Comparing results: with the reference, with an earlier result, and with what a mistake would give."""

from __future__ import annotations

import torch
from torch import Tensor

from .cases import Case, Inputs
from .findings import Measure, Outcome, bounded, pairs
from .reference import relative_error
from .subject import Subject


def right(s: Subject, about: str, case: Case, inputs: Inputs, out: Tensor) -> Measure:
    """Hold one output to the reference; a noisy device's single draw may lie a little outside."""
    numerics = s.capabilities.numerics[case.request.dtype]
    error = relative_error(out, s.want(case, inputs).out)
    return bounded(f"{case}, {about}: out", error, numerics.relative * (2 if numerics.noisy else 1))


def same(s: Subject, about: str, case: Case, got: Outcome, want: Outcome) -> Measure:
    """Hold a result to the same call's earlier one: the order of sums may differ, nothing else."""
    bound = max(1e-5, torch.finfo(got.out.dtype).eps)
    return bounded(f"{case}, {about}: the result", max(relative_error(a, b) for a, b in pairs(got, want)), bound)


def explained_share(got: Tensor, right: Tensor, wrong: Tensor) -> float:
    """How much of the way from a wrong result to the right one a device went: 1 for the right one, 0 for the wrong one.

    The projection (got - wrong) . (right - wrong) / |right - wrong|^2 in float64. Errors that do not point along the
    mistake cancel over the many numbers of a result, so no declared bound, however large, hides the mistake. NaN where
    `got` is not finite, 1 where both results are equal.
    """
    got, right, wrong = (t.detach().double().cpu() for t in (got, right, wrong))
    way = right - wrong
    size = float(way.square().sum())
    return float(((got - wrong) * way).sum()) / size if size else 1.0
