"""From a decision to a callable: the session's own fast path, gradients, transfers and limits around it."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from threading import get_ident
from time import monotonic, perf_counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..decision import Decision
from ..device_info import Fidelity
from ..errors import ContractError, MemoryLimitError, PluginError, UnsupportedError
from ..options import Meter, meter_var, watch
from ..plans import BlockPlan, TilePlan
from ..registry import registry
from ..request import AttentionOutput, AttentionRequest, Grads
from ..selection import checked_plan, cut_request
from .operands import GRADS, Operands
from .validation import check_tables

#: (query, key, value, mask, plan, tables, rng) -> out, or AttentionOutput where lse is asked for.
Run = Callable[..., Any]
_MOST_PLANS, _TOLD = 256, ("decision", "seconds", "operands")


class BoundAttention:
    """A decision made callable. Eager calls, autograd and operators run through it.

    Attributes:
        run: the eager call, with gradients. decision, request: why.
        session, entry, backend, device: whose. explicit: whether the core differentiates.
        state: the session, or a stand-in: has `closed`. needs_rng: dropout or noise wants (seed, offset).
        expired: whether the decision is to be made anew: a policy says so, its time is over, or a backend failed while
            it was made; None: it stays.
    """

    def __init__(self, decision: Decision, request: AttentionRequest) -> None:
        winner, device = decision.winner, decision.winner.device
        self.decision, self.device, self.backend = decision, device, registry.backend_of(device)
        self.entry, self.session = registry.entry(device.id), registry.session(device.id)
        self.state: Any = self.session if hasattr(self.session, "closed") else SimpleNamespace(closed=False)
        capabilities = self.backend.capabilities(device)
        self.tiling: Any = decision.policy.tiling if request.block_plan is None else None
        self.request = request = cut_request(request, self.tiling, capabilities)
        self._plan = partial(checked_plan, self.tiling, capabilities=capabilities)
        self._kept_plan = lru_cache(_MOST_PLANS)(self._plan)
        ends = None if decision.seconds is None else monotonic() + decision.seconds
        self.expired = decision.expired if ends is None else lambda: monotonic() >= ends
        self.needs_rng = request.dropout > 0 or capabilities.numerics[request.dtype].noisy
        mode = self.session.autograd(request) if request.grads else "native"
        if mode not in ("native", "explicit"):
            raise PluginError(
                f"{device.id} claims gradients, and its session offers {mode!r} for {request.describe()}: its "
                "capabilities must not claim 'backward'"
            )
        self.explicit = mode == "explicit"
        self._target, estimate = device.reads[0] if winner.transfer else None, winner.estimate
        self._memory, self._with_lse = estimate.memory if estimate is not None else 0, replace(request, lse=True)
        self._limit, self._checks_all = registry.memory_limit(device.id), os.environ.get("HAL_CHECK") == "1"
        self._observed = registry.plugins.implementations("hal_call")
        self._call = self._session_run(self._with_lse if self.explicit else request)
        self._base: Run = self._checked
        self.run: Run = self._reporting(self._whole)

    def _session_run(self, request: AttentionRequest) -> Run:
        """The session's fast path where it has one. A call inside a meter is prepared apart where its session can say
        what it costs.
        """
        session, cost = self.session, getattr(self.session, "cost", None)
        fast: Run | None = session.bind(request) if hasattr(session, "bind") else None
        if fast is not None and cost is None:
            return fast

        def run(query: Tensor, key: Tensor, value: Tensor, mask: Any, plan: Any, tables: Any, rng: Any) -> Any:
            meter = meter_var.get()
            if fast is not None and meter is None:
                return fast(query, key, value, mask, plan, tables, rng)
            prepared = session.prepare_attention(
                query, key, value, request=exact(request, query, key), plan=plan, tables=tables
            )
            output = session.compute_attention(prepared, mask, rng=rng)
            if cost is not None and meter is not None:
                meter.costs[id(self), get_ident()] = cost(prepared)
            return output if request.lse else output.out

        return run

    def _checked(self, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
        """The session's call with its result held to the contract: the first call, or under HAL_CHECK=1 every one,
        which then demands finite inputs and valid tables too.
        """
        for name, tensor in (("query", query), ("key", key), ("value", value)) if self._checks_all else ():
            if tensor.dtype.itemsize > 1 and not bool(tensor.isfinite().all()):
                raise ContractError(f"{name} holds NaN or infinity, and HAL_CHECK=1 asks for finite inputs")
        if self._checks_all and others[2] is not None:
            check_tables(others[2], self.request, query, key)
        result = self._call(query, key, value, *others)
        wanted = {
            "out": f"{[*query.shape[:3], self.request.dim_v]} {query.dtype} on {query.device}",
            "log-sum-exp": f"{[*query.shape[:3]]} {torch.promote_types(query.dtype, torch.float32)} on {query.device}",
        }
        results = result if isinstance(result, tuple) else (result,)
        for (what, form), given in zip(wanted.items(), results, strict=False):
            is_tensor = isinstance(given, Tensor)
            offered = f"{[*given.shape]} {given.dtype} on {given.device}" if is_tensor else type(given).__name__
            if offered != form:
                raise PluginError(f"{self.device.id} gave {what} {offered}: {form} is wanted")
        if not self._checks_all:  # from now on without this method, and without what is switched off
            self._base = self._call
            if self.tiling is None and self._target is None and self._limit is None:
                run: Run = self._explicit if self.explicit else self._call
                self.run = self._reporting(run) if self._observed else run
        return result

    def _explicit(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, plan: Any, tables: Any, rng: Any) -> Any:
        tensors, cut = Operands(query, key, value, mask, plan, tables).flat()
        out, lse = (ExplicitAttention.apply if torch._C._are_functorch_transforms_active() else _apply_eager)(
            *tensors, self, rng, cut
        )
        return AttentionOutput(out, lse) if self.request.lse else out

    def _surrounded(self, run: Run, query: Tensor, key: Tensor, *others: Any) -> Any:
        """A run within the configured limit, its tensors moved to the device and back, under the caller's tiling."""
        if self._limit is not None:
            in_use = self.session.memory.stats().in_use
            if in_use + self._memory > self._limit:  # for the bound of the bucket; these lengths may still fit
                needed = self.backend.estimate(exact(self.request, query, key), self.device).memory
                if in_use + needed > self._limit:
                    raise MemoryLimitError(self.device.id, needed, in_use, self._limit)
        given = (query, key, *others) if self._target is None else moved_to(self._target, (query, key, *others))
        if self.tiling is not None:
            given = (*given[:4], self.plan_of(given[0], given[1]), *given[5:])
        return run(*given) if self._target is None else moved_to(query.device, run(*given))

    def _reporting(self, run: Run) -> Run:
        """The call, reported to `hal_call` and `hal_error`. Attributes are read here: read at each call they would be a
        third of what observers cost.
        """
        decision = self.decision
        told = [
            (each.plugin_name, each.function if each.argnames == _TOLD else partial(_call_named, each))
            for each in self._observed
        ]
        # A device with events of its own reports when they are read, and its tensors may be others by then.
        timer = getattr(self.session, "timer", None) if told else None

        def report(seconds: float, operands: tuple[Any, ...] | None = None) -> None:
            for plugin, tell in told:
                try:
                    tell(decision, seconds, operands)
                except (Exception, SystemExit, GeneratorExit) as error:
                    registry.plugins.fail(plugin, "hal_call", error)
                    told[:] = [one for one in told if one[0] != plugin]

        def reported(*arguments: Any) -> Any:
            stop, start = None if timer is None else timer(report), perf_counter()
            try:
                result = run(*arguments)
            except Exception as error:
                list(registry.call_each("hal_error", decision=decision, error=error))
                raise
            report(perf_counter() - start, arguments) if stop is None else stop()
            return result

        return reported

    def _whole(self, *arguments: Any) -> Any:
        return self._surrounded(self._explicit if self.explicit else self._base, *arguments)

    def forward_run(self, *arguments: Any) -> Any:
        """The call without the core's autograd, with the log-sum-exp that an explicit backward needs."""
        return self._surrounded(self._base, *arguments)

    def backward(
        self, operands: Operands, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, rng: Any
    ) -> Grads:
        """Gradients of the operands from a forward's result: by the session, or by torch running the forward again."""
        if not self.explicit:
            return self._native_backward(operands, grad_out, grad_lse, rng)
        if self._target is not None:
            operands, out, lse, grad_out, grad_lse = moved_to(self._target, (operands, out, lse, grad_out, grad_lse))
        query, key, value, mask, plan, tables = operands
        plan = plan if self.tiling is None else self.plan_of(query, key)
        prepared = self.session.prepare_attention(
            query, key, value, request=exact(self._with_lse, query, key), plan=plan, tables=tables
        )
        return self.session.compute_attention_backward(prepared, out, lse, grad_out, mask, grad_lse=grad_lse, rng=rng)

    def _native_backward(self, operands: Operands, grad_out: Tensor, grad_lse: Tensor | None, rng: Any) -> Grads:
        """Gradients by running a differentiable forward again: what a compiled graph's backward does."""
        named, wanted = zip(GRADS, operands, strict=False), self.request.grads
        leaves = [t if t is None else t.detach().requires_grad_(name in wanted) for name, t in named]
        with torch.enable_grad():
            result = self.forward_run(*leaves, operands.plan, operands.tables, rng)
        pairs = [
            (r, grad)
            for r, grad in zip(result if isinstance(result, tuple) else (result,), (grad_out, grad_lse), strict=False)
            if r is not None and grad is not None and r.requires_grad
        ]
        needed = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = torch.autograd.grad([r for r, _ in pairs], needed, [grad for _, grad in pairs], allow_unused=True)
        by_leaf = dict(zip(map(id, needed), found, strict=True))
        return Grads(*(by_leaf.get(id(leaf)) for leaf in leaves))

    def plan_of(self, query: Tensor, key: Tensor) -> TilePlan | BlockPlan:
        """The plan of the caller's tiling at the tensors' lengths, checked for coverage when it is made and then
        kept.
        """
        request, content = exact(self.request, query, key), self.tiling.needs_content
        return self._plan(request, query=query, key=key) if content else self._kept_plan(request)

    def metered(self, meter: Meter | watch, run: Run, arguments: tuple[Any, ...]) -> Any:
        """Run a call between two synchronisations and add it to the meter; or let it be watched."""
        if isinstance(meter, watch):
            result = run(*arguments) if meter.outer is None else self.metered(meter.outer, run, arguments)
            meter.saw(self.decision, meter.costs.pop((id(self), get_ident()), None) if meter.costs else None)
            return result
        synchronize = getattr(self.session, "synchronize", lambda: None)
        synchronize()
        start = perf_counter()
        result = run(*arguments)
        synchronize()
        wall = perf_counter() - start
        request = exact(self.request, arguments[0], arguments[1])
        estimate = meter.costs.pop((id(self), get_ident()), None) or self.backend.estimate(request, self.device)
        meter.add(
            self.device,
            wall,
            estimate.time if self.device.fidelity is Fidelity.SIMULATED else None,
            estimate.energy,
            request.visible_macs if estimate.macs is None else estimate.macs,
            request.bytes_moved if self._target is not None else 0,
        )
        return result


