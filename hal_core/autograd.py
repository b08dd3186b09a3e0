"""Gradients for sessions that compute their own backward. Imported with the first tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError
from .request import AttentionRequest, Grads, SequenceTables
from .tiling import BlockPlan

_TABLES = len(SequenceTables._fields)


class ExplicitAttention(torch.autograd.Function):
    """Forward and backward of a session. Tensors are saved with save_for_backward, so changing one in place raises."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, session: Any, request: AttentionRequest,
        plan: BlockPlan | None, tables: SequenceTables | None, rng: tuple[int, int] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        prepared = session.prepare_attention(query, key, value, request=request, plan=plan, tables=tables)
        out, lse = session.compute_attention(prepared, mask, rng=rng)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, mask, ctx.session, ctx.request, plan, tables, ctx.rng = inputs
        ctx.blocks = None if plan is None else plan[:2]
        plan_tensors = (None, None) if plan is None else plan[2:]
        ctx.save_for_backward(query, key, value, mask, *output, *plan_tensors, *(tables or (None,) * _TABLES))
        ctx.has_tables = tables is not None
        ctx.set_materialize_grads(False)
        if not ctx.request.grad_lse:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        query, key, value, mask, out, lse, indices, counts, *tables = ctx.saved_tensors
        grads = _differentiable_backward(
            query, key, value, mask, out, lse, torch.zeros_like(out) if grad_out is None else grad_out, grad_lse, ctx.session,
            ctx.request,
            BlockPlan(ctx.blocks[0], ctx.blocks[1], indices, counts) if ctx.blocks else None,
            SequenceTables(*tables) if ctx.has_tables else None, ctx.rng,
        )  # fmt: skip
        return (*grads, None, None, None, None, None)


class ExplicitBackward(torch.autograd.Function):
    """The backward as a function of its own, so that differentiating it once more is refused by name."""

    @staticmethod
    def forward(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, grad_out: Tensor,
        grad_lse: Tensor | None, session: Any, request: AttentionRequest, plan: BlockPlan | None,
        tables: SequenceTables | None, rng: tuple[int, int] | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
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


explicit_attention: Any = ExplicitAttention.apply
_differentiable_backward: Any = ExplicitBackward.apply


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
    found = torch.autograd.grad([r for r, _ in pairs], [*needed.values()], [grad for _, grad in pairs], allow_unused=True)
    grads = dict(zip(needed, found, strict=True))
    return Grads(*(grads.get(name) for name in leaves))
