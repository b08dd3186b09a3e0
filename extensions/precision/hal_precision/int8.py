"""Linear layers that multiply int8 with int32 sums, as the KPU's arrays do, with scales from calibration data.

Weights have a scale for each row, inputs one for each layer: the one of least squared error on the calibration data.
Layers that eight bits would hurt more than is allowed stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from hal_core import ContractError

from . import sensitivity
from .fp8 import place_layers

_LARGEST = 127.0
#: Parts of the largest input that are tried as the largest code.
_RANGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
#: Values of a layer's inputs, for each batch, that the scale is chosen by.
_SAMPLED = 1 << 16


@attrs.frozen
class Int8Calibration:
    """scales: of inputs, by layer that multiplies int8. errors: of the model's output, relative, with that layer alone
    in eight bits. left: layers that stay, and why.
    """

    scales: dict[str, float]
    errors: dict[str, float]
    left: dict[str, str]


class Int8Linear(nn.Module):
    """y = (x8 w8^T) s_x s_w + bias, for inference. Buffers: `weight`, int8 [out, in]; `weight_scale`, float32 [out];
    `input_scale`, float32 scalar; `bias` is the layer's own parameter.

    Under `torch.compile(backend="kpu")` the product runs on the arrays that multiply int8.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor

    def __init__(self, layer: nn.Linear, input_scale: float) -> None:
        super().__init__()
        weight = layer.weight.detach().float()
        scale = (weight.abs().amax(1) / _LARGEST).clamp_min(1e-20)
        self.register_buffer("weight", (weight / scale.unsqueeze(1)).round().to(torch.int8))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("input_scale", torch.tensor(input_scale, device=weight.device))
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out], in the input's dtype; inputs beyond the scale's range saturate."""
        codes = (input.float() / self.input_scale).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
        sums = torch._int_mm(codes.flatten(0, -2), self.weight.t())
        out = (sums.float() * (self.weight_scale * self.input_scale)).to(input.dtype)
        out = out if self.bias is None else out + self.bias
        return out.view(*input.shape[:-1], len(self.weight))


def calibrate_int8(
    model: nn.Module,
    calibration: Any,
    max_error: float = 0.05,
    *,
    skip: Iterable[str] = (),
    readout: sensitivity.Readout | None = None,
) -> tuple[nn.Module, Int8Calibration]:
    """(a copy of the model whose linear layers multiply int8, what was measured). The model is not changed.

    Args:
        calibration: as in `plan_precision`. max_error: largest relative error of the model's output with one layer
            alone in eight bits, by `hal_nn.layer_sensitivity`; others stay. skip: parts of names of layers that stay.
        readout: from the model's output to the tensor that matters.

    Raises:
        ContractError: malformed data, or no layer that may multiply int8, with every reason.
    """
    import hal_nn

    batches, left = sensitivity.batches_of(calibration), dict[str, str]()
    layers = {name: each for name, each in model.named_modules() if type(each) is nn.Linear and name}
    for name in layers:
        if any(part in name for part in skip):
            left[name] = "is named by skip"
    samples: dict[str, list[Tensor]] = {name: [] for name in layers if name not in left}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            values = args[0].detach().float().flatten()
            largest = values[values.abs().argmax()].view(1)
            samples[name].append(torch.cat([values[:: 1 + values.numel() // _SAMPLED], largest]))

        return hook

    def outputs(network: nn.Module) -> Tensor:
        return torch.cat([sensitivity.read(network, batch, readout)[0].flatten() for batch in batches])

    handles = [layers[name].register_forward_pre_hook(watch(name)) for name in samples]
    with sensitivity.frozen(model), torch.no_grad():
        outputs(model)
        for handle in handles:
            handle.remove()
        left |= {name: "no calibration batch reached it" for name, found in samples.items() if not found}
        names = [name for name in samples if name not in left]
        measured = hal_nn.layer_sensitivity(model, outputs, bits=8, layers=names) if names else []
    errors = {each.name: each.error for each in measured}
    left |= {
        name: f"its relative error in int8 is {error:.3g}, above max_error {max_error:g}"
        for name, error in errors.items()
        if not error <= max_error
    }
    scales = {name: _input_scale(torch.cat(samples[name])) for name in errors if name not in left}
    if not scales:
        reasons = "; ".join(f"{name} {why}" for name, why in left.items()) or "it has no linear layers inside"
        raise ContractError(f"No layer of the model can multiply int8: {reasons}. Nothing was changed.")
    found = copy.deepcopy(model).eval()
    place_layers(found, {name: Int8Linear(found.get_submodule(name), scale) for name, scale in scales.items()})  # type: ignore[arg-type]
    return found, Int8Calibration(scales, errors, left)


def _input_scale(values: Tensor) -> float:
    """The scale of least squared error among parts of the largest value."""
    largest = values.abs().amax().clamp_min(1e-20)
    scales = [part * largest / _LARGEST for part in _RANGES]
    errors = [((values / s).round().clamp(-_LARGEST, _LARGEST) * s - values).square().sum() for s in scales]
    return float(scales[int(torch.stack(errors).argmin())])
