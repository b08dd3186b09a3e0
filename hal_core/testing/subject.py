"""The device under test: running a case on it in both ways there are, and comparing with the reference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import attention
from ..device import Device
from ..registry import registry
from ..request import AttentionOutput, AttentionRequest, Causal, Grads, MaskKind
from .cases import Case, Corners, Inputs
from .reference import reference, reference_gradients, relative_error

#: Draws of a noisy device in each case, and in quick mode.
DRAWS, QUICK_DRAWS = 12, 4
PATHS = ("session", "hal.attention")


class Failure(Exception):
    """A check's finding against the device, with the worst error and the bound it broke where there are such."""

    def __init__(self, detail: str, error: float | None = None, bound: float | None = None) -> None:
        super().__init__(detail)
        self.error, self.bound = error, bound


class Skip(Exception):
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


class Subject:
    """A device under test.

    Attributes:
        device, backend, capabilities: what is tested. cases: what it claims, by subject. seed, quick: of the run.
    """

    def __init__(self, device: Device, *, seed: int, quick: bool) -> None:
        self.device, self.seed, self.quick = device, seed, quick
        self.backend = registry.backend_of(device)
        self.capabilities = self.backend.capabilities(device)
        self.corners = Corners(self.capabilities, device, quick=quick, seed=seed)
        self.cases: dict[str, list[Case]] = {}
        for case in self.corners.claimed():
            self.cases.setdefault(case.subject, []).append(case)

    @property
    def session(self) -> Any:
        return registry.session(self.device.id)

    def claims(self, *features: str) -> bool:
        return set(features) <= self.capabilities.features

    def accepts(self, request: AttentionRequest) -> bool:
        """Whether neither the capabilities nor the backend's own check refuse."""
        return self.corners.fits(request) and not list(self.backend.check(request, self.device))

    def probe(self, *wishes: dict[str, Any]) -> Case:
        """The plain request with each wish that the device accepts on top of those before it."""
        changes: dict[str, Any] = {}
        for wish in wishes:
            if self.accepts(self.corners.case("probe", "", changes | wish).request):
                changes |= wish
        return self.corners.case("probe", "", changes)

    def rng(self, request: AttentionRequest, draw: int = 0) -> tuple[int, int] | None:
        """(seed, offset) where the device uses them."""
        return (self.seed + 1, draw) if request.dropout or self.capabilities.numerics[request.dtype].noisy else None

    def rerun_bound(self, request: AttentionRequest) -> float:
        """How far two runs of one call may lie apart: the order of sums may differ, nothing else."""
        return max(1e-5, torch.finfo(getattr(torch, request.dtype)).eps)

    def run(self, path: str, case: Case, inputs: Inputs, draw: int = 0) -> Outcome:
        """A case on the device, with gradients where it asks for them."""
        return self.by_session(case, inputs, draw) if path == "session" else self.by_attention(case, inputs, draw)

    def by_session(self, case: Case, inputs: Inputs, draw: int = 0, session: Any = None) -> Outcome:
        session, request = session or self.session, case.request
        mode = session.autograd(request) if request.grads else ""
        if mode == "none":
            raise Failure(f"{case}: gradients are claimed, and the session's autograd() says 'none'")
        leaves = _leaves(inputs, request.grads if mode == "native" else frozenset())
        asked = replace(request, lse=True) if mode == "explicit" else request
        rng = self.rng(request, draw)
        prepared = session.prepare_attention(*leaves[:3], request=asked, plan=inputs.plan, tables=inputs.tables)
        out, lse = session.compute_attention(prepared, leaves[3], rng=rng)
        if mode == "explicit":
            grad_lse = inputs.grad_lse if request.grad_lse else None
            grads = session.compute_attention_backward(
                prepared, out, lse, inputs.grad_out, inputs.mask, grad_lse=grad_lse, rng=rng
            )
            return Outcome(out, lse, grads)
        return Outcome(out.detach(), lse, _native_gradients(request, leaves, out, lse, inputs))

    def by_attention(self, case: Case, inputs: Inputs, draw: int = 0) -> Outcome:
        leaves = _leaves(inputs, case.request.grads)
        options = case.options(inputs) | {"attn_mask": leaves[3]}
        result = attention(*leaves[:3], backend=self.device.id, rng=self.rng(case.request, draw), **options)
        out, lse = result if isinstance(result, AttentionOutput) else (result, None)
        return Outcome(out.detach(), lse, _native_gradients(case.request, leaves, out, lse, inputs))

    def want(self, case: Case, inputs: Inputs, keep: Tensor | None = None) -> Outcome:
        """What the reference gives."""
        given = {"request": case.request, "plan": inputs.plan, "tables": inputs.tables, "keep": keep}
        with one_thread():
            out, lse = reference(*inputs[:4], **given)  # type: ignore[arg-type]
            grads = Grads()
            if case.request.grads:
                grad_lse = inputs.grad_lse if case.request.grad_lse else None
                grads = reference_gradients(*inputs[:4], grad_out=inputs.grad_out, grad_lse=grad_lse, **given)  # type: ignore[arg-type]
        return Outcome(out, lse, grads)

    def errors(self, case: Case, inputs: Inputs, got: Outcome, want: Outcome) -> Iterator[tuple[str, float, float]]:
        """(what, error, bound) for everything that the case asks for. Raises Failure for a wrong shape or dtype."""
        request, numerics = case.request, self.capabilities.numerics[case.request.dtype]
        lse_dtype = torch.float64 if request.dtype == "float64" else torch.float32
        results = [("out", got.out, want.out, inputs.query.dtype, numerics.relative)]
        if request.lse:
            results.append(("log-sum-exp", got.lse, want.lse, lse_dtype, numerics.lse))  # type: ignore[arg-type]
        for name, field, tensor in zip(("q", "k", "v", "mask"), Grads._fields, inputs[:4], strict=True):
            if name in request.grads:
                if numerics.gradient is None:
                    raise Failure(f"gradients are claimed in {request.dtype}, and its Numerics declare no bound for them")
                pair = (getattr(got.grads, field), getattr(want.grads, field))
                results.append((f"gradient of {field}", *pair, tensor.dtype, numerics.gradient))  # type: ignore[union-attr]
        for what, x, wanted, dtype, bound in results:
            if not isinstance(x, Tensor) or (x.shape, x.dtype, x.device) != (wanted.shape, dtype, inputs.query.device):
                given = f"{list(x.shape)} {x.dtype} on {x.device}" if isinstance(x, Tensor) else f"{x!r}"
                raise Failure(f"{case}: {what} is {given}, wanted is {list(wanted.shape)} {dtype} on {inputs.query.device}")
            error = relative_error(x, wanted)
            if what.startswith("gradient") and wanted.norm() <= 1e-12 * inputs.grad_out.double().norm():
                # Where every row reads one key at most, dq and dk cancel to 0: rounding is judged by what flowed in.
                error = float(x.double().norm() / inputs.grad_out.double().norm().clamp(min=1e-300))
            yield what, error, bound

    def hold(self, case: Case, inputs: Inputs | None = None, keep: Tensor | None = None, paths: tuple[str, ...] = PATHS) -> Measure:
        """Run a case on each path and hold it to the declared numerics; a noisy device by the mean over draws."""
        inputs = inputs or case.draw(self.seed)
        want, worst = self.want(case, inputs, keep), Measure()
        noisy = self.capabilities.numerics[case.request.dtype].noisy
        draws = range((QUICK_DRAWS if self.quick else DRAWS) if noisy else 1)
        for path in paths:
            if path == "hal.attention" and case.request.lse and case.request.grads and not case.request.grad_lse:
                continue  # hal.attention lets gradients flow through any log-sum-exp that it returns
            seen: dict[tuple[str, float], list[float]] = {}
            for draw in draws:
                got = self.run(path, case, inputs, draw)
                for what, error, bound in self.errors(case, inputs, got, want):
                    seen.setdefault((what, bound), []).append(error)
            for (what, bound), errors in seen.items():
                error = statistics.fmean(errors)
                spread = 3 * statistics.stdev(errors) / len(errors) ** 0.5 if len(errors) > 1 and error < math.inf else 0.0
                if not error - spread <= bound:
                    why = diagnosis(case, inputs, got, want, bound)
                    raise Failure(f"{case}, by {path}: {what} is wrong by {error:.2g}, {bound:.2g} declared{why}", error, bound)
                worst = max(worst, Measure(error, bound), key=lambda m: m.share)
        return worst


