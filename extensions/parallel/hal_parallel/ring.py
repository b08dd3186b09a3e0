"""The ring: keys and values travel from rank to rank while each attends to those that it holds; in the backward pass
their gradients travel with them.

Source: Liu, Zaharia & Abbeel 2023 (Ring Attention); gradients from the merged result: Dao et al. 2022, algorithm 4.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .description import Given
from .draws import Draws
from .exchange import Link
from .inner import Inner, Result
from .layout import Pieces
from .parts import WHOLE, Part, PartialAttention, PartialGradients, finished, new_sum
from .visible import Call, Rule, find_calls


@dataclass(frozen=True, eq=False)
class RingPlan:
    """A rank's part of one attention call.

    Attributes:
        link: the ring; None where this rank holds all keys. inner: the device of its dense calls.
        queries: the tokens of all ring ranks' queries; keys: of their keys. rank: this one.
        rule: what a token reads. most: bounds of the rows and keys of a dense call, None for none.
        draws: None for none. parts: batch entries and heads that are computed one after the other.
    """

    link: Link | None
    inner: Inner
    queries: tuple[Pieces, ...]
    keys: tuple[Pieces, ...]
    rank: int
    rule: Rule
    most: tuple[int, int] | None = None
    draws: Draws | None = None
    parts: tuple[Part, ...] = (WHOLE,)

    def calls(self, source: int, rank: int | None = None) -> tuple[Call, ...]:
        """The dense calls of a rank (this one) over the keys of rank `source`."""
        queries = self.queries[self.rank if rank is None else rank]
        return find_calls(queries, self.keys[source], self.rule, self.most)

    def source(self, step: int) -> int:
        """Whose keys this rank holds at a step."""
        return (self.rank - step) % len(self.keys)

    @cached_property
    def steps(self) -> int:
        """Steps after which no rank reads any more of the keys that travel: the same number on every rank."""
        size = len(self.keys)
        needed = [step for step in range(size) for rank in range(size) if self.calls((rank - step) % size, rank)]
        return max(needed, default=0) + 1


class RingAttention(torch.autograd.Function):
    """Local query, key, value and mask -> local (out, log-sum-exp)."""

    @staticmethod
    def forward(
        ctx: Any, plan: RingPlan, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        shape = (*query.shape[:3], value.shape[3])
        summed = torch.promote_types(query.dtype, torch.float32)
        out, lse = query.new_empty(shape), query.new_empty(shape[:3], dtype=summed)
        with torch.autocast(query.device.type, enabled=False):
            for part in plan.parts:
                given = part.of(Given(query, key, value, mask))
                ring_forward(plan, part, given, part.queries(out), part.queries(lse))
        ctx.save_for_backward(query, key, value, mask, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        *tensors, out, lse = ctx.saved_tensors
        plan, given = ctx.plan, Given(*tensors)
        wanted = frozenset(
            name for name, needed in zip(("q", "k", "v", "mask"), ctx.needs_input_grad[1:], strict=True) if needed
        )
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        mask = torch.zeros_like(given.mask, dtype=lse.dtype) if "mask" in wanted and given.mask is not None else None
        many = len(plan.parts) > 1
        written: list[Any] = [
            torch.empty_like(t, pin_memory=t.is_pinned()) if many and name in wanted else None
            for name, t in zip("qkv", given[:3], strict=True)
        ]
        grads = Given._make([*written, mask])
        with torch.autocast(out.device.type, enabled=False):
            for part in plan.parts:
                result = Result(*(part.queries(t) for t in (out, lse, grad_out, grad_lse)))
                found = ring_backward(plan, part, part.of(given), result, wanted, part.of(grads))
        found = written if many else found
        return (None, *found, None if mask is None or given.mask is None else mask.to(given.mask.dtype))


def attend(plan: RingPlan, given: Given) -> tuple[Tensor, Tensor]:
    """Local (out, log-sum-exp), with gradients for the operands."""
    out, lse = RingAttention.apply(plan, *given)  # type: ignore[no-untyped-call]
    return out, lse


def ring_forward(plan: RingPlan, part: Part, given: Given, out: Tensor, lse: Tensor) -> None:
    """Write (out, log-sum-exp) of the local queries over the keys of all ranks."""
    partial = PartialAttention(plan.inner, part.draws(plan.draws), given.query, out)
    held = _held(plan, given)
    for step in range(plan.steps):
        coming, wait = _pass_on(plan, held, step, "forward")
        partial.add(given._replace(key=held[0], value=held[1]), plan.calls(plan.source(step)))
        wait()
        held = coming
    partial.finish(out, lse)


def ring_backward(
    plan: RingPlan, part: Part, given: Given, result: Result, wanted: frozenset[str], into: Given
) -> list[Tensor | None]:
    """Gradients of the local query, key and value; None where not wanted.

    The sums of dK and dV travel one step behind their keys: a rank adds its part to the sums that came, and passes them
    on while it computes the next part. The order of the sums is that of the ring, so equal calls give equal gradients.

    Args:
        into: where gradients are written, None: in new tensors. The mask's is added to.
    """
    places = {"q": (given.query, into.query), "k": (given.key, into.key), "v": (given.value, into.value)}
    names = [name for name in "kv" if name in wanted]
    keys = [places[name] for name in names]
    query = new_sum(given.query, result.lse, into.query) if "q" in wanted else None
    partial = PartialGradients(plan.inner, part.draws(plan.draws), result, wanted, query, into.mask)
    held = _held(plan, given)
    sums: list[Tensor] = []
    for step in range(plan.steps):
        coming, wait = _pass_on(plan, held, step, "backward")
        arriving, wait_for_sums = _shift(plan, sums, 1, f"gradients of keys and values, step {step} of {plan.steps}")
        own = [new_sum(like, result.lse, place if plan.link is None else None) for like, place in keys]
        local, named = given._replace(key=held[0], value=held[1]), dict(zip(names, own, strict=True))
        partial.add(local, plan.calls(plan.source(step)), named.get("k"), named.get("v"))
        wait_for_sums()
        sums = [total.add_(part) for total, part in zip(arriving, own, strict=True)] if arriving else own
        wait()
        held = coming
    found = dict(zip(names, _home(plan, sums), strict=True)) | ({} if query is None else {"q": query})
    return [finished(found[name], *places[name]) if name in found else None for name in "qkv"]


def _held(plan: RingPlan, given: Given) -> list[Tensor]:
    """This rank's keys and values: to be sent, or on the query's device if a call takes all of them."""
    pair = [given.key, given.value]
    if plan.link is not None:
        return [tensor.contiguous() for tensor in pair]
    whole = plan.most is None or plan.most[1] >= given.key.shape[2]
    return [tensor.to(given.query.device, non_blocking=True) for tensor in pair] if whole else pair


def _pass_on(plan: RingPlan, held: list[Tensor], step: int, phase: str) -> tuple[list[Tensor], Callable[[], None]]:
    """Begin to pass the keys and values on, unless this is the last step: as `_shift`."""
    return _shift(
        plan, held if step + 1 < plan.steps else [], 1, f"keys and values, {phase}, step {step + 1} of {plan.steps}"
    )


def _shift(plan: RingPlan, send: list[Tensor], hops: int, what: str) -> tuple[list[Tensor], Callable[[], None]]:
    """Begin to send tensors `hops` ranks on: (what comes from as far before, which `wait` waits for; wait)."""
    coming = [torch.empty_like(tensor) for tensor in send]
    return coming, plan.link.shift(send, coming, hops, what) if plan.link is not None and send else lambda: None


def _home(plan: RingPlan, sums: list[Tensor]) -> list[Tensor]:
    """The sums of this rank's own keys, from the rank that added the last part."""
    hops = -(plan.steps - 1) % len(plan.keys)
    if hops == 0:
        return sums
    own, wait = _shift(plan, sums, hops, "gradients of keys and values, backward, the way home")
    wait()
    return own
