"""Attention by a sparse tiling: planned, run where blocks can be skipped, masked where they cannot, and judged."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, BlockPlan, Causal, ContractError, UnsupportedError

from ..arguments import is_number, need_tensor
from .lost_mass import dense_lse, lost_mass, lost_mass_bound
from .selection import SparseTiling, cut_of

#: How the lost mass of a call is found: a certain bound, exactly on some rows, or exactly on all.
Judge = Literal["bound", "rows", "exact"]
#: Rows that "rows" looks at.
SAMPLED_ROWS = 64


class MaskWarning(UserWarning):
    """A device that cannot skip blocks was given a mask: the result is the same, nothing is saved."""


class SparseResult(NamedTuple):
    """What `sparse_attention` gives.

    Attributes:
        out: [batch, heads, len_q, dim_v]. plan: that was run or expanded.
        visible: block pairs that causal leaves, of one head.
        skipped: whether the device left out what the plan leaves out; False: it had a mask, or the call was dense.
        dense: whether the quality gate had dense attention computed instead.
        lost: share of each judged row's attention outside the plan, or a bound of it, [batch, heads, rows]; None where
            it was not asked for.
    """

    out: Tensor
    plan: BlockPlan
    visible: int
    skipped: bool
    dense: bool
    lost: Tensor | None

    @property
    def density(self) -> float:
        """Share of the visible block pairs that was computed, of all heads on average. Waits for the device."""
        read = float(self.plan.counts.float().mean() * self.plan.counts.shape[-1])
        return 1.0 if self.dense else read / max(self.visible, 1)


def request_of(query: Tensor, key: Tensor, value: Tensor, causal: str, scale: float | None) -> AttentionRequest:
    """The request that a tiling plans for: shapes, causal and scale."""
    return AttentionRequest(
        batch=query.shape[0],
        heads_q=query.shape[1],
        heads_kv=key.shape[1],
        len_q=query.shape[2],
        len_k=key.shape[2],
        dim_qk=query.shape[3],
        dim_v=value.shape[3],
        dtype=str(query.dtype).removeprefix("torch."),
        device=str(query.device),
        causal=Causal(causal),
        scale=scale,
    )


#: Arguments of `hal.attention` that the plan, the judge or this function speak for.
_OWN = ("attn_mask", "block_plan", "diagonal", "is_causal", "return_lse", "softcap", "tiling", "window")
_TABLES = ("cu_seqlens_q", "cu_seqlens_k", "page_table", "cache_seqlens", "key_scale", "value_scale")


def _check(tensors: tuple[Any, Any, Any], tiling: Any, causal: Any, options: dict[str, Any]) -> None:
    for name, given in zip(("query", "key", "value"), tensors, strict=True):
        need_tensor(name, given, "[batch, heads, length, head_dim]")
        if given.dim() != 4 or not given.is_floating_point():
            raise ContractError(
                f"{name} {list(given.shape)} {given.dtype} was given: pass floats [batch, heads, length, head_dim]"
            )
    query, key, value = tensors
    fits = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3] and key.shape[:3] == value.shape[:3]
    if not fits or not key.shape[1] or query.shape[1] % key.shape[1]:
        shapes = ", ".join(str(list(t.shape)) for t in tensors)
        raise ContractError(
            f"query, key and value {shapes} were given: use one batch, one head_dim of query and key, one shape of key "
            "and value but for head_dim, and query heads that are a multiple of theirs"
        )
    if not isinstance(tiling, SparseTiling):
        raise ContractError(
            f"tiling is a {type(tiling).__name__}: pass hal_nn.sparse.tiling_of(pattern, sparsity, block_size)"
        )
    if causal not in (known := [each.value for each in Causal]):
        raise ContractError(f"causal {causal!r} was given: use one of {', '.join(map(repr, known))}")
    if own := [name for name in (*_OWN, *_TABLES) if isinstance(options.get(name), Tensor) or options.get(name)]:
        raise ContractError(
            f"{', '.join(own)} was given to sparse_attention, whose plan does not know it: leave it out, or call "
            "hal.attention with block_plan=tiling.plan(...)"
        )


def need_judge(judge: Any) -> None:
    """Raise ContractError unless an argument is a `Judge` or None."""
    if judge not in (None, "bound", "rows", "exact"):
        raise ContractError(f"judge {judge!r} was given: use 'bound', 'rows', 'exact' or None")


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiling: SparseTiling,
    *,
    causal: str = "none",
    scale: float | None = None,
    judge: Judge | None = None,
    max_lost: float | None = None,
    **options: Any,
) -> SparseResult:
    """Attention that reads the blocks of a tiling's plan. Gradients go through it as through dense attention.

    Args:
        query, key, value: as for `hal.attention`; grouped heads are allowed.
        tiling: plans the call; scoring and planning are part of it, nothing is kept between calls.
        causal: "none", "top_left" or "bottom_right".
        judge: find each row's lost mass. "bound": a bound that certainly holds, for a few percent of dense attention.
            "rows": exactly, on 64 rows spread over the call. "exact": on all rows, for the cost of dense attention.
        max_lost: the quality gate: where a judged row loses more, the whole call is computed densely. Needs `judge`.
        options: more of `hal.attention`: backend, objective and others. A mask or a window is not among them.

    Returns:
        A `SparseResult`.

    Warns:
        MaskWarning: no device in question can skip blocks; the plan is expanded to a mask.

    Raises:
        ContractError: an argument that cannot be. UnsupportedError: no device runs the call as a mask either.
    """
    _check((query, key, value), tiling, causal, options)
    if max_lost is not None and (judge is None or not is_number(max_lost) or not 0 <= max_lost <= 1):
        raise ContractError(
            f"max_lost {max_lost!r} and judge {judge!r} were given: use a share from 0 to 1 and a judge"
        )
    need_judge(judge)
    request = request_of(query, key, value, causal, scale)
    plan = tiling.plan(request, {}, query=query.detach(), key=key.detach())
    plain = {"causal": causal, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1], **options}
    skipped = True
    try:
        result = hal.attention(query, key, value, block_plan=plan, return_lse=judge is not None, **plain)
    except UnsupportedError as error:
        skipped = False
        mask = hal.expand_block_plan(plan, query.shape[2], key.shape[2])
        try:
            result = hal.attention(query, key, value, mask, return_lse=judge is not None, **plain)
        except UnsupportedError:
            raise error from None
        warnings.warn(
            f"a device that cannot skip blocks was given {tiling.name} as a mask: nothing is saved "
            f"({str(error).splitlines()[0]})",
            MaskWarning,
            stacklevel=2,
        )
    visible = cut_of(request, plan.block_q, plan.block_k, 0.0, "cpu").visible
    if judge is None:
        return SparseResult(result, plan, visible, skipped, False, None)
    out, lse = result
    lost = _judged(judge, (query, key, value), plan, lse.detach(), request, plain)
    if max_lost is None or not lost.numel() or float(lost.max()) <= max_lost:
        return SparseResult(out, plan, visible, skipped, False, lost)
    out = hal.attention(query, key, value, **plain)
    return SparseResult(out, plan, visible, False, True, lost)


def _judged(
    judge: Judge,
    tensors: tuple[Tensor, Tensor, Tensor],
    plan: BlockPlan,
    lse: Tensor,
    request: AttentionRequest,
    options: dict[str, Any],
) -> Tensor:
    query, key, value = (t.detach() for t in tensors)
    if judge == "bound":
        return lost_mass_bound(query, key, plan, lse, request)
    if judge == "exact":
        return lost_mass(lse, dense_lse(query, key, value, **options))
    rows = torch.linspace(0, request.len_q - 1, min(SAMPLED_ROWS, request.len_q), device=query.device).long().unique()
    low, high = request.band(request.len_q, request.len_k)
    mask = None
    if (low, high) != (None, None):
        away = torch.arange(request.len_k, device=query.device) - rows.unsqueeze(1)
        mask = torch.ones_like(away, dtype=torch.bool)
        mask &= True if high is None else away <= high
        mask &= True if low is None else away >= low
        mask = mask[None, None]
    options = {name: given for name, given in options.items() if name != "causal"}
    full = dense_lse(query[:, :, rows], key, value, attn_mask=mask, **options)
    return lost_mass(lse[:, :, rows], full)
