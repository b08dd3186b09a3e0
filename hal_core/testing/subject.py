"""The device under test: running a case on it in both ways there are, and comparing with the reference.

DRAWS, QUICK_DRAWS: of a noisy device in each case, and in quick mode. FEW: numbers whose norm says little; a row counts
for 8 at the most, since all of its gradient may hang on one number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import AttentionOutput, AttentionRequest, Causal, Device, Grads, attention
from ..registry import registry
from .cases import Case, Corners, Inputs
from .reference import reference, reference_gradients, relative_error

DRAWS, QUICK_DRAWS, FEW, PATHS = 12, 4, 64, ("session", "hal.attention")


class Failure(Exception):  # noqa: N818 - a finding, not an error of the program
    """A check's finding against the device, with the worst error and the bound it broke where there are such."""

    def __init__(self, detail: str, error: float | None = None, bound: float | None = None) -> None:
        super().__init__(detail)
        self.error, self.bound = error, bound


class Skip(Exception):  # noqa: N818
    """A check that has nothing to look at on this device, and why."""


class Measure(NamedTuple):
    """What a passed check saw: the error closest to its bound."""

    error: float | None = None
    bound: float | None = None
    detail: str = ""

    @property
    def share(self) -> float:
        return 0.0 if not self.error else self.error / self.bound if self.bound else math.inf


class Outcome(NamedTuple):
    """What a device, or the reference, gave for a case."""

    out: Tensor
    lse: Tensor | None
    grads: Grads


