"""From a decision to a callable: the session's own fast path, gradients, transfers and limits around it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from threading import get_ident
from time import monotonic, perf_counter
from typing import Any

import torch
from torch import Tensor

from ..decision import Decision
from ..device_info import Fidelity
from ..errors import ContractError, MemoryLimitError, PluginError, UnsupportedError
from ..options import meter_var
from ..plans import BlockPlan, TilePlan
from ..registry import registry
from ..request import AttentionOutput, AttentionRequest, Grads
from ..selection import cut_request, tiling_limits
from .operands import GRADS, Operands

Run = Callable[
    ..., Any
]  # (query, key, value, mask, plan, tables, rng) -> out, or AttentionOutput where lse is asked for
_MOST_PLANS = 256


class _Open:
    """Stands in for a session that does not say whether it is closed."""

    closed = False


class BoundAttention:
    """A decision made callable. Eager calls, autograd and operators run through it.

    Attributes:
        run: the eager call, with gradients. decision, request: why.
        session, entry, backend, device: whose. explicit: whether the core differentiates.
        state: the session, or a stand-in: has `closed`. needs_rng: dropout or noise wants (seed, offset).
        expires: `time.monotonic()` after which the decision is made anew; None: it stays.
    """

    def __init__(self, decision: Decision, request: AttentionRequest) -> None:
        winner, device = decision.winner, decision.winner.device
        self.decision, self.device, self.backend = decision, device, registry.backend_of(device)
        self.entry, self.session = registry.entry(device.id), registry.session(device.id)
        self.state: Any = self.session if hasattr(self.session, "closed") else _Open
        capabilities = self.backend.capabilities(device)
        self.tiling: Any = decision.policy.tiling if request.block_plan is None else None
        self.request = request = cut_request(request, self.tiling, capabilities)
        self._limits, self._plans = tiling_limits(capabilities), dict[AttentionRequest, Any]()
        self.expires = None if decision.seconds is None else monotonic() + decision.seconds
        self.needs_rng = request.dropout > 0 or capabilities.numerics[request.dtype].noisy
        mode = self.session.autograd(request) if request.grads else "native"
        if mode not in ("native", "explicit"):
            given = f"{device.id} claims gradients, and its session offers {mode!r} for {request.describe()}"
            raise PluginError(f"{given}: its capabilities must not claim 'backward'")
        self.explicit = mode == "explicit"
        self._target = device.reads[0] if winner.transfer else None
        asked = replace(request, lse=True) if self.explicit else request
        self._base: Run = _checked(self._session_run(asked), self, always=os.environ.get("HAL_CHECK") == "1")
        self._memory = winner.estimate.memory if winner.estimate is not None else 0
        self.run: Run = self._around(self._explicit if self.explicit else self._base)
        self.forward_run: Run = self._around(self._base) if self.explicit else self.run
        if registry.plugins.having("hal_call"):
            self.run = self._observed(self.run)

    @property
    def is_stale(self) -> bool:
        """Whether the decision is to be made anew: a policy gave it a time, or a backend failed while it was made."""
        return self.expires is not None and monotonic() >= self.expires

    def _around(self, run: Run) -> Run:
        """A run with what surrounds it: the plan of a tiling, the configured limit, the transfer."""
        if self.tiling is not None:
            run = self._cut(run)
        if self._target is not None:
            run = self._moved(run, self._target)
        if (limit := registry.memory_limit(self.device.id)) is not None:
            run = self._limited(run, limit)
        return run

    def _session_run(self, request: AttentionRequest) -> Run:
        """The session's fast path; inside a meter the call is prepared apart, so that its session can say what it
        costs.
        """
        bind, apart = getattr(self.session, "bind", None), self._prepare_and_compute(request)
        if bind is None:
            return apart
        fast: Run = bind(request)
        if not hasattr(self.session, "cost"):
            return fast

        def run(*arguments: Any) -> Any:
            return (fast if meter_var.get() is None else apart)(*arguments)

        return run

    def _prepare_and_compute(self, request: AttentionRequest) -> Run:
        session, cost = self.session, getattr(self.session, "cost", None)

        def run(query: Tensor, key: Tensor, value: Tensor, mask: Any, plan: Any, tables: Any, rng: Any) -> Any:
            this = exact(request, query, key)
            prepared = session.prepare_attention(query, key, value, request=this, plan=plan, tables=tables)
            output = session.compute_attention(prepared, mask, rng=rng)
            if cost is not None and (meter := meter_var.get()) is not None:
                meter.costs[id(self), get_ident()] = cost(prepared)
            return output if request.lse else output.out

        return run

    def _explicit(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, plan: Any, tables: Any, rng: Any) -> Any:
        tensors, cut = Operands(query, key, value, mask, plan, tables).flat()
        out, lse = ExplicitAttention.apply(self, rng, cut, *tensors)  # type: ignore[no-untyped-call]
        return AttentionOutput(out, lse) if self.request.lse else out

    def forward(self, operands: Operands, rng: Any) -> Any:
        """The call without the core's autograd, with the log-sum-exp that an explicit backward needs."""
        return self.forward_run(*operands, rng)

    def backward(
        self, operands: Operands, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, rng: Any
    ) -> Grads:
        """Gradients of the operands from a forward's result: by the session, or by torch running the forward again."""
        if not self.explicit:
            return native_backward(self.forward_run, operands, rng, self.request.grads, grad_out, grad_lse)
        if self._target is not None:
            operands, out, lse, grad_out, grad_lse = moved_to(self._target, (operands, out, lse, grad_out, grad_lse))
        request = exact(replace(self.request, lse=True), operands.query, operands.key)
        if self.tiling is not None:
            operands = operands._replace(plan=self.plan_of(operands.query, operands.key))
        query, key, value, mask, plan, tables = operands
        prepared = self.session.prepare_attention(query, key, value, request=request, plan=plan, tables=tables)
        backward = self.session.compute_attention_backward
        return backward(prepared, out, lse, grad_out, mask, grad_lse=grad_lse, rng=rng)

    def plan_of(self, query: Tensor, key: Tensor) -> TilePlan | BlockPlan:
        """The plan of the caller's tiling at the tensors' lengths, checked for coverage when it is made and then
        kept.
        """
        request = exact(self.request, query, key)
        if self.tiling.needs_content:
            return self.tiling.plan(request, self._limits, query=query, key=key)  # type: ignore[no-any-return]
        if (plan := self._plans.get(request)) is None:
            plan = self.tiling.plan(request, self._limits)
            if isinstance(plan, TilePlan):
                plan.check(self.tiling.name)
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[request] = plan
        return plan  # type: ignore[no-any-return]

    def _cut(self, run: Run) -> Run:
        def cut(query: Tensor, key: Tensor, value: Tensor, mask: Any, plan: Any, tables: Any, rng: Any) -> Any:
            return run(query, key, value, mask, self.plan_of(query, key), tables, rng)

        return cut

    def _moved(self, run: Run, target: str) -> Run:
        def moved(query: Tensor, *others: Any) -> Any:
            return moved_to(query.device, run(moved_to(target, query), *(moved_to(target, other) for other in others)))

        return moved

    def _limited(self, run: Run, limit: int) -> Run:
        def limited(*arguments: Any) -> Any:
            in_use = self.session.memory.stats().in_use
            if in_use + self._memory > limit:  # for the bound of the bucket; these lengths may still fit
                this = exact(self.request, arguments[0], arguments[1])
                needed = self.backend.estimate(this, self.device).memory
                if in_use + needed > limit:
                    raise MemoryLimitError(self.device.id, needed, in_use, limit)
            return run(*arguments)

        return limited

    def _observed(self, run: Run) -> Run:
        """The eager call, reported to `hal_call` observers."""

        def report(seconds: float) -> None:
            for _ in registry.call_each("hal_call", decision=self.decision, seconds=seconds):
                pass

        def by_clock(reported: Callable[[float], None]) -> Callable[[], None]:
            start = perf_counter()
            return lambda: reported(perf_counter() - start)

        timer = getattr(self.session, "timer", by_clock)  # a device with events of its own reports when they are read

        def observed(*arguments: Any) -> Any:
            stop = timer(report)
            result = run(*arguments)
            stop()
            return result

        return observed

    def metered(self, meter: Any, run: Run, arguments: tuple[Any, ...]) -> Any:
        """Run a call between two synchronisations and add it to the meter."""
        synchronize = getattr(self.session, "synchronize", None) or (lambda: None)
        synchronize()
        start = perf_counter()
        result = run(*arguments)
        synchronize()
        wall = perf_counter() - start
        request = exact(self.request, arguments[0], arguments[1])
        estimate = meter.costs.pop((id(self), get_ident()), None) or self.backend.estimate(request, self.device)
        modelled = estimate.time if self.device.fidelity is Fidelity.SIMULATED else None
        moved = request.bytes_moved if self._target is not None else 0
        meter.add(self.device, wall, modelled, estimate.energy, request.visible_macs, moved)
        return result


