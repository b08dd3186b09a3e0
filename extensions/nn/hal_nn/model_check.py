"""Which models of transformers run their attention on hal; the others are refused when they are built.

transformers accepts a registered attention implementation for every model, also where the model's code never asks for
it. `install` wraps three methods of `PreTrainedModel`, and `uninstall` takes the wrappers off again:

- `get_correct_attn_implementation`, which runs before a model is built and when its implementation is set: classes
  whose code does not ask for the implementation are refused;
- `post_init`, which runs when a model is built: attention layers that compute attention themselves are refused;
- `__call__`: the first call of a model while a device is asked for (`hal.use`, `hal.configure`, HAL_BACKEND) warns if
  no attention of it ran on hal. Calls inside compiled code are not watched.
"""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hal_core import HalError
from hal_core.plugin_api import merged_policy

from .attention_code import (
    OTHER_OPERATIONS as OTHER_OPERATIONS,
    POOLING_HEADS as POOLING_HEADS,
    asks_interface as _asks_interface,
    computes_attention as _computes_attention,
    is_called_attention as _is_called_attention,
    is_pooling_head as _is_pooling_head,
)
from .masks import note_layers
from .placement import calls
from .reroute import is_accounted, is_rerouted

NAME = "hal"


class CallWarning(UserWarning):
    """A model was called for a device, and none of its attention ran there."""


class PartWarning(UserWarning):
    """A part of a model that runs on hal computes attention on torch."""


_watched: weakref.WeakKeyDictionary[nn.Module, str | None] = weakref.WeakKeyDictionary()
_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_originals: dict[str, Any] = {}
_tables: list[dict[str, Any]] = []


def install() -> None:
    """Put the wrappers on `PreTrainedModel`; twice is harmless."""
    if _originals:
        return
    for name, wrapper in (
        ("get_correct_attn_implementation", _checked_implementation),
        ("post_init", _checked_model),
        ("__call__", _watched_call),
    ):
        _originals[name] = PreTrainedModel.__dict__.get(name)  # None: inherited
        setattr(PreTrainedModel, name, wrapper(getattr(PreTrainedModel, name)))


def uninstall() -> None:
    """Take the wrappers off, and what was put into tables of attention classes out of them."""
    for name, original in _originals.items():
        if original is None:
            delattr(PreTrainedModel, name)
        else:
            setattr(PreTrainedModel, name, original)
    _originals.clear()
    for table in _tables:
        table.pop(NAME, None)
    _tables.clear()
    _watched.clear()
    _checked.clear()


def _checked_implementation(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, *args: Any, **options: Any) -> str:
        chosen = original(self, requested_attention, *args, **options)
        if chosen == NAME:
            if reason := class_refusal(type(self)):
                raise HalError(reason)
            _refuse_tables(type(self))
            _check(self)  # no layer is there yet while it is built
        return chosen

    return get_correct_attn_implementation


