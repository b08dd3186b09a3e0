"""The model's layers one by one: error at each layer's output, and the time and energy of what ran on the device in it.

A pass of its own after the comparison looks at the layers, so that nothing of it is in the times of the whole. It has
the seeds of the metered pass: what a simulated device states for its layers adds up to what it states for the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import attrs
import torch
from hal_nn.sensitivity import match_layers
from torch import Tensor, nn

import hal_core as hal
from hal_core import Fidelity, HalError

from .attention_clock import Clock, clocked
from .batches import Batch, Tokens
from .lanes import Lane, Scope
from .measure import error_origin
from .metrics import errors
from .models import Float64Throughout, Model, in_float64
from .result import Comparison, Figure, Layer

#: Said of a row whose layers cannot be told apart.
NOT_APART = "its layers are one program of torch.compile, which nothing tells apart"


def layer_names(network: nn.Module) -> list[str]:
    """The model's layers in its order: the entries of its outermost lists of modules (the blocks of a transformer), and
    the linear layers outside of them.
    """
    blocks: list[str] = []
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, nn.ModuleList) and not inside:
            blocks += [f"{name}.{key}" for key, entry in module.named_children() if any(entry.children())]
    found = set(blocks)
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and not any(name.startswith(f"{block}.") for block in blocks):
            found.add(name)
    return [name for name, _ in network.named_modules() if name in found]


def part_names(network: nn.Module) -> list[str]:
    """What `--layer` can name: layers, and the attention modules and linear layers in them."""
    layers = set(layer_names(network))
    return [
        name
        for name, module in network.named_modules()
        if name in layers
        or isinstance(module, nn.Linear)
        or (name and "attention" in type(module).__name__.lower() and any(module.children()))
    ]


def chosen(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The layers, or where patterns are given the layers and parts that they name, in the model's order.

    Raises:
        ContractError: a name, or pattern, of nothing, with the closest ones. HalError: a model without layers.
    """
    names = part_names(network) if patterns else layer_names(network)
    if not names:
        raise HalError(f"{type(network).__name__} has neither lists of modules nor linear layers: leave --layers out")
    wanted = match_layers(names, patterns) if patterns else frozenset(names)
    return [name for name in names if name in wanted]


