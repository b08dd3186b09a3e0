"""Layers that compute attention by their own code, sent to hal: their forward runs with its products deferred."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import hal_core as hal
from hal_core import HalError

from . import deferred_operations as deferred_operations  # it records the operations on scores
from .attention_code import asks_interface, is_called_attention, may_attend
from .deferred import Scores
from .deferred_products import PRODUCTS, start
from .placement import calls, device_of

_RECORD, _INNER, _LEFT = "_hal_rerouted", "_hal_forward", "_hal_left"  # in a module's __dict__


class Rerouted:
    """What is known of one layer whose attention is sent to hal.

    Attributes:
        name: of the layer in its model. attention: what is called with the arguments of `hal.attention`; None for
            that itself. probing: whether what cannot be sent is computed and noted, and not refused.
        calls: attention calls that ran on hal. reasons: while probing, why attention of the layer cannot.
        entered: whether the layer was called. beside: whether it took another softmax, which ran on torch.
    """

    def __init__(self, name: str, kind: str, attention: Callable[..., Tensor] | None) -> None:
        self.name, self.kind, self.attention = name, kind, attention
        self.probing = False
        self.calls = 0
        self.entered = self.beside = False
        self.reasons: list[str] = []

    def refuse(self, reason: str) -> None:
        """Note why attention does not run on hal, or raise HalError."""
        if not self.probing:
            raise HalError(
                f"{self.kind} ({self.name}) was converted to run on hal, and {reason}: revert the model "
                "(hal_nn.revert), or convert it without this layer"
            )
        if reason not in self.reasons:
            self.reasons.append(reason)


class _Rerouting(TorchFunctionMode):
    """The forward pass of one layer: products are deferred, and attention of torch goes to hal."""

    def __init__(self, record: Rerouted, module: nn.Module) -> None:
        super().__init__()
        self._record, self._device, self._kind = record, device_of(module), type(module)
        self._made: list[Scores] = []
        self._readers: list[str] = []
        self._softmax = ""  # of what was computed: the operation that had it computed
        self._calls = record.calls

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _WATCHED:
            if name == "scaled_dot_product_attention":
                return self._attention(*args, **kwargs)
            if name == "multi_head_attention_forward":
                self._record.refuse("it calls torch's multi_head_attention_forward, which holds the weights")
            elif name in _SOFTMAX:
                if isinstance(args[0], Tensor) and not isinstance(args[0], Scores):
                    self._softmax = self._softmax or (self._readers[-1] if self._readers else name)
            elif not _has_scores(args) and (scores := start(self, function, args, kwargs)) is not None:
                self._made.append(scores)
                return scores
        result = function(*args, **kwargs)
        if isinstance(result, Scores):
            self._made.append(result)
        return result

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float
    ) -> Tensor:
        """Attention of [batch, heads, length, dim] on the layer's device."""
        gqa = query.shape[1] != key.shape[1]
        return self._attention(query, key, value, mask, dropout, scale=scale, enable_gqa=gqa)

    def _attention(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._device is not None:
            kwargs["backend"] = self._device
        result: Tensor = (self._record.attention or hal.attention)(*args, **kwargs)
        self._record.calls += 1
        calls.count += 1
        return result

    def computed(self, reader: str) -> None:
        """Scores were computed: attention, if their softmax follows."""
        if reader in _SOFTMAX:
            self._record.refuse(f"its {reader} is not over the keys")
        self._readers.append(reader)

    def weights_read(self, reader: str) -> None:
        """Weights are needed: nothing on a device has them."""
        self._record.refuse(f"{reader} reads its attention weights, which hal never holds")

    def finish(self, result: Any) -> Any:
        """What the layer returns, with scores computed that are no weights; the operands of weights are let go."""
        if self._softmax:
            if self._calls == self._record.calls and (self._softmax not in _SOFTMAX or is_called_attention(self._kind)):
                self._record.refuse(f"{self._softmax} reads its scores, and no mask says what becomes of them")
            self._record.beside = True
        result = pytree.tree_map_only(Scores, _computed_scores, result)
        for scores in self._made:
            if scores.state is None or scores.state.weights:
                scores.release()
        return result


def _computed_scores(scores: Scores) -> Any:
    if scores.state is None or scores.state.weights or scores.step is None:
        return scores
    return scores.step.value()


_SOFTMAX = frozenset({"softmax", "log_softmax"})
_WATCHED = _SOFTMAX | {"scaled_dot_product_attention", "multi_head_attention_forward"} | {*PRODUCTS}


def _has_scores(args: Sequence[Any]) -> bool:
    return any(isinstance(one, Scores) or (isinstance(one, tuple | list) and _has_scores(one)) for one in args)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    record: Rerouted = self.__dict__[_RECORD]
    record.entered = True
    mode = _Rerouting(record, self)
    inner = _forward_before(self)
    with mode:
        result = inner(*args, **kwargs)
    return mode.finish(result)


@functools.cache
def _outside_graphs() -> Callable[..., Any]:
    """`_forward` for compiled code, which leaves its graph there. Made late, because it imports the compiler."""
    disabled: Callable[..., Any] = torch.compiler.disable(_forward)
    return disabled


def _forward_before(module: nn.Module) -> Any:
    """The forward that a layer had before."""
    given = module.__dict__.get(_INNER)
    return types.MethodType(type(module).forward, module) if given is None else given


def reroute(module: nn.Module, name: str, attention: Callable[..., Tensor] | None = None) -> Rerouted:
    """Send the attention of a layer to hal, or to a function with its arguments. Class, parameters and hooks stay."""
    record = module.__dict__[_RECORD] = Rerouted(name, type(module).__name__, attention)
    if "forward" in module.__dict__:
        module.__dict__[_INNER] = module.__dict__["forward"]
    module.__dict__["forward"] = types.MethodType(_outside_graphs(), module)
    return record


def reroute_layers(model: nn.Module, attention: Callable[..., Tensor]) -> int:
    """Send every layer of a model that computes attention to a function; how many there are."""
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if may_attend(type(module)) or asks_interface(type(module))
    ]
    for name, layer in layers:
        reroute(layer, name, attention)
    return len(layers)


def restore(module: nn.Module) -> None:
    """Take back what `reroute` did."""
    module.__dict__.pop(_RECORD)
    module.__dict__.pop("forward")
    if _INNER in module.__dict__:
        module.__dict__["forward"] = module.__dict__.pop(_INNER)


def leave(module: nn.Module) -> None:
    """Mark a layer of a converted model that stays as it was, which the report says."""
    module.__dict__[_LEFT] = True


def take_back(module: nn.Module) -> None:
    """Take the mark of `leave` off."""
    module.__dict__.pop(_LEFT, None)


def is_rerouted(module: nn.Module) -> bool:
    """Whether a layer's attention is sent to hal."""
    return _RECORD in module.__dict__


def is_accounted(module: nn.Module) -> bool:
    """Whether a conversion sent a layer's attention to hal, or reported that it stays."""
    return _RECORD in module.__dict__ or _LEFT in module.__dict__
