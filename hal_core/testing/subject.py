"""The device under test: running a case on it in both ways there are, and comparing with the reference.

DRAWS, QUICK_DRAWS: of a noisy device in each case, and in quick mode. FEW: results with fewer numbers than this are
judged over several draws, since the norm of few numbers may be close to 0; a row counts for 8 at the most, since all
of its gradient may depend on one number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import AttentionOutput, AttentionRequest, Device, Grads, attention, use
from ..registry import registry
from .cases import Case, Inputs
from .corners import Corners
from .findings import Failure, Measure, Outcome, on_host, one_thread
from .mistakes import diagnosis
from .reference import reference, reference_gradients, relative_error

DRAWS, QUICK_DRAWS, FEW, PATHS = 12, 4, 64, ("session", "hal.attention")


class Subject:
    """A device under test.

    Attributes:
        device, backend, capabilities: what is tested. cases: what it claims, by subject. seed, quick: of the run.
        noisy: dtypes in which errors are random.
        largest: by dtype and quantity, the largest error of a call that was held to the declared bound, and the bound.
    """

    def __init__(self, device: Device, *, seed: int, quick: bool) -> None:
        self.device, self.seed, self.quick = device, seed, quick
        self.backend = registry.backend_of(device)
        self.capabilities = self.backend.capabilities(device)
        self.noisy = {dtype for dtype, numerics in self.capabilities.numerics.items() if numerics.noisy}
        self.corners = Corners(self.capabilities, device, quick=quick, seed=seed)
        self.cases: dict[str, list[Case]] = {}
        self.largest: dict[str, dict[str, tuple[float, float]]] = {}
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

    def probe(self, *extras: dict[str, Any]) -> Case:
        """The plain request with each extra that the device accepts together with those before it."""
        changes: dict[str, Any] = {}
        for extra in extras:
            if self.accepts(self.corners.case("probe", changes | extra).request):
                changes |= extra
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
        if not isinstance(out, Tensor):
            raise Failure(f"{case}: compute_attention gave {out!r} as the output: a tensor is wanted")
        if mode == "explicit":
            flowing: dict[str, Any] = {"grad_lse": inputs.grad_lse if request.grad_lse else None, "rng": rng}
            backward = session.compute_attention_backward
            return Outcome(out, lse, backward(prepared, out, lse, inputs.grad_out, inputs.mask, **flowing))
        return Outcome(out.detach(), lse, _native_gradients(request, leaves, out, lse, inputs))

    def by_attention(self, case: Case, inputs: Inputs, draw: int = 0, **more: Any) -> Outcome:
        """Through the public function; `more` are further arguments of it. Device options come from the request."""
        leaves, request = _leaves(inputs, case.request.grads), case.request
        options = case.options(inputs) | {"attn_mask": leaves[3], "backend": self.device.id} | more
        with ExitStack() as around:
            if request.options:
                around.enter_context(use(self.device.id, options=dict(request.options)))
            result = attention(*leaves[:3], rng=self.rng(request, draw), **options)
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

        Where rows read one key, dq and dk are 0 up to rounding: their error is relative to grad_out. For a log-sum-exp
        near 0 the absolute error counts.
        """
        r, flowed = case.request, float(inputs.grad_out.double().norm())
        numerics = self.capabilities.numerics[r.dtype]
        if r.grads and numerics.gradient is None:
            raise Failure(f"gradients are claimed in {r.dtype}, and its Numerics declare no bound for them")
        stated = self.backend.estimate(r, self.device).error if r.options else None
        allowed = 0.0 if stated is None else stated.high  # an option may cost accuracy, where the estimate says so
        of_lse = max(numerics.lse, allowed)
        rows = (
            ("out", got.out, want.out, inputs.query.dtype, max(numerics.relative, allowed)),
            ("log-sum-exp", got.lse, want.lse if r.lse else None, inputs.grad_lse.dtype, of_lse),
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

        A noisy device, and results of few numbers, are judged over several draws. Errors are normalised by the RMS norm
        over draws, so that near-zero references do not dominate.
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
                self._note(r.dtype, what.partition(" of ")[0], error, bound)
                if not error - spread <= bound:
                    wrong = f"{case}, by {path}: {what} is wrong by {error:.2g}, {bound:.2g} declared"
                    raise Failure(wrong + diagnosis(case, given, got, want, bound), error, bound)
                worst = self.worse(worst, Measure(error, bound))
        return worst

    def _note(self, dtype: str, what: str, error: float, bound: float) -> None:
        """Keep the largest error of a quantity: "out", "log-sum-exp" or "gradient"."""
        by_quantity = self.largest.setdefault(dtype, {})
        by_quantity[what] = max((error, bound), by_quantity.get(what, (0.0, bound)))


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
