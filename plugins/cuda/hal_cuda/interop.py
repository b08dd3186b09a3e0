"""The calls of FlashAttention under their own names, on this project's attention.

`from hal_cuda.interop import flash_attn_func` takes the place of `from flash_attn import flash_attn_func`: tensors are
[batch, length, heads, dim] or [tokens, heads, dim], the diagonal of unequal lengths ends in the last row and key, and a
window counts from it; -1 is no bound. On the tensors of a GPU its own kernels run, or torch's where those are faster;
tensors elsewhere go to the device that `hal_core.attention` chooses. What cannot be said by these calls is refused.

Source: flash-attn 2.8, flash_attn/flash_attn_interface.py.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from hal_core.plugin_api import Causal, ContractError, UnsupportedError, attention

Window = tuple[int, int]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention, differentiable.

    Args:
        q: [batch, len_q, heads, dim]. k: [batch, len_k, heads_kv, dim]. v: [batch, len_k, heads_kv, dim_v].
        dropout_p: share of the weights that is dropped; the pattern is this project's (see `hal_core.attention`).
        softmax_scale: None for 1 / sqrt(dim). softcap: 0 for none. window_size: keys left and right of the diagonal.
        alibi_slopes: refused. deterministic: the same bits in every run, gradients included.
        return_attn_probs: also give the log-sum-exp.

    Returns:
        [batch, len_q, heads, dim_v]; with `return_attn_probs` (out, log-sum-exp float32 [batch, heads, len_q], None):
        probabilities are never made.

    Raises:
        UnsupportedError: slopes were given. Anything else: as `hal_core.attention`.
    """
    _refuse(alibi_slopes=alibi_slopes)
    result = attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        dropout_p=dropout_p,
        scale=softmax_scale,
        softcap=softcap or None,
        enable_gqa=True,
        deterministic=deterministic,
        return_lse=return_attn_probs,
        **_edges(causal, window_size, q.shape[1] + k.shape[1], k.shape[1] - q.shape[1]),
    )
    if not return_attn_probs:
        return result.transpose(1, 2)
    return result.out.transpose(1, 2), result.lse, None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Any:
    """Attention of sequences that lie behind one another, differentiable without `seqused_k`.

    Args:
        q: [tokens, heads, dim]. k, v: [tokens of the keys, heads_kv, dim].
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], where each begins and the last ends. The longest lengths are
            numbers on the host, so nothing is read from the device.
        block_table: refused: `flash_attn_with_kvcache` takes pages.
        seqused_k: int32 [sequences], how many of its keys each sequence reads; the diagonal ends in the last of them.
        seqused_q: refused. The rest: as for `flash_attn_func`.

    Returns:
        [tokens, heads, dim_v]; with `return_attn_probs` (out, log-sum-exp float32 [heads, tokens], None).

    Raises:
        UnsupportedError: slopes, pages or seqused_q were given. Anything else: as `hal_core.attention`.
    """
    _refuse(alibi_slopes=alibi_slopes, block_table=block_table, seqused_q=seqused_q)
    result = attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        dropout_p=dropout_p,
        scale=softmax_scale,
        softcap=softcap or None,
        enable_gqa=True,
        deterministic=deterministic,
        return_lse=return_attn_probs,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        cache_seqlens=seqused_k,
        **_edges(causal, window_size, max_seqlen_q + max_seqlen_k),
    )
    if not return_attn_probs:
        return result[0].transpose(0, 1)
    return result.out[0].transpose(0, 1), result.lse[0], None


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention over a cache, without gradients; new keys and values are written into it first.

    Args:
        q: [batch, len_q, heads, dim].
        k_cache, v_cache: [caches, longest, heads_kv, dim], or pages [pages, page size, heads_kv, dim] with a
            block_table, int32 [batch, most pages].
        k, v: [batch, new, heads_kv, dim], written in place behind what each cache holds, turned like the queries where
            rotary_cos and rotary_sin [positions, rotary dim / 2] are given: pairs (2i, 2i + 1) with
            `rotary_interleaved`, else halves. A query's position is its own where the call is causal or has a window,
            else that of the first new key. A key that finds no place, behind the cache's end or in a page that the
            table names wrongly, is not written on a GPU and a ContractError on the host.
        cache_seqlens: keys that each cache holds before the call, int32 [batch] or one number; None: it is full.
        cache_batch_idx: which cache each batch entry reads, int32 [batch].
        cache_leftpad: slots before the first key of each cache, int32 [batch]; cache_seqlens and positions count them.
            Not with pages, and of a cache that is contiguous.
        num_splits: ignored, as its value changes no result but its last bits: the device divides the keys by itself.

    Returns:
        [batch, len_q, heads, dim_v]; with `return_softmax_lse` also the log-sum-exp float32 [batch, heads, len_q].

    Raises:
        UnsupportedError: slopes, or left padding with pages, were given.
        ContractError: one of k and v, or of the rotary tables, is missing; pages and cache_batch_idx were given
            together; new keys without cache_seqlens, or that find no place. Anything else: as `hal_core.attention`.
    """
    _refuse(cache_leftpad=None if block_table is None else cache_leftpad, alibi_slopes=alibi_slopes)
    for name, one, two in (("k and v", k, v), ("rotary_cos and rotary_sin", rotary_cos, rotary_sin)):
        if (one is None) != (two is None):
            raise ContractError(f"one of {name} was given: pass both")
    if block_table is not None and cache_batch_idx is not None:
        raise ContractError("block_table and cache_batch_idx were given: the table says already where a cache lies")
    batch, page = q.shape[0], k_cache.shape[1]
    if cache_seqlens is None:
        if k is not None:
            raise ContractError("new keys without cache_seqlens were given: pass how many keys each cache holds")
        held = torch.full((batch,), page * (1 if block_table is None else block_table.shape[1]), device=q.device)
    else:
        held = torch.as_tensor(cache_seqlens, device=q.device).expand(batch)
    held = held.to(torch.int32)
    if block_table is not None:
        pages = block_table
    else:  # a cache of its own is one page
        pages = torch.arange(batch, device=q.device) if cache_batch_idx is None else cache_batch_idx
        pages = pages.to(torch.int32)[:, None]
    with torch.no_grad():
        if rotary_cos is not None and rotary_sin is not None:
            moving = causal or tuple(window_size) != (-1, -1)
            q = _turned(q, rotary_cos, rotary_sin, held, rotary_interleaved, moving)
            k = None if k is None else _turned(k, rotary_cos, rotary_sin, held, rotary_interleaved, True)
        if k is not None and v is not None:
            _append(k_cache, v_cache, k, v, held, pages)
            held = (held + k.shape[1]).clamp(max=page * pages.shape[1])
        options: dict[str, Any] = {
            "scale": softmax_scale,
            "softcap": softcap or None,
            "enable_gqa": True,
            "return_lse": return_softmax_lse,
            **_edges(causal, window_size, q.shape[1] + page * pages.shape[1]),
        }
        if cache_leftpad is not None:
            return _left_padded(q, k_cache, v_cache, held, pages[:, 0], cache_leftpad, options)
        if block_table is None and cache_batch_idx is None:
            options |= {"cache_seqlens": held}
        else:
            options |= {"page_table": pages, "cache_seqlens": held}
        result = attention(q.transpose(1, 2), k_cache.transpose(1, 2), v_cache.transpose(1, 2), **options)
    if not return_softmax_lse:
        return result.transpose(1, 2)
    return result.out.transpose(1, 2), result.lse


def _append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, held: Tensor, pages: Tensor) -> None:
    """Write new keys and values behind what each cache holds; none of them outside the cache.

    One that finds no place is written where the last one of its cache is, with the same number: nothing is read back.
    """
    size, new = k_cache.shape[1], k.shape[1]
    place = held.long()[:, None] + torch.arange(new, device=k.device)
    page = pages.long().gather(1, (place // size).clamp(0, pages.shape[1] - 1))
    fits = (place >= 0) & (place < size * pages.shape[1]) & (page >= 0) & (page < k_cache.shape[0])
    if k.device.type == "cpu" and not bool(fits.all()):
        raise ContractError(
            f"{new} new keys behind {held.tolist()} in pages of {size} were given to a table {list(pages.shape)}: "
            "pass room for them, and pages that exist"
        )
    slots = page * size + place % size
    # Sent to the first token of its batch entry that fits; an entry with none writes what is there.
    first = fits.int().argmax(1, keepdim=True)
    token = torch.where(fits, torch.arange(new, device=k.device), first)
    none = ~fits.any(1)
    slots = slots.gather(1, token).clamp(0, k_cache.shape[0] * size - 1)
    for cache, rows in ((k_cache, k), (v_cache, v)):
        wanted = rows.gather(1, token[:, :, None, None].expand_as(rows))
        there = cache[slots // size, slots % size]
        cache[slots // size, slots % size] = torch.where(none[:, None, None, None], there, wanted)


def _left_padded(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, held: Tensor, caches: Tensor, leftpad: Tensor, options: dict[str, Any]
) -> Any:
    """Attention over caches whose keys begin behind some slots: sequences in one row of keys, each with its begin."""
    if leftpad.shape != (q.shape[0],):
        raise ContractError(f"cache_leftpad {list(leftpad.shape)} was given: use [{q.shape[0]}]")
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ContractError("cache_leftpad with a cache that is not contiguous was given: pass a contiguous cache")
    batch, len_q, longest = q.shape[0], q.shape[1], k_cache.shape[1]
    leftpad = leftpad.to(torch.int32)
    begins = torch.cat([caches * longest + leftpad, caches.new_full((1,), k_cache.shape[0] * longest)])
    result = attention(
        q.flatten(0, 1).transpose(0, 1)[None],
        k_cache.flatten(0, 1).transpose(0, 1)[None],
        v_cache.flatten(0, 1).transpose(0, 1)[None],
        cu_seqlens_q=torch.arange(0, (batch + 1) * len_q, len_q, dtype=torch.int32, device=q.device),
        cu_seqlens_k=begins.to(torch.int32),
        max_seqlen_q=len_q,
        max_seqlen_k=longest,
        cache_seqlens=(held - leftpad).clamp(min=0),
        **options,
    )
    out = (result.out if options["return_lse"] else result)[0].transpose(0, 1).unflatten(0, (batch, len_q))
    return (out, result.lse[0].unflatten(1, (batch, len_q)).transpose(0, 1)) if options["return_lse"] else out


def _edges(causal: bool, window: Window, most: int, shift: int | None = None) -> dict[str, Any]:
    """Arguments of `attention` for a diagonal that ends in the last row and key.

    A window that reaches right of it is a diagonal that lies so much further right; with an open right side, beyond all
    keys. most: queries and keys together. shift: keys beyond the queries, where they are the same for all sequences.
    """
    left, right = (None if side < 0 else int(side) for side in window)
    if not causal and left is None and right is None:
        return {}
    if not causal and shift is not None:
        return {"window": (left, right), "diagonal": shift}
    beyond = 0 if causal else most if right is None else min(right, most)
    edges = {"causal": Causal.BOTTOM_RIGHT, "diagonal": beyond}
    return edges if left is None else edges | {"window": (left + beyond, None)}


def _turned(x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, interleaved: bool, moving: bool) -> Tensor:
    """Rotary embedding of [batch, length, heads, dim] from position `first` [batch] on; all at it unless `moving`."""
    place = first.long()[:, None] + (torch.arange(x.shape[1], device=x.device) if moving else 0)
    cos, sin = (table[place].unsqueeze(2).float() for table in (cos, sin))
    half = cos.shape[3]
    head, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    one, two = (head[..., 0::2], head[..., 1::2]) if interleaved else head.split(half, dim=-1)
    parts = (one * cos - two * sin, two * cos + one * sin)
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned.to(x.dtype), rest], -1)


def _refuse(**given: Any) -> None:
    fixes = {
        "alibi_slopes": "an additive mask given to hal_core.attention",
        "block_table": "flash_attn_with_kvcache",
        "cache_leftpad": "a cache without pages",
        "seqused_q": "cu_seqlens_q that leave out the other rows",
    }
    for name, value in given.items():
        if value is not None:
            _refused(name, fixes[name])


def _refused(what: str, instead: str) -> NoReturn:
    raise UnsupportedError(f"{what} was given, and this call cannot say it: use {instead}")


__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
