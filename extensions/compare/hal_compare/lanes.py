"""The rows of a comparison while they are measured: which device, how much of the model it runs, and with which
network.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import nn

import hal_core as hal
from hal_core import Device, DeviceUnavailableError, HalError
from hal_core.protocols import KernelProvider
from hal_core.registry import registry

from .. import huggingface
from . import attention_clock
from .batches import Batch
from .metrics import Tally
from .models import variant

BASELINE = "torch sdpa"
#: How a device says that it has a torch.compile backend: an entry of `Device.features`, with the backend's name behind
#: it.
COMPILES = "torch.compile "


class Scope(enum.StrEnum):
    """How much of the model runs on the device."""

    ATTENTION = "attention"
    LINEAR = "attention and linear layers"
    COMPILED = "the whole model, by torch.compile"


_MARKS = {Scope.ATTENTION: "", Scope.LINEAR: " +linear", Scope.COMPILED: " compiled"}


@attrs.define
class Lane:
    """One row while it is being measured.

    Attributes:
        name, device, place, baseline, scope: as in `Row`. network: the model's variant. refusals: reasons met, in
            order.
        refused_batches: how many. once: whether it is timed once, being slow. tallies: accuracy by repeat.
        walls, inside: seconds of the whole and of the device's part by group, a value a repeat. macs, calls: by group.
        records: the meter's, by group.
    """

    name: str
    device: Device | None
    place: str
    baseline: bool = False
    scope: Scope = Scope.ATTENTION
    network: Any = None
    refusals: list[str] = attrs.field(factory=list)
    refused_batches: int = 0
    once: bool = False
    tallies: list[Tally] = attrs.field(factory=list)
    walls: dict[int, list[float]] = attrs.field(factory=dict)
    inside: dict[int, list[float]] = attrs.field(factory=dict)
    macs: dict[int, int] = attrs.field(factory=dict)
    calls: dict[int, int] = attrs.field(factory=dict)
    records: dict[int, list[Any]] = attrs.field(factory=dict)

    @property
    def timed_in_metered_pass(self) -> bool:
        """Whether no further passes are made: it is slow, and its first pass is like any other."""
        return self.once and self.scope is not Scope.COMPILED

    def forward(self, batch: Batch) -> Any:
        """The network on a batch."""
        return self.network(**batch.inputs(self.place), output_hidden_states=True, use_cache=False)


def rows_for(names: Sequence[str], linear: Sequence[str] = (), compiled: Sequence[str] = ()) -> list[Lane]:
    """A lane for torch's attention on each place where tensors lie, and one or more for each device.

    Args:
        names: device ids or backend names; none stands for every device there is.
        linear, compiled: those that run the model's linear layers too, or the whole of it by torch.compile, in lanes of
            their own; "all" stands for every named device that can.

    Raises:
        UnknownBackendError: no installed plugin offers a name. HalError: no device at all.
    """
    lanes: dict[str, Lane] = {}
    for name in names or [device.id for device in hal.devices()]:
        try:
            found = registry.find(name)
        except DeviceUnavailableError as error:
            lanes[name] = Lane(name, None, "", refusals=[str(error)])
            continue
        lanes |= {device.id: Lane(device.id, device, _place(device)) for device in found if device.id not in lanes}
    if not lanes:
        raise HalError(
            "no device was found: install a plugin, for example pip install hal-cpu; `hal doctor` shows more"
        )
    listed = [lane.device for lane in lanes.values() if lane.device is not None]
    wide = [*_widened(linear, Scope.LINEAR, listed), *_widened(compiled, Scope.COMPILED, listed)]
    places = sorted({lane.place for lane in lanes.values() if lane.place} | {"cpu"})
    baselines = {place: BASELINE if place == "cpu" else f"{BASELINE} ({place})" for place in places}
    together = [*lanes.values(), *wide]
    order = list(lanes) + [lane.device.id for lane in wide if lane.device and lane.device.id not in lanes]
    together.sort(key=lambda lane: order.index(lane.device.id if lane.device else lane.name))
    return [*(Lane(name, None, place, baseline=True) for place, name in baselines.items()), *together]


def _place(device: Device) -> str:
    return "cpu" if device.reads_from("cpu") else device.reads[0]


def _widened(names: Sequence[str], scope: Scope, listed: Sequence[Device]) -> list[Lane]:
    """Lanes in which the device runs more than attention."""
    if not names:
        return []
    able = linear_devices() if scope is Scope.LINEAR else {d.id for d in hal.devices() if dynamo_backend(d)}
    if "all" in names:
        chosen = [device for device in listed if device.id in able]
    else:
        chosen = list({device.id: device for name in names for device in registry.find(name)}.values())
    lacks = "no linear kernel" if scope is Scope.LINEAR else "no torch.compile backend"
    return [
        Lane(
            device.id + _MARKS[scope],
            device,
            _place(device),
            scope=scope,
            refusals=[] if device.id in able else [f"{device.id} has {lacks}: it runs attention alone"],
        )
        for device in chosen
    ]


def linear_devices() -> set[str]:
    """Ids of the devices that provide the kernel `linear`."""
    found = set()
    for device in hal.devices():
        provider = registry.backend_of(device)
        if isinstance(provider, KernelProvider) and "linear" in provider.kernel_names(device):
            found.add(device.id)
    return found


def dynamo_backend(device: Device) -> str | None:
    """The name of the device's torch.compile backend; None where it has none."""
    return next((text.removeprefix(COMPILES) for text in device.features if text.startswith(COMPILES)), None)


class LinearOnDevice(nn.Module):
    """A linear layer whose product runs as a device's `linear` kernel, timed by the clock of the current context."""

    def __init__(self, layer: nn.Linear, device: str) -> None:
        super().__init__()
        self.weight, self.bias, self._linear = layer.weight, layer.bias, hal.kernel("linear", backend=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with attention_clock.inside(x.numel() * self.weight.shape[0]):
            result: torch.Tensor = self._linear(x, self.weight, self.bias)
        return result


def make_networks(network: Any, lanes: Sequence[Lane]) -> None:
    """Give each lane its own copy of the model; weights are shared between lanes of one place."""
    placed = {"cpu": network}
    for lane in lanes:
        if lane.refusals:
            continue
        if lane.place not in placed:
            placed[lane.place] = variant(network, "eager").to(lane.place)
        try:
            lane.network = _network_of(lane, placed[lane.place])
        except HalError as error:
            lane.refusals.append(str(error))


def _network_of(lane: Lane, network: Any) -> Any:
    if lane.scope is Scope.COMPILED:
        assert lane.device is not None
        return torch.compile(variant(network, "sdpa"), backend=dynamo_backend(lane.device))
    own = variant(network, attention_clock.TORCH if lane.baseline else attention_clock.HAL)
    if lane.device is not None:
        huggingface.set_device(own, lane.device.id)
    if lane.device is not None and lane.scope is Scope.LINEAR:
        for module in list(own.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, LinearOnDevice(child, lane.device.id))
    return own
