"""`QuantumMotivicTile`: attention over one tile of tokens, with numbers that say what the tile holds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import hal_core as hal
from hal_core import ContractError

from . import arithmetic, information, quantum
from .core import _low_rank


class QuantumMotivicTile(nn.Module):
    """Query, key, value and output projections around `hal.attention` over one tile.

    Args:
        size: tokens of the tile, at most. hidden_dim: of a token. num_heads: a divisor of it.
        dropout: of the attention weights, in training.
        resolution: share of the full rank that the result keeps, above 0, up to 1.
        motive_rank: the rank itself, instead of the resolution; None: none.

    Attributes:
        block_size: tokens in a block of attention, None for the device's own cut; set by `balance_load`.
        resolution_history: every resolution so far.

    Raises:
        ContractError: sizes that cannot be, or tokens of another width or number.
    """

    def __init__(
        self,
        size: int,
        hidden_dim: int,
        num_heads: int = 1,
        dropout: float = 0.0,
        resolution: float = 1.0,
        motive_rank: int | None = None,
    ) -> None:
        super().__init__()
        if min(size, hidden_dim, num_heads) < 1 or hidden_dim % num_heads:
            raise ContractError(
                f"size {size}, hidden_dim {hidden_dim} and num_heads {num_heads} were given: use 1 or more, and heads "
                "that divide hidden_dim"
            )
        if not 0 < resolution <= 1 or (motive_rank is not None and motive_rank < 1) or not 0 <= dropout < 1:
            raise ContractError(
                f"resolution {resolution}, motive_rank {motive_rank} and dropout {dropout} were given: use a share "
                "above 0, up to 1, a rank of 1 or more, and a probability below 1"
            )
        self.size, self.hidden_dim, self.num_heads, self.dropout = size, hidden_dim, num_heads, dropout
        self.resolution, self.motive_rank = float(resolution), motive_rank
        self.block_size: int | None = None
        self.resolution_history = [self.resolution]
        self.query, self.key, self.value, self.out = (nn.Linear(hidden_dim, hidden_dim) for _ in range(4))
        self._neighbors: list[QuantumMotivicTile] = []
        self._seen: dict[str, Tensor] = {}

    @property
    def rank(self) -> int:
        """The rank that a tile of `size` tokens keeps."""
        full = min(self.size, self.hidden_dim)
        return min(self.motive_rank or max(round(self.resolution * full), 1), full)

    def add_neighbor(self, tile: QuantumMotivicTile) -> None:
        """A tile whose attention the metric `flow` compares with this one's, both ways."""
        if tile is self:
            raise ContractError("a tile was given as its own neighbour: give another one")
        if tile not in self._neighbors:
            self._neighbors.append(tile)
            tile._neighbors.append(self)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over the tile, of rank `rank` at most: [batch, tokens, hidden_dim] to the same shape."""
        if x.dim() != 3 or x.shape[2] != self.hidden_dim or not 0 < x.shape[1] <= self.size:
            raise ContractError(
                f"tokens {list(x.shape)} were given: use [batch, 1 to {self.size} tokens, {self.hidden_dim}]"
            )
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        tiling = None if self.block_size is None else hal.DenseTiling(self.block_size)
        dropout = self.dropout if self.training else 0.0
        heads = hal.attention(q, k, v, dropout_p=dropout, tiling=tiling)
        whole: Tensor = self.out(heads.transpose(1, 2).flatten(2))
        found = whole if self.rank >= min(x.shape[1:]) else _low_rank(whole, self.rank)
        kept = {"x": x, "q": q, "k": k, "whole": whole, "out": found}
        self._seen = {name: tensor.detach() for name, tensor in kept.items()}
        return found

    def get_metrics(self) -> dict[str, Any]:
        """Numbers of the last call; means over its batch and heads.

        quantum_entropy: von Neumann entropy of the result's density matrix, nats. effective_rank: of the result.
        motive_height: bits of a lossless tile of the result with one scale (`arithmetic.height`). ifq: norm of the
        result over norm of the tokens. cer: share of the energy that the rank leaves out. ae: Renyi entropy of order 2
        of the weights, nats. flow: mean Hellinger distance of the weights to the neighbours', of those with as many
        tokens; 0 without one. load_distribution: exp of the entropy of the keys' mass over the number of keys, 1 for
        even load. resolution_history.

        Raises:
            ContractError: before the first call.
        """
        if not self._seen:
            raise ContractError("metrics were asked for before the tile was called: call it on tokens first")
        seen = self._seen
        x, q, k, whole, out = (seen[name] for name in ("x", "q", "k", "whole", "out"))
        energy = whole.square().sum()
        mass = information.key_mass(q, k) / q.shape[2]
        load = torch.special.entr(mass).sum(-1).exp() / k.shape[2]
        return {
            "quantum_entropy": float(quantum.von_neumann(information.density(out)).mean()),
            "effective_rank": float(information.effective_rank(out).mean()),
            "motive_height": arithmetic.height(out),
            "ifq": float(out.norm() / x.norm()),
            "cer": float((whole - out).square().sum() / energy),
            "ae": float(information.renyi(q, k, 2.0).mean()),
            "flow": self._flow(q, k),
            "load_distribution": float(load.mean()),
            "resolution_history": list(self.resolution_history),
        }

    def _flow(self, q: Tensor, k: Tensor) -> float:
        others = [tile._seen for tile in self._neighbors if tile._seen and tile._seen["q"].shape == q.shape]
        found = [information.head_distance(q, k, o["q"], o["k"], kind="hellinger").mean() for o in others]
        return float(torch.stack(found).mean()) if found else 0.0

    def adapt_resolution(self, energy: float = 0.99) -> float:
        """The least resolution whose rank keeps this share of the last result's energy; it is set, and returned.

        Raises:
            ContractError: before the first call, or a share that is none.
        """
        if not self._seen or not 0 < energy <= 1:
            raise ContractError(f"energy {energy} was given, after {len(self._seen)} results: call the tile first")
        squares: Tensor = torch.linalg.svdvals(self._seen["whole"]).square().sum(0)
        share = squares.cumsum(0) / squares.sum()
        rank = min(int((share < energy).sum()) + 1, len(share))
        self.motive_rank, self.resolution = rank, rank / min(self.size, self.hidden_dim)
        self.resolution_history.append(self.resolution)
        return self.resolution

    def balance_load(self) -> int:
        """The block of tokens for the load of the last call, the power of two from 16 on that is nearest below
        size * load_distribution: fine blocks where few keys hold the mass. It is set, and returned.
        """
        even = float(self.get_metrics()["load_distribution"])
        self.block_size = max(16, 1 << int(math.log2(max(self.size * even, 1))))
        return self.block_size
