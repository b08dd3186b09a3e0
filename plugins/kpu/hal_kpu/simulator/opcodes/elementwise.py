"""Operations of the vector unit on each element. The second operand may be a number in the instruction, `scalar`.

Operations per element ("passes") are assumed: 1 for what an adder, multiplier or comparator does, more for functions
that are evaluated by range reduction and a polynomial, or by Newton's iteration, in fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .work import Attributes, Opcode, vector_work

_UNARY: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "neg": (1, torch.neg),
    "abs": (1, torch.abs),
    "sign": (1, torch.sign),
    "floor": (1, torch.floor),
    "ceil": (1, torch.ceil),
    "round": (1, torch.round),
    "trunc": (1, torch.trunc),
    "not": (1, torch.bitwise_not),
    "reciprocal": (4, torch.reciprocal),
    "sqrt": (5, torch.sqrt),
    "rsqrt": (4, torch.rsqrt),
    "exp": (6, torch.exp),
    "expm1": (7, torch.expm1),
    "log": (7, torch.log),
    "log1p": (8, torch.log1p),
    "sin": (8, torch.sin),
    "cos": (8, torch.cos),
    "asin": (9, torch.asin),
    "acos": (9, torch.acos),
    "atan": (9, torch.atan),
    "sinh": (9, torch.sinh),
    "cosh": (9, torch.cosh),
    "tanh": (9, torch.tanh),
    "asinh": (10, torch.asinh),
    "acosh": (10, torch.acosh),
    "atanh": (10, torch.atanh),
    "erf": (9, torch.erf),
    "sigmoid": (9, torch.sigmoid),
}

_BINARY: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "add": (1, torch.add),
    "sub": (1, torch.sub),
    "mul": (1, torch.mul),
    "div": (5, torch.true_divide),
    "maximum": (1, torch.maximum),
    "minimum": (1, torch.minimum),
    "pow": (14, torch.pow),
    "atan2": (14, torch.atan2),
    "fmod": (7, torch.fmod),
    "remainder": (8, torch.remainder),
    "floor_divide": (6, torch.floor_divide),
    "and": (1, torch.bitwise_and),
    "or": (1, torch.bitwise_or),
    "xor": (1, torch.bitwise_xor),
    "shift_left": (1, torch.bitwise_left_shift),
    "shift_right": (1, torch.bitwise_right_shift),
}

_PREDICATES: dict[str, Callable[..., Tensor]] = {
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
}
_TENSORS_ONLY = {"maximum", "minimum", "atan2"}  # torch's functions that take no number


def _unary(name: str) -> Opcode:
    passes, function = _UNARY[name]

    def value(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
        return (function(inputs[0]),)

    return Opcode(name, value, vector_work(passes), (1, 1))


def _operands(name: str, inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor | float, Tensor | float]:
    """Two tensors, or a tensor and the instruction's number, which comes first when `scalar_first` is set."""
    if len(inputs) == 2:
        return inputs[0], inputs[1]
    scalar: Tensor | float = attrs["scalar"]
    if name in _TENSORS_ONLY or attrs.get("scalar_first"):  # a number does not widen the tensor it meets
        kind = torch.result_type(inputs[0], attrs["scalar"])
        scalar = torch.full((), attrs["scalar"], dtype=kind, device=inputs[0].device)
    return (scalar, inputs[0]) if attrs.get("scalar_first") else (inputs[0], scalar)


def _binary(name: str) -> Opcode:
    passes, function = _BINARY[name]

    def value(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
        return (function(*_operands(name, inputs, attrs)),)

    return Opcode(name, value, vector_work(passes), (1, 2), optional={"scalar", "scalar_first"})


def _compare(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """bool: whether the first stands in relation `predicate` (eq, ne, lt, le, gt, ge) to the second."""
    left, right = _operands("compare", inputs, attrs)
    return (_PREDICATES[attrs["predicate"]](left, right),)


def _where(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """(condition, a, b) -> a where the condition holds, else b."""
    condition, a, b = inputs
    return (torch.where(condition, a, b),)


def _cast(inputs: tuple[Tensor, ...], attrs: Attributes) -> tuple[Tensor, ...]:
    """Convert to `dtype`: rounds to nearest even into floats, towards zero into integers. Always new memory."""
    return (inputs[0].to(getattr(torch, attrs["dtype"]), copy=True),)


ELEMENTWISE = [
    *map(_unary, _UNARY),
    *map(_binary, _BINARY),
    Opcode("compare", _compare, vector_work(1), (1, 2), {"predicate"}, {"scalar", "scalar_first"}),
    Opcode("where", _where, vector_work(1), (3, 3)),
    Opcode("cast", _cast, vector_work(1), (1, 1), {"dtype"}),
]
