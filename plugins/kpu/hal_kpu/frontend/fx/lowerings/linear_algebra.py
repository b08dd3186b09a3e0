"""Cholesky's factors and triangular systems of ATen, column by column, unrolled for small matrices.

Each step is a product of one column with one row on the array and a few vector operations. Source: Golub and Van Loan,
Matrix Computations 1996, algorithms 3.1.3 (column-oriented forward substitution) and 4.2.2 (outer product Cholesky).
"""

from __future__ import annotations

import math

import torch

from ...emitter import Emitter, Value
from ..registry import NotLowered, lowers

aten = torch.ops.aten
_LARGEST = 64  # rows; the program grows with them


def _size(a: Value) -> int:
    if a.ndim < 2 or a.shape[-1] > _LARGEST or 0 in a.shape:
        raise NotLowered(f"of an empty matrix or one of more than {_LARGEST} rows")
    return a.shape[-1]


def _flip(e: Emitter, a: Value) -> Value:
    """The transposed matrix."""
    return e.transpose(a, (*range(a.ndim - 2), a.ndim - 1, a.ndim - 2))


def _column(e: Emitter, a: Value, index: int, first: int = 0) -> Value:
    """Column `index` from row `first` on, [..., rows, 1]."""
    return e.slice(e.slice(a, a.ndim - 1, index, index + 1), a.ndim - 2, first, a.shape[-2])


def _row(e: Emitter, a: Value, index: int) -> Value:
    return e.slice(a, a.ndim - 2, index, index + 1)


def _factor(e: Emitter, a: Value) -> tuple[Value, Value]:
    """(the lower factor, the pivots [..., n] whose roots stand on its diagonal); only a's lower triangle is read."""
    rest, columns, pivots = a, [], []
    for step in range(_size(a)):
        below = _column(e, rest, 0)
        pivot = _row(e, below, 0)
        column = below * e.one("rsqrt", pivot)
        pivots.append(e.reshape(pivot, (*a.shape[:-2], 1)))
        columns.append(e.one("pad", column, widths=(0, 0, step, 0)) if step else column)
        if step + 1 < a.shape[-1]:
            rest = e.slice(rest, rest.ndim - 2, 1, rest.shape[-2])
            rest = e.slice(rest, rest.ndim - 1, 1, rest.shape[-1])
            tail = e.slice(column, column.ndim - 2, 1, column.shape[-2])
            rest = rest - e.matmul(tail, _flip(e, tail))
    return e.one("concat", *columns, axis=a.ndim - 1), e.one("concat", *pivots, axis=a.ndim - 2)


def _solve(e: Emitter, a: Value, b: Value, upper: bool, unit: bool) -> Value:
    """x of a x = b, [..., n, m], with a triangular. Upper ones are solved from the end: both axes are reversed."""
    n = _size(a)
    if upper:
        a = e.one("reverse", a, axes=(a.ndim - 2, a.ndim - 1))
        b = e.one("reverse", b, axes=(b.ndim - 2,))
    rows = []
    for step in range(n):
        row = _row(e, b, 0)
        if not unit:
            row = row / e.slice(_row(e, a, step), a.ndim - 1, step, step + 1)
        rows.append(row)
        if step + 1 < n:
            b = e.slice(b, b.ndim - 2, 1, b.shape[-2]) - e.matmul(_column(e, a, step, step + 1), row)
    shape = max((row.shape for row in rows), key=math.prod)
    out = e.one("concat", *(e.broadcast(row, shape) for row in rows), axis=len(shape) - 2)
    return e.one("reverse", out, axes=(out.ndim - 2,)) if upper else out


def _identity(e: Emitter, n: int, dtype: torch.dtype) -> Value:
    counted = e.one("iota", length=n, dtype="int64")
    return e.cast(e.one("compare", e.reshape(counted, (n, 1)), counted, predicate="eq"), dtype)


@lowers(aten.linalg_cholesky_ex.default)
def cholesky_ex(e: Emitter, a: Value, *, upper: bool = False, check_errors: bool = False) -> tuple[Value, Value]:
    """(the factor, 0 or the first column whose pivot is not positive)."""
    if check_errors:
        raise NotLowered("with an error that depends on values")
    factor, pivots = _factor(e, _flip(e, a) if upper else a)
    bad = e.one("not", e.one("compare", pivots, 0, predicate="gt"))
    first = e.one("argmax", e.cast(bad, torch.float32), axis=bad.ndim - 1) + 1
    count = e.sum(bad, (bad.ndim - 1,))
    info = e.one("where", e.one("compare", count, 0, predicate="gt"), first, first * 0)
    return _flip(e, factor) if upper else factor, e.cast(info, torch.int32)


@lowers(aten.cholesky_inverse.default)
def cholesky_inverse(e: Emitter, factor: Value, upper: bool = False) -> Value:
    if 0 in factor.shape:
        return e.copy(factor)
    lower = _flip(e, factor) if upper else factor
    half = _solve(e, lower, _identity(e, _size(lower), lower.dtype), upper=False, unit=False)
    return e.matmul(_flip(e, half), half)


@lowers(aten.cholesky_solve.default)
def cholesky_solve(e: Emitter, b: Value, factor: Value, upper: bool = False) -> Value:
    shape = (*torch.broadcast_shapes(b.shape[:-2], factor.shape[:-2]), *b.shape[-2:])
    if 0 in shape:
        return e.one("fill", shape=shape, scalar=0, dtype=str(b.dtype).removeprefix("torch."))
    lower = _flip(e, factor) if upper else factor
    half = _solve(e, lower, b, upper=False, unit=False)
    return _solve(e, _flip(e, lower), half, upper=True, unit=False)


@lowers(aten.linalg_solve_triangular.default)
def solve_triangular(
    e: Emitter, a: Value, b: Value, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Value:
    if left:
        return _solve(e, a, b, upper, unitriangular)
    return _flip(e, _solve(e, _flip(e, a), _flip(e, b), not upper, unitriangular))


@lowers(aten.triangular_solve.default)
def triangular_solve(
    e: Emitter, b: Value, a: Value, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Value, Value]:
    turned = _flip(e, a) if transpose else a
    return _solve(e, turned, b, upper != transpose, unitriangular), e.copy(a)
