"""Every input of a call is checked here, once, and described as an `AttentionRequest`."""

import itertools
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import refuse
from ..plans import BlockPlan
from ..request import AttentionRequest, Causal, MaskKind, SequenceMetadata
from .operands import Operands

LAYOUT = "[batch, heads, length, head_dim]"
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
#: Dtypes that only key and value may have, as a cache with scales; a uint8 holds two int4.
_CACHES = {torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8}
_PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}
_LARGEST = 1 << 48  # of a whole number that stands for tokens


class CallOptions(NamedTuple):
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


def build_request(operands: Operands, options: CallOptions, grads: frozenset[str]) -> AttentionRequest:
    """The exact request of a call. Raises ContractError with one sentence for the first thing that is wrong."""
    query, key, value, mask, given_plan, tables = operands
    plan: Any = given_plan
    _check_tensors(query, key, value)
    batch, heads_q, len_q, dim_qk = query.shape
    heads_kv, len_k, packed, page_size, used = key.shape[1], key.shape[2], False, None, False
    if tables is not None:
        packed, page_size = tables.cu_seqlens_q is not None, len_k if tables.page_table is not None else None
        used = tables.cache_seqlens is not None and page_size is None
        batch, len_q, len_k = _table_sizes(query, key, tables, options)
    heads = f"{heads_q} query heads and {heads_kv} key heads were given"
    kind = "int4" if key.dtype == torch.uint8 else str(key.dtype).removeprefix("torch.")
    cache_dtype = None if key.dtype == query.dtype else kind
    scaled = tables is not None and tables.key_scale is not None and tables.value_scale is not None
    refuse(
        (
            page_size is None and key.shape[0] != query.shape[0],
            f"batch {batch} of query and {key.shape[0]} of key were given: make them equal",
        ),
        (
            heads_q != heads_kv and (heads_kv == 0 or heads_q % heads_kv != 0),
            f"{heads}: query heads must be a multiple",
        ),
        (heads_q != heads_kv and not options.enable_gqa, f"{heads}: pass enable_gqa=True for grouped heads"),
        (
            cache_dtype is not None and not scaled,
            f"query {query.dtype} and key {key.dtype} were given: cast, or pass key_scale and value_scale",
        ),
        (
            cache_dtype is None and tables is not None and not tables.key_scale is tables.value_scale is None,
            f"key_scale or value_scale was given with {key.dtype}: they scale FP8, int8 or int4, leave them out",
        ),
    )
    shape = (batch, heads_q, len_q, len_k)
    if mask is not None:
        _check_mask(mask, shape, query, packed)
    mask_batch, mask_heads = (1, 1) if mask is None else (1, 1, *mask.shape)[-4:-2]
    if plan is not None:
        _check_plan(plan, shape, query)
    mask_kind = MaskKind.NONE if mask is None else MaskKind.BOOLEAN if mask.dtype == torch.bool else MaskKind.ADDITIVE
    return AttentionRequest(
        batch=batch,
        heads_q=heads_q,
        heads_kv=heads_kv,
        len_q=len_q,
        len_k=len_k,
        dim_qk=dim_qk,
        dim_v=head_size(value),
        dtype=str(query.dtype).removeprefix("torch."),
        device=str(query.device),
        mask=mask_kind,
        mask_batch=mask_batch,
        mask_heads=mask_heads,
        packed=packed,
        page_size=page_size,
        used=used,
        cache_dtype=cache_dtype,
        block_plan=None if plan is None else (plan.block_q, plan.block_k, plan.indices.shape[-1]),
        last_dim_contiguous=all(t.stride(3) == 1 or t.shape[3] == 1 for t in (query, key, value)),
        grads=grads,
        lse=bool(options.return_lse),
        grad_lse=bool(options.return_lse and grads),
        **_checked(options),
    )


def is_plain(tensor: Any) -> bool:
    """Whether a tensor's memory is what its shape and strides say: a plain tensor or a parameter."""
    return type(tensor) in _PLAIN or not isinstance(tensor, Tensor)


