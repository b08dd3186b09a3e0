"""The operations of an attention layer that are recorded instead of computed; see `deferred`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .deferred import DTYPES, HANDLERS, Scores, State, Step, computed, is_plain
from .deferred_products import Equation, operands_of, ordered

#: A mask value from here down hides a key that stands beside a visible one: exp(-1e3) is 0 in every dtype.
HIDES = -1e3
#: From here down a score that is added is lost in rounding.
_ABSORBS = -1e30


def _next(
    given: Scores,
    state: State | None,
    function: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Scores | None:
    """The scores after one more operation; None where it has no state."""
    return (
        None if state is None else Scores(given.sink, state, Step(function, args, kwargs or {}), dtype or given.dtype)
    )


# Masks and biases


def _add(function: Any, left: Any, right: Any, *, alpha: float = 1) -> Scores | None:
    given, other, sign = (left, right, alpha) if isinstance(left, Scores) else (right, left, 1)
    if given is right and alpha != 1:
        return None
    return _next(given, _biased(given, other, sign), function, (left, right), {"alpha": alpha})


def _sub(function: Any, left: Any, right: Any, *, alpha: float = 1) -> Scores | None:
    if not isinstance(left, Scores):
        return None
    return _next(left, _biased(left, right, -alpha), function, (left, right), {"alpha": alpha})


def _biased(given: Scores, other: Any, sign: float) -> State | None:
    state = _state(given)
    if state.weights:
        return None
    if not isinstance(other, Tensor):
        return state if math.isfinite(other) else None  # the same for every key
    if isinstance(other, Scores):
        if _state(other).weights:
            return None
        other = computed(other)
    lead = _lead_with(given, other)
    if lead is None:
        return None
    bias = other if sign == 1 else other * sign
    return state._replace(lead=lead, bias=bias if state.bias is None else state.bias + bias)


def _state(given: Scores) -> State:
    assert given.state is not None
    return given.state


def _lead_with(given: Scores, other: Tensor) -> tuple[int, ...] | None:
    """The leading sizes of scores with another tensor; None where it has more rows or columns than they."""
    try:
        shape = torch.broadcast_shapes(given.shape, other.shape)
    except RuntimeError:
        return None
    return tuple(shape[:-2]) if shape[-2:] == given.shape[-2:] else None


def _masked_fill(function: Any, given: Any, mask: Tensor, value: Any) -> Scores | None:
    if not isinstance(given, Scores):
        return None
    return _next(given, _filled(given, mask, value), function, (given, mask, value))


def _where(function: Any, *args: Any) -> Scores | None:
    if len(args) != 3:
        return None
    condition, chosen, other = (args[1], args[0], args[2]) if isinstance(args[0], Scores) else args
    if isinstance(chosen, Scores) and not isinstance(other, Scores):
        return _next(chosen, _filled(chosen, ~condition, other), function, args)
    if isinstance(other, Scores) and not isinstance(chosen, Scores):
        return _next(other, _filled(other, condition, chosen), function, args)
    return None


def _filled(given: Scores, mask: Tensor, value: Any) -> State | None:
    """Scores whose masked entries are a very low number, or weights whose masked entries are 0."""
    state = _state(given)
    if (isinstance(value, Tensor) and value.numel() != 1) or (lead := _lead_with(given, mask)) is None:
        return None
    number, mask = float(value), mask.bool()
    if state.weights:
        return _zeroed(state, mask) if number == 0 else None
    if number > HIDES:
        return None
    if number > _ABSORBS:  # the entry is replaced, whatever the score: so low that the score is lost, in the same order
        number = max(number * -_ABSORBS, torch.finfo(state.query.dtype).min / 4)
    bias = torch.zeros((), dtype=state.query.dtype, device=mask.device) if state.bias is None else state.bias
    return state._replace(lead=lead, bias=torch.where(mask, torch.full_like(bias, number), bias))


def _zeroed(state: State, mask: Tensor) -> State | None:
    """Weights that are set to 0 where the scores were masked already: rows without a visible key give 0."""
    if state.bias is None or not bool((~mask | (state.bias <= HIDES)).all()):
        return None
    return state._replace(bias=state.bias.masked_fill(mask, -math.inf))


def _max(function: Any, left: Any, right: Any = None) -> Scores | None:
    if not isinstance(left, Scores) or not isinstance(right, Tensor):
        return None
    return _next(left, _at_least(left, right), function, (left, right))


def _clamp(function: Any, given: Any, min: Any = None, max: Any = None) -> Scores | None:
    if min is None or max is not None:
        return None
    return _next(given, _at_least(given, min), function, (given, min))


def _at_least(given: Scores, lowest: Any) -> State | None:
    """A lower bound that only masked entries reach."""
    state = _state(given)
    if state.weights or (isinstance(lowest, Tensor) and lowest.numel() != 1) or float(lowest) > HIDES:
        return None
    return state if state.bias is None else state._replace(bias=state.bias.clamp(min=float(lowest)))


# Factors


def _mul(function: Any, left: Any, right: Any) -> Scores | None:
    given, other = (left, right) if isinstance(left, Scores) else (right, left)
    return _next(given, _scaled(given, other), function, (left, right))


def _div(function: Any, left: Any, right: Any) -> Scores | None:
    if not isinstance(left, Scores) or isinstance(right, Scores):
        return None
    return _next(left, _scaled(left, 1 / right), function, (left, right))


def _scaled(given: Scores, other: Any) -> State | None:
    state = _state(given)
    if isinstance(other, Scores):
        return None
    if not isinstance(other, Tensor) or (other.numel() == 1 and not other.requires_grad):
        number = float(other)
        if state.weights:
            return state._replace(factor=_times(state.factor, torch.full((1, 1), number, device=given.device)))
        return state._replace(scale=state.scale * number, bias=None if state.bias is None else state.bias * number)
    lead = _lead_with(given, other)
    if lead is None:
        return None
    rows = other.reshape((1,) * (2 - other.ndim) + tuple(other.shape))
    query, key = state.query, state.key
    if rows.shape[-1] == 1:
        if state.weights:
            return state._replace(lead=lead, factor=_times(state.factor, rows))
        query = query * rows.to(query.dtype)
    elif rows.shape[-2] == 1 and not state.weights:
        key = key * rows.transpose(-1, -2).to(key.dtype)
    elif state.weights or state.bias is not None or not bool(((rows == 0) | (rows == 1)).all()):
        return None
    else:
        return state._replace(lead=lead, zeroed=rows == 0)
    return state._replace(query=query, key=key, lead=lead, bias=None if state.bias is None else state.bias * rows)


def _times(factor: Tensor | None, other: Tensor) -> Tensor:
    return other if factor is None else factor * other


# From scores to weights


def _softmax(
    function: Any, given: Any, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Scores | None:
    state = _hidden(_state(given))
    if state is None or state.weights or dim not in (-1, given.ndim - 1):
        return None
    return _next(given, state._replace(weights=True), function, (given, dim), {"dtype": dtype}, dtype)


def _hidden(state: State) -> State | None:
    """Scores that were multiplied by 0 are hidden by the bias, whatever they were; None where they are not."""
    if state.zeroed is None:
        return state
    if state.bias is None or not bool((~state.zeroed | (state.bias <= HIDES)).all()):
        return None
    lowest = torch.finfo(state.query.dtype).min / 4
    lower = torch.where(state.bias > _ABSORBS, (state.bias * -_ABSORBS).clamp(min=lowest), state.bias)
    return state._replace(bias=torch.where(state.zeroed, lower, state.bias), zeroed=None)


def _dropout(function: Any, given: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    state = _state(given)
    if not training or p == 0:
        return given
    if not state.weights or state.dropout:
        return None
    return _next(given, state._replace(dropout=float(p)), function, (given, p, training, inplace))


def _cast(function: Any, given: Any, *args: Any, **kwargs: Any) -> Scores | None:
    if not isinstance(given, Scores):
        return None
    like = function(torch.empty(0, dtype=given.dtype, device=given.device), *args, **kwargs)
    if not isinstance(like, Tensor) or like.device != given.device or like.dtype not in DTYPES:
        return None
    return _next(given, given.state, function, (given, *args), kwargs, like.dtype)


# Leading dimensions


def _viewed(function: Any, given: Any, *args: Any, **kwargs: Any) -> Scores | None:
    if not isinstance(given, Scores):
        return None
    shape = tuple(function(torch.empty(given.shape, device="meta"), *args, **kwargs).shape)
    if len(shape) < 2 or shape[-2:] != given.shape[-2:] or math.prod(shape[:-2]) != math.prod(given.shape[:-2]):
        return None
    state, lead = _state(given), shape[:-2]

    def regrouped(tensor: Tensor) -> Tensor:
        if tensor.ndim <= 2:
            return tensor
        if all(size == 1 for size in tensor.shape[:-2]):
            return tensor.reshape(tensor.shape[-2:])
        return tensor.expand(*state.lead, *tensor.shape[-2:]).reshape(*lead, *tensor.shape[-2:])

    moved = state._replace(
        query=regrouped(state.query),
        key=regrouped(state.key),
        lead=lead,
        bias=None if state.bias is None else regrouped(state.bias),
        factor=None if state.factor is None else regrouped(state.factor),
        zeroed=None if state.zeroed is None else regrouped(state.zeroed),
    )
    return _next(given, moved, function, (given, *args), kwargs)


# Weights times values


def _times_values(function: Any, weights: Any, value: Any) -> Tensor | None:
    if not isinstance(weights, Scores) or not is_plain(value) or value.ndim < 2:
        return None
    return attend(weights, value)


def _einsum_values(function: Any, equation: Any, *operands: Any) -> Tensor | None:
    given = operands_of(operands)
    said = Equation.read(equation) if len(given) == 2 and isinstance(equation, str) else None
    if said is None:
        return None
    (weights, value), (term, other, out) = given, said.terms
    rows, columns = said.rows, said.columns
    if isinstance(value, Scores):
        weights, value, term, other, rows, columns = value, weights, other, term, columns, rows
    batch = term[:-2]
    if not is_plain(value) or term != batch + rows + said.summed:
        return None
    result = attend(weights, ordered(value, other, batch + said.summed + columns))
    return None if result is None else ordered(result, batch + rows + columns, out)


def attend(weights: Scores, value: Tensor) -> Tensor | None:
    """The weights times [*lead, len_k, dim], as one call of attention; None for scores without a softmax."""
    state = _state(weights)
    if not state.weights:
        return None
    if state.product is not None:
        state.product.check()
    lead = tuple(torch.broadcast_shapes(state.lead, value.shape[:-2]))
    dtype = torch.promote_types(state.query.dtype, value.dtype)
    query, key, values = (_four(one.to(dtype), lead) for one in (state.query, state.key, value))
    heads, batch = math.prod(lead[-1:]), math.prod(lead[:-1])
    if not key.shape[1] == values.shape[1] == 1:
        key, values = (one.expand(-1, heads, -1, -1) for one in (key, values))
    query = query.expand(batch, heads, -1, -1)
    key, values = (one.expand(batch, -1, -1, -1) for one in (key, values))
    mask = None
    if state.bias is not None:
        bias = state.bias.to(dtype)
        mask = _four(bias.expand(*bias.shape[:-1], key.shape[-2]) if bias.ndim else bias.reshape(1, 1), lead)
    out = weights.sink.attend(query, key, values, mask, state.dropout, state.scale)
    out = out.contiguous().reshape(*lead, *out.shape[-2:])
    if state.factor is not None:
        out = out * state.factor.to(out.dtype)
    return out.to(value.dtype)


def _four(tensor: Tensor, lead: tuple[int, ...]) -> Tensor:
    """[*lead, rows, columns] as [batch, heads, rows, columns], sizes of 1 kept where they can be."""
    lead = (1,) * (2 - len(lead)) + lead
    tensor = tensor.reshape((1,) * (len(lead) + 2 - tensor.ndim) + tuple(tensor.shape))
    outer, last = tensor.shape[: len(lead) - 1], tensor.shape[len(lead) - 1 :]
    if all(size == 1 for size in outer):
        return tensor.reshape(1, *last)
    return tensor.expand(*lead[:-1], *last).reshape(math.prod(lead[:-1]), *last)


def _by_name(handler: Callable[..., Any], *names: str) -> dict[str, Callable[..., Any]]:
    return dict.fromkeys(names, handler)


HANDLERS.update(
    _by_name(_add, "add")
    | _by_name(_sub, "sub", "subtract")
    | _by_name(_mul, "mul", "multiply")
    | _by_name(_div, "div", "divide", "true_divide")
    | _by_name(_masked_fill, "masked_fill")
    | _by_name(_where, "where")
    | _by_name(_max, "max", "maximum")
    | _by_name(_clamp, "clamp", "clamp_min")
    | _by_name(_softmax, "softmax")
    | _by_name(_dropout, "dropout")
    | _by_name(_cast, "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous")
    | _by_name(_viewed, "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as")
    | _by_name(_times_values, "matmul", "bmm")
    | _by_name(_einsum_values, "einsum")
)
