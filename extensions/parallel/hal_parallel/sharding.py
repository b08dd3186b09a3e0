"""`shard` and `unshard`: from a whole sequence to this rank's part and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hal_core import ContractError

from . import layout as layouts
from .exchange import gather_tokens
from .layout import NAMES, TokenLayout, make_layout
from .topology import topology_of


def shard(tensor: Tensor, mesh: Any = None, layout: Any = "contiguous", dim: int = 2, fill: float = 0) -> Tensor:
    """This rank's tokens of a tensor that every rank holds whole; where the world does not divide it, padded by `fill`.

    Args:
        tensor: with the whole sequence along `dim`. layout: a name or a `TokenLayout`.
    """
    rank, found = _place(mesh, layout, tensor.shape[dim])
    return layouts.shard(tensor, found, rank, dim, fill)


def unshard(
    tensor: Tensor, mesh: Any = None, layout: Any = "contiguous", dim: int = 2, length: int | None = None
) -> Tensor:
    """The whole sequence, on every rank, of the parts that the ranks hold; differentiable.

    Args:
        tensor: this rank's tokens along `dim`. length: tokens of the sequence without padding; None: no padding.
    """
    topology = topology_of(mesh)
    world = 1 if topology is None else topology.world
    _, found = _place(mesh, layout, tensor.shape[dim] * world if length is None else length)
    if found.local != tensor.shape[dim]:
        raise ContractError(
            f"a part of {tensor.shape[dim]} tokens was given, and {found.name} of {found.length} has {found.local}: "
            "pass length="
        )
    for link in () if topology is None else topology.links:
        tensor = gather_tokens(tensor, link, dim, "parts of the sequence")
    return layouts.unshard(tensor.chunk(world, dim), found, dim) if found.local else tensor


def _place(mesh: Any, layout: Any, length: int) -> tuple[int, TokenLayout]:
    topology = topology_of(mesh)
    world, rank = (1, 0) if topology is None else (topology.world, topology.rank)
    if isinstance(layout, TokenLayout):
        return rank, layout
    if layout not in NAMES:
        raise ContractError(f"layout {layout!r} was given: use {', '.join(NAMES)} or a TokenLayout")
    return rank, make_layout(layout, length, world)
