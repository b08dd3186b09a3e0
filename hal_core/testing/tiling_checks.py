"""Whether a device's tiling is real: its plans cover the work, and a tiling that the caller brings is followed.

LONG, STORED: the length of a plan that must stay small, and the most row and key ranges that it may store.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor

from .. import AttentionRequest, BlockPlan, DenseTiling, TilePlan, UnsupportedError
from ..capability import Choice, Code
from ..request import Causal, MaskKind
from ..selection import cut_request, tiling_limits
from .cases import QKV, Case, Inputs
from .comparisons import explained_share
from .corners import members
from .findings import Failure, Measure
from .reference import reference
from .subject import PATHS, Subject

LONG, STORED = 32_768, 4096


class UnevenTiling(DenseTiling):
    """Rows cut into pieces of 1, 2, 3 ... and keys likewise: what no kernel expects unless it follows the plan."""

    def __init__(self, first: int = 1) -> None:
        super().__init__()
        self.first, self.name = first, f"uneven({first})"

    def plan(self, request: AttentionRequest, limits: Any, *, query: Any = None, key: Any = None) -> TilePlan:
        keys = tuple(_growing(request.len_k, self.first + 2))
        return TilePlan.uneven(request, ((a, b, keys) for a, b in _growing(request.len_q, self.first)), cut_by="kit")


class _HalfPlan(TilePlan):
    """Equal blocks whose row ranges leave keys out from the middle on. `used` once block sizes or ranges were read."""

    used = False

    @property
    def block_q(self) -> int:
        self.used = True
        return self[2]

    @property
    def block_k(self) -> int:
        self.used = True
        return self[3]

    def rows(self) -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
        for q_start, q_stop, spans in super().rows():
            yield q_start, q_stop, tuple(span for span in spans if span[0] < self.len_k // 2)


class HalfTiling(DenseTiling):
    """Equal blocks that read half of the keys. To the core, which checks uneven ranges, its plans look like any others.

    Attributes:
        last: the plan that was made last.
    """

    last: _HalfPlan

    def __init__(self, block_q: int, block_k: int) -> None:
        super().__init__(block_q, block_k, cut_by="kit")
        self.name = f"half({block_q}x{block_k})"

    def plan(self, request: AttentionRequest, limits: Any, *, query: Any = None, key: Any = None) -> TilePlan:
        self.last = _HalfPlan(*super().plan(request, limits, query=query, key=key))
        return self.last


def _growing(length: int, first: int) -> Iterator[tuple[int, int]]:
    start, size = 0, first
    while start < length:
        yield start, min(start + size, length)
        start, size = start + size, size + 1


def tilings(s: Subject) -> Measure:
    """The device's own tiling is named, planned and counted; a tiling that the caller brings is followed or refused."""
    count = _hold_plans(s)
    _hold_names(s)
    _hold_splitting(s)
    if s.capabilities.tile_sizes == Choice(()):
        _hold_refused(s, DenseTiling(64), "its own tiling alone is claimed")
        return Measure(detail=f"{count} plans; its own tiling alone")
    worst, tried = _hold_foreign(s)
    return worst._replace(detail=f"{count} plans; {tried} calls under tilings of {s.capabilities.tile_sizes}")