def is_fake(tensor: Any) -> bool:
    """Whether a tensor has a shape and no data: one of a FakeTensorMode, or on the meta device."""
    return hasattr(tensor, "fake_mode") or tensor.is_meta


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        refuse(
            (
                isinstance(tensor, torch.fx.Proxy),
                f"{name} is a Proxy of torch.fx: trace with torch.export or torch.compile",
            ),
            (not isinstance(tensor, Tensor), f"{name} is a {type(tensor).__name__}: pass a torch tensor {LAYOUT}"),
            (torch._C._is_tracing(), "torch.jit.trace met a bound call or explain: trace hal.attention itself"),
            (
                getattr(tensor, "is_nested", False) is True,
                f"{name} is a nested tensor: pass packed sequences with cu_seqlens_q and cu_seqlens_k",
            ),
        )
        refuse(
            (
                not is_plain(tensor) and not is_fake(tensor),
                f"{name} is a {type(tensor).__name__}, a tensor subclass: pass a plain torch tensor",
            ),
            (tensor.dim() != 4, f"{name} has shape {list(tensor.shape)}: reshape it to {LAYOUT}"),
            (
                tensor.layout != torch.strided,
                f"{name} is {tensor.layout}: pass a dense tensor, and a block_plan for sparsity",
            ),
            (
                tensor.dtype not in _FLOATS | _CACHES,
                f"{name} is {tensor.dtype}: cast it to float32, bfloat16, float16 or float64",
            ),
        )
    given = [[getattr(t, field) for t in (query, key, value)] for field in ("dtype", "device", "shape")]
    (q_dtype, k_dtype, v_dtype), devices, (q, k, v) = given
    refuse(
        (
            q_dtype in _CACHES,
            f"query is {q_dtype}: only key and value may be FP8, int8 or int4, with key_scale and value_scale",
        ),
        (
            v_dtype != k_dtype or (k_dtype != q_dtype and k_dtype not in _CACHES),
            f"query {q_dtype}, key {k_dtype} and value {v_dtype} were given: cast them to one dtype",
        ),
        (
            not devices[0] == devices[1] == devices[2],
            f"query on {devices[0]}, key on {devices[1]} and value on {devices[2]} were given: move them to one device",
        ),
        (k[:3] != v[:3], f"key {list(k)} and value {list(v)} were given: batch, heads and length must be equal"),
        (q[3] != head_size(key), f"head_dim {q[3]} of query and {head_size(key)} of key were given: make them equal"),
        (0 in (q[3], v[3]), "a head_dim of 0 was given: use 1 or more"),
    )


def head_size(cache: Tensor) -> int:
    """The head size of keys or values; a byte holds two int4."""
    return cache.shape[3] * (2 if cache.dtype == torch.uint8 else 1)


def _table_sizes(query: Tensor, key: Tensor, t: SequenceMetadata, options: CallOptions) -> tuple[int, int, int]:
    """(batch, len_q, len_k) of a call with tables; lengths may be upper bounds."""
    for name, table in zip(t._fields, t, strict=True):
        wanted = torch.float32 if name.endswith("scale") else torch.int32
        kind, place = getattr(table, "dtype", type(table).__name__), getattr(table, "device", query.device)
        refuse(
            (table is not None and kind != wanted, f"{name} is {kind}: pass a tensor of {wanted}"),
            (place != query.device, f"{name} on {place} and query on {query.device} were given: move it"),
        )
    lead = (query.shape[0] if t.cu_seqlens_q is None else 1, key.shape[1])
    wide = {"key_scale": (*lead, 1, query.shape[3]), "value_scale": (*lead, 1, 1)}
    if t.value_scale is not None and t.value_scale.dim() > 1 and t.value_scale.shape[-2] > 1:
        wide["value_scale"] = (*key.shape[:3], 1)  # one for each key
    refuse(
        *(
            (
                not _broadcasts(shape := getattr(getattr(t, name), "shape", ()), most),
                f"{name} {list(shape)} torch.float32 was given: pass float32 that broadcasts to {list(most)}",
            )
            for name, most in wide.items()
        )
    )
    cu_q, cu_k, pages, held, batch = t.cu_seqlens_q, t.cu_seqlens_k, t.page_table, t.cache_seqlens, query.shape[0]
    refuse(
        ((cu_q is None) != (cu_k is None), "one of cu_seqlens_q and cu_seqlens_k was given: pass both"),
        (pages is not None and held is None, "page_table without cache_seqlens was given: pass both"),
        (cu_q is not None and pages is not None, "packed lengths and a paged cache were given: use one of them"),
    )
    count = batch if cu_q is None else cu_q.numel() - 1
    refuse(
        (
            held is not None and held.shape != (count,),
            f"cache_seqlens {[*getattr(held, 'shape', ())]} was given: use [{count}]",
        )
    )
    if cu_q is not None:
        given: tuple[Any, Any] = (options.max_seqlen_q, options.max_seqlen_k)
        refuse(
            (
                cu_q.dim() != 1 or cu_q.shape != cu_k.shape or cu_q.numel() < 2,
                f"cu_seqlens_q {list(cu_q.shape)} and cu_seqlens_k {list(cu_k.shape)} were given: use [sequences + 1]",
            ),
            (
                query.shape[0] != 1 or key.shape[0] != 1,
                f"packed query {list(query.shape)} and key {list(key.shape)} were given: use a batch of 1",
            ),
        )
        longest = torch.stack((cu_q, cu_k)).diff().amax(1).clamp(min=0).tolist() if None in given else given
        most = [length if most is None else most for most, length in zip(given, longest, strict=True)]
        refuse(
            (
                not all(type(n) is int and 0 <= n < _LARGEST for n in most),
                f"max_seqlen_q {most[0]!r} and max_seqlen_k {most[1]!r} were given: pass lengths of 0 or more",
            ),
        )
        return len(cu_q) - 1, most[0], most[1]
    if pages is None:
        return batch, query.shape[2], key.shape[2]
    refuse(
        (
            pages.dim() != 2 or pages.shape[0] != batch,
            f"page_table {list(pages.shape)} was given: use [batch, most pages] with batch {batch}",
        )
    )
    return batch, query.shape[2], pages.shape[1] * key.shape[2]


