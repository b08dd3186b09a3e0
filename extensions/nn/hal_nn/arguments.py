"""Checks of arguments that several public names take, each with one sentence for what was given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hal_core import ContractError

#: Characters of an argument that a message shows.
_LONGEST = 60


def shown(given: Any) -> str:
    """An argument in a message: a short text of it, or what it is."""
    if isinstance(given, Tensor):
        return f"a tensor {list(given.shape)}"
    text = repr(given)
    return text if len(text) <= _LONGEST else f"a {type(given).__name__}"


def need_module(name: str, given: Any) -> None:
    """Raise ContractError unless an argument is a module."""
    if isinstance(given, type) and issubclass(given, nn.Module):
        raise ContractError(f"{name} is the class {given.__name__}: pass an object of it, {given.__name__}(...)")
    if not isinstance(given, nn.Module):
        raise ContractError(f"{name} is a {type(given).__name__}: pass a torch.nn.Module")


def need_tensor(name: str, given: Any, sizes: str) -> None:
    """Raise ContractError unless an argument is a tensor; `sizes` says of which shape."""
    if not isinstance(given, Tensor):
        raise ContractError(f"{name} is a {type(given).__name__}: pass a tensor {sizes}")


def need_rows(name: str, given: Any, width: int) -> None:
    """Raise ContractError unless an argument is a tensor [batch, length, width]."""
    need_tensor(name, given, f"[batch, length, {width}]")
    if given.dim() != 3 or given.shape[-1] != width:
        raise ContractError(f"{name} has shape {list(given.shape)}: pass [batch, length, {width}]")


def need_whole(name: str, given: Any, least: int = 1) -> None:
    """Raise ContractError unless an argument is a whole number of at least `least`."""
    if type(given) is not int or given < least:
        raise ContractError(f"{name} {shown(given)} was given: use a whole number of {least} or more")


def is_number(given: Any) -> bool:
    """Whether an argument is a finite number, and no boolean."""
    return isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)


def need_share(name: str, given: Any, most: float = 1, what: str = "") -> None:
    """Raise ContractError unless an argument is a number from 0 to `most`; `what` says of what."""
    if not is_number(given) or not 0 <= given <= most:
        raise ContractError(f"{name} {shown(given)} was given: use 0 to {most}{what}")


def need_parameter_dtype(name: str, given: Any) -> None:
    """Raise ContractError unless an argument is None or a dtype that parameters may have."""
    if given is not None and not (isinstance(given, torch.dtype) and given.is_floating_point):
        raise ContractError(f"{name} {given!r} was given: use a floating-point dtype such as torch.float32, or None")


def torch_device(given: Any) -> torch.device:
    """A torch device by itself or by its name.

    Raises:
        ContractError: torch knows no such kind of device.
    """
    try:
        return torch.device(given)
    except (RuntimeError, TypeError):
        raise ContractError(
            f"device {given!r} was given: use a torch device such as 'cpu' or 'cuda:0'; devices of hal are chosen by "
            "hal.use"
        ) from None
