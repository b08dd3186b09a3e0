"""`torch.nn.attention.varlen.varlen_attn` under its own name, on this project's attention."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from hal_core.plugin_api import Causal, ContractError, UnsupportedError, attention


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """Attention of sequences that lie behind one another, differentiable.

    It has the arguments and the meaning of PyTorch's function, and takes tensors of every device that
    `hal_core.attention` serves. The diagonal of a causal call or of a window ends in a sequence's last row and key.

    Args:
        query: [tokens, heads, dim]. key, value: [tokens of the keys, heads_kv, dim], or with a `block_table` pages
            [pages, page size, heads_kv, dim].
        cu_seq_q, cu_seq_k: int32 [sequences + 1], where each sequence begins and the last ends. cu_seq_k may be None
            where there is a block_table.
        max_q, max_k: the longest lengths.
        return_aux: with an attribute `lse` that is true (`torch.nn.attention.varlen.AuxRequest(lse=True)`), the
            log-sum-exp is returned too.
        scale: None for 1 / sqrt(dim).
        window_size: keys left and right of the diagonal, -1 for no bound; (-1, 0) is causal.
        enable_gqa: whether key and value may have fewer heads.
        seqused_k: int32 [sequences], keys in use of each sequence; with a block_table alone, where it is required.
        block_table: int32 [sequences, most pages], the pages of each sequence in order. Every sequence must have max_q
            queries, and no gradients are given.
        num_splits: 1 is refused: it promises the same bits of a sequence whatever else is in the batch, and tiles are
            chosen for the batch. Other values change nothing: the device divides keys by itself.

    Returns:
        [tokens, heads, dim of value]; with the log-sum-exp asked for (out, float32 [heads, tokens], natural, -inf for a
        row that reads no key).

    Raises:
        ValueError: heads do not match, as PyTorch's function says it.
        ContractError: a block_table without seqused_k. UnsupportedError: what is refused above; a window that is not
            causal where queries and keys may differ in number; seqused_k without pages. Anything else: as
            `hal_core.attention`.

    Source: PyTorch 2.13, torch/nn/attention/varlen.py.
    """
    heads, heads_kv = query.shape[1], key.shape[-2]
    if heads != heads_kv and not enable_gqa:
        raise ValueError(
            f"Expect query and key/value to have the same number of heads but got Hq={heads} and Hkv={heads_kv}. "
            "Try setting enable_gqa=True for GQA."
        )
    if heads % heads_kv:
        raise ValueError(
            f"Expect number of query heads to be a multiple of kv heads for GQA but got Hq={heads} and Hkv={heads_kv}."
        )
    lse = return_aux is not None and bool(return_aux.lse)
    left, right = (None if side < 0 else int(side) for side in window_size)
    causal = right == 0
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa, "return_lse": lse}
    if causal:
        options["causal"] = Causal.BOTTOM_RIGHT
    if left is not None or (right is not None and not causal):
        options["window"] = (left, None if causal else right)
        if not causal and (block_table is not None or cu_seq_q is not cu_seq_k):
            _refused("a window without causal over sequences whose queries and keys may differ in number")
    if num_splits == 1:
        _refused("num_splits=1")
    if block_table is not None:
        return _paged(query, key, value, cu_seq_q, max_q, seqused_k, block_table, options)
    if seqused_k is not None:
        _refused("seqused_k without a block_table")
    result = attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        cu_seqlens_q=cu_seq_q,
        cu_seqlens_k=cu_seq_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        **options,
    )
    return (result.out[0].transpose(0, 1), result.lse[0]) if lse else result[0].transpose(0, 1)


def _paged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    max_q: int,
    seqused_k: Tensor | None,
    block_table: Tensor,
    options: dict[str, Any],
) -> Any:
    if seqused_k is None:
        raise ContractError("a block_table without seqused_k was given: pass how many keys each sequence holds")
    sequences = cu_seq_q.numel() - 1
    if query.shape[0] != sequences * max_q:
        _refused("a block_table and queries that differ in number")
    with torch.no_grad():
        result = attention(
            query.unflatten(0, (sequences, max_q)).transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            page_table=block_table,
            cache_seqlens=seqused_k,
            **options,
        )
    if not options["return_lse"]:
        return result.transpose(1, 2).flatten(0, 1)
    return result.out.transpose(1, 2).flatten(0, 1), result.lse.transpose(0, 1).flatten(1)


def _refused(what: str) -> NoReturn:
    raise UnsupportedError(
        f"{what} was given, and hal_cuda.varlen_attn cannot say it: use torch.nn.attention.varlen.varlen_attn"
    )


__all__ = ["varlen_attn"]