@contextmanager
def one_thread() -> Iterator[None]:
    """Small float64 products are much faster on one thread where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _leaves(inputs: Inputs, wanted: frozenset[str]) -> list[Any]:
    return [
        tensor.detach().requires_grad_() if name in wanted and tensor is not None else tensor
        for name, tensor in zip(("q", "k", "v", "mask"), inputs[:4], strict=True)
    ]


def _native_gradients(request: AttentionRequest, leaves: list[Any], out: Tensor, lse: Tensor | None, inputs: Inputs) -> Grads:
    """Torch's gradients of the leaves; those that do not depend on the result stay None."""
    if not request.grads:
        return Grads()
    outputs, flowing = [out], [inputs.grad_out]
    if request.grad_lse and lse is not None:
        # A dead row's log-sum-exp is -inf whatever the inputs are; its gradient would only say 0 * inf.
        outputs, flowing = [out, lse], [inputs.grad_out, inputs.grad_lse]
    needed = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    if not any(output.requires_grad for output in outputs):
        raise Failure("gradients were asked for, and the result does not require any: it was detached on the way")
    found = dict(zip(map(id, needed), torch.autograd.grad(outputs, needed, flowing, allow_unused=True), strict=True))
    return Grads(*(found.get(id(leaf)) for leaf in leaves))