@contextmanager
def one_thread() -> Iterator[None]:
    """Small float64 products are much faster on one thread where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Subject:
    """A device under test.

    Attributes:
        device, backend, capabilities: what is tested. cases: what it claims, by subject. seed, quick: of the run.
        noisy: dtypes in which errors are random.
    """

    def __init__(self, device: Device, *, seed: int, quick: bool) -> None:
        self.device, self.seed, self.quick = device, seed, quick
        self.backend = registry.backend_of(device)
        self.capabilities = self.backend.capabilities(device)
        self.noisy = {dtype for dtype, numerics in self.capabilities.numerics.items() if numerics.noisy}
        self.corners = Corners(self.capabilities, device, quick=quick, seed=seed)
        self.cases: dict[str, list[Case]] = {}
        for case in self.corners.claimed():
            self.cases.setdefault(case.subject, []).append(case)

    @property
    def session(self) -> Any:
        return registry.session(self.device.id)

    @staticmethod
    def worse(*measures: Measure) -> Measure:
        """The one closest to its bound."""
        return max(measures, key=lambda m: m.share)

    def accepts(self, request: AttentionRequest) -> bool:
        """Whether neither the capabilities nor the backend's own check refuse."""
        return self.corners.fits(request) and not list(self.backend.check(request, self.device))

    def probe(self, *wishes: dict[str, Any]) -> Case:
        """The plain request with each wish that the device accepts on top of those before it."""
        changes: dict[str, Any] = {}
        for wish in wishes:
            if self.accepts(self.corners.case("probe", changes | wish).request):
                changes |= wish
        return self.corners.case("probe", changes)

    def rng(self, request: AttentionRequest, draw: int = 0) -> tuple[int, int] | None:
        """(seed, offset) where the device uses them."""
        return (self.seed + 1, draw) if request.dropout or request.dtype in self.noisy else None

    def run(self, path: str, case: Case, inputs: Inputs, draw: int = 0) -> Outcome:
        """A case on the device, with gradients where it asks for them."""
        return self.by_session(case, inputs, draw) if path == "session" else self.by_attention(case, inputs, draw)

    def by_session(self, case: Case, inputs: Inputs, draw: int = 0, session: Any = None) -> Outcome:
        session, request = session or self.session, case.request
        mode = session.autograd(request) if request.grads else ""
        leaves = _leaves(inputs, request.grads if mode != "explicit" else frozenset())
        asked = replace(request, lse=True) if mode == "explicit" else request
        rng = self.rng(request, draw)
        prepared = session.prepare_attention(*leaves[:3], request=asked, plan=inputs.plan, tables=inputs.tables)
        out, lse = session.compute_attention(prepared, leaves[3], rng=rng)
        if mode == "explicit":
            flowing: dict[str, Any] = {"grad_lse": inputs.grad_lse if request.grad_lse else None, "rng": rng}
            backward = session.compute_attention_backward
            return Outcome(out, lse, backward(prepared, out, lse, inputs.grad_out, inputs.mask, **flowing))
        return Outcome(out.detach(), lse, _native_gradients(request, leaves, out, lse, inputs))

    def by_attention(self, case: Case, inputs: Inputs, draw: int = 0) -> Outcome:
        leaves = _leaves(inputs, case.request.grads)
        options = case.options(inputs) | {"attn_mask": leaves[3]}
        result = attention(*leaves[:3], backend=self.device.id, rng=self.rng(case.request, draw), **options)
        out, lse = result if isinstance(result, AttentionOutput) else (result, None)
        return Outcome(out.detach(), lse, _native_gradients(case.request, leaves, out, lse, inputs))

    @one_thread()
    def want(self, case: Case, inputs: Inputs, keep: Tensor | None = None) -> Outcome:
        """What the reference gives, computed on the host."""
        query, key, value, mask, plan, tables, grad_out, grad_lse = on_host(inputs)
        given: dict[str, Any] = {"request": case.request, "plan": plan, "tables": tables, "keep": on_host(keep)}
        out, lse = reference(query, key, value, mask, **given)
        if not case.request.grads:
            return Outcome(out, lse, Grads())
        flowing = {"grad_out": grad_out, "grad_lse": grad_lse if case.request.grad_lse else None}
        return Outcome(out, lse, reference_gradients(query, key, value, mask, **flowing, **given))

    def errors(
        self, case: Case, inputs: Inputs, got: Outcome, want: Outcome
    ) -> Iterator[tuple[str, float, float, float]]:
        """(what, error, bound, norm) for everything that the case asks for. Raises Failure for a wrong shape or dtype.

        Where rows read one key, dq and dk cancel to 0: judged by what flowed in. A log-sum-exp near 0: absolute error.
        """
        r, flowed = case.request, float(inputs.grad_out.double().norm())
        numerics = self.capabilities.numerics[r.dtype]
        if r.grads and numerics.gradient is None:
            raise Failure(f"gradients are claimed in {r.dtype}, and its Numerics declare no bound for them")
        rows = (
            ("out", got.out, want.out, inputs.query.dtype, numerics.relative),
            ("log-sum-exp", got.lse, want.lse if r.lse else None, inputs.grad_lse.dtype, numerics.lse),
            *(
                (
                    f"gradient of {name}",
                    x,
                    wanted,
                    tensor.dtype if tensor is not None else None,
                    numerics.gradient or 0.0,
                )
                for name, x, wanted, tensor in zip(Grads._fields, got.grads, want.grads, inputs[:4], strict=True)
            ),
        )
        for what, x, wanted, dtype, bound in (row for row in rows if row[2] is not None):
            if not isinstance(x, Tensor) or (x.shape, x.dtype, x.device) != (wanted.shape, dtype, inputs.query.device):
                given = f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else f"{x!r}"
                raise Failure(
                    f"{case}: {what} is {given}, wanted is {list(wanted.shape)} {dtype} on {inputs.query.device}"
                )
            cancelled = what.startswith("gradient") and float(wanted.norm()) <= 1e-12 * flowed
            error = float(x.double().norm()) / flowed if cancelled and flowed else relative_error(x, wanted)
            finite = wanted[wanted.isfinite()] if what == "log-sum-exp" else wanted.new_ones(1)
            error *= min(float(finite.square().mean()) ** 0.5, 1.0) if len(finite) else 1.0
            yield what, error, bound, 1.0 if what == "log-sum-exp" else flowed if cancelled else float(wanted.norm())

    def hold(self, case: Case, inputs: Inputs | None = None, keep: Tensor | None = None) -> Measure:
        """Run a case on each path and hold it to the declared numerics.

        Noise, and results of few numbers, whose norm may be next to nothing, are judged over fresh draws taken
        together: each draw's error against the size of all of them, so that a draw of next to nothing tells next to
            nothing.
        """
        r, often = case.request, QUICK_DRAWS if self.quick else DRAWS
        draws = range(
            DRAWS if r.batch * r.heads_q * r.len_q * min(r.dim_v, 8) < FEW else often if r.dtype in self.noisy else 1
        )
        worst, wants = Measure(), [self.want(case, inputs or case.draw(self.seed + draw), keep) for draw in draws]
        # hal.attention lets gradients flow through any log-sum-exp that it returns
        for path in PATHS[:1] if r.lse and r.grads and not r.grad_lse else PATHS:
            seen = dict[tuple[str, float], list[tuple[float, float]]]()
            for draw, want in zip(draws, wants, strict=True):
                got = self.run(path, case, given := inputs or case.draw(self.seed + draw), draw)
                for what, error, bound, norm in self.errors(case, given, got, want):
                    seen.setdefault((what, bound), []).append((error, norm))
            for (what, bound), found in seen.items():
                size = math.hypot(*(norm for _, norm in found)) / len(found) ** 0.5
                errors = [error * norm / size if size else error for error, norm in found]
                error = math.hypot(*errors) / len(errors) ** 0.5
                spread = (
                    3 * statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 and error < math.inf else 0.0
                )
                if not error - spread <= bound:
                    wrong = f"{case}, by {path}: {what} is wrong by {error:.2g}, {bound:.2g} declared"
                    raise Failure(wrong + diagnosis(case, given, got, want, bound), error, bound)
                worst = self.worse(worst, Measure(error, bound))
        return worst