def _hold_plans(s: Subject) -> int:
    """Plans cover every visible pair once; equal ones come again; long ones stay small."""
    tiling, found, limits = s.session.tiling, 0, tiling_limits(s.capabilities)
    for name, kind in (("name", str), ("needs_content", bool)):
        if not isinstance(value := getattr(tiling, name, None), kind) or value == "":
            raise Failure(f"session.tiling.{name} is {value!r}: a {kind.__name__} is wanted")
    extremes: list[dict[str, Any]] = [
        {"causal": causal, "window": window, "diagonal": diagonal, **lengths}
        for causal, (window, diagonal), lengths in itertools.product(
            Causal, ((None, 0), ((9, 4), 0), (None, -6), ((3, 0), 5)), s.corners.lengths()
        )
    ]
    for changes in extremes:
        case = s.corners.case("tilings", changes)
        r = case.request
        if not s.accepts(r) or 0 in (r.len_q, r.len_k) or (r.diagonal and r.causal is Causal.NONE and not r.window):
            continue
        plan = _planned(tiling, case, limits, s.seed)
        if wrong := _wrong_blocks(plan, r) if isinstance(plan, BlockPlan) else _wrong_tiles(plan, r, tiling.name):
            raise Failure(f"{case}: {wrong}")
        if not isinstance(plan, BlockPlan) and plan != tiling.plan(r, limits):
            raise Failure(f"{case}: the tiling {tiling.name!r} gave two different plans for one request")
        found += 1
    long = s.corners.case("tilings", {"len_q": LONG, "len_k": LONG})
    if not tiling.needs_content and s.accepts(long.request):
        plan = tiling.plan(long.request, limits | {"maximum": max(64, limits.get("minimum", 1))})
        stored = sum(1 + len(spans) for *_, spans in plan.ranges or ()) if isinstance(plan, TilePlan) else 0
        if stored > STORED:
            raise Failure(f"a plan for {LONG:,} x {LONG:,} stores {stored:,} ranges: equal blocks store nothing")
    return found


def _planned(tiling: Any, case: Case, limits: Any, seed: int) -> Any:
    content = dict(zip(("query", "key"), case.draw(seed)[:2], strict=True)) if tiling.needs_content else {}
    return tiling.plan(case.request, limits, **content)


def _wrong_blocks(plan: BlockPlan, request: AttentionRequest) -> str:
    listed = torch.arange(plan.indices.shape[-1]) < plan.counts.cpu().unsqueeze(-1)
    entries = plan.indices.cpu().masked_fill(~listed, -1).sort(-1).values
    twice = (entries.diff() == 0) & (entries[..., 1:] >= 0)
    outside = (entries * plan.block_k >= request.len_k).any() or twice.any()
    return "a block lies outside, or is listed twice" if outside else ""


def _wrong_tiles(plan: TilePlan, request: AttentionRequest, name: str) -> str:
    """What is wrong with a plan, by counting how often each pair is read; "" for nothing."""
    if not plan.cut_by:
        return f"the plan of {name!r} does not say who cuts: set cut_by"
    plan.check(name)
    times = torch.zeros(request.len_q, request.len_k, dtype=torch.int32)
    visible = _visible_pairs(request)
    written = 0
    for q_start, q_stop, _ in plan.rows():
        if q_start != written or not q_start < q_stop <= request.len_q:
            return f"rows {q_start} to {q_stop} follow row {written} of {request.len_q}"
        written = q_stop
    if written != request.len_q:
        return f"rows from {written} of {request.len_q} are in no range"
    for tile in plan.tiles():
        rows, columns = tile.q_stop - tile.q_start, tile.k_stop - tile.k_start
        inside = min(tile.q_start, tile.k_start) >= 0 and tile.q_stop <= request.len_q and tile.k_stop <= request.len_k
        if not (inside and 0 < rows <= (plan.block_q or rows) and 0 < columns <= (plan.block_k or columns)):
            return f"{tile} is empty, larger than its blocks, or reaches outside"
        place = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
        if tile.full and not visible[place].all():
            return f"{tile} is called full, and part of it is hidden"
        times[place] += 1
    wrong = bool((times[visible] != 1).any() or (times > 1).any())
    return f"visible pairs lie in {sorted(set(times[visible].tolist()))} tiles, 1 is wanted" if wrong else ""


def _visible_pairs(request: AttentionRequest) -> Tensor:
    """[len_q, len_k] by the reference: with an identity as values, the weights are the result."""
    query, key = (torch.zeros(1, 1, n, 1) for n in (request.len_q, request.len_k))
    options: dict[str, Any] = {name: getattr(request, name) for name in ("causal", "window", "diagonal")}
    weights: Tensor = reference(query, key, torch.eye(request.len_k)[None, None], **options).out[0, 0]
    return weights > 0


