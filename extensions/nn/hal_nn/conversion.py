"""Models converted to hal: their attention replaced or sent to a device, proved on a sample, taken back to the bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

import hal_core as hal
from hal_core import ContractError, DeviceUnavailableError, HalError, UnknownBackendError

from . import multihead, placement, proof
from .arguments import is_number, need_module
from .attention_code import (
    OTHER_OPERATIONS,
    asks_interface,
    has_products,
    is_called_attention,
    is_pooling_head,
    may_attend,
)
from .reroute import Rerouted, is_rerouted, leave, reroute, restore, take_back

_CONVERSION = "_hal_conversion"  # in a converted model's __dict__


@attrs.frozen(kw_only=True)
class LayerReport:
    """What was done with one attention layer.

    Attributes:
        name: in the model. kind: its class. way: "interface" (transformers' attention interface), "replaced" (by a
            module of hal_nn), "rerouted" (its own code, whose products go to hal), or "" where it stays as it was.
        reason: why it stays, or what is to be known of it; "" for nothing.
    """

    name: str
    kind: str
    way: str
    reason: str = ""

    def __str__(self) -> str:
        said = f"{self.name} ({self.kind}): {self.way or 'not converted'}"
        return f"{said}, {self.reason}" if self.reason else said


@attrs.frozen(kw_only=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        model: the class of the model. layers: its attention layers.
        error: ||after - before|| / ||before||, the largest over the outputs on the sample; None without a sample.
        tolerance: the error that was allowed; None without a sample. devices: on which the sample's attention ran.
    """

    model: str
    layers: tuple[LayerReport, ...]
    error: float | None = None
    tolerance: float | None = None
    devices: tuple[str, ...] = ()

    @property
    def converted(self) -> tuple[LayerReport, ...]:
        """The layers whose attention runs on hal."""
        return tuple(layer for layer in self.layers if layer.way)

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """The layers that stay as they were, each with the reason."""
        return tuple(layer for layer in self.layers if not layer.way)

    def __str__(self) -> str:
        ways = [layer.way for layer in self.converted]
        counts = ", ".join(f"{ways.count(way)} {way}" for way in dict.fromkeys(ways))
        lines = [f"{self.model}: {len(ways)} of {len(self.layers)} attention layers converted ({counts})"]
        if self.error is None:
            lines.append("not proved: no sample was given")
        else:
            where = ", ".join(self.devices)
            lines.append(
                f"proved on a sample, on {where}: relative error {self.error:.1e}, allowed {self.tolerance:.1e}"
            )
        return "\n".join([*lines, *(str(layer) for layer in self.layers if layer.reason)])


class _Conversion:
    """What it takes to go back.

    Attributes:
        configs: each with its attention implementation before. rerouted, left: layers. adopted: modules with what
            `multihead.release` takes. marks: modules with the device that they had. hooks: those that refuse to give
            weights.
    """

    def __init__(self) -> None:
        self.configs: list[tuple[Any, Any]] = []
        self.rerouted: list[nn.Module] = []
        self.left: list[nn.Module] = []
        self.adopted: list[tuple[nn.MultiheadAttention, Any]] = []
        self.marks: list[tuple[nn.Module, str | None]] = []
        self.hooks: list[RemovableHandle] = []

    def undo(self) -> None:
        for config, before in reversed(self.configs):
            config._attn_implementation_internal = before
        for layer in self.rerouted:
            restore(layer)
        for layer in self.left:
            take_back(layer)
        for module, hooks in self.adopted:
            multihead.release(module, hooks)
        for marked, device in self.marks:
            placement.mark(marked, device)
        for hook in self.hooks:
            hook.remove()


