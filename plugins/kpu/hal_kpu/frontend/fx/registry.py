"""Which ATen operators lower to DFX opcodes, and by what function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from torch._ops import OpOverload

Lowering: TypeAlias = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])
LOWERINGS: dict[Any, Lowering] = {}  # by OpOverload


class NotLowered(Exception):  # noqa: N818  it is no error: the operator then runs on the host and is counted there
    """This use of an operator has no lowering; the text says why."""


def lowers(*overloads: OpOverload[..., Any]) -> Callable[[Function], Function]:
    """Register `function(emitter, *args, **kwargs)`, called as the ATen operator is, with Values for tensors.

    The function emits opcodes and returns a Value, or a tuple or list as the operator does. It raises `NotLowered` for
    arguments it does not take.
    """

    def register(function: Function) -> Function:
        for overload in overloads:
            if overload in LOWERINGS:
                raise ValueError(f"{overload} has two lowerings: {LOWERINGS[overload]} and {function}")
            LOWERINGS[overload] = function
        return function

    return register
