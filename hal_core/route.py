"""From a decision to a callable: the session's own fast path, gradients, transfers and limits around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .autograd import explicit_attention
from .context import memory_limit
from .errors import MemoryLimitError, PluginError
from .registry import registry
from .request import AttentionOutput, AttentionRequest
from .selection import Decision

Run = Callable[..., Any]  # (query, key, value, mask, plan, tables, rng) -> out, or AttentionOutput where lse is asked for


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
        out, lse = explicit_attention(query, key, value, mask, session, this, plan, tables, rng)
        return AttentionOutput(out, lse) if request.lse else out

    return run


def _moved(run: Run, target: str) -> Run:
    def moved(query: Tensor, key: Tensor, value: Tensor, mask: Any, plan: Any, tables: Any, rng: Any) -> Any:
        def there(tensor: Any) -> Any:
            return tensor.to(target) if isinstance(tensor, torch.Tensor) else tensor

        plan = plan if plan is None else type(plan)(*map(there, plan))
        tables = tables if tables is None else type(tables)(*map(there, tables))
        result, back = run(there(query), there(key), there(value), there(mask), plan, tables, rng), query.device
        return result.to(back) if isinstance(result, Tensor) else AttentionOutput(*(part.to(back) for part in result))

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