def convert(
    model: nn.Module,
    sample: Any = None,
    *,
    device: str | Sequence[str] | None = None,
    tolerance: float | None = None,
) -> tuple[nn.Module, ConversionReport]:
    """Have the attention of a model run on hal, in place.

    Layers that use transformers' attention interface get "hal" there. nn.MultiheadAttention, inside nn.Transformer's
    layers too, becomes `PhotonicMultiHeadAttention` with the same parameters. Layers that compute attention by their
    own code, of transformers or of anybody (products, a softmax, products; or torch's scaled_dot_product_attention),
    keep their code: the products are deferred, and one call of `hal.attention` takes their place. Parameters, state
    dict and hooks stay as they are.

    Args:
        model: any module. sample: what the model is called with to prove that it gives the same: a tensor, a sequence
            of arguments, or a dict of named ones. None: token ids for a model of transformers that takes them, else
            there is no proof, and a layer that cannot run on hal says so when it is called.
        device: a device, a backend, or a list of them, of which the first available one is taken; None leaves it to
            `hal.use` and so on.
        tolerance: the largest relative error of an output; None: what rounding and the device explain.

    Returns:
        (model, what was converted, what was not, and why).

    Raises:
        HalError: nothing to convert; converted already; the model does not run on the sample, or the result is further
            away than allowed. The model is then as it was before.
        UnsupportedError: the device cannot run the attention of the sample. The model is as it was before.
        ContractError: no module, no names for device, or no tolerance.
    """
    need_module("model", model)
    if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):
        raise ContractError(f"tolerance {tolerance!r} was given: use a relative error of 0 or more, or None")
    if is_converted(model):
        raise HalError(f"{type(model).__name__} is converted already: take it back first, with hal_nn.revert(model)")
    chosen = available(device)
    if sample is None:
        sample = proof.default_sample(model)
    before = None if sample is None else proof.checked_sample(model, sample)
    conversion, rows = _Conversion(), dict[str, LayerReport]()
    try:
        records = _rerouted(model, conversion, rows)
        _use_interface(model, conversion, rows)
        if chosen is not None:
            conversion.marks = [(module, placement.device_of(module)) for module in model.modules()]
            placement.set_device(model, chosen)
        _need_layers(model, rows)
        _refuse_weights(model, conversion)
        if before is None:
            report = ConversionReport(model=type(model).__name__, layers=tuple(rows.values()))
        else:
            report = _proved(model, sample, before, tolerance, conversion, records, rows)
    except BaseException:
        conversion.undo()
        raise
    model.__dict__[_CONVERSION] = conversion
    return model, report


def convert_to_photonic(
    model: nn.Module, config: Mapping[str, Any] | Any | None = None
) -> tuple[nn.Module, ConversionReport]:
    """`convert` for a photonic device.

    Args:
        config: None, or a mapping or object with `device` (None or "auto": the first photonic device), `sample` and
            `tolerance`, each with the meaning that it has in `convert`.

    Raises:
        HalError: no photonic device is here, or the config has another setting or none; and as `convert` does.
    """
    need_module("model", model)
    settings = dict(config) if isinstance(config, Mapping) else {} if config is None else _settings(config)
    if unknown := sorted(settings.keys() - _SETTINGS):
        raise HalError(f"{', '.join(unknown)} was given in config: it takes {', '.join(_SETTINGS)}")
    if (device := settings.get("device")) in (None, "auto"):
        device = [found.id for found in hal.devices() if found.family == "photonic"]
        if not device:
            raise HalError(
                "no photonic device is here: pip install hal-photonics for a simulated one, or name a device"
            )
    return convert(model, settings.get("sample"), device=device, tolerance=settings.get("tolerance"))


_SETTINGS = ("device", "sample", "tolerance")


def _settings(config: Any) -> dict[str, Any]:
    found = {name: getattr(config, name) for name in _SETTINGS if hasattr(config, name)}
    if not found:
        raise HalError(f"config is a {type(config).__name__} without {', '.join(_SETTINGS)}: pass a mapping of them")
    return found


def revert(model: nn.Module) -> nn.Module:
    """Take a conversion back: the modules, their code and settings are the ones before, to the bit.

    Weights that were trained in between stay trained.

    Raises:
        HalError: the model is not converted.
    """
    need_module("model", model)
    conversion = model.__dict__.get(_CONVERSION)
    if conversion is None:
        raise HalError(f"{type(model).__name__} is not converted: pass the model that hal_nn.convert was given")
    conversion.undo()
    del model.__dict__[_CONVERSION]
    return model