def _hold_names(s: Subject) -> None:
    """Among a tiling's choices, and in another session, equal names give equal plans and other plans another name."""
    tiling, limits, request = s.session.tiling, tiling_limits(s.capabilities), s.corners.base
    if tiling.needs_content:
        return
    with s.backend.open(s.device) as other:
        offered = [tiling, other.tiling, *(tiling.choices(request, limits) if hasattr(tiling, "choices") else ())]
        seen: dict[tuple[type, str], Any] = {}
        for each in offered:
            plan = each.plan(request, limits)
            if seen.setdefault((type(each), each.name), plan) != plan:
                raise Failure(f"two tilings are named {each.name!r}, and give different plans: name the parameters")


def _hold_splitting(s: Subject) -> None:
    tensor, tiling = s.probe().draw(s.seed).key, s.session.tiling
    for size in (1, 16, tensor.shape[2] + 1):
        parts = tiling.split_into_tiles(tensor, size)
        if any(part.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() for part in parts):
            raise Failure(f"split_into_tiles({size}) copied: views are wanted")
        if not torch.equal(torch.cat(parts, 2), tensor) or any(part.shape[2] > size for part in parts):
            raise Failure(f"split_into_tiles({size}) of {list(tensor.shape)} lost or repeated tokens")


def _hold_refused(s: Subject, tiling: Any, why: str) -> None:
    case = s.probe()
    try:
        s.by_attention(case, case.draw(s.seed), tiling=tiling)
    except UnsupportedError as error:
        refused: Any = error.decision
        fields = [(refusal.code, refusal.field) for c in refused.candidates for refusal in c.refusals]
        if (Code.TILING, "tiling") not in fields:
            raise Failure(f"a tiling {tiling.name} is refused for {fields}, not as 'tiling': {why}") from error
    else:
        raise Failure(f"a tiling {tiling.name} is run, and {why}")


def _hold_foreign(s: Subject) -> tuple[Measure, int]:
    """Tilings that the caller brings: right within `tile_sizes`, refused outside, and really followed."""
    sizes, worst, tried = s.capabilities.tile_sizes, Measure(), 0
    accepted = members(sizes, (16, 48), 128)
    accepted = [size for size in accepted if size] or [size for size in (16, 64) if size in sizes]
    strategies: list[Any] = [DenseTiling(a, b) for a, b in zip(accepted, reversed(accepted), strict=True)]
    if 0 in sizes:
        strategies += [UnevenTiling(), UnevenTiling(5)]
    masked: dict[str, Any] = {"mask": MaskKind.BOOLEAN, "mask_shape": "full"}
    grouped = {"heads_q": 4, "heads_kv": 2}
    for case in (
        s.probe({"lse": True}),
        s.probe(masked, grouped),
        s.probe({"causal": Causal.BOTTOM_RIGHT}, {"grads": QKV}),
    ):
        inputs = case.draw(s.seed)
        want = s.want(case, inputs)
        for tiling in strategies:
            if not s.accepts(cut_request(case.request, tiling, s.capabilities)):
                continue
            got = s.by_attention(case, inputs, tiling=tiling)
            for what, error, bound, _ in s.errors(case, inputs, got, want):
                allowed = bound * (2 if case.request.dtype in s.noisy else 1)
                if not error <= allowed:
                    found = f"{what} is wrong by {error:.2g}, {allowed:.2g} declared"
                    raise Failure(f"{case} under tiling {tiling.name}: {found}", error, allowed)
                worst = s.worse(worst, Measure(error, allowed))
            tried += 1
    if not tried:
        raise Failure(f"tile sizes of {sizes} are claimed, and every tiling of such sizes is refused by check()")
    for size in (size for size in (3, 7, 100, 1 << 20) if size not in sizes):
        _hold_refused(s, DenseTiling(size), f"tile sizes of {sizes} are claimed")
    if 0 in sizes:
        _hold_followed(s)
    else:
        _hold_refused(s, UnevenTiling(), f"tile sizes of {sizes} are claimed")
    warning = _hold_blocks_followed(s, [tiling for tiling in strategies if isinstance(tiling.block_q, int)])
    return worst._replace(warning=warning), tried


