"""The memory of a training step or a forward pass, by running it on fake tensors: shapes and storages, no arithmetic.

Every storage that an operator returns is counted until it is freed, as the allocator would, so the peak is that of the
code that runs: fused or eager attention, recomputation, the loss, the optimiser's temporaries. What an operator
allocates inside and frees again is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hal_core import ContractError

#: Makes an optimiser of a list of parameters.
OptimiserFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


class StorageCount(TorchDispatchMode):
    """Counts the bytes of storages that live while the mode is on. `current`, `peak`: bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default:  # torch's own shapes are for bfloat16 alone
            ends = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
            out = args[0].new_empty(_grouped_shape(args[0], args[1], ends))
        else:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.current -= size

        self._known[key] = weakref.ref(storage, freed)
        self.current += size
        self.peak = max(self.peak, self.current)


def _grouped_shape(left: Tensor, right: Tensor, ends: Tensor | None) -> tuple[int, ...]:
    """The shape of a product by groups of rows, of columns, or of the summed dimension: one matrix for each group."""
    if left.dim() == 2 and right.dim() == 2:
        assert ends is not None
        return (ends.shape[0], left.shape[0], right.shape[1])
    if left.dim() == 3 and right.dim() == 3:
        return (left.shape[0], left.shape[1], right.shape[2])
    return (left.shape[-2], right.shape[-1])


class Simulated(NamedTuple):
    """Bytes, found on fake tensors.

    Attributes:
        weights: parameters and buffers. gradients, optimiser: what a step leaves. inputs: of one batch.
        step: the most that lives beside weights, optimiser and inputs, gradients included where there are any.
        activations: what the forward pass keeps for the backward, or holds at its end.
        layers: bytes that the forward pass of each named module leaves behind.
        cache: the returned key-value cache, of each of its layers where it has layers; () for none.
    """

    weights: int
    gradients: int
    optimiser: int
    inputs: int
    step: int
    activations: int
    layers: dict[str, int]
    cache: tuple[int, ...]


def loss_of(output: Any) -> Tensor:
    """What a step differentiates: the output's own loss, else the mean of its first floating tensor.

    Raises:
        ContractError: the output has no floating tensor.
    """
    if getattr(output, "loss", None) is not None:
        loss: Tensor = output.loss
        return loss
    values = list(output.values()) if isinstance(output, Mapping) else output  # torch keeps a view of them whole
    first = next((t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()), None)
    if first is None:
        raise ContractError(
            f"the model gave {type(output).__name__} without a floating tensor, so that a step has nothing to "
            "differentiate: give it a loss, or pass training=False"
        )
    mean: Tensor = first.float().mean()
    return mean


def training_step(call: Callable[[], Any], optimiser: torch.optim.Optimizer) -> None:
    """One step as it is simulated: forward, backward, optimiser; gradients are dropped at the end."""
    loss = loss_of(call())
    loss.backward()
    del loss
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def simulate(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...],
    *,
    training: bool = True,
    optimiser: OptimiserFactory | None = None,
    device: str = "cpu",
    watched: frozenset[str] = frozenset(),
) -> Simulated:
    """Run a model's step on fake tensors; the model, which may lie on the meta device, is not changed.

    Args:
        inputs: arguments of `model`, by name or in order; tensors count by shape and dtype.
        training: forward, backward and optimiser; False: a forward pass without gradients.
        optimiser: makes one of a list of parameters; None: AdamW.
        device: where the step would run. watched: names of modules whose forward pass is measured.

    Raises:
        Whatever the model raises; torch's DataDependentOutputException and others where it reads a tensor's content.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, StorageCount() as count:

        def fake(tensor: Tensor, grad: bool = False) -> Tensor:
            empty = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device, requires_grad=grad
            )
            return nn.Parameter(empty.detach(), requires_grad=grad) if grad else empty

        del mode
        state = {n: fake(p, training and p.requires_grad) for n, p in model.named_parameters()}
        learned = [state[n] for n, p in model.named_parameters() if training and p.requires_grad]
        state |= {n: fake(b) for n, b in model.named_buffers()}
        weights = count.current
        given = tree_map_only(Tensor, fake, inputs)
        args, kwargs = ((), dict(given)) if isinstance(given, Mapping) else (given, {})
        size_of_inputs = count.current - weights

        def call() -> Any:
            return torch.func.functional_call(model, state, args, kwargs)

        layers: dict[str, int] = {}
        hooks = _watch(model, watched, layers, count)
        before_mode = model.training
        model.train(training)
        try:
            if not training:
                return _forward(call, count, weights, size_of_inputs, layers)
            stepper = (optimiser or torch.optim.AdamW)(learned)
            training_step(call, stepper)  # the first step makes the optimiser's state
            states = sum(_bytes(t) for t in tree_leaves(dict(stepper.state)) if isinstance(t, Tensor))
            base = count.current
            layers.clear()
            count.peak = count.current
            loss = loss_of(call())
            activations = count.current - base
            loss.backward()
            del loss
            gradients = sum(_bytes(p.grad) for p in learned if p.grad is not None)
            stepper.step()
            return Simulated(
                weights, gradients, states, size_of_inputs, count.peak - base, activations, dict(layers), ()
            )
        finally:
            model.train(before_mode)
            for hook in hooks:
                hook.remove()


def _forward(
    call: Callable[[], Any], count: StorageCount, weights: int, inputs: int, layers: dict[str, int]
) -> Simulated:
    base = count.current
    count.peak = base
    with torch.no_grad():
        output = call()
    cache = getattr(output, "past_key_values", None)
    parts = getattr(cache, "layers", None) or ([] if cache is None else [cache])
    held = tuple(sum({t.untyped_storage()._cdata: _bytes(t) for t in _tensors(part)}.values()) for part in parts)
    return Simulated(weights, 0, 0, inputs, count.peak - base, count.current - base, dict(layers), held)


def _tensors(cache: Any) -> list[Tensor]:
    """The tensors of a cache: those of its layers' attributes."""
    found: list[Tensor] = []
    waiting = [cache]
    seen: set[int] = set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, dict):
            waiting += item.values()
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            waiting += [v for v in vars(item).values() if isinstance(v, Tensor | list | tuple | dict) or _is_cache(v)]
    return found


def _is_cache(value: Any) -> bool:
    return "Cache" in type(value).__name__ or "Layer" in type(value).__name__


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _watch(model: nn.Module, names: frozenset[str], layers: dict[str, int], count: StorageCount) -> list[Any]:
    hooks, starts = [], dict[str, int]()
    for name, module in model.named_modules():
        if name in names:

            def before(_: Any, __: Any, name: str = name) -> None:
                starts[name] = count.current

            def after(_: Any, __: Any, ___: Any, name: str = name) -> None:
                layers[name] = layers.get(name, 0) + count.current - starts[name]

            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    return hooks
