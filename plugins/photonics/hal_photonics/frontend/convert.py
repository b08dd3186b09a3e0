"""A model's linear and convolutional layers put on a photonic device, all but those that are named."""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from hal_core.plugin_api import ContractError

from ..simulator.core import check_options
from .layers import DeviceProduct, Multiply, OpticalLayer, Settings, can_convert, optical_layer


def to_optics(
    model: nn.Module,
    device: str | Multiply,
    *,
    digital: Sequence[str] = (),
    passes: int = 1,
) -> nn.Module:
    """A copy of a model whose linear and convolutional layers run on a photonic device.

        optical = hal_photonics.to_optics(model, "lightmatter:0", digital=["classifier"], passes=4)

    Names, parameters and state dict stay. Gradients are straight-through (`OpticalLayer`), so the copy can be trained.

    Args:
        model: anything with `nn.Linear` or ungrouped `nn.Conv2d` layers; it is left as it is.
        device: the id of a photonic device, or a product of one's own.
        digital: names of layers, or patterns ("encoder.*"), that stay as they are.
        passes: of the optics, averaged, in every layer.

    Raises:
        ContractError: what is no model or no device; a name that fits no layer, with the closest ones; passes that no
            chip has; no layer to convert.
        UnknownBackendError, DeviceUnavailableError: there is no such device.
    """
    check_options(passes, None)
    check_model(model)
    if not isinstance(device, str) and not callable(device):
        raise ContractError(
            f"device {device!r} was given: pass the id of a photonic device, or a product of your own, a function of "
            "(x, weight, settings)"
        )
    result = copy.deepcopy(model)
    layers = {name: module for name, module in result.named_modules(remove_duplicate=False) if can_convert(module)}
    if not layers:
        raise ContractError(f"{type(model).__name__} has no nn.Linear or ungrouped nn.Conv2d layer to convert")
    stay = {layers[name] for name in matching(list(layers), digital)}
    multiply = DeviceProduct(device) if isinstance(device, str) else device
    settings = Settings(passes=passes)
    # A layer that the model holds under several names is converted once, and is digital if one of them is named.
    optical = {layer: optical_layer(layer, multiply, settings) for layer in layers.values() if layer not in stay}
    if "" in layers:  # the model is one layer
        return optical.get(result, result)
    for name, layer in layers.items():
        if layer in optical:
            parent, _, last = name.rpartition(".")
            setattr(result.get_submodule(parent), last, optical[layer])
    for module in result.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # only the fast path, which optical layers are never on, reads them
    return result


def optical_layers(model: nn.Module) -> Iterator[tuple[str, OpticalLayer]]:
    """(name, layer) of the layers that run on the optics, in the model's order. Raises ContractError for no model."""
    check_model(model)
    for name, module in model.named_modules():
        if isinstance(module, OpticalLayer):
            yield name, module


def check_model(model: object) -> None:
    """Raise ContractError for what is no torch module."""
    if not isinstance(model, nn.Module):
        raise ContractError(f"model {model!r} was given: pass a torch.nn.Module")


def matching(names: Sequence[str], wanted: Sequence[str]) -> frozenset[str]:
    """The names that the wanted ones, or patterns among them, mean.

    Raises:
        ContractError: one that means none, with the closest names; what is no list of texts.
    """
    found: set[str] = set()
    if not isinstance(wanted, Iterable):
        raise ContractError(f"digital {wanted!r} was given: pass a list of layer names or patterns")
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        if not isinstance(pattern, str):
            raise ContractError(f"layer {pattern!r} was given: pass names of layers as text, for example {names[0]!r}")
        if hits := [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]:
            found.update(hits)
            continue
        close = difflib.get_close_matches(pattern, names, 3, 0.4) or list(names[:3])
        raise ContractError(
            f"layer {pattern!r} was given: there is none of that name; the closest are {', '.join(close)}"
        )
    return frozenset(found)