def _checked_model(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        if self.config._attn_implementation == NAME:
            _check(self)

    return post_init


def _watched_call(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **options: Any) -> Any:  # noqa: N807 - what it replaces has this name
        if torch.compiler.is_compiling():
            return original(self, *args, **options)
        implementation = getattr(self.config, "_attn_implementation", None)
        if _watched.get(self, "") == implementation:
            return original(self, *args, **options)
        if implementation == NAME and self not in _checked:
            _check(self)  # it may come out of a file, without having been built here
        policy = merged_policy()
        if not policy.names:
            return original(self, *args, **options)
        _watched[self] = implementation
        before, outer = calls.count, calls.outer
        calls.outer = str(implementation)
        try:
            result = original(self, *args, **options)
        finally:
            calls.outer = outer
        if (
            calls.count == before
            and not _is_compiled(self)
            and (outer is None or _is_part(self, implementation, outer))
        ):
            _warn(self, implementation, f"{policy.origin}({', '.join(map(repr, policy.names))})")
        return result

    return __call__


def _check(model: PreTrainedModel) -> None:
    """Refuse a model, name the pooling head that stays on torch, and have the masks follow what its layers say."""
    if reason := model_refusal(model):
        raise HalError(reason)
    if heads := sorted({type(layer).__name__ for layer in _layers(model) if _is_pooling_head(type(layer))}):
        warnings.warn(
            f"{type(model).__name__} pools its output by an attention of its own, {' and '.join(heads)}, which runs on "
            f"torch; its other attention runs on hal",
            PartWarning,
            stacklevel=4,
        )
    if next(model.children(), None) is not None:  # else it is being built
        _checked.add(model)
    said = [getattr(layer, "is_causal", None) for layer in model.modules() if _asks_interface(type(layer))]
    if said:
        note_layers(model.config.model_type, said)


def class_refusal(kind: type[PreTrainedModel]) -> str:
    """Why a class of models cannot run its attention on hal, in one sentence; "" if nothing in its code says so."""
    if kind.__module__.startswith("transformers.") and not kind._can_set_attn_implementation():
        return _sentence(kind, "its code computes attention itself and does not ask transformers' attention interface")
    return ""


def model_refusal(model: PreTrainedModel) -> str:
    """Why a built model cannot run its attention on hal, in one sentence; "" if it can.

    Models inside it that have a config of their own are left to their own check.
    """
    layers = [layer for layer in _layers(model) if not is_accounted(layer)]
    own = sorted({type(layer).__name__ for layer in layers if _computes_attention(type(layer))})
    if not own:
        return ""
    names = " and ".join([", ".join(own[:-1]), own[-1]] if len(own) > 1 else own)
    verb = "compute" if len(own) > 1 else "computes"
    return _sentence(type(model), f"{names} in it {verb} attention without transformers' attention interface")


def _sentence(kind: type[PreTrainedModel], reason: str) -> str:
    other = "'sdpa'" if getattr(kind, "_supports_sdpa", False) else "'eager'"
    return (
        f"{kind.__name__} cannot run on hal: {reason}. Use attn_implementation={other}, which runs on torch; for a "
        f"part of a larger model, a dict gives each part its own, as {{'text_config': 'hal', 'vision_config': {other}}}"
    )


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, without those of models inside it and of pooling heads."""
    for child in model.children():
        if not isinstance(child, PreTrainedModel):
            yield child
            if not _is_pooling_head(type(child)):
                yield from _layers(child)


def _refuse_tables(kind: type) -> None:
    """Give the tables of attention classes in a model's module an entry for hal, which refuses.

    Without it, a model that picks its attention class from such a table raises KeyError: 'hal'.
    """
    for name, table in list(vars(sys.modules[kind.__module__]).items()):
        if not isinstance(table, dict) or "eager" not in table or NAME in table or not name.isupper():
            continue
        if not all(isinstance(one, type) for one in table.values()):
            continue

        def refuse(*_: Any, _name: str = name, **__: Any) -> None:
            raise HalError(
                _sentence(_being_built(kind), f"it picks its attention class from {_name}, which has none for hal")
            )

        table[NAME] = refuse
        _tables.append(table)


def _being_built(kind: type[Any]) -> type[Any]:
    """The class of the model whose construction calls, found in the callers' frames; `kind` if there is none."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(model := frame.f_locals.get("self"), PreTrainedModel):
            return type(model)
        frame = frame.f_back
    return kind


def _is_compiled(model: nn.Module) -> bool:
    """Whether a part is compiled, whose calls are not counted."""
    return any(
        getattr(part, "_compiled_call_impl", None) is not None
        or ("forward" in vars(part) and not is_rerouted(part))
        or hasattr(part, "_orig_mod")
        for part in model.modules()
    )


def _is_part(model: PreTrainedModel, implementation: str | None, outer: str) -> bool:
    """Whether a model inside another one is worth a warning of its own: it was to run on hal, or differs from it."""
    return (implementation == NAME or str(implementation) != outer) and _has_attention(model)


def _has_attention(model: nn.Module) -> bool:
    return any(_is_called_attention(type(part)) for part in model.modules())


def _warn(model: PreTrainedModel, implementation: str | None, asked: str) -> None:
    name = type(model).__name__
    if implementation != NAME:
        what = f"its attention implementation is {implementation!r}: build it with attn_implementation='hal'"
    elif _has_attention(model):
        what = "this call reached none of its attention layers, or they do not ask transformers' attention interface"
    else:
        what = "it has no attention layer, so that all of it runs on torch"
    warnings.warn(
        f"{name} was called under hal's {asked}, and no attention of it ran on hal: {what}", CallWarning, stacklevel=3
    )