def diagnosis(case: Case, inputs: Inputs, got: Outcome, want: Outcome, bound: float) -> str:
    """What mistake would give this very result, where one of the common ones does."""
    r, lse = case.request, got.lse
    if got.out.isnan().any() and not want.out.isnan().any():
        dead = want.lse == -math.inf if want.lse is not None else torch.zeros(())
        only = bool((got.out.isnan().any(-1) == dead).all()) and bool(dead.any())
        return ": rows that read no key are NaN, 0 is wanted" if only else ": there are NaN in the result"
    if lse is not None and want.lse is not None and relative_error(lse * math.log(2), want.lse) <= 10 * bound:
        return ": it is the base-2 logarithm, the natural one is wanted"
    for mistake, request, changed in _mistakes(case, inputs):
        if (request, changed) == (r, inputs):
            continue
        with one_thread():
            other = reference(*changed[:4], request=request, plan=changed.plan, tables=changed.tables, keep=None).out
        if relative_error(got.out, want.out) > bound >= relative_error(got.out, other) / 2:
            return f": it is the result of {mistake}"
    return ""


def _mistakes(case: Case, inputs: Inputs) -> Iterator[tuple[str, AttentionRequest, Inputs]]:
    r, default = replace(case.request, dropout=0.0), max(case.request.dim_qk, 1) ** -0.5
    if r.mask is not MaskKind.NONE and inputs.mask is not None:
        yield "dropping the mask", r, inputs._replace(mask=None)
        yield "inverting the mask", r, inputs._replace(mask=~inputs.mask if r.mask is MaskKind.BOOLEAN else -inputs.mask)
    for causal in Causal:
        if causal is not r.causal:
            yield f"causal {causal} where {r.causal} was asked", replace(r, causal=causal), inputs
    if r.diagonal:
        yield "dropping the diagonal", replace(r, diagonal=0), inputs
    if r.window is not None:
        yield "dropping the window", replace(r, window=None), inputs
        left, right = r.window
        for step in (-1, 1):
            off = tuple(None if side is None else side + step for side in (left, right))
            yield "a window that is off by one", replace(r, window=(off[0], right)), inputs
            yield "a window that is off by one", replace(r, window=(left, off[1])), inputs
    if r.softcap is not None:
        yield "dropping the softcap", replace(r, softcap=None), inputs
    for scale in {default, 1.0, r.dim_v**-0.5 if r.dim_v else 1.0, default**2} - {r.effective_scale}:
        yield f"the scale {scale:.4g} where {r.effective_scale:.4g} was asked", replace(r, scale=scale), inputs
    if r.block_plan is not None:
        yield "dropping the block plan", r, inputs._replace(plan=None)
    if r.heads_q != r.heads_kv and inputs.tables is None:
        group = r.heads_q // r.heads_kv
        swapped = inputs._replace(key=inputs.key.repeat(1, group, 1, 1), value=inputs.value.repeat(1, group, 1, 1))
        yield "query head h reading key head h % heads_kv", replace(r, heads_kv=r.heads_q), swapped
