"""`QuantumGeometricCore`: the three operations of the tiling plan, each with a definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hal_core import ContractError

from . import arithmetic, flow
from .stochastic import check_stochastic


class QuantumGeometricCore:
    """Flows of patterns, numbers of attention weights, and low-rank tiles, on a hal device or wherever they run best.

    Args:
        backend: device of the flows' kernels; None: the first that provides them.
    """

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    def compute_pattern_flow(
        self, tensor: Tensor, *, flow: str = "heat", steps: int = 1, dt: float | None = None, **options: Any
    ) -> Tensor:
        """One of the flows of `hal_geometric.flow`, of the tensor's shape.

        Args:
            tensor: [..., height, width] on a periodic grid, float32 or float64.
            flow: "heat" (default dt 1), "ricci" (the tensor is phi), "react" (the tensor is u; v=, default zeros; u is
                returned; default dt 0.1).
            dt: None: the flow's own. options: further ones of the flow.

        Raises:
            ContractError: an unknown flow, or a step beyond its limit.
        """
        return _flow(flow, tensor, steps, dt, self.backend if tensor.dtype == torch.float32 else None, options)

    def analyze_arithmetic_dynamics(self, pattern: Tensor) -> Tensor:
        """Four numbers of row-stochastic weights [..., L, L], float64 [..., 4].

        Height in bits of the matrix (`arithmetic.height`); entropy rate and entropy of the stationary distribution in
        nats, and spectral gap, of the Markov chain (`arithmetic.chain`).

        Raises:
            ContractError: a pattern whose rows are not weights.
        """
        check_stochastic(pattern)
        found = arithmetic.chain(pattern)
        bits = [float(arithmetic.height(one)) for one in pattern.reshape(-1, *pattern.shape[-2:])]
        height = torch.tensor(bits, dtype=torch.float64).view(pattern.shape[:-2])
        return torch.stack([height, found.entropy_rate, found.stationary_entropy, found.gap], -1)

    def apply_motivic_structure(self, tensor: Tensor, rank: int = 4, tile: int | None = None) -> Tensor:
        """The best approximation of rank `rank` of each tile, in the Frobenius norm (Eckart & Young 1936).

        Idempotent; the energy that is lost is the sum of the squared singular values from rank + 1 on.

        Args:
            tensor: [..., rows, columns]. tile: side of square tiles, the last ones smaller; None: one tile.

        Raises:
            ContractError: a rank or a tile below 1.
        """
        if rank < 1 or (tile is not None and tile < 1) or tensor.dim() < 2:
            raise ContractError(
                f"rank {rank} and tile {tile} of a tensor {list(tensor.shape)} were given: use 1 or more, and at least "
                "two dimensions"
            )
        if tile is None:
            return _low_rank(tensor, rank)
        bands = [
            torch.cat([_low_rank(part, rank) for part in band.split(tile, -1)], -1) for band in tensor.split(tile, -2)
        ]
        return torch.cat(bands, -2)


def _flow(name: str, x: Tensor, steps: int, dt: float | None, device: str | None, options: dict[str, Any]) -> Tensor:
    if name == "heat":
        return flow.heat(x, dt=1.0 if dt is None else dt, steps=steps, device=device, **options)
    if name == "ricci":
        return flow.ricci(x, dt=dt, steps=steps, device=device, **options)
    if name == "react":
        v = options.pop("v", torch.zeros_like(x))
        return flow.react(x, v, dt=0.1 if dt is None else dt, steps=steps, device=device, **options)[0]
    raise ContractError(f"flow {name!r} was given: use heat, ricci or react")


def _low_rank(x: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    found: Tensor = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return found
