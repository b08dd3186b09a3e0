"""From a decision to a callable: the session's own fast path, gradients, transfers and limits around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .context import memory_limit
from .errors import MemoryLimitError, PluginError, UnsupportedError
from .registry import registry
from .request import AttentionOutput, AttentionRequest, Grads, SequenceTables
from .selection import Decision
from .tiling import BlockPlan

Run = Callable[
    ..., Any
]  # (query, key, value, mask, plan, tables, rng) -> out, or AttentionOutput where lse is asked for


class Route:
    """A decision made callable.

    Attributes:
        run: the call with gradients. base: the session's call without the core's autograd, with
            the log-sum-exp that an explicit backward needs. decision, request: why.
        session, entry, backend: whose. explicit: whether the core differentiates.
        needs_rng: dropout or noise wants (seed, offset).
    """

    __slots__ = ("backend", "base", "decision", "entry", "explicit", "needs_rng", "request", "run", "session")

    def __init__(self, decision: Decision, request: AttentionRequest) -> None:
        winner, device = decision.winner, decision.winner.device
        self.decision, self.request, self.backend = decision, request, registry.backend_of(device)
        self.entry, self.session = registry.entry(device.id), registry.session(device.id)
        self.needs_rng = request.dropout > 0 or self.backend.capabilities(device).numerics[request.dtype].noisy
        mode = self.session.autograd(request) if request.grads else "native"
        if mode == "none":
            given = f"{device.id} claims gradients, and its session offers none for {request.describe()}"
            raise PluginError(f"{given}: its capabilities must not claim 'backward'")
        self.explicit = mode == "explicit"
        bind = getattr(self.session, "bind", None)
        if self.explicit:
            self.run: Run = _explicit(self.session, request)
            self.base: Run = _plain(self.session, replace(request, lse=True))
        else:
            self.run = self.base = bind(request) if bind is not None else _plain(self.session, request)
        if winner.transfer:
            self.run, self.base = (_moved(run, device.reads[0]) for run in (self.run, self.base))
        if (limit := memory_limit(device.id)) is not None and winner.estimate is not None:
            self.run, self.base = (_limited(run, self, winner.estimate.memory, limit) for run in (self.run, self.base))


def metered(meter: Any, route: Route, arguments: tuple[Any, ...], run: Run) -> Any:
    """Run a call between two synchronisations and add it to the meter."""
    synchronize = getattr(route.session, "synchronize", None) or (lambda: None)
    synchronize()
    start = perf_counter()
    result = run(*arguments)
    synchronize()
    wall, device = perf_counter() - start, route.decision.winner.device
    request = exact(route.request, arguments[0], arguments[1])
    estimate = route.backend.estimate(request, device)
    modelled = estimate.time if device.fidelity == "simulated" else None
    moved = request.bytes_moved if route.decision.winner.transfer else 0
    meter.add(device, wall, modelled, estimate.energy, request.visible_macs, moved)
    return result


@lru_cache(maxsize=4096)
def _with_lengths(request: AttentionRequest, len_q: int, len_k: int) -> AttentionRequest:
    return replace(request, len_q=len_q, len_k=len_k)


def exact(request: AttentionRequest, query: Tensor, key: Tensor) -> AttentionRequest:
    """The request with the tensors' lengths. Packed and paged calls keep their bounds: their lengths lie in tables."""
    len_q, len_k = query.shape[2], key.shape[2]
    if request.packed or request.page_size is not None or (len_q == request.len_q and len_k == request.len_k):
        return request
    return _with_lengths(request, len_q, len_k)


def _plain(session: Any, request: AttentionRequest) -> Run:
    def run(query: Tensor, key: Tensor, value: Tensor, mask: Any, plan: Any, tables: Any, rng: Any) -> Any:
        this = exact(request, query, key)
        prepared = session.prepare_attention(query, key, value, request=this, plan=plan, tables=tables)
        output = session.compute_attention(prepared, mask, rng=rng)
        return output if request.lse else output.out

    return run


def _explicit(session: Any, request: AttentionRequest) -> Run:
    with_lse = replace(request, lse=True)

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Any, plan: Any, tables: Any, rng: Any) -> Any:
        this = exact(with_lse, query, key)
        out, lse = ExplicitAttention.apply(query, key, value, mask, session, this, plan, tables, rng)  # type: ignore[no-untyped-call]
        return AttentionOutput(out, lse) if request.lse else out

    return run


