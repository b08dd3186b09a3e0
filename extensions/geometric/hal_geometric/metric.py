"""Riemannian geometry of a metric that is given as a function of coordinates: by automatic differentiation.

A metric is a function x [n] -> g [n, n], symmetric and positive definite. Curvature needs its derivatives, so a matrix
for each sample is not enough: pass the function. n is at most 16: the curvature tensor has n^4 entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jacfwd

from hal_core import ContractError

Metric = Callable[[Tensor], Tensor]
MOST_DIMENSIONS = 16


def _checked(x: Tensor) -> None:
    if x.dim() != 1 or not x.is_floating_point():
        raise ContractError(f"coordinates {list(x.shape)} of {x.dtype} were given: use one point [n] of a float dtype")
    if len(x) > MOST_DIMENSIONS:
        raise ContractError(
            f"a metric of {len(x)} dimensions was given: use at most {MOST_DIMENSIONS}, for example the first "
            "principal directions, because the curvature tensor has n^4 entries"
        )


def pullback(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """g = J^T J, the metric that the map f [n] -> [m] draws back from R^m, [n, n]."""
    _checked(x)
    jacobian = jacfwd(lambda y: f(y).flatten())(x)
    return jacobian.mT @ jacobian  # type: ignore[no-any-return]


def fisher(p: Tensor) -> Tensor:
    """diag(p) - p p^T, the Fisher information of a softmax in its logits, p [..., n] -> [..., n, n] (Amari 1985).

    KL(softmax(z), softmax(z + dz)) = dz^T fisher dz / 2 to second order. Its kernel is the constant vector: for a
    metric fix one logit and drop its row and column; every sectional curvature is then 1/4.
    """
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def christoffel(g: Metric, x: Tensor) -> Tensor:
    """Gamma^k_ij = g^kl (d_i g_lj + d_j g_li - d_l g_ij) / 2, [k, i, j]; symmetric in i, j."""
    _checked(x)
    return _christoffel(g, x)


def _christoffel(g: Metric, x: Tensor) -> Tensor:
    slope = jacfwd(g)(x)  # [i, j, k]: d_k g_ij
    first = slope.permute(0, 2, 1) + slope - slope.permute(2, 0, 1)  # [l, i, j]
    raised: Tensor = torch.linalg.solve(g(x), first.flatten(1))
    return raised.view_as(first) / 2


def riemann(g: Metric, x: Tensor) -> Tensor:
    """R^l_kij = d_i Gamma^l_jk - d_j Gamma^l_ik + Gamma^l_im Gamma^m_jk - Gamma^l_jm Gamma^m_ik, [l, k, i, j]."""
    _checked(x)
    gamma = _christoffel(g, x)
    slope = jacfwd(lambda y: _christoffel(g, y))(x)  # [l, j, k, i]: d_i Gamma^l_jk
    half = slope.permute(0, 2, 3, 1) + torch.einsum("lim,mjk->lkij", gamma, gamma)
    return half - half.transpose(2, 3)  # type: ignore[no-any-return]


def ricci(g: Metric, x: Tensor) -> Tensor:
    """R_kj = R^l_klj, [n, n]."""
    return torch.einsum("lklj->kj", riemann(g, x))


def scalar(g: Metric, x: Tensor) -> Tensor:
    """The scalar curvature g^kj R_kj, []."""
    inverse: Tensor = torch.linalg.inv(g(x))
    return (inverse * ricci(g, x)).sum()


def sectional(g: Metric, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """K(u, v) = <R(u, v) v, u> / (|u|^2 |v|^2 - <u, v>^2), []; u, v [n] independent."""
    at, curvature = g(x), riemann(g, x)
    numerator = torch.einsum("al,lkij,a,k,i,j->", at, curvature, u, v, u, v)
    uu, vv, uv = u @ at @ u, v @ at @ v, u @ at @ v
    return numerator / (uu * vv - uv**2)


def _runge_kutta(slope: Callable[[float, Tensor], Tensor], state: Tensor, steps: int) -> Tensor:
    """The classical method of order 4 from time 0 to 1."""
    if steps < 1:
        raise ContractError(f"steps {steps} was given: use 1 or more")
    h = 1 / steps
    for n in range(steps):
        t = n * h
        a = slope(t, state)
        b = slope(t + h / 2, state + h / 2 * a)
        c = slope(t + h / 2, state + h / 2 * b)
        d = slope(t + h, state + h * c)
        state = state + h / 6 * (a + 2 * b + 2 * c + d)
    return state


def geodesic(g: Metric, x: Tensor, v: Tensor, steps: int = 50) -> tuple[Tensor, Tensor]:
    """Point and velocity at time 1 of x'' = -Gamma(x', x') from x with velocity v, ([n], [n]): the exponential map.

    Runge-Kutta of order 4: the error falls with the fourth power of `steps`.
    """
    _checked(x)
    n = len(x)

    def slope(_: float, state: Tensor) -> Tensor:
        velocity = state[n:]
        return torch.cat([velocity, -torch.einsum("kij,i,j->k", _christoffel(g, state[:n]), velocity, velocity)])

    end = _runge_kutta(slope, torch.cat([x, v]), steps)
    return end[:n], end[n:]


def transport(g: Metric, path: Callable[[Tensor], Tensor], v: Tensor, steps: int = 50) -> Tensor:
    """v, tangent at path(0), moved parallel along path [] -> [n] to path(1): v' = -Gamma(path', v), order 4, [n].

    Around a closed path the change of v is its holonomy.
    """
    _checked(v)

    def slope(t: float, state: Tensor) -> Tensor:
        time = torch.tensor(t, dtype=v.dtype)
        return -torch.einsum("kij,i,j->k", _christoffel(g, path(time)), jacfwd(path)(time), state)

    return _runge_kutta(slope, v, steps)


def length(g: Metric, path: Callable[[Tensor], Tensor], steps: int = 50) -> Tensor:
    """Length of path [] -> [n] from 0 to 1, by Gauss-Legendre quadrature with 3 points per step, []."""
    nodes = torch.tensor([-(0.6**0.5), 0.0, 0.6**0.5], dtype=torch.float64)
    weights = torch.tensor([5.0, 8.0, 5.0], dtype=torch.float64) / 18
    total = torch.zeros((), dtype=torch.float64)
    for n in range(steps):
        for node, weight in zip(nodes, weights, strict=True):
            time = (n + (node + 1) / 2) / steps
            speed = jacfwd(path)(time)
            total = total + weight / steps * (speed @ g(path(time)) @ speed).sqrt()
    return total