def on_host(value: Any) -> Any:
    """Tensors, also inside tuples, on the host; anything else as it is."""
    return tree_map_only(Tensor, Tensor.cpu, value)


def _leaves(inputs: Inputs, wanted: frozenset[str]) -> list[Any]:
    return [
        tensor.detach().requires_grad_() if name in wanted and tensor is not None else tensor
        for name, tensor in zip(("q", "k", "v", "mask"), inputs[:4], strict=True)
    ]


def _native_gradients(
    request: AttentionRequest, leaves: list[Any], out: Tensor, lse: Tensor | None, inputs: Inputs
) -> Grads:
    """Torch's gradients of the leaves; those that the result does not depend on stay None."""
    if not request.grads:
        return Grads()
    pairs = [(out, inputs.grad_out)] + ([(lse, inputs.grad_lse)] if request.grad_lse and lse is not None else [])
    pairs = [(output, flowing) for output, flowing in pairs if output.requires_grad]
    if not pairs:
        raise Failure("gradients were asked for, and the result does not require any: it was detached on the way")
    needed = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = torch.autograd.grad([o for o, _ in pairs], needed, [f for _, f in pairs], allow_unused=True)
    by_leaf = {id(leaf): grad for leaf, grad in zip(needed, found, strict=True)}
    return Grads(*(by_leaf.get(id(leaf)) for leaf in leaves))


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
    for mistake, request, changed in _mistakes(case.request, on_host(inputs)):
        other = reference(*changed[:4], request=request, plan=changed.plan, tables=changed.tables).out
        if relative_error(got.out, other) <= 2 * bound:
            return f": it is the result of {mistake}"
    return ""


def _mistakes(r: AttentionRequest, inputs: Inputs) -> Iterator[tuple[str, AttentionRequest, Inputs]]:
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
    changes += [{"scale": scale} for scale in (r.dim_qk**-0.5, max(r.dim_v, 1) ** -0.5, 1.0)]
    for change in changes:
        for field, value in change.items():
            if getattr(r, field) != value and (field != "scale" or r.effective_scale != value):
                yield f"{field} {value} where {getattr(r, field)} was asked", replace(r, **change), inputs