def _hold_blocks_followed(s: Subject, tilings: Sequence[DenseTiling]) -> str:
    """Equal blocks that the caller brings are used, by the session's methods and by `hal.attention`; or a warning.

    Sums that are added up in other parts round differently, so results under other block sizes differ in some bit. A
    device whose results are equal in every bit must leave out the keys that a plan's row ranges leave out.
    """
    case = s.probe({"mask": MaskKind.NONE}, {"causal": Causal.NONE}, {"len_k": 140})
    inputs, r = case.draw(s.seed), case.request
    cuts = [each for each in tilings if s.accepts(cut_request(r, each, s.capabilities))]
    cuts.sort(key=lambda each: -min(each.block_q or 0, each.block_k or 0))  # the fewest tiles first
    for path in PATHS if cuts else ():
        first, again, *others = (partial(_run_cut, s, path, case, inputs, each) for each in (cuts[0], *cuts))
        out = first()
        if torch.equal(out, again()) and any(not torch.equal(out, other()) for other in others):
            continue
        half = HalfTiling(cuts[0].block_q or 1, cuts[0].block_k or 1)
        cut = _run_cut(s, path, case, inputs, half)
        used = half.last.used
        start = next((b for *_, spans in half.last.rows() for _, b in spans[-1:]), 0)
        if start < r.len_k and _share_without(s, case, inputs, start, cut) >= 0.5:
            continue
        sizes = ", ".join(f"{each.block_q} x {each.block_k}" for each in cuts)
        if not used:
            found = (
                f"results under blocks of {sizes} are equal bit for bit, and no block size or range of the plan is read"
            )
            raise Failure(f"{case}, by {path}: the plan of a tiling that the caller brings is ignored: {found}")
        return (
            f"nothing shows that the plan is followed: results by {path} under blocks of {sizes} are equal bit for bit"
        )
    return ""


def _run_cut(s: Subject, path: str, case: Case, inputs: Inputs, tiling: DenseTiling) -> Tensor:
    """The output under a tiling, by a path of `PATHS`."""
    if path != "session":
        return s.by_attention(case, inputs, tiling=tiling).out
    request = cut_request(case.request, tiling, s.capabilities)
    plan: Any = tiling.plan(case.request, tiling_limits(s.capabilities))
    return s.by_session(attrs.evolve(case, request=request), inputs._replace(plan=plan)).out


def _hold_followed(s: Subject) -> None:
    """A plan that leaves keys out gives attention without those keys: whoever ignores the plan reads them."""
    case = s.probe({"mask": MaskKind.NONE}, {"causal": Causal.NONE})
    inputs, r = case.draw(s.seed), case.request
    half = max(r.len_k // 2, 1)
    rows = ((0, r.len_q // 2, ((0, half),)), (r.len_q // 2, r.len_q, ((0, half),)))
    plan = TilePlan.uneven(r, [row for row in rows if row[0] < row[1]], cut_by="kit")
    asked = attrs.evolve(case, request=replace(r, tiling=("leaves keys out", 0, 0)))
    cut = s.by_session(asked, inputs._replace(plan=plan))  # type: ignore[arg-type]
    if not _share_without(s, case, inputs, half, cut.out) >= 0.5:
        raise Failure(
            f"{case}: the plan leaves keys {half} to {r.len_k} out, and the result is attention over all keys"
        )


def _share_without(s: Subject, case: Case, inputs: Inputs, start: int, out: Tensor) -> float:
    """`explained_share` of an output: 1 for attention without the keys from `start` on, 0 for attention over all."""
    visible = torch.arange(case.request.len_k, device=inputs.key.device).view(1, 1, 1, -1) < start
    if inputs.mask is not None:
        visible = (inputs.mask if inputs.mask.dtype == torch.bool else inputs.mask != -torch.inf) & visible
    return explained_share(out, s.want(case, inputs._replace(mask=visible)).out, s.want(case, inputs).out)
