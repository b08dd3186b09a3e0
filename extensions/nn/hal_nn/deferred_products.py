"""Which products of a layer may be those of queries and keys: they are deferred; see `deferred`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .deferred import DTYPES, Scores, Sink, State, Step, is_plain, was_not_called


def start(sink: Sink, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Scores | None:
    """The product of queries and keys as `Scores`; None where a call cannot be one."""
    read = PRODUCTS.get(getattr(function, "__name__", ""))
    try:
        state = read(*args, **kwargs) if read is not None else None
    except TypeError as error:
        if was_not_called(error):
            return None
        raise
    if state is None or state.query.dtype not in DTYPES or state.query.dtype != state.key.dtype:
        return None
    step = Step(function, args, kwargs)
    return Scores(sink, state._replace(product=step), step, state.query.dtype)


def _matmul(left: Tensor, right: Tensor) -> State | None:
    if not (is_plain(left) and is_plain(right) and left.ndim >= 3 and right.ndim >= 3):
        return None
    lead = tuple(torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]))
    return State(left, right.transpose(-1, -2), lead)


def _baddbmm(bias: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> State | None:
    state = _matmul(batch1, batch2)
    if state is None:
        return None
    return state._replace(scale=float(alpha), bias=None if beta == 0 else bias * beta)


class Equation(NamedTuple):
    """An einsum of two operands that is a product of matrices: a letter for each dimension.

    Attributes:
        batch: common to operands and result. rows: of the first operand. columns: of the second. summed: over.
        terms: the letters of both operands and of the result.
    """

    batch: str
    rows: str
    columns: str
    summed: str
    terms: tuple[str, str, str]

    @classmethod
    def read(cls, text: str) -> Equation | None:
        """None where an equation says something else."""
        terms, arrow, out = text.replace(" ", "").partition("->")
        left, comma, right = terms.partition(",")
        if not arrow or not comma or "," in right or "." in text:
            return None
        if any(len(set(term)) < len(term) for term in (left, right, out)):
            return None
        batch = "".join(letter for letter in out if letter in left and letter in right)
        rows = "".join(letter for letter in left if letter not in right)
        columns = "".join(letter for letter in right if letter not in left)
        summed = "".join(letter for letter in left if letter in right and letter not in out)
        if len(rows) != 1 or len(columns) != 1 or len(summed) != 1 or sorted(batch + rows + columns) != sorted(out):
            return None
        return cls(batch, rows, columns, summed, (left, right, out))


def ordered(tensor: Tensor, term: str, order: str) -> Tensor:
    """A tensor whose dimensions have the letters of `term`, with them in another order."""
    return tensor.permute([term.index(letter) for letter in order])


def operands_of(operands: Sequence[Any]) -> Sequence[Any]:
    """The operands of an einsum, which may be given in one list."""
    return operands[0] if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands


def _einsum(equation: Any, *operands: Any) -> State | None:
    given = operands_of(operands)
    if not isinstance(equation, str) or len(given) != 2 or not all(map(is_plain, given)):
        return None
    said = Equation.read(equation)
    if said is None:
        return None
    left, right, out = said.terms
    query = ordered(given[0], left, said.batch + said.rows + said.summed)
    key = ordered(given[1], right, said.batch + said.columns + said.summed)
    if out == said.batch + said.columns + said.rows:
        query, key = key, query
    elif out != said.batch + said.rows + said.columns:
        return None
    return State(query, key, tuple(query.shape[:-2]))


#: What may be the product of queries and keys, by the name of the function.
PRODUCTS: dict[str, Callable[..., State | None]] = {
    "matmul": _matmul,
    "bmm": _matmul,
    "einsum": _einsum,
    "baddbmm": _baddbmm,
}
