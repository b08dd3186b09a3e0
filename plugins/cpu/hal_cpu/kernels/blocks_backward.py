"""Gradients of attention by a block plan, from a given (out, lse): the products of `blocks`, made again.

Source: Dao et al. 2022 (FlashAttention), algorithm 4, over gathered blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hal_core.plugin_api import BlockPlan, Grads

from ..memory import ScratchMemory, Workspace
from .blocks import (
    Chunk,
    Heads,
    Scratch,
    chunks,
    from_blocks,
    gathered,
    hidden_pairs,
    hide,
    picked_rows,
    scores_of,
    to_blocks,
    walk,
)
from .problem import Problem
from .scores import HiddenPairs
from .tiled_backward import Given


def backward(problem: Problem, plan: BlockPlan, memory: ScratchMemory, given: Given) -> Grads:
    """Gradients of what the request asks for; of query, key and value where it does not say.

    A row that read no key gives 0 to all of them.
    """
    wanted = problem.request.grads or frozenset("qkv")
    grads = Grads(
        torch.empty_like(problem.query) if "q" in wanted else None,
        torch.empty_like(problem.source.key) if "k" in wanted else None,
        torch.empty_like(problem.source.value) if "v" in wanted else None,
        None,
    )
    plan = plan._replace(block_q=max(min(plan.block_q, problem.query.shape[2]), 1))
    with Workspace(memory) as workspace:
        _run(problem, plan, Scratch.take(problem, workspace, backward=True), given, grads)
    return grads


def _run(problem: Problem, plan: BlockPlan, scratch: Scratch, given: Given, grads: Grads) -> None:
    hidden, rule = hidden_pairs(problem, scratch), problem.rule
    last, before = problem.group - 1, None
    for heads in walk(problem, plan, scratch):
        key_sum, value_sum = (
            room[: blocks.numel()].view(blocks.shape)
            for room, blocks in ((scratch.key_sum, heads.key), (scratch.value_sum, heads.value))
        )
        if before != (heads.batch, heads.head_kv):
            key_sum.zero_()
            value_sum.zero_()
            before = (heads.batch, heads.head_kv)
        _heads(problem, plan, heads, scratch, given, hidden, (key_sum, value_sum), grads)
        if heads.queries.stop - 1 - heads.head_kv * problem.group < last:
            continue  # another query head of the group follows
        if grads.key is not None:
            key_sum.mul_(rule.scale / rule.factor if rule.factor else 0.0)
        for total, grad in ((key_sum, grads.key), (value_sum, grads.value)):
            if grad is not None:
                grad[heads.batch, heads.head_kv] = total.flatten(0, 1)[: grad.shape[2]]


def _heads(
    problem: Problem,
    plan: BlockPlan,
    heads: Heads,
    scratch: Scratch,
    given: Given,
    hidden: HiddenPairs,
    sums: tuple[Tensor, Tensor],
    grads: Grads,
) -> None:
    """Add what one pattern's heads give to the sums of keys and values, and write their query's gradients."""
    place, size = (heads.batch, heads.queries), plan.block_q
    out = to_blocks(given.out[place], size, scratch.whole_out)
    grad_out = to_blocks(given.grad_out[place], size, scratch.whole_grad_out)
    rows = out.shape[0] * out.shape[1]
    level = to_blocks(given.lse[place].unsqueeze(-1), size, scratch.statistics[:rows])
    delta = scratch.statistics[rows : 2 * rows].view(level.shape)
    torch.sum(out.mul_(grad_out), -1, keepdim=True, out=delta)
    if given.grad_lse is not None:  # the room of `out` is free again
        delta -= to_blocks(given.grad_lse[place].unsqueeze(-1), size, scratch.whole_out)
    # A row without a key: its scores are all -inf, so any finite level makes its weights 0.
    level.masked_fill_(level == -math.inf, 0).mul_(problem.rule.unit)
    query = to_blocks(problem.query[place], size, scratch.whole_query).mul_(problem.rule.factor)
    grad_query = scratch.whole_out[: query.numel()].view(query.shape)
    for chunk in chunks(problem, plan, heads):
        if not chunk.most:
            grad_query[chunk.units] = 0
            continue
        part = picked_rows(query, chunk.units, scratch.query)
        key = gathered(heads.key, chunk, scratch.key)
        slope = None
        if problem.rule.cap is not None:
            shape = (*part.shape[:2], key.shape[1])
            slope = scratch.slope[: math.prod(shape)].view(shape)
        scores = scores_of(problem, plan, chunk, heads, part, key, scratch, slope)
        hide(problem, plan, chunk, scores, heads.many, hidden)
        picks = scratch.statistics[2 * rows :][: 2 * part.shape[0] * part.shape[1]].view(2, -1)
        weights = problem.rule.exponentials(scores, picked_rows(level, chunk.units, picks[0]))
        flowing = picked_rows(grad_out, chunk.units, scratch.grad_out)
        value = gathered(heads.value, chunk, scratch.value)
        grad = scratch.grad_scores[: weights.numel()].view(weights.shape)
        torch.bmm(flowing, value.mT, out=grad)
        if grads.value is not None:
            _add(sums[1], chunk, weights, flowing, scratch.value)
        grad.sub_(picked_rows(delta, chunk.units, picks[1])).mul_(weights)
        if slope is not None:
            grad.mul_(slope)
        if grads.query is not None:
            found = scratch.out[: part.numel()].view(part.shape)
            grad_query.index_copy_(0, chunk.units, torch.bmm(grad, key, out=found))
        if grads.key is not None:
            _add(sums[0], chunk, grad, part, scratch.key)
    if grads.query is not None:
        from_blocks(grad_query.mul_(problem.rule.scale), size, grads.query[place])


def _add(total: Tensor, chunk: Chunk, left: Tensor, right: Tensor, room: Tensor) -> None:
    """Add left^T @ right, [n, most * block_k, dim], to the blocks of [key blocks, block_k, dim] that were read."""
    shape = (len(chunk.counts), left.shape[2], right.shape[2])
    found = torch.bmm(left.mT, right, out=room[: math.prod(shape)].view(shape))
    total.index_add_(0, chunk.picked.flatten(), found.view(-1, *total.shape[1:]))
