"""Common mistakes, and the results that they would give: failures are explained with them, and `structure` looks for
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from .. import AttentionRequest, Causal
from .cases import Case, Inputs
from .findings import Outcome, on_host, one_thread
from .reference import reference, relative_error


@one_thread()
def diagnosis(case: Case, inputs: Inputs, got: Outcome, want: Outcome, bound: float) -> str:
    """What mistake would give this very result, where one of the common ones does."""
    assert want.lse is not None
    if got.out.isnan().any():
        only = torch.equal(got.out.isnan().any(-1).cpu(), want.lse == -math.inf)
        return ": rows that read no key are NaN, 0 is wanted" if only else ": there are NaN in the result"
    if got.lse is not None and relative_error(got.lse * math.log(2), want.lse) <= 10 * bound:
        return ": it is the base-2 logarithm, the natural one is wanted"
    if case.request.dropout or relative_error(got.out, want.out) <= bound:
        return ""
    for mistake, request, changed in mistakes(case.request, on_host(inputs)):
        other = reference(*changed[:4], request=request, plan=changed.plan, tables=changed.tables).out
        if relative_error(got.out, other) <= 2 * bound:
            return f": it is the result of {mistake}"
    return ""


def mistakes(r: AttentionRequest, inputs: Inputs) -> Iterator[tuple[str, AttentionRequest, Inputs]]:
    """(what the mistake is, the request and the inputs whose right result it gives), for host tensors."""
    if inputs.mask is not None:
        yield "dropping the mask", r, inputs._replace(mask=None)
    if r.block_plan is not None:
        yield "dropping the block plan", r, inputs._replace(plan=None)
    if r.heads_q != r.heads_kv and inputs.tables is None:
        key, value = (t.repeat(1, r.heads_q // r.heads_kv, 1, 1) for t in (inputs.key, inputs.value))
        swapped = inputs._replace(key=key, value=value)
        yield "query head h reading key head h % heads_kv", replace(r, heads_kv=r.heads_q), swapped
    changes: list[dict[str, Any]] = [
        {"diagonal": 0},
        {"window": None},
        {"softcap": None},
        *({"causal": c} for c in Causal),
    ]
    changes += [{"scale": scale} for scale in (r.dim_qk**-0.5, max(r.dim_v, 1) ** -0.5, 1.0, 2 * r.effective_scale)]
    for change in changes:
        for field, value in change.items():
            if getattr(r, field) != value and (field != "scale" or r.effective_scale != value):
                yield f"{field} {value} where {getattr(r, field)} was asked", replace(r, **change), inputs