def check_tables(tables: SequenceMetadata, request: AttentionRequest, query: Tensor, key: Tensor) -> None:
    """Check the contents of packed or paged tables; reads them, so it waits for an accelerator, whose tables only
    HAL_CHECK=1 has checked.

    Raises ContractError where an entry would make a device read outside its memory.
    """
    begins = None if request.used else tables.cu_seqlens_k  # of used lengths in any order
    for name, cumulative, longest, total in (
        ("cu_seqlens_q", tables.cu_seqlens_q, request.len_q, query.shape[2]),
        ("cu_seqlens_k", begins, request.len_k, key.shape[2]),
    ):
        ends = [] if cumulative is None else cumulative.tolist()
        steps = [after - before for before, after in itertools.pairwise(ends)]
        refuse(
            (
                bool(ends) and (ends[0] != 0 or ends[-1] != total or min(steps) < 0 or max(steps) > longest),
                f"{name} {ends} was given: start at 0, never fall, end at {total}, and no step over {longest}",
            )
        )
    if request.used:
        held, begin = tables.cache_seqlens, 0 if tables.cu_seqlens_k is None else tables.cu_seqlens_k[:-1]
        over = (held < 0) | (held + begin > key.shape[2]) | (held > request.len_k)
        refuse((bool(over.any()), f"cache_seqlens {held.tolist()} was given: use 0 or more, and keys that there are"))
    if tables.page_table is not None and tables.page_table.shape[0]:
        held, size, most = tables.cache_seqlens, key.shape[2], tables.page_table.shape[1] * key.shape[2]
        over = (held < 0) | (held > most)
        refuse((bool(over.any()), f"cache_seqlens {held.tolist()} was given: use 0 to {most}, pages times page size"))
        pages = (held.unsqueeze(1) + size - 1) // max(size, 1)
        used = torch.arange(tables.page_table.shape[1], device=held.device) < pages
        refuse(
            (
                bool((used & ((tables.page_table < 0) | (tables.page_table >= key.shape[0]))).any()),
                f"a page_table entry outside 0 to {key.shape[0] - 1} was given: name existing pages",
            )
        )


def _check_mask(mask: Any, shape: tuple[int, ...], query: Tensor, packed: bool) -> None:
    refuse((not isinstance(mask, Tensor), f"attn_mask is a {type(mask).__name__}: pass a tensor"))
    floats = " or ".join(dict.fromkeys(map(str, (query.dtype, torch.float32))))
    refuse(
        (packed, "attn_mask and packed lengths were given: use one of them"),
        (
            not is_plain(mask) and not is_fake(mask),
            f"attn_mask is a {type(mask).__name__}, a tensor subclass: pass a plain torch tensor",
        ),
        (
            mask.dtype not in (torch.bool, query.dtype, torch.float32),
            f"attn_mask is {mask.dtype}: pass bool (True: attend), or {floats}, which is added to the scores",
        ),
        (
            mask.device != query.device,
            f"attn_mask on {mask.device} and query on {query.device} were given: move the mask",
        ),
        (
            mask.dim() < 2 or not _broadcasts(mask.shape, shape),
            f"attn_mask has shape {list(mask.shape)}: use one that broadcasts to {list(shape)}",
        ),
    )


