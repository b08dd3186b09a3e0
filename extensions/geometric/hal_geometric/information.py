"""What attention's weights hold, from attention itself: entropy, mass of keys, distance of heads; and ranks.

Nothing of size len_q * len_k is formed: each function makes one to three calls of `hal.attention`, on any device that
gives a log-sum-exp. query: [B, H, len_q, d], key: [B, H, len_k, d]; `options` are further arguments of `hal.attention`
(backend, is_causal, attn_mask, window ...). Entropies are in nats. log-sum-exp is written lse, p a row's weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hal_core as hal
from hal_core import ContractError


def _scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _lse(query: Tensor, key: Tensor, scale: float, **options: Any) -> Tensor:
    return hal.attention(query, key, key, scale=scale, return_lse=True, **options).lse  # type: ignore[no-any-return]


def entropy(query: Tensor, key: Tensor, scale: float | None = None, **options: Any) -> Tensor:
    """Shannon entropy H = -sum p log p of each row's weights, [B, H, len_q]; 0 <= H <= log len_k.

    H = lse - scale q . attention(q, k', k'), with k' = k - mean(k): centred keys have the same weights and smaller
    scores, so that sharp rows do not cancel. One call; differentiable where the device has "lse_grad". A row without
    keys has entropy 0. With an additive mask the mask is no part of q . k: refused.

    Raises:
        ContractError: an additive mask, a softcap or dropout.
    """
    _plain(options)
    scale = _scale(query, scale)
    centred = key - key.mean(2, keepdim=True)
    grouped = query.shape[1] != key.shape[1]
    out, lse = hal.attention(query, centred, centred, scale=scale, return_lse=True, enable_gqa=grouped, **options)
    found = lse - scale * (query * out).sum(-1).to(lse.dtype)
    return torch.where(lse.isneginf(), torch.zeros_like(found), found)


def renyi(query: Tensor, key: Tensor, order: float, scale: float | None = None, **options: Any) -> Tensor:
    """Renyi entropy H_a = log(sum p^a) / (1 - a) of each row, [B, H, len_q]; H_2 <= H <= log len_k.

    H_a = (lse(a s) - a lse(s)) / (1 - a) for scores s: two calls.

    Raises:
        ContractError: an order of 1 (use `entropy`) or not above 0.
    """
    _plain(options)
    if not order > 0 or order == 1:
        raise ContractError(f"order {order} was given: use one above 0, and entropy() for 1")
    scale, centred = _scale(query, scale), key - key.mean(2, keepdim=True)
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    once, again = (_lse(query, centred, factor * scale, **options) for factor in (1.0, order))
    found = (again - order * once) / (1 - order)
    return torch.where(once.isneginf(), torch.zeros_like(found), found)


def _plain(options: dict[str, Any]) -> None:
    mask = options.get("attn_mask")
    wrong = [name for name in ("softcap", "block_plan", "return_lse") if options.get(name)]
    wrong += ["an additive mask"] * (mask is not None and mask.dtype != torch.bool)
    wrong += ["dropout_p"] * bool(options.get("dropout_p"))
    if wrong:
        raise ContractError(f"{wrong[0]} was given: the weights must be a softmax of scale * q . k over visible keys")


def key_mass(query: Tensor, key: Tensor, scale: float | None = None, *, backend: str | None = None) -> Tensor:
    """How much weight each key gets of all rows, sum_i p_ij, [B, H, len_k], float32: heavy hitters. Sums to len_q.

    The column sums are exp lse of attention(k, q) with the mask -lse_i of each row i, [B, H, 1, len_q]: two calls.
    Heads are not grouped; the device takes additive masks.
    """
    scale = _scale(query, scale)
    centred = key - key.mean(2, keepdim=True)
    rows = _lse(query, centred, scale, backend=backend)
    mask = (-rows).to(query.dtype).unsqueeze(2)
    return _lse(centred, query, scale, attn_mask=mask, backend=backend).exp()


def head_distance(
    query: Tensor,
    key: Tensor,
    other_query: Tensor,
    other_key: Tensor,
    scale: float | None = None,
    *,
    kind: str = "fisher_rao",
    **options: Any,
) -> Tensor:
    """Distance between the weights p and p' of two heads on the same keys, row by row, [B, H, len_q]: redundant heads.

    From the Bhattacharyya coefficient c = sum sqrt(p p') = exp(lse([q, q'], [k, k'], scale / 2) - (lse + lse') / 2):
    "fisher_rao" 2 arccos c, at most pi; "hellinger" sqrt(2 - 2 c); "coefficient" c itself. Three calls, one of them
    with the head size 2 d.
    """
    if kind not in ("fisher_rao", "hellinger", "coefficient"):
        raise ContractError(f"kind {kind!r} was given: use fisher_rao, hellinger or coefficient")
    _plain(options)
    scale = _scale(query, scale)
    keys = [k - k.mean(2, keepdim=True) for k in (key, other_key)]
    own = [_lse(q, k, scale, **options) for q, k in zip((query, other_query), keys, strict=True)]
    both = _lse(torch.cat([query, other_query], -1), torch.cat(keys, -1), scale / 2, **options)
    coefficient = (both - (own[0] + own[1]) / 2).exp().clamp(0, 1)
    if kind == "coefficient":
        return coefficient
    return 2 * torch.arccos(coefficient) if kind == "fisher_rao" else (2 - 2 * coefficient).sqrt()


def effective_rank(x: Tensor) -> Tensor:
    """exp H of the normalised singular values of x [..., m, n], [...]: between 1 and min(m, n); 0 for zeros.

    Source: Roy & Vetterli 2007, The effective rank.
    """
    values = torch.linalg.svdvals(x)
    share = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    rank = torch.special.entr(share).sum(-1).exp()
    return torch.where(values[..., 0] > 0, rank, torch.zeros_like(rank))


def stable_rank(x: Tensor) -> Tensor:
    """|x|_F^2 / |x|_2^2 of x [..., m, n], [...]: at most its rank."""
    values: Tensor = torch.linalg.svdvals(x)
    return values.square().sum(-1) / values[..., 0].square().clamp_min(torch.finfo(values.dtype).tiny)


def density(x: Tensor) -> Tensor:
    """The density matrix rho = x^T x / tr(x^T x) of rows x [..., m, d], [..., d, d].

    -log tr rho^2 <= von Neumann entropy <= log d.
    """
    gram = x.mT.conj() @ x
    return gram / gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