def _call_named(each: Any, *given: Any) -> None:
    """An observer that takes fewer arguments than `hal_call` has, or in another order."""
    each.function(*map(dict(zip(_TOLD, given, strict=True)).get, each.argnames))


@lru_cache(maxsize=4096)
def _with_lengths(request: AttentionRequest, len_q: int, len_k: int) -> AttentionRequest:
    return replace(request, len_q=len_q, len_k=len_k)


def exact(request: AttentionRequest, query: Tensor, key: Tensor) -> AttentionRequest:
    """The request with the tensors' lengths. Packed and paged calls keep their bounds: their lengths lie in tables."""
    lengths = query.shape[2], key.shape[2]
    fixed = request.packed or request.page_size is not None or lengths == (request.len_q, request.len_k)
    return request if fixed else _with_lengths(request, *lengths)


def moved_to(target: Any, value: Any) -> Any:
    """A tensor, or the tensors in a tuple, on another torch device; anything else as it is."""
    return tree_map(lambda part: part.to(target) if isinstance(part, Tensor) else part, value)


class ExplicitBackward(torch.autograd.Function):
    """The backward as a function of its own, so that differentiating it once more is refused by name."""

    @staticmethod
    def forward(
        grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *arguments: Any
    ) -> tuple[Tensor | None, ...]:
        *tensors, bound, rng, cut = arguments
        return tuple(bound.backward(Operands.unflat(tensors, cut), out, lse, grad_out, grad_lse, rng))

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], *arguments: Any) -> Any:
        """Several gradients of one forward, as torch.func.jacrev asks for them."""
        each = [
            ExplicitBackward.apply(  # type: ignore[no-untyped-call]
                *(t if type(d) is not int else t.select(d, i) for t, d in zip(arguments, dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        grads = [None if first is None else torch.stack(grads) for first, *grads in zip(each[0], *each, strict=True)]
        return tuple(grads), tuple(None if grad is None else 0 for grad in grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.described = inputs[-3].request.describe()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise UnsupportedError(
            f"a second derivative of attention was asked for ({ctx.described}), and first ones are offered: use "
            "torch's math attention where second derivatives are needed"
        )


def derivative(backward: Callable[..., Any], count: int) -> tuple[Callable[..., None], Callable[..., Any]]:
    """(setup_context, backward) of a forward that gives (out, lse): its first `count` arguments are its tensors, query,
    key, value and mask the first of them. Tensors are saved with save_for_backward, so changing one in place raises.

    Args:
        backward: (grad_out, grad_lse, out, lse, and the forward's arguments) -> gradients of the first four.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.static = inputs[count:]
        ctx.save_for_backward(*inputs[:count], *output)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        found = backward(grad_out, grad_lse, out, lse, *tensors, *ctx.static)
        grads = [grad if wanted else None for grad, wanted in zip(found, ctx.needs_input_grad, strict=False)]
        return (*grads, *(None,) * (count + len(ctx.static) - len(grads)))

    return save, differentiate


class ExplicitAttention(torch.autograd.Function):
    """Forward and backward of a session, from the twelve tensors of `Operands.flat`, the bound call, rng, and `cut`."""

    # The backward is a node only where something differentiates, maps or traces it.
    setup_context, backward = map(
        staticmethod,
        derivative(
            lambda *given: (
                ExplicitBackward.apply(*given)  # type: ignore[no-untyped-call]
                if torch.is_grad_enabled()
                or torch._C._are_functorch_transforms_active()
                or torch.compiler.is_compiling()
                else ExplicitBackward.forward(*given)
            ),
            12,
        ),
    )

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, bound, rng, cut = arguments
        return tuple(bound._base(*Operands.unflat(tensors, cut), rng))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        described = ctx.static[0].request.describe()
        raise UnsupportedError(f"forward-mode derivatives of attention were asked for ({described}): use reverse mode")


#: `ExplicitAttention.apply` outside of torch.func's transforms: torch's own reads the forward's signature in each call,
#: which takes longer than the rest of it.
_apply_eager: Any = super(torch.autograd.Function, ExplicitAttention).apply
