"""Attention with other scores than the inner product, as plain attention of lifted queries and keys.

Each function takes query [..., len_q, d] and key [..., len_k, d] and gives (query', key') whose inner products are the
score, up to a constant of the row, which softmax does not see. The factor is in query': pass `scale=1.0`.

    q, k = lift.euclidean(query, key, weight=0.5)
    out = hal.attention(q, k, value, scale=1.0)

Lift in the precision that the points have and cast afterwards (`dtype=`): a lift of rounded points is another lift.
Scores without an exact lift (the hyperbolic distance itself, its square, angles) go into a mask: `distance_mask`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hal_core import ContractError

from .manifold import Lorentz, Manifold, minkowski

#: Absolute error of a Lorentz score at radius r is CANCELLATION * unit roundoff * cosh(r)^2, measured.
CANCELLATION = {torch.float64: 10.0, torch.float32: 10.0, torch.bfloat16: 2.0, torch.float16: 2.0}
#: The largest error of a score that is not refused.
MOST_ERROR = 1e-2


class Lifted(NamedTuple):
    """Query and key for `hal.attention` with scale 1. query: [..., len_q, dim]. key: [..., len_k, dim]."""

    query: Tensor
    key: Tensor


def _checked(query: Tensor, key: Tensor) -> None:
    if query.dim() < 2 or key.dim() < 2 or query.shape[-1] != key.shape[-1]:
        raise ContractError(
            f"query {list(query.shape)} and key {list(key.shape)} were given: use [..., length, d] with one d"
        )


def spherical(query: Tensor, key: Tensor, beta: float = 1.0) -> Lifted:
    """beta cos(q, k), the von Mises-Fisher kernel; -beta / 2 |q - k|^2 of unit vectors is the same score. dim = d."""
    _checked(query, key)
    normalize = torch.nn.functional.normalize
    return Lifted(beta * normalize(query, dim=-1), normalize(key, dim=-1))


def lorentz(
    query: Tensor,
    key: Tensor,
    beta: float = 1.0,
    *,
    space: Lorentz | None = None,
    centre: bool = True,
    dtype: torch.dtype | None = None,
) -> Lifted:
    """beta |K| <q, k>_L = -beta cosh(sqrt|K| dist): the score of fully hyperbolic networks. dim = d = n + 1.

    Values in ambient form, points of the sheet, give their Lorentz centroid: `Lorentz().rescale(out)`.

    Args:
        query, key: points of `space` (default Lorentz()), [..., length, n + 1].
        centre: move the keys' centroid to the origin first, by an isometry, which makes the radii small.
        dtype: of the result; None: that of the points.

    Raises:
        ContractError: a point off the sheet; or scores whose cancellation error beta c u cosh(r)^2 exceeds 1e-2, with
            c = 10 in float32 and 2 in bfloat16 and float16, u the unit roundoff, and r the largest radius.

    Source: Chen et al. 2022, Fully hyperbolic neural networks; Law et al. 2019 (centroid).
    """
    _checked(query, key)
    space = space or Lorentz()
    space.require(query, key)
    dtype = dtype or query.dtype
    scale, sheet = abs(space.curvature) ** 0.5, Lorentz(check=False)
    query, key = query * scale, key * scale
    if centre:
        middle = sheet.rescale(key.detach().mean(-2, keepdim=True))
        query, key = sheet.boost(middle, query), sheet.boost(middle, key)
    cosh = max(float(t.detach()[..., 0].max()) if t.numel() else 1.0 for t in (query, key))
    unit = torch.finfo(dtype).eps / 2
    error = abs(beta) * CANCELLATION.get(dtype, 2.0) * unit * cosh**2
    if space.checks and not error <= MOST_ERROR:
        better = "float64" if dtype == torch.float32 else "float32 or float64"
        raise ContractError(
            f"Lorentz scores of {dtype} at radius {torch.acosh(torch.tensor(cosh)):.3g} with beta {beta:g} were given: "
            f"their error of {error:.2g} is above {MOST_ERROR:g}; use {better}, or points nearer to each other"
        )
    flip = torch.ones(query.shape[-1], dtype=query.dtype, device=query.device)
    flip[0] = -1
    return Lifted((beta * flip * query).to(dtype), key.to(dtype))


def mahalanobis(query: Tensor, key: Tensor, metric: Tensor | None = None, weight: float = 1.0) -> Lifted:
    """-weight (q - k)^T G (q - k) with G = metric, [d, d] symmetric; None: the identity. dim = d + 1.

    q' = [2 w G q, -w], k' = [k, k^T G k].

    Source: Kim, Papamakarios & Mnih 2021, The Lipschitz constant of self-attention (L2 attention).
    """
    _checked(query, key)
    mapped = query if metric is None else query @ _symmetric(metric, query)
    bias = -weight * torch.ones_like(query[..., :1])
    square = _squares(key, metric).unsqueeze(-1)
    return Lifted(torch.cat([2 * weight * mapped, bias], -1), torch.cat([key, square], -1))


def euclidean(query: Tensor, key: Tensor, weight: float = 1.0) -> Lifted:
    """-weight |q - k|^2, `mahalanobis` with the identity. dim = d + 1."""
    return mahalanobis(query, key, None, weight)


def euclidean_mask(key: Tensor, weight: float = 1.0, metric: Tensor | None = None) -> Tensor:
    """The same score without a longer head: the additive mask -weight k^T G k, [..., 1, len_k], beside the scale
    2 weight on q G and k.
    """
    return -weight * _squares(key, metric).unsqueeze(-2)


def _symmetric(metric: Tensor, like: Tensor) -> Tensor:
    if metric.shape != (like.shape[-1],) * 2 or not torch.allclose(metric, metric.mT):
        raise ContractError(
            f"a metric {list(metric.shape)} was given: use a symmetric one of {[like.shape[-1]] * 2}, for "
            "example (g + g.T) / 2"
        )
    return metric.to(like)


def _squares(key: Tensor, metric: Tensor | None) -> Tensor:
    return (key * (key if metric is None else key @ _symmetric(metric, key))).sum(-1)


def fidelity(query: Tensor, key: Tensor, beta: float = 1.0) -> Lifted:
    """beta |<q, k>|^2, the fidelity of pure states. dim = d (d + 1) / 2 for real vectors, d^2 for complex ones.

    Real: the products x_i x_j, i <= j, those of i < j times sqrt 2. Complex: |x_i|^2, and the real and imaginary parts
    of x_i conj(x_j), i < j, times sqrt 2, which are the density matrix as a real vector.
    """
    _checked(query, key)
    return Lifted(beta * _outer(query), _outer(key))


def _outer(x: Tensor) -> Tensor:
    d = x.shape[-1]
    i, j = torch.triu_indices(d, d, 1, device=x.device)
    off = x[..., i] * x[..., j].conj() * 2**0.5
    if x.is_complex():
        return torch.cat([x.abs().square(), off.real, off.imag], -1)
    return torch.cat([x.square(), off], -1)


def product(*parts: Lifted | tuple[Tensor, Tensor]) -> Lifted:
    """The sum of several lifts' scores: the score on a product of their spaces. dim = the sum of theirs."""
    if not parts:
        raise ContractError("no lifts were given: pass the results of spherical, lorentz, euclidean ...")
    queries, keys = zip(*parts, strict=True)
    return Lifted(torch.cat(queries, -1), torch.cat(keys, -1))


def distance_mask(query: Tensor, key: Tensor, space: Manifold, beta: float = 1.0, power: int = 1) -> Tensor:
    """-beta dist(q, k)^power as an additive mask, [..., len_q, len_k], for queries and keys of zeros.

    For scores without a lift: the distance of hyperbolic attention networks (Gulcehre et al. 2019) and its square. Far
    out the weights exp(-beta dist) are a power law, (2 cosh dist)^-beta. Takes len_q * len_k numbers; trains where the
    device has "mask_grad".
    """
    _checked(query, key)
    if power not in (1, 2):
        raise ContractError(f"power {power} was given: use 1 or 2")
    return -beta * space.dist(query.unsqueeze(-2), key.unsqueeze(-3)) ** power


def lorentz_scores(query: Tensor, key: Tensor, beta: float = 1.0) -> Tensor:
    """beta <q, k>_L by its definition, [..., len_q, len_k]: what `lorentz` is held to."""
    return beta * minkowski(query.unsqueeze(-2), key.unsqueeze(-3))