def _broadcasts(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    pairs = zip(reversed(shape), reversed(wanted), strict=False)
    return len(shape) <= len(wanted) and all(given in (1, size) for given, size in pairs)


def _check_plan(plan: Any, shape: tuple[int, ...], query: Tensor) -> None:
    refuse((not isinstance(plan, BlockPlan), f"block_plan is a {type(plan).__name__}: pass a hal_core.BlockPlan"))
    (batch, heads, len_q, len_k), (block_q, block_k, indices, counts) = shape, plan
    refuse(
        (
            not isinstance(indices, Tensor) or not isinstance(counts, Tensor),
            f"block_plan with indices {type(indices).__name__} was given: pass int32 tensors",
        ),
        (
            type(block_q) is not int or type(block_k) is not int or min(block_q, block_k) < 1,
            f"blocks of {block_q!r} x {block_k!r} were given: use whole numbers of 1 or more",
        ),
    )
    size, rows, columns = list(indices.shape), -(-len_q // block_q), -(-len_k // block_k)
    fits = (
        len(size) == 4
        and counts.shape == indices.shape[:3]
        and size[0] in (1, batch)
        and size[1] in (1, heads)
        and size[2] == rows
        and size[3] <= max(columns, 1)
        and indices.dtype == counts.dtype == torch.int32
    )
    refuse(
        (
            not fits,
            f"block_plan indices {size} {indices.dtype} and counts {list(counts.shape)} {counts.dtype} were given: "
            f"use int32, [1 or {batch}, 1 or {heads}, {rows}, at most {columns}], counts without the last dimension",
        ),
        (not indices.device == counts.device == query.device, f"block_plan on {indices.device} was given: move it"),
    )
    if indices.device.type == "cpu" and not is_fake(indices):  # reading an accelerator's would wait for it
        listed = torch.arange(size[3]) < counts.unsqueeze(-1)
        wrong = (listed & ((indices < 0) | (indices >= columns))).any() | ((counts < 0) | (counts > size[3])).any()
        bounds = f"outside 0 to {columns - 1}, or a count over its list"
        refuse((bool(wrong), f"a block_plan entry {bounds}, was given: fix the plan"))


def _is_finite(number: Any) -> bool:
    return issubclass(type(number), Real) and -sys.float_info.max <= number <= sys.float_info.max


def _is_whole(number: Any) -> bool:
    return type(number) is int and abs(number) < _LARGEST


def _short(value: Any) -> str:
    """The value as text, cut where it is long: a number may have ten thousand digits."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return f"of {value.bit_length()} bits"
    text = f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _checked(o: CallOptions) -> dict[str, Any]:
    """The request's fields of the options, each within its domain."""
    numbers = {"scale": o.scale, "softcap": o.softcap, "max_error": o.max_error, "dropout_p": o.dropout_p}
    flags = ("is_causal", "enable_gqa", "return_lse", "deterministic")
    refuse(
        *(
            (
                not _is_finite(number) and (number is not None or name == "dropout_p"),
                f"{name} {_short(number)} was given: pass a finite Python number",
            )
            for name, number in numbers.items()
        ),
        *(
            (getattr(o, name) not in (True, False), f"{name} {_short(getattr(o, name))} was given: pass True or False")
            for name in flags
        ),
    )
    sides = o.window if isinstance(o.window, tuple | list) else ()
    refuse(
        (not _is_whole(o.diagonal), f"diagonal {_short(o.diagonal)} was given: use a whole number of tokens"),
        (not 0 <= o.dropout_p < 1, f"dropout_p {o.dropout_p} was given: use 0 or more and less than 1"),
        (o.softcap is not None and o.softcap <= 0, f"softcap {o.softcap} was given: use a positive number or None"),
        (o.max_error is not None and o.max_error < 0, f"max_error {o.max_error} was given: use 0 or more, or None"),
        (
            o.causal is not None and o.causal not in list(Causal),
            f"causal {_short(o.causal)} was given: use 'none', 'top_left' or 'bottom_right'",
        ),
        (
            o.is_causal and o.causal not in (None, Causal.TOP_LEFT),
            f"is_causal=True and causal={o.causal!s} were given: is_causal is top_left, pass one of them",
        ),
        (
            o.window is not None
            and (len(sides) != 2 or any(s is not None and (not _is_whole(s) or s < 0) for s in sides)),
            f"window {_short(o.window)} was given: use (left, right), each 0 or more keys, None for no bound",
        ),
    )
    causal = Causal.TOP_LEFT if o.is_causal else Causal.NONE if o.causal is None else Causal(o.causal)
    return {
        "causal": causal,
        "diagonal": o.diagonal,
        "window": tuple(sides) if any(s is not None for s in sides) else None,
        "softcap": None if o.softcap is None else float(o.softcap),
        "scale": None if o.scale is None else float(o.scale),
        "dropout": float(o.dropout_p),
        "deterministic": bool(o.deterministic),
        "max_error": o.max_error,
    }
