"""Floats as the dyadic rationals that they are, and attention weights as a Markov chain.

A finite float is n 2^e with an odd whole number n: exact statements about bits need no tolerance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hal_core import ContractError

from .stochastic import check_stochastic


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, e), int64, with x = n 2^e and |n| < 2^53."""
    if not x.is_floating_point() or not bool(x.isfinite().all()):
        raise ContractError(f"a tensor of {x.dtype} was given: use finite floats")
    mantissa, exponent = torch.frexp(x.double())
    return (mantissa * 2.0**53).long(), exponent.long() - 53


def significant_bits(x: Tensor) -> Tensor:
    """Bits of the odd part n of each entry n 2^e, int64 of x's shape; 0 for 0.

    At most 8 for bfloat16, 11 for float16, 24 for float32. Bits alone do not say that a format fits: the range of the
    exponents is a second number.
    """
    n, _ = _parts(x)
    low = n & -n  # the lowest bit that is set
    odd = n.abs() // low.clamp_min(1)
    return torch.where(n == 0, 0, torch.frexp(odd.double())[1].long())


def height(x: Tensor) -> int:
    """Weil height of the point [x_1 : ... : x_m] in bits: of max |n_i| / gcd(n_i), with x_i = n_i 2^e for one e.

    The bits of the entries, without sign, in a lossless tile with one shared scale. A factor of all entries that is
    exact, 3 or 2^-9 say, changes nothing. 0 for zeros.
    """
    n, e = _parts(x.flatten())
    used = n != 0
    if not bool(used.any()):
        return 0
    n, e = n[used], e[used]
    shifts = (e - e.min()).tolist()
    whole = {abs(number) << shift for number, shift in zip(n.tolist(), shifts, strict=True)}
    return int(max(whole) // math.gcd(*whole)).bit_length()


class Chain(NamedTuple):
    """Attention weights as a Markov chain, float64.

    Attributes:
        stationary: pi with pi P = pi, [..., n]. entropy_rate: -sum_i pi_i sum_j P_ij log P_ij in nats, [...].
        stationary_entropy: -sum pi log pi, [...]: at least the entropy rate, at most log n.
        gap: 1 - |second eigenvalue of P|, [...]: the rate at which rows become alike.
    """

    stationary: Tensor
    entropy_rate: Tensor
    stationary_entropy: Tensor
    gap: Tensor


def chain(pattern: Tensor) -> Chain:
    """The chain of row-stochastic weights P [..., n, n].

    Raises:
        ContractError: rows that are no weights, or several stationary distributions (parts that never meet).
    """
    check_stochastic(pattern)
    p = pattern.double()
    p = p / p.sum(-1, keepdim=True)
    n = p.shape[-1]
    equations = p.mT - torch.eye(n, dtype=p.dtype, device=p.device)
    ones = torch.ones(*p.shape[:-2], 1, n, dtype=p.dtype, device=p.device)
    equations = torch.cat([equations[..., :-1, :], ones], -2)
    right = torch.zeros(*p.shape[:-1], 1, dtype=p.dtype, device=p.device)
    right[..., -1, 0] = 1
    pi, info = torch.linalg.solve_ex(equations, right)
    pi = pi[..., 0]
    if bool((info != 0).any()) or not bool(((pi.unsqueeze(-2) @ p).squeeze(-2) - pi).abs().max() <= 1e-9):
        raise ContractError(
            "a pattern with several stationary distributions was given: add a small weight everywhere, "
            "(1 - a) P + a / n"
        )
    pi = pi.clamp_min(0)
    rate = (pi.unsqueeze(-1) * torch.special.entr(p)).sum((-2, -1))
    return Chain(pi, rate, torch.special.entr(pi).sum(-1), 1 - second_eigenvalue(p))


def second_eigenvalue(pattern: Tensor) -> Tensor:
    """Magnitude of the second largest eigenvalue of row-stochastic weights [..., n, n], [...], float64; 0 for n = 1.

    Each application of the weights makes the rows alike by this factor in the end; 1 where parts never meet.
    """
    check_stochastic(pattern)
    p = pattern.double()
    values = torch.linalg.eigvals(p / p.sum(-1, keepdim=True)).abs().sort(-1, descending=True).values
    return values[..., 1].clamp(max=1) if p.shape[-1] > 1 else torch.zeros_like(values[..., 0])
