"""The public door: every input is checked here, once, and described as an `AttentionRequest`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ContractError
from .request import AttentionRequest, Causal, MaskKind, SequenceTables
from .tiling import BlockPlan

LAYOUT = "[batch, heads, length, head_dim]"
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}


class Options(NamedTuple):
    """The static arguments of a call, as given."""

    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    causal: Causal | str | None = None
    diagonal: int = 0
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    return_lse: bool = False
    max_error: float | None = None
    deterministic: bool = False
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None


def describe(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, plan: BlockPlan | None,
    tables: SequenceTables | None, options: Options, grads: frozenset[str],
) -> AttentionRequest:  # fmt: skip
    """The exact request of a call. Raises ContractError with one sentence for the first thing that is wrong."""
    _check_tensors(query, key, value)
    batch, heads_q, len_q, dim_qk = query.shape
    heads_kv, len_k = key.shape[1], key.shape[2]
    packed, page_size = False, None
    if tables is not None:
        packed, page_size = tables.cu_seqlens_q is not None, key.shape[2] if tables.page_table is not None else None
        batch, len_q, len_k = _table_sizes(query, key, tables, options)
    elif key.shape[0] != batch:
        raise ContractError(f"batch {batch} of query and {key.shape[0]} of key were given: make them equal")
    _check_heads(heads_q, heads_kv, options.enable_gqa)
    cache_dtype = _dtype_name(key) if key.dtype != query.dtype else None
    if cache_dtype is not None and (tables is None or tables.key_scale is None or tables.value_scale is None):
        raise ContractError(
            f"query {query.dtype} and key {key.dtype} were given: cast, or pass key_scale and value_scale"
        )
    shape = (batch, heads_q, len_q, len_k)
    if mask is not None:
        _check_mask(mask, shape, query, packed)
    if plan is not None:
        check_plan(plan, shape, query)
    kind = MaskKind.NONE if mask is None else MaskKind.BOOLEAN if mask.dtype == torch.bool else MaskKind.ADDITIVE
    return AttentionRequest(
        batch=batch, heads_q=heads_q, heads_kv=heads_kv, len_q=len_q, len_k=len_k, dim_qk=dim_qk, dim_v=value.shape[3],
        dtype=_dtype_name(query), device=str(query.device), mask=kind, packed=packed, page_size=page_size,
        cache_dtype=cache_dtype, block_plan=None if plan is None else (plan.block_q, plan.block_k, plan.indices.shape[-1]),
        last_dim_contiguous=all(t.stride(3) == 1 or t.shape[3] == 1 for t in (query, key, value)),
        grads=grads, lse=bool(options.return_lse), grad_lse=bool(options.return_lse and grads), **_checked(options),
    )  # fmt: skip


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise ContractError(f"{name} is a {type(tensor).__name__}: pass a torch tensor {LAYOUT}")
        if tensor.dim() != 4:
            raise ContractError(f"{name} has shape {list(tensor.shape)}: reshape it to {LAYOUT}")
        if tensor.layout != torch.strided:
            raise ContractError(
                f"{name} has layout {tensor.layout}: pass a dense tensor, and a block_plan for sparse attention"
            )
        if tensor.dtype not in _FLOATS | _FP8:
            raise ContractError(f"{name} is {tensor.dtype}: cast it to float32, bfloat16, float16 or float64")
    if query.dtype in _FP8:
        raise ContractError(f"query is {query.dtype}: only key and value may be FP8, with key_scale and value_scale")
    if value.dtype != key.dtype or (key.dtype != query.dtype and key.dtype not in _FP8):
        given = f"query {query.dtype}, key {key.dtype} and value {value.dtype}"
        raise ContractError(f"{given} were given: cast them to one dtype")
    if not query.device == key.device == value.device:
        given = f"query on {query.device}, key on {key.device} and value on {value.device}"
        raise ContractError(f"{given} were given: move them to one device")
    if key.shape[:3] != value.shape[:3]:
        given = f"key {list(key.shape)} and value {list(value.shape)}"
        raise ContractError(f"{given} were given: batch, heads and length must be equal")
    if query.shape[3] != key.shape[3]:
        raise ContractError(f"head_dim {query.shape[3]} of query and {key.shape[3]} of key were given: make them equal")
    if 0 in (query.shape[3], value.shape[3]):
        raise ContractError("a head_dim of 0 was given: use 1 or more")


def _check_heads(heads_q: int, heads_kv: int, enable_gqa: bool) -> None:
    if heads_q == heads_kv:
        return
    given = f"{heads_q} query heads and {heads_kv} key heads were given"
    if heads_kv == 0 or heads_q % heads_kv:
        raise ContractError(f"{given}: query heads must be a multiple of key heads")
    if not enable_gqa:
        raise ContractError(f"{given}: pass enable_gqa=True for grouped heads")


def _table_sizes(query: Tensor, key: Tensor, tables: SequenceTables, options: Options) -> tuple[int, int, int]:
    """(batch, len_q, len_k) of a call with tables; lengths may be upper bounds."""
    t = tables
    if (t.cu_seqlens_q is None) != (t.cu_seqlens_k is None):
        raise ContractError("one of cu_seqlens_q and cu_seqlens_k was given: pass both")
    if (t.page_table is None) != (t.cache_seqlens is None):
        raise ContractError("one of page_table and cache_seqlens was given: pass both")
    if t.cu_seqlens_q is not None and t.page_table is not None:
        raise ContractError("packed lengths and a paged cache were given: use one of them")
    for name, table in zip(t._fields[:4], t[:4], strict=True):
        if table is not None and (not isinstance(table, Tensor) or table.dtype != torch.int32):
            kind = table.dtype if isinstance(table, Tensor) else type(table).__name__
            raise ContractError(f"{name} is {kind}: pass an int32 tensor")
    if t.cu_seqlens_q is not None:
        return _packed_sizes(query, key, t, options)
    if t.page_table is not None:
        batch = query.shape[0]
        if t.page_table.dim() != 2 or t.page_table.shape[0] != batch or t.cache_seqlens.shape != (batch,):
            given = f"page_table {list(t.page_table.shape)} and cache_seqlens {list(t.cache_seqlens.shape)}"
            raise ContractError(f"{given} were given: use [batch, most pages] and [batch] with batch {batch}")
        return batch, query.shape[2], t.page_table.shape[1] * key.shape[2]
    if query.shape[0] != key.shape[0]:
        raise ContractError(f"batch {query.shape[0]} of query and {key.shape[0]} of key were given: make them equal")
    return query.shape[0], query.shape[2], key.shape[2]


def _packed_sizes(query: Tensor, key: Tensor, t: SequenceTables, options: Options) -> tuple[int, int, int]:
    if t.cu_seqlens_q.dim() != 1 or t.cu_seqlens_q.shape != t.cu_seqlens_k.shape or len(t.cu_seqlens_q) < 2:
        given = f"cu_seqlens_q {list(t.cu_seqlens_q.shape)} and cu_seqlens_k {list(t.cu_seqlens_k.shape)}"
        raise ContractError(f"{given} were given: use [sequences + 1] for both")
    if query.shape[0] != 1 or key.shape[0] != 1:
        raise ContractError(f"packed query {list(query.shape)} and key {list(key.shape)} were given: use a batch of 1")
    if options.max_seqlen_q is None or options.max_seqlen_k is None:
        raise ContractError("packed lengths without max_seqlen_q and max_seqlen_k were given: pass the longest lengths")
    return len(t.cu_seqlens_q) - 1, int(options.max_seqlen_q), int(options.max_seqlen_k)


def check_tables(tables: SequenceTables, request: AttentionRequest, query: Tensor, key: Tensor) -> None:
    """Check the contents of packed or paged tables; reads them, so it waits for an accelerator.

    Raises ContractError where an entry would make a device read outside its memory.
    """
    for name, cumulative, longest, total in (
        ("cu_seqlens_q", tables.cu_seqlens_q, request.len_q, query.shape[2]),
        ("cu_seqlens_k", tables.cu_seqlens_k, request.len_k, key.shape[2]),
    ):
        if cumulative is None:
            continue
        lengths = cumulative.diff()
        if (
            int(cumulative[0]) != 0
            or int(cumulative[-1]) != total
            or int(lengths.min()) < 0
            or int(lengths.max()) > longest
        ):
            raise ContractError(
                f"{name} {cumulative.tolist()} was given: start at 0, never fall, end at {total}, and no step over {longest}"
            )
    if tables.page_table is not None and tables.page_table.numel():
        held = tables.cache_seqlens
        if int(held.min()) < 0 or int(held.max()) > request.len_k:
            raise ContractError(
                f"cache_seqlens {held.tolist()} was given: use 0 to {request.len_k} (pages times page size)"
            )
        pages_used = -(-held // key.shape[2])
        used = torch.arange(tables.page_table.shape[1], device=held.device) < pages_used.unsqueeze(1)
        entries = tables.page_table[used]
        if entries.numel() and (int(entries.min()) < 0 or int(entries.max()) >= key.shape[0]):
            raise ContractError(f"a page_table entry outside 0 to {key.shape[0] - 1} was given: name existing pages")


def _check_mask(mask: Any, shape: tuple[int, ...], query: Tensor, packed: bool) -> None:
    if not isinstance(mask, Tensor):
        raise ContractError(f"attn_mask is a {type(mask).__name__}: pass a tensor")
    if packed:
        raise ContractError("attn_mask and packed lengths were given: use one of them")
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise ContractError(f"attn_mask is {mask.dtype}: pass bool (True: attend), {query.dtype} or torch.float32")
    if mask.device != query.device:
        raise ContractError(f"attn_mask on {mask.device} and query on {query.device} were given: move the mask")
    check_mask_shape(mask, shape)


def check_mask_shape(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ContractError unless the mask broadcasts to [batch, heads, len_q, len_k]."""
    given = mask.shape
    if not 2 <= len(given) <= 4 or any(g not in (1, s) for g, s in zip(reversed(given), reversed(shape), strict=False)):
        raise ContractError(f"attn_mask has shape {list(given)}: use one that broadcasts to {list(shape)}")


