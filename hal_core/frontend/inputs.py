"""Calls that torch's scaled_dot_product_attention takes and devices do not, in the form that devices take.

A regular call does not come here: `attention` asks for help with the ContractError of one that was refused.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ContractError, refuse
from ..request import AttentionOutput, Causal
from .validation import CallOptions

Attention = Callable[..., Any]
_BEYOND_4D = ("block_plan", "cu_seqlens_q", "cu_seqlens_k", "page_table", "cache_seqlens", "key_scale", "value_scale")


def _broadcast(*sizes: int) -> int:
    """The size that sizes of one dimension broadcast to. ValueError: they do not."""
    (size,) = {size for size in sizes if size != 1} or {1}
    return size


def as_4d(
    tensors: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    mask: Tensor | None,
    grouped: bool,
    unfit: ContractError,
) -> tuple[list[Tensor], tuple[int, ...]]:
    """Operands of two or more dimensions as [product of batch, heads, length, head_dim].

    Views, but where several batch dimensions are not laid out as one, and where key and value heads that differ are
    repeated. A mask broadcasts as before.

    Returns:
        query, key, value and a mask that was given, and the result's dimensions before its length.

    Raises:
        ContractError: `unfit`, or sizes before the length that do not go together, or a mask that does not fit them.
    """
    ranks = [len(shape) for shape in shapes]
    rank, wide = max(ranks), max(*ranks, 4)
    if min(ranks) < 2:
        raise unfit
    q, k, v = ((1,) * (wide - len(shape)) + shape for shape in shapes)
    try:
        batch = [_broadcast(*sizes) for sizes in zip(q[:-3], k[:-3], v[:-3], strict=True)]
        heads_q = q[-3] if grouped else _broadcast(q[-3], k[-3], v[-3])
    except ValueError:
        if {*ranks} == {4}:
            raise unfit from None
        query, key, value = map(list, shapes)
        raise ContractError(
            f"query {query}, key {key} and value {value} were given, whose sizes before length and head_dim do not go "
            f"together ({query[:-2]}, {key[:-2]}, {value[:-2]}): make each of them equal or 1, or pass enable_gqa=True "
            "where the query's heads are a multiple"
        ) from None
    heads_kv = math.lcm(k[-3], v[-3]) if grouped or k[-3] == v[-3] == 1 else heads_q
    placed: list[Tensor] = []
    for tensor, heads in zip(tensors, (heads_q, heads_kv, heads_kv), strict=True):
        tensor = tensor[(None,) * (wide - tensor.dim())]
        if tensor.shape[-3] not in (1, heads):
            tensor = tensor.repeat_interleave(heads // tensor.shape[-3], -3)
        placed.append(tensor.expand(*batch, heads, -1, -1).flatten(0, -4))
    if mask is not None:
        sizes = _sizes(mask)
        lead = (1,) * (wide - len(sizes)) + sizes[:-3]
        if not 2 <= len(sizes) <= max(rank, 3) or any(n not in (1, m) for n, m in zip(lead, batch, strict=False)):
            scores = [*shapes[0][:-1], shapes[1][-2]]
            raise ContractError(f"attn_mask has shape {list(sizes)}: pass one that broadcasts to {scores}")
        mask = mask[(None,) * (wide - len(sizes))]
        placed.append((mask if {*lead} == {1} else mask.expand(*batch, -1, -1, -1)).flatten(0, -4))
    if rank == 3 and heads_q == 0:  # an empty batch, not no heads
        placed = [t.transpose(0, 1) for t in placed]
    return placed, (*batch, heads_q)[wide - rank :]


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    """A shape as numbers, while torch.jit.trace records shapes too."""
    if torch.compiler.is_compiling() or not torch._C._is_tracing():
        return tuple(tensor.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the traced function is for these sizes
        return tuple(map(int, tensor.shape))


def attend(attention: Attention, given: Sequence[Any], keywords: dict[str, Any], unfit: ContractError) -> Any:
    """Run a call that torch takes and devices do not, in the form that devices take.

    Args:
        attention: what runs that form. given: query, key, value and mask. keywords: its other arguments.

    Returns:
        The result; None for a call that is to be run, or refused, as it is.

    Raises:
        ContractError: `unfit`, where torch would not take the call either.
    """
    *tensors, mask = given
    known = all(isinstance(t, Tensor) for t in tensors) and isinstance(mask, Tensor | None)
    if not known or any(keywords[name] is not None for name in _BEYOND_4D):
        return None
    if any(t.is_nested for t in tensors):
        return _jagged(attention, given, keywords, unfit)
    numbers = {name: keywords[name] for name in ("scale", "dropout_p") if isinstance(keywords[name], Tensor)}
    if any(number.dim() or number.requires_grad for number in numbers.values()):
        raise unfit
    if numbers:
        return attention(*given, **keywords | {name: float(number) for name, number in numbers.items()})
    if keywords["dropout_p"] == 1:  # nothing of the weights is left
        result = attention(*given, **keywords | {"dropout_p": 0.0})
        return AttentionOutput(result.out * 0, result.lse) if keywords["return_lse"] else result * 0
    shapes, grouped = [_sizes(t) for t in tensors], keywords["enable_gqa"] is True
    q, k, v = (shape[:-2] for shape in shapes)
    if (
        len(q) == len(k) == 2
        and k == v
        and (q == k or (grouped and q[0] == k[0]))
        and (mask is None or mask.dim() <= 4)
    ):
        return None
    placed, lead = as_4d(tensors, shapes, mask, grouped, unfit)
    result = attention(*placed, **keywords | {"enable_gqa": True})
    if keywords["return_lse"]:
        return AttentionOutput(*(part.reshape(*lead, *part.shape[2:]) for part in result))
    return result.reshape(*lead, *result.shape[2:])


def _jagged(attention: Attention, given: Sequence[Any], keywords: dict[str, Any], unfit: ContractError) -> Any:
    """Attention of jagged tensors [batch, heads, ragged length, head_dim], as packed sequences; or of [ragged batch,
    heads, length, head_dim] and [batch, ragged length, head_dim].
    """
    *tensors, mask = given
    if not all(t.is_nested and t.layout is torch.jagged for t in tensors):
        raise unfit
    ragged = {t._ragged_idx for t in tensors} | {t.dim() for t in tensors}
    refuse(
        (ragged not in ({4, 2}, {4, 1}, {3, 1}), "jagged tensors of different forms were given: make them equal"),
        (
            any(t.lengths() is not None for t in tensors),
            "a jagged tensor with gaps was given: call .contiguous() on it",
        ),
        (keywords["return_lse"], "return_lse with jagged tensors was given: pass packed sequences with cu_seqlens_q"),
    )
    refuse(
        (mask is not None and ragged != {4, 1}, "attn_mask with jagged tensors was given: pad them, or leave it out")
    )
    query, key, _ = tensors
    values = [t.values() for t in tensors]
    if ragged == {4, 1}:
        out = attention(*values, mask.values() if getattr(mask, "is_nested", False) else mask, **keywords)
    else:
        tables = {name: t.offsets().to(torch.int32) for name, t in (("cu_seqlens_q", query), ("cu_seqlens_k", key))}
        packed = [t[(None,) * (4 - t.dim())] for t in values]
        out = attention(*packed, None, **keywords | tables).reshape(values[0].shape[:-1] + values[2].shape[-1:])
    return torch.nested.nested_tensor_from_jagged(out, query.offsets(), jagged_dim=query._ragged_idx)


def exported(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keywords: dict[str, Any]) -> Tensor:
    """Torch's own operator in place of the call: what torch.onnx.export(dynamo=False) has a translation for."""
    said = ("dropout_p", "is_causal", "scale", "enable_gqa", "causal")
    plain = {name: usual for name, usual in CallOptions._field_defaults.items() if name not in said}
    unsaid = [
        name
        for name, given in keywords.items()
        if given != plain.get(name, given) or (name in _BEYOND_4D and given is not None)
    ]
    causal = keywords["is_causal"] or keywords["causal"] == Causal.TOP_LEFT
    refuse(
        (
            bool(unsaid),
            f"{', '.join(unsaid)} was given to an ONNX export by tracing, which cannot say it: export with dynamo=True",
        ),
        (
            keywords["causal"] == Causal.BOTTOM_RIGHT or (causal and mask is not None),
            "causal='bottom_right', or causal and a mask, was given to an ONNX export by tracing, which cannot say it: "
            "pass a mask that holds both",
        ),
    )
    group = _sizes(query)[1] // _sizes(key)[1]
    if group > 1:
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    out: Tensor = torch._C._nn.scaled_dot_product_attention(
        query, key, value, mask, float(keywords["dropout_p"]), causal, scale=keywords["scale"]
    )
    return out
