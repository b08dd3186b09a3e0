"""The rows of a comparison while they are measured: which device, how much of the model it runs, and with which
network.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from hal_nn import huggingface, model_check
from hal_nn.reroute import reroute_layers
from hal_nn.sensitivity import match_layers
from torch import nn

import hal_core as hal
from hal_core import Device, DeviceUnavailableError, Fidelity, HalError
from hal_core.plugin_api import find_devices, registry

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
        noisy: whether the device's errors are random. refused_batches: how many. slow: whether it is over its budget.
        tallies: accuracy by repeat.
        digital: names of linear layers that stay off the device in a lane of linear layers. options: of the device.
        walls, inside: seconds of the whole and of the device's part by group, a value a repeat. macs, calls: by group.
        records: the meter's, by group. dtype: of the run.
    """

    name: str
    device: Device | None
    place: str
    baseline: bool = False
    scope: Scope = Scope.ATTENTION
    network: Any = None
    digital: frozenset[str] = frozenset()
    options: dict[str, Any] = attrs.field(factory=dict)
    refusals: list[str] = attrs.field(factory=list)
    noisy: bool = False
    refused_batches: int = 0
    slow: bool = False
    tallies: list[Tally] = attrs.field(factory=list)
    walls: dict[int, list[float]] = attrs.field(factory=dict)
    inside: dict[int, list[float]] = attrs.field(factory=dict)
    macs: dict[int, int] = attrs.field(factory=dict)
    calls: dict[int, int] = attrs.field(factory=dict)
    records: dict[int, list[Any]] = attrs.field(factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def simulated(self) -> bool:
        """Whether its time is modelled, so that neither warming up nor timing it again tells anything."""
        return self.device is not None and self.device.fidelity == Fidelity.SIMULATED

    @property
    def timed_in_metered_pass(self) -> bool:
        """Whether the metered pass is the first timed one too: the row is slow, and that pass is like any other."""
        return self.slow and self.scope is not Scope.COMPILED

    def forward(self, batch: Batch) -> Any:
        """The network on a batch, with the device's options."""
        inputs = batch.inputs(self.place, self.dtype)
        if not self.options:
            return self.network(**inputs, output_hidden_states=True)
        with hal.use(options=self.options):
            return self.network(**inputs, output_hidden_states=True)


def rows_for(names: Sequence[str], linear: Sequence[str] = (), compiled: Sequence[str] = ()) -> list[Lane]:
    """A lane for torch's attention on each place where tensors lie, and one or more for each device.

    Args:
        names: device ids, or backend names for all of a backend's devices. Empty: the first device of every backend.
            "all": every device there is.
        linear, compiled: those that run the model's linear layers too, or the whole of it by torch.compile, in lanes of
            their own; "all" stands for every device of `names` that can.

    Returns:
        The lanes. A named device that is not present has a lane with the reason, if another named one is.

    Raises:
        UnknownBackendError: no installed plugin offers a name. DeviceUnavailableError: none of the named devices is
            present. HalError: no device at all, or a device named in `linear` or `compiled` that cannot.
    """
    lanes: dict[str, Lane] = {}
    for name in _chosen(names):
        try:
            found = find_devices(name)
        except DeviceUnavailableError as error:
            lanes[name] = Lane(name, None, "", refusals=[str(error)])
            continue
        lanes |= {device.id: Lane(device.id, device, _place(device)) for device in found if device.id not in lanes}
    if not lanes:
        raise HalError(
            "no device was found: install a plugin, for example pip install hal-cpu; `hal doctor` shows more"
        )
    listed = [lane.device for lane in lanes.values() if lane.device is not None]
    if not listed:
        raise DeviceUnavailableError("; ".join(lane.refusals[0] for lane in lanes.values()))
    wide = [*_widened(linear, Scope.LINEAR, listed), *_widened(compiled, Scope.COMPILED, listed)]
    places = sorted({lane.place for lane in lanes.values() if lane.place} | {"cpu"})
    baselines = {place: BASELINE if place == "cpu" else f"{BASELINE} ({place})" for place in places}
    together = [*lanes.values(), *wide]
    order = list(lanes) + [lane.device.id for lane in wide if lane.device and lane.device.id not in lanes]
    together.sort(key=lambda lane: order.index(lane.device.id if lane.device else lane.name))
    return [*(Lane(name, None, place, baseline=True) for place, name in baselines.items()), *together]


def _chosen(names: Sequence[str]) -> list[str]:
    """The names, with "all" and an empty list spelled out."""
    devices = [device.id for device in hal.devices()]
    if "all" in names:
        return [*devices, *(name for name in names if name != "all")]
    if names:
        return list(names)
    first: dict[str, str] = {}
    for device in devices:
        first.setdefault(device.partition(":")[0], device)
    return list(first.values())


def _place(device: Device) -> str:
    return "cpu" if device.reads_from("cpu") else device.reads[0]


def _widened(names: Sequence[str], scope: Scope, listed: Sequence[Device]) -> list[Lane]:
    """Lanes in which the device runs more than attention."""
    if not names:
        return []
    able = linear_devices() if scope is Scope.LINEAR else {d.id for d in hal.devices() if dynamo_backend(d)}
    named = list({device.id: device for name in names if name != "all" for device in find_devices(name)}.values())
    if lacking := [device.id for device in named if device.id not in able]:
        what = "no linear kernel" if scope is Scope.LINEAR else "no torch.compile backend"
        option = "--linear" if scope is Scope.LINEAR else "--compiled"
        offered = f"{option} takes {', '.join(sorted(able))} or all" if able else f"leave {option} out"
        verb = "has" if len(lacking) == 1 else "have"
        raise HalError(f"{', '.join(lacking)} {verb} {what}, and can run attention alone: {offered}")
    chosen = [*named, *(d for d in listed if "all" in names and d.id in able and d not in named)]
    return [Lane(device.id + _MARKS[scope], device, _place(device), scope=scope) for device in chosen]


def linear_devices() -> set[str]:
    """Ids of the devices that provide the kernel `linear`."""
    found = set()
    for device in hal.devices():
        kernel_names = getattr(registry.backend_of(device), "kernel_names", None)  # optional, of a backend
        if kernel_names is not None and "linear" in kernel_names(device):
            found.add(device.id)
    return found


def is_noisy(device: Device, dtype: str) -> bool:
    """Whether the device declares random errors for the dtype."""
    numerics = hal.capabilities(device.id).numerics
    return dtype in numerics and numerics[dtype].noisy


def dynamo_backend(device: Device) -> str | None:
    """The name of the device's torch.compile backend; None where it has none."""
    return next((text.removeprefix(COMPILES) for text in device.features if text.startswith(COMPILES)), None)


class LinearOnDevice(nn.Module):
    """A linear layer whose product runs as a device's `linear` kernel, timed by the clock of the current context.

    Attributes:
        digital: whether it runs on torch instead. macs: multiply-accumulates of all its calls.
    """

    def __init__(self, layer: nn.Linear, device: str, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.weight, self.bias, self._linear = layer.weight, layer.bias, hal.kernel("linear", backend=device)
        self.digital, self.macs = False, 0
        self._options = {name: value for name, value in (options or {}).items() if _takes(self._linear, name)}
        # torch's encoder layers have a fast path that multiplies by their layers' weights without calling them; they do
        # not take it where a layer has a hook.
        self.register_forward_pre_hook(_called)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.macs += x.numel() * self.weight.shape[0]
        if self.digital:
            return nn.functional.linear(x, self.weight, self.bias)
        with attention_clock.inside(x.numel() * self.weight.shape[0]):
            result: torch.Tensor = self._linear(x, self.weight, self.bias, **self._options)
        return result


def _called(layer: nn.Module, operands: Any) -> None:
    """A hook that does nothing."""


def _takes(kernel: Any, option: str) -> bool:
    """Whether calls of a kernel take an option: it is a parameter of the function, or of a metered kernel's `run`."""
    parameters = inspect.signature(getattr(kernel, "run", kernel)).parameters
    return option in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def make_networks(network: Any, lanes: Sequence[Lane]) -> None:
    """Give each lane its own copy of the model; weights are shared between lanes of one place."""
    placed = {"cpu": network}
    for lane in lanes:
        if lane.refusals:
            continue
        lane.dtype = network.dtype
        if lane.place not in placed:
            placed[lane.place] = variant(network, "eager").to(lane.place)
        try:
            lane.network = _network_of(lane, placed[lane.place])
        except HalError as error:
            lane.refusals.append(str(error))


def _network_of(lane: Lane, network: Any) -> Any:
    if lane.scope is Scope.COMPILED:
        assert lane.device is not None
        return torch.compile(variant(network, "sdpa"), backend=dynamo_backend(lane.device) or "")
    if model_check.class_refusal(type(network)) or model_check.model_refusal(network):
        own = variant(network, "eager")  # its layers compute attention by their own code, whose products are sent
        run = nn.functional.scaled_dot_product_attention if lane.baseline else hal.attention
        reroute_layers(own, attention_clock.timed(run))
    else:
        own = variant(network, attention_clock.TORCH if lane.baseline else attention_clock.HAL)
    if lane.device is not None:
        huggingface.set_device(own, lane.device.id)
    if lane.device is not None and lane.scope is Scope.LINEAR:
        put_linear_layers(own, lane.device.id, lane.digital, lane.options)
    return own


def linear_names(network: nn.Module) -> list[str]:
    """Names of the model's linear layers, in its order."""
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]


def put_linear_layers(
    network: nn.Module, device: str, digital: frozenset[str] = frozenset(), options: Mapping[str, Any] | None = None
) -> None:
    """Replace the model's linear layers by ones on a device, in place, apart from the digital ones.

    Args:
        options: of the device; its kernel is given those that it has.
    """
    placed: dict[nn.Module, LinearOnDevice] = {}
    for name in linear_names(network):
        if name not in digital:
            layer = network.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            placed[layer] = LinearOnDevice(layer, device, options)
    for name, module in list(network.named_modules(remove_duplicate=False)):  # a layer may have several names
        if module in placed:
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, placed[module])


def keep_digital(network: nn.Module, lanes: Sequence[Lane], wanted: Sequence[str]) -> None:
    """Name the layers that stay digital in every lane of linear layers.

    Raises:
        ContractError: a name, or pattern, that no linear layer has, with the closest ones.
    """
    chosen = match_layers(linear_names(network), wanted)
    for lane in lanes:
        if lane.scope is Scope.LINEAR:
            lane.digital = chosen
