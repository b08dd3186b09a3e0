"""Calls that torch's scaled_dot_product_attention takes and devices do not, in the form that devices take.

A regular call does not come here: `attention` asks for help with the ContractError of one that was refused.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ContractError, refuse
from ..request import AttentionOutput, Causal
from .validation import CallOptions

Attention = Callable[..., Any]
_BEYOND_4D = ("block_plan", "cu_seqlens_q", "cu_seqlens_k", "page_table", "cache_seqlens", "key_scale", "value_scale")


class Layout(NamedTuple):
    """What operands of two or more dimensions become: [product of batch, heads, length, head_dim].

    batch: the dimensions before the heads, broadcast. heads_q, heads_kv: query heads, and key and value heads.
    rank: dimensions of the result.
    """

    batch: tuple[int, ...]
    heads_q: int
    heads_kv: int
    rank: int

    @classmethod
    def of(cls, shapes: Sequence[Sequence[int]], grouped: bool) -> Layout | None:
        """The layout of query, key and value, of two sizes or more each; None where they do not go together."""
        rank = max(map(len, shapes))
        wide = [(1,) * (max(rank, 3) - len(shape)) + tuple(shape) for shape in shapes]
        heads_q, heads_k, heads_v = (shape[-3] for shape in wide)
        try:
            batch = tuple(_broadcast(*sizes) for sizes in zip(*(shape[:-3] for shape in wide), strict=True))
            if grouped:
                heads_kv = math.lcm(heads_k, heads_v)
            else:
                heads_q = _broadcast(heads_q, heads_k, heads_v)
                heads_kv = 1 if heads_k == heads_v == 1 else heads_q
        except ValueError:
            return None
        fits = heads_q == heads_kv or (heads_kv and heads_q % heads_kv == 0)
        return cls(batch, heads_q, heads_kv, rank) if fits else None

    def place(self, tensor: Tensor, heads: int) -> Tensor:
        """An operand as [batch, heads, length, head_dim]. Views, but where several batch dimensions are not laid out as
        one, and where key and value heads that differ are repeated.
        """
        tensor = tensor[(None,) * (len(self.batch) + 3 - tensor.dim())]
        if tensor.shape[-3] not in (1, heads):
            tensor = tensor.repeat_interleave(heads // tensor.shape[-3], -3)
        return tensor.expand(*self.batch, heads, -1, -1).reshape(math.prod(self.batch), heads, *tensor.shape[-2:])

    def place_mask(self, mask: Tensor) -> Tensor | None:
        """A mask of up to the scores' dimensions, still broadcasting where it can; None where it does not go with
        them.
        """
        if not 2 <= mask.dim() <= max(self.rank, 3):
            return None
        mask = mask[(None,) * (len(self.batch) + 3 - mask.dim())]
        if all(size == 1 for size in mask.shape[:-3]):
            return mask.reshape(1, *mask.shape[-3:])
        if any(size not in (1, whole) for size, whole in zip(mask.shape[:-3], self.batch, strict=True)):
            return None
        return mask.expand(*self.batch, -1, -1, -1).reshape(math.prod(self.batch), *mask.shape[-3:])

    def restore(self, result: Tensor, dims: int) -> Tensor:
        """A result [batch, heads, ...] with the operands' leading dimensions and its own last `dims`."""
        lead = (*self.batch, self.heads_q)[len(self.batch) + 3 - self.rank :]
        return result.reshape(*lead, *result.shape[-dims:])


