"""On which device a module's attention runs, and how many attention calls of a thread ran on hal."""

from __future__ import annotations

import threading

from torch import nn

import hal_core as hal

from .arguments import need_module

_DEVICE = "_hal_device"  # in a module's __dict__, so that deepcopy keeps it and reading it costs one look-up


class _Calls(threading.local):
    """Of this thread: attention calls that went through hal, and the watch that is on."""

    def __init__(self) -> None:
        self.count = 0
        self.outer: str | None = None  # the implementation of the model whose call is watched now


calls = _Calls()


def set_device(model: nn.Module, device: str | None) -> nn.Module:
    """Send the attention of `model` to `device`, whatever `hal.use` says; None takes the setting back.

    Args:
        model: a model, or a part of one: layers may be put on different devices.
        device: a device ("cpu:0") or a backend ("cpu").

    Returns:
        model.

    Raises:
        UnknownBackendError, DeviceUnavailableError: no such device. ContractError: no module.
    """
    need_module("model", model)
    if device is not None:
        hal.session(device)
    for module in model.modules():
        mark(module, device)
    return model


def mark(module: nn.Module, device: str | None) -> None:
    """`set_device` for one module, without those inside it, and without looking for the device."""
    if device is None:
        module.__dict__.pop(_DEVICE, None)
    else:
        module.__dict__[_DEVICE] = device


def device_of(module: nn.Module) -> str | None:
    """The device that `set_device` set."""
    device: str | None = module.__dict__.get(_DEVICE)
    return device
