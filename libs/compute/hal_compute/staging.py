"""Large tensors in pieces, on their way through staging memory of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def pieces(tensor: Tensor, width: int, nbytes: int) -> Iterator[tuple[Tensor, int]]:
    """Cut a tensor of any strides into pieces that fit a slot of staging memory, in order.

    Args:
        tensor: at least one dimension. width: elements that a row (the last dimension) takes once padded.
        nbytes: size of a slot.

    Yields:
        (a view [rows, elements], the padded width of each of its rows). Where no padding is needed and the elements lie
        one after another, or a row is too long for a slot, the rows have one element.
    """
    size = tensor.element_size()
    if width == tensor.shape[-1] and (tensor.is_contiguous() or width * size > nbytes):
        tensor, width = tensor.contiguous().view(-1, 1), 1
    for rows in _views(tensor):
        for piece in rows.split(nbytes // (width * size)):
            yield piece, width


def _views(tensor: Tensor) -> Iterator[Tensor]:
    """Views [rows, last] of a tensor, one where its rows have a common stride."""
    try:
        yield tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        for part in tensor:
            yield from _views(part)