def _broadcast(*sizes: int) -> int:
    """The size that sizes of one dimension broadcast to. ValueError: they do not."""
    (size,) = {size for size in sizes if size != 1} or {1}
    return size


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    """A shape as numbers, while torch.jit.trace records shapes too."""
    if torch.compiler.is_compiling() or not torch._C._is_tracing():
        return tuple(tensor.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the traced function is for these sizes
        return tuple(map(int, tensor.shape))


def is_regular(given: Sequence[Any], keywords: dict[str, Any]) -> bool:
    """Whether a call of these query, key, value and mask is to be run, or refused, as it is."""
    *tensors, mask = given
    if not all(isinstance(t, Tensor) for t in tensors) or any(keywords[name] is not None for name in _BEYOND_4D):
        return True
    by_tensors = any(isinstance(keywords[name], Tensor) for name in ("scale", "dropout_p"))
    if by_tensors or any(t.is_nested for t in tensors) or keywords["dropout_p"] == 1:
        return False
    if any(t.dim() != 4 for t in tensors) or (isinstance(mask, Tensor) and mask.dim() > 4):
        return False
    q, k, v = map(_sizes, tensors)
    return q[0] == k[0] == v[0] and k[1] == v[1] and (q[1] == k[1] or keywords["enable_gqa"] is True)


def attend(attention: Attention, error: ContractError, given: Sequence[Any], keywords: dict[str, Any]) -> Any:
    """Run a call that was refused with `error` in the form that devices take.

    Args:
        attention: what runs that form. given: query, key, value and mask. keywords: its other arguments.

    Raises:
        ContractError: `error`, where torch would not take the call either.
    """
    query, key, value, mask = given
    if is_regular(given, keywords):
        raise error
    if any(t.is_nested for t in (query, key, value)):
        return _jagged(attention, error, given, keywords)
    numbers = {name: keywords[name] for name in ("scale", "dropout_p") if isinstance(keywords[name], Tensor)}
    if numbers:
        if any(number.dim() or number.requires_grad for number in numbers.values()):
            raise error
        return attention(*given, **keywords | {name: float(number) for name, number in numbers.items()})
    if keywords["dropout_p"] == 1:  # nothing of the weights is left
        result = attention(*given, **keywords | {"dropout_p": 0.0})
        return AttentionOutput(result.out * 0, result.lse) if keywords["return_lse"] else result * 0
    shapes = [_sizes(t) for t in (query, key, value)]
    if max(map(len, shapes)) == 3 and any(shape[-3:-2] == (0,) for shape in shapes):  # an empty batch, not no heads
        given = [t.unsqueeze(-3) if isinstance(t, Tensor) and (t is not mask or t.dim() == 3) else t for t in given]
        result = attention(*given, **keywords)
        return AttentionOutput(*(t.squeeze(1) for t in result)) if keywords["return_lse"] else result.squeeze(1)
    layout = None if min(map(len, shapes)) < 2 else Layout.of(shapes, keywords["enable_gqa"] is True)
    if layout is None:
        refuse(
            (
                min(map(len, shapes)) > 1 and {*map(len, shapes)} != {4},  # else `error` says more
                f"query, key and value {', '.join(str([*shape]) for shape in shapes)} were given, whose sizes before "
                f"length and head_dim do not go together ({', '.join(str([*shape[:-2]]) for shape in shapes)}): make "
                "each of them equal or 1, or pass enable_gqa=True where the query's heads are a multiple",
            )
        )
        raise error
    placed = [layout.place(query, layout.heads_q)] + [layout.place(t, layout.heads_kv) for t in (key, value)]
    if isinstance(mask, Tensor):
        mask = layout.place_mask(mask)
        refuse(
            (
                mask is None,
                f"attn_mask has shape {[*given[3].shape]}: pass one that broadcasts to "
                f"{[*shapes[0][:-1], shapes[1][-2]]}",
            )
        )
    result = attention(*placed, mask, **keywords | {"enable_gqa": layout.heads_q != layout.heads_kv})
    if keywords["return_lse"]:
        return AttentionOutput(layout.restore(result.out, 2), layout.restore(result.lse, 1))
    return layout.restore(result, 2)


def _jagged(attention: Attention, error: ContractError, given: Sequence[Any], keywords: dict[str, Any]) -> Any:
    """Attention of jagged tensors [batch, heads, ragged length, head_dim], as packed sequences; or of [ragged batch,
    heads, length, head_dim] and [batch, ragged length, head_dim].
    """
    *tensors, mask = given
    if not all(t.is_nested and t.layout is torch.jagged for t in tensors):
        raise error
    ragged = {t._ragged_idx for t in tensors} | {t.dim() for t in tensors}
    refuse(
        (ragged not in ({4, 2}, {4, 1}, {3, 1}), "jagged tensors of different forms were given: make them equal"),
        (
            any(t.lengths() is not None for t in tensors),
            "a jagged tensor with gaps was given: call .contiguous() on it",
        ),
        (keywords["return_lse"], "return_lse with jagged tensors was given: pass packed sequences with cu_seqlens_q"),
        (any(keywords[name] is not None for name in _BEYOND_4D), "jagged tensors and tables were given: pass one"),
    )
    query, key, _ = tensors
    if ragged == {4, 1}:
        out = attention(*(t.values() if getattr(t, "is_nested", False) else t for t in given), **keywords)
        return torch.nested.nested_tensor_from_jagged(out, query.offsets())
    refuse((mask is not None, "attn_mask with jagged tensors was given: pad them, or leave the mask out"))
    headed = ragged == {4, 2}
    packed = [t.transpose(1, 2).values().transpose(0, 1)[None] if headed else t.values()[None, None] for t in tensors]
    tables = {name: t.offsets().to(torch.int32) for name, t in (("cu_seqlens_q", query), ("cu_seqlens_k", key))}
    out = attention(*packed, None, **keywords | tables)[0]
    nested = torch.nested.nested_tensor_from_jagged(out.transpose(0, 1) if headed else out[0], query.offsets())
    return nested.transpose(1, 2) if headed else nested


def exported(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keywords: dict[str, Any]) -> Tensor:
    """Torch's own operator in place of the call: what torch.onnx.export(dynamo=False) has a translation for."""
    said = ("dropout_p", "is_causal", "scale", "enable_gqa", "causal")
    plain = {name: usual for name, usual in CallOptions._field_defaults.items() if name not in said}
    for name, given in keywords.items():
        refuse(
            (
                given != plain.get(name, given) or (name in _BEYOND_4D and given is not None),
                f"{name} was given to an ONNX export by tracing, which has no word for it: export with dynamo=True",
            )
        )
    causal = keywords["is_causal"] or keywords["causal"] == Causal.TOP_LEFT
    refuse(
        (
            keywords["causal"] == Causal.BOTTOM_RIGHT or (causal and mask is not None),
            "causal='bottom_right', or causal and a mask, was given to an ONNX export by tracing, which cannot say it: "
            "pass a mask that holds both",
        )
    )
    group = _sizes(query)[1] // _sizes(key)[1]
    if group > 1:
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    out: Tensor = torch._C._nn.scaled_dot_product_attention(
        query, key, value, mask, float(keywords["dropout_p"]), causal, scale=keywords["scale"]
    )
    return out
