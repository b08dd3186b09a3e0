"""What calibration data choose for each layer: the gain in front of its readouts, and its outlier channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hal_core.plugin_api import ContractError

from ..simulator.core import check_options
from .convert import optical_layers
from .layers import DeviceProduct, OpticalLayer, Settings, split_product

#: Rows of a layer's inputs that are kept of the calibration data.
_ROWS = 512
#: Gains that are tried, relative to the profile's.
_RATIOS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
#: Another gain is chosen where its error is below this share of the profile's gain's: noise alone differs by less.
_WORTHWHILE = 0.95


def tune_gains(
    model: nn.Module, run: Callable[[nn.Module], object], *, ratios: Sequence[float] = _RATIOS
) -> dict[str, float]:
    """Choose the gain of every optical layer: the one with the least error of its own products on calibration data.

    Doubling the gain gains one bit and risks clipping, so the best gain depends on how large a layer's products are
    (adaptive block floating point, Basumallik et al. 2022). A gain helps against what arises behind it: the
    converter's steps, and the share `noise.after_gain` of the readout noise.

    Args:
        model: of `to_optics`; its layers' settings are changed. run: runs the model on calibration data.
        ratios: gains that are tried, relative to the profile's.

    Returns:
        The gain of each layer by name.

    Raises:
        ContractError: no ratios; a layer that runs on no photonic device; no optical layer at all, or none that ran.
    """
    if not ratios:
        raise ContractError(f"ratios {ratios!r} was given: pass one gain or more, relative to the profile's")
    chosen = {}
    for name, (layer, x, weight) in _observed(model, run).items():
        if not isinstance(layer.multiply, DeviceProduct):
            raise ContractError(f"layer {name!r} runs on a product of your own: gains are a photonic device's")
        exact, gain, errors = x @ weight.T, layer.multiply.gain, dict[float, float]()
        for ratio in ratios:
            settings = layer.settings._replace(gain=gain * ratio)
            found = split_product(layer.multiply, x, weight, settings, layer.columns_per_channel())
            errors[gain * ratio] = float((found - exact).norm())
        best = min(errors, key=lambda tried: errors[tried])
        chosen[name] = best if errors[best] < _WORTHWHILE * errors.get(gain, math.inf) else gain
        layer.settings = layer.settings._replace(gain=chosen[name])
    return chosen


def keep_outliers_digital(
    model: nn.Module, run: Callable[[nn.Module], object], share: float
) -> dict[str, tuple[int, ...]]:
    """Keep the input channels with the largest values of every optical layer digital.

    A row's scale is its largest value, so one large channel costs all others their resolution (Dettmers et al. 2022,
    LLM.int8()). A layer's products with these channels are summed in float32 on the host.

    Args:
        model: of `to_optics`; its layers' settings are changed. run: runs the model on calibration data.
        share: of the input channels of each layer, above 0 and below 1; at least one channel is kept.

    Returns:
        The channels of each layer by name.

    Raises:
        ContractError: another share; no optical layer at all, or none that ran.
    """
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise ContractError(f"share {share!r} was given: use one above 0 and below 1")
    chosen = {}
    for name, (layer, x, _) in _observed(model, run).items():
        columns = layer.columns_per_channel()
        # How often, and by how much, a channel sets the scale of its row.
        largest = x.abs().view(len(x), -1, columns).amax(2)
        weight = largest.square().sum(0)
        count = max(round(share * len(weight)), 1)
        chosen[name] = tuple(sorted(weight.topk(count).indices.tolist()))
        layer.settings = layer.settings._replace(digital_inputs=chosen[name])
    return chosen


def with_settings(model: nn.Module, change: Callable[[Settings], Settings]) -> nn.Module:
    """Change the settings of every optical layer, in place. Returns the model.

    Raises:
        ContractError: settings that no chip or no layer has; no layer is changed then.
    """
    changed = []
    for name, layer in optical_layers(model):
        settings = change(layer.settings)
        _check_settings(name, layer, settings)
        changed.append((layer, settings))
    for layer, settings in changed:
        layer.settings = settings
    return model


def _check_settings(name: str, layer: OpticalLayer, settings: object) -> None:
    if not isinstance(settings, Settings):
        raise ContractError(f"change gave {settings!r}: return Settings, for example settings._replace(passes=4)")
    check_options(settings.passes, settings.gain)
    channels = layer.weight.shape[1]
    if not all(isinstance(channel, int) and 0 <= channel < channels for channel in settings.digital_inputs):
        given = f"digital_inputs {settings.digital_inputs} of layer {name!r} were given"
        raise ContractError(f"{given}: use input channels from 0 to {channels - 1}")


def _observed(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, tuple[OpticalLayer, Tensor, Tensor]]:
    """(layer, inputs [rows, K], weight [N, K]) of the layers that ran, by name."""
    found: dict[str, tuple[OpticalLayer, Tensor, Tensor]] = {}

    def observer(name: str, layer: OpticalLayer) -> Callable[[Tensor, Tensor], None]:
        def observe(x: Tensor, weight: Tensor) -> None:
            rows = x[:: -(-len(x) // _ROWS)].float()
            if name in found:
                rows = torch.cat([found[name][1], rows])
            found[name] = (layer, rows[-8 * _ROWS :], weight.float())

        return observe

    if not callable(run):
        raise ContractError(f"run {run!r} was given: pass a function of the model that runs it on calibration data")
    layers = list(optical_layers(model))
    if not layers:
        raise ContractError(f"{type(model).__name__} has no optical layer: convert it with to_optics first")
    for name, layer in layers:
        layer.observer = observer(name, layer)
    try:
        with torch.no_grad():
            run(model)
    finally:
        for _, layer in layers:
            layer.observer = None
    if not found:
        raise ContractError("run ran no optical layer: pass a function that calls the model that it is given")
    return found
