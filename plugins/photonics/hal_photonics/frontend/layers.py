"""Linear and convolutional layers whose products run on a photonic device.

The forward value is the chip's; the gradient is that of the exact layer at the same weights and inputs (the
straight-through estimator, Bengio, Léonard & Courville 2013). Training such a layer is therefore noise-aware: the loss
sees the chip's errors, and the weights learn to live with them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hal_core.plugin_api import ContractError, open_session

from ..kernels.straight_through import valued


class Multiply(Protocol):
    """A product of rows with weights, on whatever device."""

    def __call__(self, x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
        """x [rows, K] @ weight [N, K]^T -> [rows, N]."""
        ...


class Settings(NamedTuple):
    """How one layer uses the optics.

    Attributes:
        passes: of the optics, averaged. gain: in front of the readouts; None for the profile's.
        digital_inputs: input channels (of a convolution: of its image) whose products stay digital, ascending.
    """

    passes: int = 1
    gain: float | None = None
    digital_inputs: tuple[int, ...] = ()


class DeviceProduct:
    """Products by the `linear` kernel of an open photonic device, metered as that kernel is.

    Attributes:
        device: its id. gain: that of its profile.
    """

    def __init__(self, device: str) -> None:
        session: Any = open_session(device)
        if not hasattr(session, "profile"):
            raise ContractError(f"device {device!r} was given: name one that is made of a photonic profile")
        self.device, self.gain = session.device.id, session.profile["converters.gain"]
        self._linear = session.kernel("linear")

    def __call__(self, x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
        """The product with noise drawn from torch's default generator."""
        result: Tensor = self._linear(x, weight, None, passes=settings.passes, gain=settings.gain)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceProduct:
        return self  # a session is shared: a copied layer runs on the same chip


class OpticalLayer(nn.Module):
    """What the layers share: the product, its settings, and the observer of calibration data.

    Attributes:
        multiply: runs the products. settings: see `Settings`.
        observer: called with each product's inputs [rows, K] and weight [N, K], or None. weight: of the layer.
    """

    weight: Tensor
    multiply: Multiply
    settings: Settings
    observer: Any

    def _put_on(self, multiply: Multiply, settings: Settings) -> None:
        self.multiply, self.settings, self.observer = multiply, settings, None
        # torch's encoder layers have a fast path that multiplies by the weights of their layers without calling them;
        # they do not take it where a layer has a hook.
        self.register_forward_pre_hook(_called)

    #: Columns of the product's input that one input channel has.
    def columns_per_channel(self) -> int:
        return 1

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [rows, K] @ weight [N, K]^T: the chip's value, the exact product's gradient."""
        if self.observer is not None:
            self.observer(x.detach(), weight.detach())
        with torch.no_grad():
            found = split_product(self.multiply, x, weight, self.settings, self.columns_per_channel())
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return valued(found, x @ weight.T)
        return found


def _called(layer: nn.Module, operands: Any) -> None:
    """A hook that does nothing."""


class OpticalLinear(OpticalLayer, nn.Linear):
    """An `nn.Linear` on a photonic device, with the same weights, names and state."""

    def __init__(self, layer: nn.Linear, multiply: Multiply, settings: Settings = Settings()) -> None:  # noqa: B008
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self._put_on(multiply, settings)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        out = self._product(x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


class OpticalConv2d(OpticalLayer, nn.Conv2d):
    """An ungrouped, zero-padded `nn.Conv2d` on a photonic device: patches stream, kernels are held as weights."""

    def __init__(self, layer: nn.Conv2d, multiply: Multiply, settings: Settings = Settings()) -> None:  # noqa: B008
        nn.Module.__init__(self)
        for name in _CONV:
            setattr(self, name, getattr(layer, name))
        self.weight, self.bias = layer.weight, layer.bias
        self._put_on(multiply, settings)

    def columns_per_channel(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, C, H, W] -> [batch, N, H', W']."""
        shape = {"dilation": self.dilation, "padding": self.padding, "stride": self.stride}
        patches = functional.unfold(x, self.kernel_size, **shape).transpose(1, 2)  # type: ignore[arg-type]
        size = [
            (x.shape[2 + i] + 2 * int(self.padding[i]) - self.dilation[i] * (self.kernel_size[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in (0, 1)
        ]
        out = self._product(patches.reshape(-1, patches.shape[-1]), self.weight.flatten(1))
        out = out.view(x.shape[0], -1, self.out_channels).transpose(1, 2).reshape(x.shape[0], -1, *size)
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)


_CONV = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "transposed",
    "output_padding",
)


def can_convert(layer: nn.Module) -> bool:
    """Whether a layer's product can run on the optics: linear layers, and ungrouped, zero-padded convolutions.

    Not the output projection of `nn.MultiheadAttention`, which multiplies by that layer's weight without calling it.
    """
    if isinstance(layer, OpticalLayer | NonDynamicallyQuantizableLinear):
        return False
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def optical_layer(layer: nn.Module, multiply: Multiply, settings: Settings) -> OpticalLayer:
    """The optical form of a layer, with its parameters.

    Raises:
        ContractError: a layer that cannot run on the optics.
    """
    if not can_convert(layer):
        raise ContractError(f"{type(layer).__name__} was given: pass an nn.Linear or an ungrouped nn.Conv2d")
    if isinstance(layer, nn.Conv2d):
        return OpticalConv2d(layer, multiply, settings).train(layer.training)
    assert isinstance(layer, nn.Linear)
    return OpticalLinear(layer, multiply, settings).train(layer.training)


def split_product(multiply: Multiply, x: Tensor, weight: Tensor, settings: Settings, columns: int = 1) -> Tensor:
    """The product with its digital input channels in float32 on the host, the others on the optics.

    Args:
        columns: of x and weight that one input channel has.
    """
    channels = settings.digital_inputs
    if not channels:
        return multiply(x, weight, settings)
    digital = torch.zeros(x.shape[-1] // columns, dtype=torch.bool)
    digital[list(channels)] = True
    digital = digital.repeat_interleave(columns)
    found = x[:, digital].float() @ weight[:, digital].float().T
    if not bool(digital.all()):
        found = found + multiply(x[:, ~digital], weight[:, ~digital], settings)
    return found.to(x.dtype)