def _checked(run: Run, bound: BoundAttention, *, always: bool) -> Run:
    """The run, whose first result is held to the contract; with `always` every one, and that inputs are finite."""
    passed = False

    def checked(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
        nonlocal passed
        if always:
            for name, tensor in (("query", query), ("key", key), ("value", value)):
                if tensor.dtype.itemsize > 1 and not bool(tensor.isfinite().all()):
                    raise ContractError(f"{name} holds NaN or infinity, and HAL_CHECK=1 asks for finite inputs")
        result = run(query, key, value, *others)
        if passed and not always:
            return result
        out, lse = result if isinstance(result, tuple) else (result, None)
        check_result(bound, query, "out", out, (*query.shape[:3], value.shape[3]), query.dtype)
        if isinstance(result, tuple):
            kind = torch.float64 if query.dtype == torch.float64 else torch.float32
            check_result(bound, query, "log-sum-exp", lse, query.shape[:3], kind)
        passed = True
        if not always and bound._base is checked:  # from now on without this function
            bound._base = run
            bound.run = run if bound.run is checked else bound.run
            bound.forward_run = run if bound.forward_run is checked else bound.forward_run
        return result

    return checked


def check_result(bound: BoundAttention, query: Tensor, what: str, given: Any, shape: Any, dtype: torch.dtype) -> None:
    """Raise PluginError where a session's result has another shape, dtype or device than the contract says."""
    if not isinstance(given, Tensor):
        raise PluginError(f"{bound.device.id} gave {type(given).__name__} as {what}: a tensor is wanted")
    if (tuple(given.shape), given.dtype, given.device) != (tuple(shape), dtype, query.device):
        what = f"{what} {list(given.shape)} {given.dtype} on {given.device}"
        raise PluginError(f"{bound.device.id} gave {what}: {list(shape)} {dtype} on {query.device} is wanted")


@lru_cache(maxsize=4096)
def _with_lengths(request: AttentionRequest, len_q: int, len_k: int) -> AttentionRequest:
    return replace(request, len_q=len_q, len_k=len_k)


def exact(request: AttentionRequest, query: Tensor, key: Tensor) -> AttentionRequest:
    """The request with the tensors' lengths. Packed and paged calls keep their bounds: their lengths lie in tables."""
    len_q, len_k = query.shape[2], key.shape[2]
    if request.packed or request.page_size is not None or (len_q == request.len_q and len_k == request.len_k):
        return request
    return _with_lengths(request, len_q, len_k)


def moved_to(target: Any, value: Any) -> Any:
    """A tensor, or the tensors in a tuple, on another torch device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(target)
    if isinstance(value, tuple):
        parts = (moved_to(target, part) for part in value)
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


class ExplicitAttention(torch.autograd.Function):
    """Forward and backward of a session. Tensors are saved with save_for_backward, so changing one in place raises."""

    @staticmethod
    def forward(bound: BoundAttention, rng: Any, cut: Any, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        out, lse = bound._base(*Operands.unflat(tensors, cut), rng)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.bound, ctx.rng, ctx.cut, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)
        if not ctx.bound.request.grad_lse:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        given = (ctx.bound, ctx.rng, ctx.cut, out, lse, grad_out, grad_lse)
        grads = ExplicitBackward.apply(*given, *tensors)  # type: ignore[no-untyped-call]
        return (None, None, None, *grads, *(None,) * (len(tensors) - len(grads)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        described = ctx.bound.request.describe()
        raise UnsupportedError(f"forward-mode derivatives of attention were asked for ({described}): use reverse mode")


class ExplicitBackward(torch.autograd.Function):
    """The backward as a function of its own, so that differentiating it once more is refused by name."""

    @staticmethod
    def forward(
        bound: BoundAttention,
        rng: Any,
        cut: Any,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        session_grads = bound.backward(Operands.unflat(tensors, cut), out, lse, grad_out, grad_lse, rng)
        return tuple(session_grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.described = inputs[0].request.describe()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise UnsupportedError(
            f"a second derivative of attention was asked for ({ctx.described}), and first ones are offered: use torch's "
            "math attention where second derivatives are needed"
        )


def native_backward(
    run: Any, operands: Operands, rng: Any, wanted: frozenset[str], grad_out: Tensor, grad_lse: Tensor | None
) -> Grads:
    """Gradients by running a differentiable forward again: what a compiled graph's backward does for native sessions.

    Args:
        run: the session's callable. operands, rng: its arguments. wanted: subset of {"q", "k", "v", "mask"}.
        grad_out, grad_lse: gradients of the results.
    """
    named = dict(zip(GRADS, operands, strict=False))
    leaves = {name: t if t is None else t.detach().requires_grad_(name in wanted) for name, t in named.items()}
    with torch.enable_grad():
        result = run(*leaves.values(), operands.plan, operands.tables, rng)
    results = zip((result,) if isinstance(result, Tensor) else result, (grad_out, grad_lse), strict=False)
    pairs = [(r, grad) for r, grad in results if r is not None and grad is not None and r.requires_grad]
    needed = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    found = torch.autograd.grad(
        [r for r, _ in pairs], [*needed.values()], [grad for _, grad in pairs], allow_unused=True
    )
    grads = dict(zip(needed, found, strict=True))
    return Grads(*(grads.get(name) for name in leaves))
