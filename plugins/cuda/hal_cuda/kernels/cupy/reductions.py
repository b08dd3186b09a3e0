"""Sums and maxima in CUDA C++: warp shuffles, then a tree in shared memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..extra.checks import aligned, chip_of
from ..extra.forms import pieces_of, reduce
from . import module

_SHORT, _ROWS = 1024, 32  # the longest row that eight threads reduce, and such rows of a block
_LEAST_ROW, _LEAST_COLUMN = 1 << 14, 64


def _run(source: Tensor, out: Tensor, outer: int, length: int, inner: int, *, operation: str) -> None:
    """A `forms.Reduce`; two launches where the result is small and the rows are long."""
    chip, wide = chip_of(source.device), 16 // source.itemsize
    count = np.int64
    if inner == 1 and length <= _SHORT:
        made = _function(source, out, operation, "short_rows", chip.index)
        module.launch(made, chip.index, -(-outer // _ROWS), 256, (source, out, count(length), count(outer)))
    elif inner == 1:
        pieces, piece = pieces_of(outer, length, _LEAST_ROW, chip)
        target = out if pieces == 1 else out.new_empty((outer, pieces), dtype=torch.float32)
        made = _function(source, target, operation, "rows", chip.index)
        sizes = [count(n) for n in (length, pieces, piece)]
        module.launch(made, chip.index, outer * pieces, 256, (source, target, *sizes))
        if pieces > 1:
            _run(target, out, outer, pieces, 1, operation=operation)
    else:
        size = wide if inner % wide == 0 and aligned(source) else 1
        blocks = -(-inner // (32 * size))
        pieces, piece = pieces_of(outer * blocks, length, _LEAST_COLUMN, chip)
        target = out if pieces == 1 else out.new_empty((pieces, outer, inner), dtype=torch.float32)
        made = _function(source, target, operation, "columns" if size > 1 else "single_columns", chip.index)
        sizes = [count(n) for n in (outer, length, inner, blocks, piece)]
        module.launch(made, chip.index, outer * blocks * pieces, 256, (source, target, *sizes))
        if pieces > 1:
            _run(target, out, 1, pieces, outer * inner, operation=operation)


def _function(source: Tensor, out: Tensor, operation: str, entry: str, index: int) -> object:
    definitions = {
        "ELEMENT": module.ELEMENTS[source.dtype],
        "RESULT": module.ELEMENTS[out.dtype],
        "OPERATION": operation,
    }
    return module.function("reductions", entry, definitions, index)


def reduce_sum(input: Tensor, dim: int | None = -1) -> Tensor:
    """The sum over a dimension, or over all where dim is None; added in float32, of the input's dtype.

    Args:
        input: a CUDA tensor of any shape, float32, float16 or bfloat16. One whose elements do not fill their memory, in
            any order of its dimensions, is copied.
        dim: the dimension that disappears.

    The same tensor gives the same bits in every call. Sums of nothing are 0.

    Raises:
        ContractError: another dtype or device, or no such dimension. DeviceUnavailableError: CuPy or NVRTC is missing.
    """
    return reduce("reduce_sum", input, dim, False, lambda *form: _run(*form, operation="Sum"))


def reduce_max(input: Tensor, dim: int | None = None) -> Tensor:
    """The largest element, or the largest along `dim`; NaN where one is NaN. See `reduce_sum`.

    Raises:
        ContractError: nothing has no maximum; and as `reduce_sum`.
    """
    return reduce("reduce_max", input, dim, False, lambda *form: _run(*form, operation="Max"))