def moved_to(target: Any, value: Any) -> Any:
    """A tensor, or the tensors in a NamedTuple, on another torch device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(target)
    return type(value)(*(moved_to(target, part) for part in value)) if hasattr(value, "_fields") else value


def _moved(run: Run, target: str) -> Run:
    def moved(query: Tensor, *others: Any) -> Any:
        return moved_to(query.device, run(moved_to(target, query), *(moved_to(target, other) for other in others)))

    return moved


def _limited(run: Run, route: Route, most: int, limit: int) -> Run:
    device = route.decision.winner.device

    def limited(*arguments: Any) -> Any:
        in_use = route.session.memory.stats().in_use
        if in_use + most > limit:  # for the bound of the bucket; these lengths may still fit
            needed = route.backend.estimate(exact(route.request, arguments[0], arguments[1]), device).memory
            if in_use + needed > limit:
                raise MemoryLimitError(device.id, needed, in_use, limit)
        return run(*arguments)

    return limited


class ExplicitAttention(torch.autograd.Function):
    """Forward and backward of a session. Tensors are saved with save_for_backward, so changing one in place raises."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        session: Any,
        request: AttentionRequest,
        plan: BlockPlan | None,
        tables: SequenceTables | None,
        rng: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor]:
        prepared = session.prepare_attention(query, key, value, request=request, plan=plan, tables=tables)
        out, lse = session.compute_attention(prepared, mask, rng=rng)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, mask, ctx.session, ctx.request, plan, tables, ctx.rng = inputs
        ctx.blocks = None if plan is None else plan[:2]
        plan_tensors = (None, None) if plan is None else plan[2:]
        ctx.save_for_backward(query, key, value, mask, *output, *plan_tensors, *(tables or SequenceTables()))
        ctx.has_tables = tables is not None
        ctx.set_materialize_grads(False)
        if not ctx.request.grad_lse:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        query, key, value, mask, out, lse, indices, counts, *tables = ctx.saved_tensors
        grads = ExplicitBackward.apply(  # type: ignore[no-untyped-call]
            query,
            key,
            value,
            mask,
            out,
            lse,
            torch.zeros_like(out) if grad_out is None else grad_out,
            grad_lse,
            ctx.session,
            ctx.request,
            BlockPlan(ctx.blocks[0], ctx.blocks[1], indices, counts) if ctx.blocks else None,
            SequenceTables(*tables) if ctx.has_tables else None,
            ctx.rng,
        )
        return (*grads, None, None, None, None, None)


class ExplicitBackward(torch.autograd.Function):
    """The backward as a function of its own, so that differentiating it once more is refused by name."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        session: Any,
        request: AttentionRequest,
        plan: BlockPlan | None,
        tables: SequenceTables | None,
        rng: tuple[int, int] | None,
    ) -> tuple[Tensor | None, ...]:
        prepared = session.prepare_attention(query, key, value, request=request, plan=plan, tables=tables)
        grads = session.compute_attention_backward(prepared, out, lse, grad_out, mask, grad_lse=grad_lse, rng=rng)
        return tuple(grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.described = inputs[9].describe()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise UnsupportedError(
            f"a second derivative of attention was asked for ({ctx.described}), and first ones are offered: use torch's "
            "math attention where second derivatives are needed"
        )


def native_backward(
    run: Any, given: tuple[Any, ...], wanted: frozenset[str], grad_out: Tensor, grad_lse: Tensor | None
) -> Grads:
    """Gradients by running a differentiable forward again: what a compiled graph's backward does for native sessions.

    Args:
        run: the session's callable. given: its arguments. wanted: subset of {"q", "k", "v", "mask"}.
        grad_out, grad_lse: gradients of the results.
    """
    named = dict(zip(("q", "k", "v", "mask"), given, strict=False))
    leaves = {name: t if t is None else t.detach().requires_grad_(name in wanted) for name, t in named.items()}
    with torch.enable_grad():
        result = run(*leaves.values(), *given[4:])
    results = zip((result,) if isinstance(result, Tensor) else result, (grad_out, grad_lse), strict=False)
    pairs = [(r, grad) for r, grad in results if r is not None and grad is not None and r.requires_grad]
    needed = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    found = torch.autograd.grad(
        [r for r, _ in pairs], [*needed.values()], [grad for _, grad in pairs], allow_unused=True
    )
    grads = dict(zip(needed, found, strict=True))
    return Grads(*(grads.get(name) for name in leaves))
