"""What attention must do whatever a device's error bound: follow its arguments, and keep batch entries and heads
apart.

A declared bound of 1.2 passes nearly any result. `structure` does not look at the size of the error but at its
direction: `explained_share` says whether a result lies nearer to the right one or to that of a common mistake.

FOLLOWS: the share of the way from the mistake to the right result that a device must go at least. TELLING: a mistake
whose result differs from the right one by less than this, relative to it, is not looked at.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ..request import Causal, MaskKind
from .cases import QKV, Case, Inputs
from .comparisons import explained_share, same
from .findings import Failure, Measure, Outcome, Skip, on_host, one_thread, pairs
from .mistakes import mistakes
from .reference import reference, relative_error
from .subject import PATHS, QUICK_DRAWS, Subject

FOLLOWS, TELLING = 0.5, 0.2
_BOOLEAN: dict[str, Any] = {"mask": MaskKind.BOOLEAN, "mask_shape": "full"}
_ADDITIVE: dict[str, Any] = {"mask": MaskKind.ADDITIVE, "mask_shape": "full"}
_GROUPED: dict[str, Any] = {"heads_q": 6, "heads_kv": 2}


def structure(s: Subject) -> Measure:
    """Scale, mask, diagonal and head mapping are followed, however large the declared error is.

    The report warns where a bound is so large that the result of a mistake would pass it.
    """
    scale = 1.5 * s.corners.base.dim_qk**-0.5
    changes: list[dict[str, Any]] = [
        {},
        {"scale": scale},
        _BOOLEAN,
        _ADDITIVE,
        *s.corners.grouped[:3],
        {"window": (6, 2)},
    ]
    changes += [{"causal": causal} for causal in (Causal.TOP_LEFT, Causal.BOTTOM_RIGHT)]
    cases = [s.corners.case("structure", change) for change in changes]
    least, loose, seen = 1.0, dict[str, float](), 0
    for case in (case for case in cases if s.accepts(case.request)):
        noisy, bound = case.request.dtype in s.noisy, s.capabilities.numerics[case.request.dtype].relative
        draws = [case.draw(s.seed + n) for n in range(QUICK_DRAWS if noisy else 1)]
        results = {path: _joined([s.run(path, case, x, n).out for n, x in enumerate(draws)]) for path in PATHS}
        right = _joined([s.want(case, x).out for x in draws])
        for mistake, wrong in _wrong_results(case, draws):
            if (apart := relative_error(wrong, right)) < TELLING:
                continue
            if apart <= bound:
                loose[mistake] = max(apart, loose.get(mistake, 0.0))
            for path, got in results.items():
                share = explained_share(got, right, wrong)
                if not share >= FOLLOWS:
                    found = f"the result is nearer to that of {mistake} than to the right one (share {share:.2f})"
                    raise Failure(f"{case}, by {path}: {found}", 1 - share, 1 - FOLLOWS)
                least, seen = min(least, share), seen + 1
        _hold_head_order(s, case, draws[0])
    return Measure(1 - least, 1 - FOLLOWS, f"{seen} mistakes ruled out", _warning(s, loose))


def _warning(s: Subject, loose: dict[str, float]) -> str:
    if not loose:
        return ""
    bounds = ", ".join(f"{n.relative:g} in {dtype}" for dtype, n in sorted(s.capabilities.numerics.items()))
    named = "; ".join(f"{mistake} (error {apart:.2g})" for mistake, apart in sorted(loose.items()))
    return f"bound too loose to show anything: {bounds} is declared, which would also pass {named}"


def _joined(results: list[Tensor]) -> Tensor:
    return torch.cat([result.detach().cpu() for result in results])


@one_thread()
def _wrong_results(case: Case, draws: list[Inputs]) -> list[tuple[str, Tensor]]:
    """(mistake, its result over all draws)."""
    by_mistake: dict[str, dict[int, Tensor]] = {}
    for n, inputs in enumerate(draws):
        for mistake, request, changed in mistakes(case.request, on_host(inputs)):
            out = reference(*changed[:4], request=request, plan=changed.plan, tables=changed.tables).out
            by_mistake.setdefault(mistake, {})[n] = out
    return [(mistake, _joined([*results.values()])) for mistake, results in by_mistake.items()]


def _hold_head_order(s: Subject, case: Case, inputs: Inputs) -> None:
    """Query heads that change places within their group give results that change places, and nothing else."""
    r, group = case.request, case.request.heads_q // case.request.heads_kv
    if r.heads_q == 1 or r.dtype in s.noisy:  # noise belongs to places, so results of a noisy device do not move along
        return
    order = (
        [h // group * group + group - 1 - h % group for h in range(r.heads_q)]
        if group > 1
        else [*range(r.heads_q)][::-1]
    )
    moved = inputs._replace(query=inputs.query[:, order])
    if group == 1:
        moved = moved._replace(key=inputs.key[:, order], value=inputs.value[:, order])
    if inputs.mask is not None and inputs.mask.shape[1] > 1:
        moved = moved._replace(mask=inputs.mask[:, order])
    first, second = s.by_session(case, inputs), s.by_session(case, moved)
    same(s, "with heads in another order", case, second, Outcome(first.out[:, order], None, first.grads))


def lowest_mask(s: Subject) -> Measure:
    """The lowest finite number in an additive mask is finite: a row of nothing else gives the mean of its values."""
    if MaskKind.ADDITIVE not in s.capabilities.masks:
        raise Skip("additive masks are not claimed")
    worst, found = Measure(), 0
    extras: tuple[dict[str, Any], ...] = ({}, {"lse": True}, {"grads": QKV})
    for dtype, extra in itertools.product(s.corners.dtypes, extras):
        case = s.corners.case("lowest_mask", {"dtype": dtype, **_ADDITIVE, **extra})
        # float16's lowest number, -65504, leaves float32 scores 8 bits after the point: no mean, and no exact result.
        if dtype == "float16" or not s.accepts(case.request):
            continue
        inputs = case.draw(s.seed)
        mask = inputs.mask
        assert mask is not None
        lowest = max(torch.finfo(mask.dtype).min, torch.finfo(torch.float32).min)
        mask[..., 0::4, :] = lowest
        mask[..., 1::4, ::3] = lowest
        mask[..., 2::4, :] = torch.where(torch.arange(mask.shape[-1], device=mask.device) % 2 == 0, lowest, -math.inf)
        if not bool(s.by_session(case, inputs).out[..., 0::4, :].count_nonzero()):
            raise Failure(f"{case}: rows of the lowest finite number give 0: it is taken for -inf")
        worst, found = s.worse(worst, s.hold(case, inputs)), found + 1
    if not found:
        raise Skip("additive masks are claimed in float16 alone")
    return worst


def isolation(s: Subject) -> Measure:
    """NaN or infinity in one batch entry and key head leave the others as they were, bit for bit."""
    repeat: dict[str, Any] = {"deterministic": True}
    cases = [
        s.probe(repeat, *extras) for extras in ((), (_GROUPED, {"causal": Causal.TOP_LEFT}), (_BOOLEAN, {"lse": True}))
    ]
    cases += (
        [s.probe(repeat, {"heads_q": 4, "heads_kv": 2}, {"grads": QKV})]
        if "backward" in s.capabilities.features
        else []
    )
    tried = 0
    for n, case in enumerate(cases):
        r = case.request
        if r.batch * r.heads_kv == 1:
            continue
        for path in PATHS[n % 2 :][:1] if s.quick else PATHS:
            inputs = case.draw(s.seed)
            clean, again = (s.run(path, case, inputs) for _ in range(2))
            exact = all(torch.equal(a, b) for a, b in pairs(clean, again))
            for value, name in itertools.product((math.nan, math.inf), ("query", "key", "value")):
                poisoned = inputs._replace(**{name: getattr(inputs, name).clone()})
                place = 0 if value == math.inf else -1 if name != "query" else 0
                getattr(poisoned, name)[0, 0, place, 0] = value
                about = f"{value} in {name}, by {path}"
                got = s.run(path, case, poisoned)
                _hold_apart(s, case, about, got, clean, exact)
                if name == "query":
                    _hold_fully_masked(case, about, inputs, got)
                tried += 1
    if not tried:
        raise Skip("one batch entry and one key head: there is nothing to keep apart")
    return Measure(detail=f"{tried} calls")


def _hold_apart(s: Subject, case: Case, about: str, got: Outcome, clean: Outcome, exact: bool) -> None:
    """Compare what does not belong to batch entry 0 and key head 0."""
    r, group = case.request, case.request.heads_q // case.request.heads_kv
    names = ("out", "log-sum-exp", *(f"gradient of {name}" for name in got.grads._fields))
    for what, x, y in zip(names, (got.out, got.lse, *got.grads), (clean.out, clean.lse, *clean.grads), strict=True):
        if x is None or y is None:
            continue
        others = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        others[0, : group if x.shape[1] == r.heads_q else 1] = False
        if exact and not torch.equal(x[others], y[others]):
            wrong = "holds NaN" if bool(x[others].isnan().any()) else "changed"
            raise Failure(f"{case}, {about}: {what} {wrong} in another batch entry or key head")
        if not exact:
            kept = [Outcome(t[others].unsqueeze(0), None, type(got.grads)()) for t in (x, y)]
            same(s, f"{about}: {what} of other batch entries and heads", case, *kept)


def _hold_fully_masked(case: Case, about: str, inputs: Inputs, got: Outcome) -> None:
    """A row that reads no key gives 0 and -inf, beside a row whose query is NaN too."""
    if inputs.mask is None or inputs.mask.dtype != torch.bool:
        return
    rows = ~inputs.mask.any(-1).expand(got.out.shape[:3])
    rows[:, :, 0] = False
    if bool(got.out[rows].count_nonzero()) or (got.lse is not None and not bool((got.lse[rows] == -math.inf).all())):
        raise Failure(f"{case}, {about}: a row that reads no key is not 0, or its log-sum-exp not -inf")