def is_converted(model: nn.Module) -> bool:
    """Whether `convert` was called on the model, or on a part of it."""
    need_module("model", model)
    return any(_CONVERSION in module.__dict__ for module in model.modules())


def available(device: str | Sequence[str] | None) -> str | None:
    """The device that is asked for; of a list the first one that is here.

    Raises:
        HalError: none of a list is here. UnknownBackendError, DeviceUnavailableError: one alone is not.
        ContractError: neither a name nor names.
    """
    if not (device is None or isinstance(device, str | Sequence)):
        raise ContractError(f"device {device!r} was given: use a device or backend of hal, or a list of them")
    if device is None or isinstance(device, str):
        if device is not None:
            hal.session(device)
        return device
    reasons = []
    for one in device:
        try:
            hal.session(one)
        except (UnknownBackendError, DeviceUnavailableError) as error:
            reasons.append(f"{one}: {' '.join(str(error).split())}")
        else:
            return one
    listed = ", ".join(map(repr, device)) or "an empty list"
    offered = ", ".join(found.id for found in hal.devices()) or "none"
    raise HalError(
        f"{listed} was given for device, and none of it is available ({'; '.join(reasons) or 'it names none'}): pass "
        f"one of {offered}"
    )


def _rerouted(
    model: nn.Module, conversion: _Conversion, rows: dict[str, LayerReport]
) -> list[tuple[nn.Module, Rerouted]]:
    """Send the layers that compute attention by their own code to hal, and list the others that are called attention.

    nn.MultiheadAttention is replaced.

    Layers that ask transformers' interface go the same way where a layer beside them does not, because the config of
    both says which masks they get, and where their model takes eager attention alone.
    """
    own = [one for one in _layers(model) if may_attend(type(one[1])) or isinstance(one[1], nn.MultiheadAttention)]
    mixed = {id(config) for _, _, configs in own for config in configs}
    mixed |= {id(part.config) for part in model.modules() if getattr(part, "_supports_sdpa", True) is False}
    records = []
    for name, layer, configs in _layers(model):
        kind = type(layer)
        if kind is nn.MultiheadAttention:
            assert isinstance(layer, nn.MultiheadAttention)
            conversion.adopted.append((layer, multihead.adopt(layer)))
            rows[name] = LayerReport(name=name, kind=kind.__name__, way="replaced")
        elif may_attend(kind) or (asks_interface(kind) and not mixed.isdisjoint(map(id, configs))):
            records.append((layer, reroute(layer, name)))
            conversion.rerouted.append(layer)
            rows[name] = LayerReport(name=name, kind=kind.__name__, way="rerouted")
        elif reason := _stays(kind):
            rows[name] = LayerReport(name=name, kind=kind.__name__, way="", reason=reason)
    return records


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[Any]]]:
    """Each module once, with its name and the configs that it reads: its own, and that of the model of transformers
    around it. The model itself has the name of its class: a layer alone can be converted.
    """
    inside: list[tuple[str, Any]] = [("", None)]
    for name, module in model.named_modules():
        while inside[-1][0] and not f"{name}.".startswith(f"{inside[-1][0]}."):
            inside.pop()
        config = getattr(module, "config", None)
        if hasattr(module, "get_correct_attn_implementation"):
            inside.append((name, config))
        found = [one for one in (config, inside[-1][1]) if hasattr(one, "_attn_implementation")]
        yield name or type(model).__name__, module, found


def _stays(kind: type[Any]) -> str:
    if is_pooling_head(kind):
        return "it reduces a sequence to one vector by an attention of its own"
    if is_called_attention(kind) and kind.__name__.endswith(OTHER_OPERATIONS):
        return "it weighs by no product of queries and keys, which is another operation than attention"
    if is_called_attention(kind) and has_products(kind) and not asks_interface(kind):
        return "its code takes no softmax over products"
    return ""


