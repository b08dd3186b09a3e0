"""What the errors of one layer do to a model's output: noise on a linear layer or an attention, or fewer bits in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import attrs

from hal_core import ContractError

from .sensitivity import match_layers

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn


@attrs.frozen(kw_only=True)
class LayerSensitivity:
    """What one disturbed layer does to a model's output.

    Attributes:
        name: of the module. kind: "linear" or "attention". parameters: of the layer, modules inside it included.
        error: ||y - clean|| / ||clean|| of the model's output y, root mean square over draws.
        amplification: error over the relative size of the noise; None for fewer bits.
    """

    name: str
    kind: str
    parameters: int
    error: float
    amplification: float | None = None


def sensitive_layers(model: nn.Module) -> dict[str, str]:
    """The layers that `layer_sensitivity` disturbs, in the model's order: "linear" or "attention" by name.

    Attention is a module whose class says so in its name and that holds no other such module: its output is that of the
    whole module, with its output projection where the module has one.
    """
    from torch import nn

    found: dict[str, str] = {}
    modules = dict(model.named_modules())
    attention = {name for name, each in modules.items() if name and _is_attention(each)}
    for name, module in modules.items():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            found[name] = "linear"
        elif name in attention and not any(other.startswith(f"{name}.") for other in attention):
            found[name] = "attention"
    return found


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower() and any(True for _ in module.parameters())


def layer_sensitivity(
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    *,
    noise: float | None = None,
    bits: int | None = None,
    layers: Iterable[str] = (),
    draws: int = 2,
    seed: int = 0,
) -> list[LayerSensitivity]:
    """The effect of each linear layer's and each attention's errors on a model's output, one layer at a time.

    Args:
        model: left as it was. run: gives an output tensor of the model, any shape, deterministic; it is called once,
            and then once for each layer and draw.
        noise: white Gaussian noise on the layer's output, its root mean square relative to that of the output: 0.1 is
            20 dB. bits: instead, the layer's input, its weight where it is linear, and its output are rounded to so
            many bits, symmetric, one scale a tensor.
        layers: names, or patterns such as "encoder.*"; none for all. draws: of the noise. seed: of the first draw.

    Returns:
        One entry a layer, in the model's order. `error` is 0 where the output does not depend on the layer.

    Raises:
        ContractError: both or neither of noise and bits, or one that is not possible; an unknown layer, with the
            closest names; a model without such layers; an output that is no finite tensor.
    """
    import torch

    _check(noise, bits, draws)
    kinds = sensitive_layers(model)
    if not kinds:
        raise ContractError(f"{type(model).__name__} was given: it has neither linear layers nor attention")
    wanted = match_layers(list(kinds), layers) if (layers := list(layers)) else frozenset(kinds)
    with torch.no_grad():
        clean = _output(run, model)
        scale = float(clean.norm()) or 1.0
        found = []
        for name in (name for name in kinds if name in wanted):
            module, errors = model.get_submodule(name), []
            for draw in range(draws if bits is None else 1):
                generator = torch.Generator().manual_seed(seed + draw)
                with _noisy(module, noise, generator) if bits is None else _coarse(module, bits):
                    errors.append(float((_output(run, model) - clean).norm()) / scale)
            error = math.sqrt(sum(each**2 for each in errors) / len(errors))
            found.append(
                LayerSensitivity(
                    name=name,
                    kind=kinds[name],
                    parameters=sum(each.numel() for each in module.parameters()),
                    error=error,
                    amplification=error / noise if noise else None,
                )
            )
    return found


def _check(noise: float | None, bits: int | None, draws: int) -> None:
    if (noise is None) == (bits is None):
        raise ContractError(f"noise={noise!r} and bits={bits!r} were given: pass one of them, noise=0.1 for 20 dB")
    if noise is not None and not (isinstance(noise, int | float) and 0 < noise < math.inf):
        raise ContractError(f"noise={noise!r} was given: pass a number above 0, relative to the layer's output")
    if bits is not None and not (type(bits) is int and 2 <= bits <= 24):
        raise ContractError(f"bits={bits!r} was given: pass a whole number from 2 to 24")
    if type(draws) is not int or draws < 1:
        raise ContractError(f"draws={draws!r} was given: pass a whole number, 1 or more")


def _output(run: Callable[[nn.Module], Tensor], model: nn.Module) -> Tensor:
    import torch

    output = run(model)
    if not isinstance(output, torch.Tensor) or not bool(output.isfinite().all()):
        what = "a tensor that is not finite" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        raise ContractError(f"run gave {what}: return a finite tensor of the model's output")
    return output.double()


@contextmanager
def _noisy(module: nn.Module, noise: float | None, generator: Generator) -> Iterator[None]:
    """The module with noise on its output, until the block ends."""
    import torch

    def add(output: Tensor) -> Tensor:
        drawn = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
        return output + (noise or 0.0) * output.square().mean().sqrt() * drawn

    hook = module.register_forward_hook(lambda _, given, output: _first(output, add))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _coarse(module: nn.Module, bits: int) -> Iterator[None]:
    """The module with its input, its own weight and its output rounded, until the block ends."""
    import torch

    def rounded(tensor: Tensor) -> Tensor:
        return _rounded(tensor, bits)

    def before(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        hidden = {name: _first(value, rounded) for name, value in named.items() if name == "hidden_states"}
        return tuple(_first(value, rounded) for value in given[:1]) + given[1:], named | hidden

    hooks = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(lambda _, given, output: _first(output, rounded)),
    ]
    weight = getattr(module, "weight", None)
    kept = weight.data if isinstance(weight, torch.Tensor) else None
    if weight is not None and kept is not None:
        weight.data = rounded(kept)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if weight is not None and kept is not None:
            weight.data = kept


def _first(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's value with its first floating tensor changed."""
    import torch

    if isinstance(value, torch.Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, tuple) and value:
        return (_first(value[0], change), *value[1:])
    return value


def _rounded(tensor: Tensor, bits: int) -> Tensor:
    """Symmetric rounding with one scale: the largest magnitude is the largest code."""
    top = 2 ** (bits - 1) - 1
    largest = tensor.abs().max()
    step = largest / top
    return tensor if not bool(step > 0) else (tensor / step).round() * step