def with_layers(
    comparison: Comparison,
    model: Model,
    lanes: Sequence[Lane],
    tokens: Tokens,
    names: Sequence[str],
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> Comparison:
    """The comparison with the layers of every row that ran, but for models that torch.compile runs as one.

    Args:
        lanes: of the comparison, with their networks. tokens: the batches of the comparison. names: of `chosen`.
    """
    rows = {row.name for row in comparison.rows if row.ran}
    able = [lane for lane in lanes if lane.name in rows and lane.scope is not Scope.COMPILED]
    reference = in_float64(model.network)
    seen = {lane.name: _Seen() for lane in able}
    steps, done = len(tokens.batches) * (1 + len(able)), 0
    for number, batch in enumerate(tokens.batches):
        progress("float64 reference, by layer", done / steps)
        with torch.no_grad(), Float64Throughout(), _Outputs(reference, names) as truth:
            reference(**batch.inputs("cpu", torch.float64), output_hidden_states=True)
        done += 1
        for lane in able:
            progress(f"{lane.name}, by layer", done / steps)
            for draw in range(_draws(lane)):
                torch.manual_seed(draw * len(tokens.batches) + number)
                _pass(lane, batch, truth.outputs, names, seen[lane.name], draw)
            done += 1
    found = {lane.name: _layers(lane, names, seen[lane.name]) for lane in able}
    return attrs.evolve(
        comparison, rows=tuple(attrs.evolve(row, layers=found.get(row.name, ())) for row in comparison.rows)
    )


def _draws(lane: Lane) -> int:
    """How often a row runs: one draw of its noise a repeat, and as many times by the host's clock."""
    simulated = lane.device is not None and lane.device.fidelity is Fidelity.SIMULATED
    return 1 if simulated and not lane.noisy else len(lane.tallies)


class _Outputs:
    """Inside its block, the outputs of a network's layers by name, a list of one tensor a call."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self._network, self._names = network, names
        self.outputs: dict[str, list[Tensor]] = defaultdict(list)

    def __enter__(self) -> _Outputs:
        def keep(name: str) -> Callable[..., None]:
            return lambda module, given, output: self.outputs[name].append(_tensor(output).detach().clone())

        self._hooks = [self._network.get_submodule(name).register_forward_hook(keep(name)) for name in self._names]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def _tensor(output: Any) -> Tensor:
    """The output of a layer; the first tensor where it gives several."""
    while not isinstance(output, Tensor):
        values = list(output.values()) if isinstance(output, dict) else list(output)
        output = next(value for value in values if isinstance(value, Tensor | tuple | list | dict))
    return output


class _Seen:
    """What was seen of one row's layers.

    Attributes:
        errors: by layer and draw, of every text and call. seconds: in the device's part of a layer, by layer and draw.
            macs: done there. records: the meter's, by layer, first draw. The whole pass has the name "".
    """

    def __init__(self) -> None:
        self.errors: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.seconds: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        self.macs: dict[str, int] = defaultdict(int)
        self.records: dict[str, list[Any]] = defaultdict(list)


def _pass(
    lane: Lane, batch: Batch, truth: dict[str, list[Tensor]], names: Sequence[str], seen: _Seen, draw: int
) -> None:
    """One pass of a row in which every layer is looked at when it ends."""
    clock, calls = Clock(lane.place), defaultdict[str, int](int)
    before: dict[str, tuple[float, int, dict[str, Any]]] = {}
    with hal.meter() as meter:

        def begin(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, given: Any) -> None:
                before[name] = clock.seconds, clock.macs, meter.records
                meter.records = {}

            return hook

        def end(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, given: Any, output: Any) -> None:
                seconds, macs, outer = before.pop(name)
                seen.seconds[name][draw] += clock.seconds - seconds
                if draw == 0:
                    seen.macs[name] += clock.macs - macs
                    seen.records[name] += meter.records.values()
                for device, record in meter.records.items():
                    outer[device] = outer[device].plus(record) if device in outer else record
                meter.records = outer
                exact = truth[name][calls[name]]
                calls[name] += 1
                seen.errors[name][draw] += _errors(_tensor(output), exact, batch.mask)

            return hook

        with _hooked(lane.network, names, begin, end), torch.no_grad(), clocked(clock):
            lane.forward(batch)
    seen.seconds[""][draw] += clock.seconds
    if draw == 0:
        seen.records[""] += meter.records.values()


@contextmanager
def _hooked(network: nn.Module, names: Sequence[str], begin: Any, end: Any) -> Iterator[None]:
    modules = [(name, network.get_submodule(name)) for name in names]
    hooks = [module.register_forward_pre_hook(begin(name)) for name, module in modules]
    hooks += [module.register_forward_hook(end(name)) for name, module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _errors(output: Tensor, exact: Tensor, mask: Tensor) -> list[float]:
    """||x - exact|| / ||exact|| of each text over its real tokens; of all together where the texts lie in one row."""
    output = output.detach().to("cpu", torch.float64)
    if output.dim() >= 3 and len(output) == len(mask):
        return errors(output.flatten(2), exact.flatten(2), mask)
    return [float((output - exact).norm() / exact.norm())]


def _layers(lane: Lane, names: Sequence[str], seen: _Seen) -> tuple[Layer, ...]:
    whole, found = _costs(lane, seen, ""), []
    for name in names:
        if name not in seen.errors:
            continue  # the model did not call it
        draws = [sum(each) / len(each) for each in seen.errors[name].values()]
        time, energy = _costs(lane, seen, name) if seen.macs[name] else (None, None)
        found.append(
            Layer(
                name=name,
                error=Figure.over(draws, *error_origin(lane)),
                time=time,
                time_share=_share(time, whole[0]),
                energy=energy,
                energy_share=_share(energy, whole[1]),
                macs=seen.macs[name],
            )
        )
    return tuple(found)


def _costs(lane: Lane, seen: _Seen, name: str) -> tuple[Figure, Figure | None]:
    """(seconds, joules) of the device's part of a layer: as the device states them, seconds else as measured."""
    records = [] if lane.baseline else seen.records[name]
    stated = _summed([record.time for record in records])
    return stated or Figure.over([*seen.seconds[name].values()]), _summed([record.energy for record in records])


def _share(part: Figure | None, whole: Figure | None) -> float | None:
    return part.middle / whole.middle if part is not None and whole is not None and whole.middle else None


def _summed(quantities: Sequence[Any]) -> Figure | None:
    """The sum; None where there is nothing, or one part is unknown."""
    if not quantities or any(quantity is None for quantity in quantities):
        return None
    return reduce(Figure.plus, map(Figure.of, quantities))
