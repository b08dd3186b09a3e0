"""Which tokens of a sequence each rank holds, and in which order.

zigzag = make_layout("zigzag", 10, 2)
zigzag.indices(0)        # tensor([0, 1, 2, 9, -1, -1]): -1 pads
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Self

import torch
from torch import Tensor

from hal_core import ContractError

NAMES = ("contiguous", "zigzag", "striped")
REPLICATED = "replicated"


class Piece(NamedTuple):
    """Tokens start, start + step, ... in neighbouring slots of a rank's tensors.

    Attributes:
        at: the first slot. start: the token in it. size: how many. step: from one token to the next.
    """

    at: int
    start: int
    size: int
    step: int = 1

    @property
    def last(self) -> int:
        """The token in the last slot."""
        return self.start + (self.size - 1) * self.step

    def part(self, first: int, stop: int) -> Self:
        """Tokens number `first` to `stop` of this piece."""
        return self._replace(at=self.at + first, start=self.start + first * self.step, size=stop - first)


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class TokenLayout:
    """Where every token of a sequence lies.

    Attributes:
        name: for messages. length: tokens of the sequence, padding not counted.
        local: slots of each rank, padding included. pieces: the tokens of each rank, padding left out.
    """

    name: str
    length: int
    local: int
    pieces: tuple[Pieces, ...]

    @property
    def world(self) -> int:
        return len(self.pieces)

    @property
    def padding(self) -> int:
        """Slots of all ranks that hold no token; a replicated layout has none."""
        return self.local * self.world - sum(piece.size for pieces in self.pieces for piece in pieces)

    def indices(self, rank: int) -> Tensor:
        """int64 [local]: the global token in each slot of a rank, -1 for padding."""
        found = torch.full((self.local,), -1)
        for piece in self.pieces[rank]:
            found[piece.at : piece.at + piece.size] = torch.arange(piece.start, piece.last + 1, piece.step)
        return found

    @classmethod
    def of(cls, indices: Sequence[Tensor | Sequence[int]], name: str = "explicit") -> Self:
        """The layout of explicit global token indices: one list of equal length for each rank, -1 for padding.

        Raises:
            ContractError: lists of different lengths, or tokens that are not 0 to n - 1, each once.
        """
        lists = [[int(token) for token in tokens] for tokens in indices]
        held = sorted(token for tokens in lists for token in tokens if token != -1)
        if not lists or len({len(tokens) for tokens in lists}) > 1 or held != list(range(len(held))):
            raise ContractError(
                f"token indices with lists of {[len(tokens) for tokens in lists]} were given: pass one list of equal "
                "length for each rank, every token of 0 to n - 1 in one of them, and -1 for padding"
            )
        pieces = ((Piece(at, token, 1) for at, token in enumerate(tokens) if token != -1) for tokens in lists)
        return cls(name, len(held), len(lists[0]), tuple(map(_joined, pieces)))


@lru_cache(maxsize=256)
def make_layout(name: str, length: int, world: int) -> TokenLayout:
    """A layout by name.

    contiguous: rank r holds the r-th run of ceil(length / world) tokens. zigzag: of 2 * world runs, rank r holds runs r
    and 2 * world - 1 - r, so that causal attention is equal work for every rank. striped: rank r holds tokens r,
    r + world, r + 2 * world ... replicated: every rank holds every token.

    Source: zigzag: Zhu, ring-flash-attention (2024); striped: Brandon et al. 2023 (Striped Attention).

    Raises:
        ContractError: an unknown name, or a world of less than 1.
    """
    if name not in (*NAMES, REPLICATED) or length < 0 or world < 1:
        raise ContractError(
            f"layout {name!r} of {length} tokens over {world} ranks was given: use {', '.join(NAMES)}, or a TokenLayout"
        )
    if name == REPLICATED:
        return TokenLayout(name, length, length, ((Piece(0, 0, length),) if length else (),) * world)
    if name == "striped":
        local = -(-length // world)
        ranks = [[Piece(0, rank, -(-(length - rank) // world), world)] for rank in range(world)]
    else:
        numbers = [(rank, 2 * world - 1 - rank)[: 1 + (name == "zigzag")] for rank in range(world)]
        size = -(-length // (world * len(numbers[0])))
        local = size * len(numbers[0])
        ranks = [
            [Piece(at * size, run * size, min(size, length - run * size)) for at, run in enumerate(runs)]
            for runs in numbers
        ]
    return TokenLayout(name, length, local, tuple(_joined(p for p in pieces if p.size > 0) for pieces in ranks))


def _joined(pieces: Iterable[Piece]) -> Pieces:
    """The pieces, those in neighbouring slots whose tokens go on by one step as one."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else piece
        step = piece.start - last.last
        same = all(each.size == 1 or each.step == step for each in (last, piece))
        if last.at + last.size == piece.at and step > 0 and same:
            found[-1] = Piece(last.at, last.start, last.size + piece.size, step)
        else:
            found.append(piece)
    return tuple(found)


@lru_cache(maxsize=256)
def joined_ranks(layout: TokenLayout, ranks: tuple[int, ...], step: int = 1) -> tuple[Pieces, Tensor | None]:
    """The pieces of several ranks' tensors, one behind the other, and the order that makes them fewest.

    Args:
        step: of the pieces that these will be compared with: tokens are sorted only if they then go on by it.

    Returns:
        (pieces, order): order is int64, the joined slots with their padding last, or None where they stay as they are.
    """
    plain = [
        piece._replace(at=piece.at + i * layout.local) for i, rank in enumerate(ranks) for piece in layout.pieces[rank]
    ]
    tokens = torch.cat([layout.indices(rank) for rank in ranks])
    held = int((tokens >= 0).sum())
    order = torch.argsort(torch.where(tokens < 0, layout.length, tokens), stable=True)
    tokens = tokens[order[:held]]
    edges = [0, *((tokens.diff() != step).nonzero()[:, 0] + 1).tolist(), len(tokens)]
    ordered = [Piece(a, int(tokens[a]), b - a, step) for a, b in itertools.pairwise(edges) if b > a]
    if len(ordered) < len(plain):
        return tuple(ordered), order
    return _joined(plain), None


def shard(tensor: Tensor, layout: TokenLayout, rank: int, dim: int = 2, fill: float = 0) -> Tensor:
    """A rank's part of a whole sequence, [..., length along dim, ...] -> [..., local, ...]; padding is `fill`."""
    if tensor.shape[dim] != layout.length:
        raise ContractError(
            f"a tensor of {tensor.shape[dim]} tokens was given to a layout of {layout.length}: pass the whole sequence"
        )
    index = layout.indices(rank).to(tensor.device)
    if not layout.length:
        return tensor
    part = tensor.index_select(dim, index.clamp(min=0))
    behind = [1] * (tensor.dim() - 1 - dim % tensor.dim())  # dimensions after the tokens'
    return part if not layout.padding else part.masked_fill((index < 0).view(-1, *behind), fill)


def unshard(parts: Sequence[Tensor], layout: TokenLayout, dim: int = 2) -> Tensor:
    """The whole sequence of all ranks' parts, in the order of tokens; padding is left out."""
    if layout.name == REPLICATED:
        return parts[0]
    index = torch.cat([layout.indices(rank) for rank in range(layout.world)])
    order = torch.argsort(index)[int((index < 0).sum()) :]
    return torch.cat(list(parts), dim).index_select(dim, order.to(parts[0].device))