def _use_interface(model: nn.Module, conversion: _Conversion, rows: dict[str, LayerReport]) -> None:
    """Set transformers' attention interface to hal in the configs of the layers that ask it and are not rerouted."""
    layers = [one for one in _layers(model) if asks_interface(type(one[1])) and not is_rerouted(one[1])]
    if not layers or "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    from . import huggingface

    huggingface.register()
    kept = {id(config) for _, layer, configs in _layers(model) if is_rerouted(layer) for config in configs}
    refused: dict[int, str] = {}
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and id(part.config) not in kept]
    for part in parts:
        try:
            part.get_correct_attn_implementation(huggingface.NAME)
        except HalError as error:
            refused[id(part.config)] = " ".join(str(error).partition(". Use attn_implementation")[0].split())
    configs = {id(part.config): part.config for part in parts}
    configs |= {id(config): config for _, _, found in layers for config in found}
    for key, config in configs.items():
        if key not in kept and key not in refused and config._attn_implementation != huggingface.NAME:
            conversion.configs.append((config, config._attn_implementation_internal))
            config._attn_implementation_internal = huggingface.NAME
    for name, layer, found in layers:
        reason = next((refused[id(config)] for config in found if id(config) in refused), "")
        rows[name] = LayerReport(name=name, kind=type(layer).__name__, way="" if reason else "interface", reason=reason)


def _refuse_weights(model: nn.Module, conversion: _Conversion) -> None:
    """Have the models of transformers around rerouted layers refuse output_attentions: those layers have no weights."""
    for part in model.modules():
        if hasattr(part, "get_correct_attn_implementation") and any(map(is_rerouted, part.modules())):
            conversion.hooks.append(part.register_forward_pre_hook(_without_weights, with_kwargs=True))


def _without_weights(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    asked = kwargs.get("output_attentions")
    if getattr(module.config, "output_attentions", False) if asked is None else asked:
        raise HalError(
            f"output_attentions=True was given to {type(module).__name__}, whose attention was converted to run on "
            "hal, which never holds the weights: revert the model for such calls (hal_nn.revert)"
        )


def _need_layers(model: nn.Module, rows: Mapping[str, LayerReport]) -> None:
    if any(row.way for row in rows.values()):
        return
    reasons = "; ".join(str(row) for row in rows.values()) or "no layer of it computes attention"
    raise HalError(
        f"{type(model).__name__} has nothing to convert ({reasons}): pass a model with nn.MultiheadAttention, with "
        "products, a softmax and products in a layer's forward, or of transformers"
    )


def _proved(
    model: nn.Module,
    sample: Any,
    before: Mapping[str, torch.Tensor],
    tolerance: float | None,
    conversion: _Conversion,
    records: Sequence[tuple[nn.Module, Rerouted]],
    rows: dict[str, LayerReport],
) -> ConversionReport:
    """Run the sample, take back the layers that cannot run on hal, and compare."""
    for _, record in records:
        record.probing = True
    with hal.meter() as meter:
        after = proof.run(model, sample)
    again = False
    for layer, record in records:
        record.probing = False
        row = rows[record.name]
        if record.reasons:
            restore(layer)
            leave(layer)
            conversion.rerouted.remove(layer)
            conversion.left.append(layer)
            rows[record.name] = attrs.evolve(row, way="", reason="; ".join(record.reasons))
            again = True
        elif not record.entered:
            rows[record.name] = attrs.evolve(row, reason="which the sample did not reach")
        elif not record.calls:  # something else than attention after all
            restore(layer)
            conversion.rerouted.remove(layer)
            del rows[record.name]
        elif record.beside:
            rows[record.name] = attrs.evolve(row, reason="a softmax that it takes besides runs on torch")
    _need_layers(model, rows)
    if again:
        with hal.meter() as meter:
            after = proof.run(model, sample)
    devices = tuple(meter.records)
    error = proof.difference(after, before, proof.padding_mask(sample))
    limit = proof.allowed(before, devices) if tolerance is None else tolerance
    if not error <= limit:
        raise HalError(
            f"{type(model).__name__} gives another result after its conversion, relative error {error:.1e} on the "
            f"sample where {limit:.1e} is allowed, so it is as it was before: pass another tolerance or device"
        )
    return ConversionReport(
        model=type(model).__name__, layers=tuple(rows.values()), error=error, tolerance=limit, devices=devices
    )