def check_plan(plan: BlockPlan, shape: tuple[int, ...], query: Tensor) -> None:
    """Raise ContractError unless the block plan covers [batch, heads, len_q, len_k]."""
    if not isinstance(plan, BlockPlan):
        raise ContractError(f"block_plan is a {type(plan).__name__}: pass a hal_core.BlockPlan")
    batch, heads, len_q, len_k = shape
    if plan.block_q < 1 or plan.block_k < 1:
        raise ContractError(f"blocks of {plan.block_q} x {plan.block_k} were given: use 1 or more")
    blocks = (-(-len_q // plan.block_q), -(-len_k // plan.block_k))
    indices, counts = plan.indices, plan.counts
    fits = (
        indices.dim() == 4 and counts.shape == indices.shape[:3] and indices.shape[2] == blocks[0]
        and indices.shape[0] in (1, batch) and indices.shape[1] in (1, heads) and indices.shape[3] <= max(blocks[1], 1)
    )  # fmt: skip
    if not fits or indices.dtype != torch.int32 or counts.dtype != torch.int32:
        given = (
            f"block_plan indices {list(indices.shape)} {indices.dtype} and counts {list(counts.shape)} {counts.dtype}"
        )
        wanted = f"[1 or {batch}, 1 or {heads}, {blocks[0]}, at most {blocks[1]}]"
        raise ContractError(f"{given} were given: use int32, {wanted} and the same without the last dimension")
    if indices.device != query.device or counts.device != query.device:
        raise ContractError(f"block_plan on {indices.device} and query on {query.device} were given: move the plan")
    if indices.numel():
        listed = torch.arange(indices.shape[3], device=indices.device) < counts.unsqueeze(-1)
        wrong = listed & ((indices < 0) | (indices >= blocks[1]))
        if bool(wrong.any()) or int(counts.min()) < 0 or int(counts.max()) > indices.shape[3]:
            raise ContractError(
                f"a block_plan entry outside 0 to {blocks[1] - 1}, or a count over its list, was given: fix the plan"
            )


def _checked(o: Options) -> dict[str, Any]:
    """The request's fields of the options, each within its domain."""
    if not 0.0 <= o.dropout_p < 1.0:
        raise ContractError(f"dropout_p {o.dropout_p} was given: use 0 or more and less than 1")
    for name, number in (("scale", o.scale), ("softcap", o.softcap), ("max_error", o.max_error)):
        if number is not None and not math.isfinite(number):
            raise ContractError(f"{name} {number} was given: use a finite number or None")
    if o.softcap is not None and o.softcap <= 0:
        raise ContractError(f"softcap {o.softcap} was given: use a positive number or None")
    if o.max_error is not None and o.max_error < 0:
        raise ContractError(f"max_error {o.max_error} was given: use 0 or more, or None")
    return {
        "causal": _causal(o), "diagonal": int(o.diagonal), "window": _window(o.window),
        "softcap": None if o.softcap is None else float(o.softcap), "scale": None if o.scale is None else float(o.scale),
        "dropout": float(o.dropout_p), "deterministic": bool(o.deterministic), "max_error": o.max_error,
    }  # fmt: skip


def _causal(o: Options) -> Causal:
    if o.causal is None:
        return Causal.TOP_LEFT if o.is_causal else Causal.NONE
    try:
        causal = Causal(o.causal)
    except ValueError:
        raise ContractError(f"causal {o.causal!r} was given: use 'none', 'top_left' or 'bottom_right'") from None
    if o.is_causal and causal is not Causal.TOP_LEFT:
        raise ContractError(
            f"is_causal=True and causal={str(causal)!r} were given: is_causal is 'top_left', pass one of them"
        )
    return causal


def _window(window: Any) -> tuple[int | None, int | None] | None:
    if window is None:
        return None
    whole = isinstance(window, tuple | list) and len(window) == 2
    if not whole or any(side is not None and (not isinstance(side, int) or side < 0) for side in window):
        raise ContractError(f"window {window!r} was given: use (left, right), each 0 or more keys, None for no bound")
    return None if tuple(window) == (None, None) else (window[0], window[1])


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
