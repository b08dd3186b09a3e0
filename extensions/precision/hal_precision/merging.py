"""Linear layers of one input as one matrix product: queries, keys and values, or gate and up of a gated MLP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: Names of sibling layers that read the same input, in the order in which they are called.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


class MergedProjections:
    """Layers whose weights lie one after the other in one tensor, and that are one product without gradients.

    The parameters stay the layers' own and become views of that tensor. The first layer multiplies for all; the others
    take their part where they get the very same input, and multiply on their own otherwise, and with gradients.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = list(layers)
        self.sizes = [layer.out_features for layer in layers]
        self.weight, self.bias = self._joined("weight"), self._joined("bias")
        self.given: Tensor | None = None
        self.parts: Sequence[Tensor] = ()
        for place, layer in enumerate(layers):
            layer.forward = partial(self._forward, place)  # type: ignore[method-assign]

    def _joined(self, name: str) -> Tensor | None:
        parameters = [getattr(layer, name) for layer in self.layers]
        if parameters[0] is None:
            return None
        joined = torch.cat([each.detach() for each in parameters])
        for parameter, part in zip(parameters, joined.split(self.sizes), strict=True):
            parameter.data = part
        return joined

    def _forward(self, place: int, input: Tensor) -> Tensor:
        layer = self.layers[place]
        if torch.is_grad_enabled() or (place and input is not self.given):
            return linear(input, layer.weight, layer.bias)
        if place == 0:
            assert self.weight is not None
            self.given, self.parts = input, linear(input, self.weight, self.bias).split(self.sizes, -1)
        found = self.parts[place]
        if place == len(self.layers) - 1:
            self.given, self.parts = None, ()
        return found

    def revert(self) -> None:
        """Layers with tensors of their own again, bit for bit."""
        for layer in self.layers:
            del layer.forward
            for parameter in layer.parameters():
                parameter.data = parameter.data.clone()


def merge_projections(model: nn.Module) -> list[MergedProjections]:
    """Merge what `GROUPS` names, where layers are plain, unshared and alike in inputs, bias, dtype and device."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1

    def kind(layer: Any) -> Any:
        if type(layer) is not nn.Linear or any(uses[id(each)] > 1 for each in layer.parameters()):
            return None
        return layer.in_features, layer.bias is None, layer.weight.dtype, layer.weight.device

    found = []
    for module in model.modules():
        for names in GROUPS:
            layers = [getattr(module, name, None) for name in names]
            kinds = {kind(layer) for layer in layers}
            if len(kinds) == 1 and None not in kinds:
                found.append(MergedProjections(layers))  # type: ignore[arg-type]
    return found
