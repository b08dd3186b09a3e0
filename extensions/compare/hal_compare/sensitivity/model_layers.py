"""Which layers of the model hurt its result most: each alone with a device's errors, with noise, or with fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from hal_nn.disturbance import layer_sensitivity, sensitive_layers
from hal_nn.sensitivity import layer_damage, match_layers
from torch import Tensor, nn

from hal_core import Device, HalError

from ..lanes import Lane, LinearOnDevice, linear_devices, linear_names
from .trial import Trial


@attrs.frozen(kw_only=True)
class LayerEffect:
    """One layer alone in error.

    Attributes:
        name: of the module. kind: "linear" or "attention". error: ||h - reference|| / ||reference|| of the model's last
            hidden states: mean over texts for a device, of all texts together for noise and bits.
        macs: multiply-accumulates of a linear layer on a device; 0 where they were not counted.
    """

    name: str
    kind: str
    error: float
    macs: int = 0


@attrs.frozen(kw_only=True)
class LayerEffects:
    """The layers of a model.

    Attributes:
        cause: what each layer alone was given: "the errors of lightmatter:0", "noise at 20 dB", "8 bits".
        device: None for noise and bits. layers: in the model's order.
    """

    cause: str
    device: str | None
    layers: tuple[LayerEffect, ...]

    def ranked(self) -> list[LayerEffect]:
        """The worst first."""
        return sorted(self.layers, key=lambda layer: -layer.error)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return attrs.asdict(self)


def check(network: nn.Module, patterns: Sequence[str], device: Device | None) -> None:
    """Refuse what cannot be looked at, before anything is measured.

    Raises:
        ContractError: a layer that is not there, with the closest names. HalError: a model without layers, or a device
            without a linear kernel.
    """
    names = list(sensitive_layers(network)) if device is None else linear_names(network)
    if not names:
        raise HalError(f"{type(network).__name__} has no linear layers: leave --layers out")
    match_layers(names, patterns)
    if device is not None and device.id not in linear_devices():
        able = ", ".join(sorted(linear_devices())) or "none is installed"
        raise HalError(
            f"{device.id} has no linear kernel, so no linear layer runs on it: name a device that has one ({able}), or "
            "leave --device out and pass --noise or --bits"
        )


def on_device(
    trial: Trial, device: Device, patterns: Sequence[str], progress: Callable[[str, float], None]
) -> LayerEffects:
    """The linear layers of the model, each alone on a device, all others on torch; attention stays exact too.

    Raises:
        As `check`.
    """
    check(trial.model.network, patterns, device)
    names = linear_names(trial.model.network)
    wanted = match_layers(names, patterns) if patterns else frozenset(names)
    lane = trial.lane(device, attention=False)
    layers = {name: _layer(lane, name) for name in names}
    others, done = frozenset(names) - wanted, 0

    def error(digital: frozenset[str]) -> float:
        nonlocal done
        progress(f"layer {done + 1} of {len(wanted)} on {device.id}", done / len(wanted))
        done += 1
        for name, layer in layers.items():
            layer.digital, layer.macs = name in digital | others, 0
        return sum(trial.error(lane, draw) for draw in range(trial.draws)) / trial.draws

    hurt = layer_damage([name for name in names if name in wanted], error)
    effects = [
        LayerEffect(name=name, kind="linear", error=damage, macs=layers[name].macs // trial.draws)
        for name, damage in hurt.items()
    ]
    return LayerEffects(cause=f"the errors of {device.id}", device=device.id, layers=tuple(effects))


def disturbed(
    trial: Trial,
    patterns: Sequence[str],
    *,
    noise: float | None,
    bits: int | None,
    progress: Callable[[str, float], None],
) -> LayerEffects:
    """The linear layers and attentions of the model, each alone with noise or fewer bits; see `layer_sensitivity`."""
    model, batches = trial.model, trial.tokens.batches
    kinds = sensitive_layers(model.network)
    names = [name for name in kinds if name in match_layers(list(kinds), patterns)] if patterns else list(kinds)
    steps, done = 1 + len(names) * (1 if bits is not None else trial.draws), 0

    def run(network: nn.Module) -> Tensor:
        nonlocal done
        progress(f"run {done + 1} of {steps}", done / steps)
        done += 1
        states = []
        for batch in batches:
            outputs = network(**batch.inputs("cpu", model.network.dtype), output_hidden_states=True)
            hidden = (getattr(outputs, "hidden_states", None) or outputs.decoder_hidden_states)[-1]
            states.append(hidden[batch.mask.bool()] if hidden.shape[:2] == batch.mask.shape else hidden.flatten(0, -2))
        return torch.cat(states)

    found = layer_sensitivity(model.network, run, noise=noise, bits=bits, layers=names, draws=trial.draws)
    cause = f"noise of {noise:g} of its output" if noise is not None else f"{bits} bits"
    layers = tuple(LayerEffect(name=each.name, kind=each.kind, error=each.error) for each in found)
    return LayerEffects(cause=cause, device=None, layers=layers)


def _layer(lane: Lane, name: str) -> LinearOnDevice:
    layer = lane.network.get_submodule(name)
    assert isinstance(layer, LinearOnDevice)
    return layer
