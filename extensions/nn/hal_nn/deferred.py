"""Attention scores that are not computed: what a layer does to them is recorded until its weights meet the values.

A layer that computes attention by itself multiplies queries and keys, scales, adds masks and biases, takes the softmax,
drops, and multiplies by the values. `deferred_products.start` gives a `Scores` in place of the first product. It has
the shape of the scores and no memory; each operation on it is recorded, as long as attention with one additive mask can
say the same, and the last product is one call of attention. Any other operation before the softmax gets the scores that
the layer's own code would have computed, by the same operations. After it, the weights would be needed, which attention
on a device never holds: the layer's `Sink` decides what happens then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hal_core import HalError

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

#: What records an operation, by its name: called with the function and its arguments, gives the result, or None.
HANDLERS: dict[str, Callable[..., Any]] = {}


class Sink(Protocol):
    """The layer that scores belong to."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float
    ) -> Tensor:
        """Attention of [batch, heads, length, dim], one key head where all share it."""
        ...

    def computed(self, reader: str) -> None:
        """The scores are computed, because `reader` is an operation that is not recorded."""
        ...

    def weights_read(self, reader: str) -> None:
        """The weights are needed by `reader`. Raises, or returns to have them computed."""
        ...


class State(NamedTuple):
    """Attention as recorded so far.

    Attributes:
        query, key: [*lead, length, dim], leading sizes of 1 standing for all. lead: the leading sizes of the scores.
        product: of query and key, as the layer called it. scale: a factor of it.
        bias: added to the scaled products, broadcastable to the scores.
        weights: whether the softmax was taken. dropout: probability, after it. factor: of the weights, constant along
            the keys. zeroed: before the softmax, entries that were multiplied by 0.
    """

    query: Tensor
    key: Tensor
    lead: tuple[int, ...]
    scale: float = 1.0
    bias: Tensor | None = None
    weights: bool = False
    dropout: float = 0.0
    factor: Tensor | None = None
    zeroed: Tensor | None = None
    product: Step | None = None


class Step:
    """An operation as it was called; `value` runs it, after those that it depends on."""

    def __init__(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._function = function
        self._args, self._kwargs = _steps(tuple(args)), _steps(kwargs)
        self._value: Tensor | None = None
        self._versions = [(one, one._version) for one in self._args if is_plain(one) and not one.is_inference()]

    def value(self) -> Tensor:
        if self._value is None:
            self.check()
            result: Tensor = self._function(*_values(self._args), **_values(self._kwargs))
            self._value = result
        return self._value

    def check(self) -> None:
        """Raise HalError if an operand was changed in place since the call."""
        if any(one._version != version for one, version in self._versions):
            raise HalError(
                f"a tensor that {self._function.__name__} had read was changed in place before its result was used: "
                "revert the conversion, or change the layer's code"
            )


def _steps(given: Any) -> Any:
    if isinstance(given, Scores):
        return given.step
    if isinstance(given, tuple | list):
        return type(given)(_steps(one) for one in given)
    return {name: _steps(one) for name, one in given.items()} if isinstance(given, dict) else given


def _values(given: Any) -> Any:
    if isinstance(given, Step):
        return given.value()
    if isinstance(given, tuple | list):
        return type(given)(_values(one) for one in given)
    return {name: _values(one) for name, one in given.items()} if isinstance(given, dict) else given


def is_plain(given: Any) -> bool:
    """Whether an argument is a tensor that is there."""
    return isinstance(given, Tensor) and not isinstance(given, Scores)


class Scores(Tensor):
    """Scores, or weights after the softmax, [*lead, len_q, len_k], that are recorded and not computed."""

    state: State | None
    step: Step | None
    sink: Sink

    @staticmethod
    def __new__(cls, sink: Sink, state: State, step: Step, dtype: torch.dtype) -> Scores:
        shape = (*state.lead, state.query.shape[-2], state.key.shape[-2])
        made: Scores = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=state.query.device)
        return made

    def __init__(self, sink: Sink, state: State, step: Step, dtype: torch.dtype) -> None:
        self.sink, self.state, self.step = sink, state, step

    def release(self) -> None:
        """Forget the operands: later reads are refused."""
        self.state = self.step = None

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if (name == "__get__" and function.__self__.__name__ in _FACTS) or name in _FACTS:
                return function(*args, **kwargs)
            found = _scores_in((*args, *kwargs.values()))
            for one in found:
                if one.state is None:
                    one.sink.weights_read(name)
                    raise HalError(f"{name} reads attention weights after the layer returned, and hal never holds them")
            if name.endswith("_") and not name.startswith("__") and name[:-1] in HANDLERS:
                result = _handled(name[:-1], function, args, kwargs)
                if isinstance(result, Scores) and result.shape == found[0].shape and found[0] is args[0]:
                    args[0].state, args[0].step = result.state, result.step
                    return args[0]
            elif name in HANDLERS and (result := _handled(name, function, args, kwargs)) is not None:
                return result
            for one in found:
                assert one.state is not None
                (one.sink.weights_read if one.state.weights else one.sink.computed)(name)
            result = function(*_values(_steps(tuple(args))), **_values(_steps(kwargs)))
            if name.endswith("_") and args and isinstance(args[0], Scores) and isinstance(result, Tensor):
                args[0].step = _Computed(result)  # changed in place: later reads see the change
            return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise HalError(f"{function} reads attention scores past torch's function protocol: revert this layer")


class _Computed(Step):
    """A result that is there already."""

    def __init__(self, value: Tensor) -> None:
        self._value = value


_FACTS = frozenset(
    {"shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda", "is_cpu", "is_meta", "size", "dim"}
    | {"numel", "nelement", "ndimension", "is_floating_point", "is_complex", "element_size", "__len__", "get_device"}
    | {"is_sparse", "is_nested", "is_quantized", "__hash__", "is_mps", "is_xpu", "names", "state", "step", "sink"}
)


def _scores_in(given: Sequence[Any]) -> list[Scores]:
    return [
        one
        for each in given
        for one in (each if isinstance(each, tuple | list) else (each,))
        if isinstance(one, Scores)
    ]


def computed(given: Scores) -> Tensor:
    """The scores themselves."""
    assert given.step is not None
    return given.step.value()


def _handled(name: str, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A recorded operation's result; None where it cannot be recorded."""
    try:
        return HANDLERS[name](function, *args, **kwargs)
    except TypeError as error:
        if was_not_called(error):
            return None
        raise


def was_not_called(error: TypeError) -> bool:
    """Whether the function that was called last did not take its arguments, so that nothing of it ran."""
    return error.__traceback__ is not None and error.__traceback__.tb_next is None
