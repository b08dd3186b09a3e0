"""Riemannian identities of metrics given as functions."""

from __future__ import annotations

import math

import pytest
import torch
from hal_geometric import metric
from hal_geometric.manifold import Sphere
from torch import Tensor

from hal_core import ContractError


def half_plane(x: Tensor) -> Tensor:
    return torch.eye(len(x), dtype=x.dtype) / x[-1] ** 2


def sphere(x: Tensor) -> Tensor:
    """Colatitude and longitude."""
    return torch.diag(torch.stack([torch.ones_like(x[0]), x[0].sin() ** 2]))


def embedded(x: Tensor) -> Tensor:
    return torch.stack([x[0].sin() * x[1].cos(), x[0].sin() * x[1].sin(), x[0].cos()])


def surface(x: Tensor) -> Tensor:
    """A surface without symmetries, in R^5."""
    return torch.cat([x, (x.square().sum() + x[0] * x[1]).sin().view(1), (x[0] - 0.3 * x[-1]).exp().view(1)])


def drawn(x: Tensor) -> Tensor:
    return metric.pullback(surface, x)


def simplex(z: Tensor) -> Tensor:
    """Fisher's metric in logits, the last one 0."""
    p = torch.cat([z, torch.zeros_like(z[:1])]).softmax(0)
    return metric.fisher(p)[:-1, :-1]


X = torch.tensor([0.4, -0.3, 0.7], dtype=torch.float64)


def test_a_pullback_is_symmetric_and_positive_and_of_a_sphere_the_spheres() -> None:
    g = drawn(X)
    assert torch.equal(g, g.mT)
    assert float(torch.linalg.eigvalsh(g).min()) > 0
    x = X[:2].abs()
    assert torch.allclose(metric.pullback(embedded, x), sphere(x), atol=1e-15)


def test_the_connection_is_symmetric_and_keeps_the_metric() -> None:
    gamma, g = metric.christoffel(drawn, X), drawn(X)
    assert float((gamma - gamma.mT).abs().max()) <= 1e-15
    slope = torch.func.jacfwd(drawn)(X)
    along = torch.einsum("mki,mj->ijk", gamma, g)
    assert float((slope - along - along.transpose(0, 1)).abs().max()) <= 1e-14 * float(slope.abs().max())


def test_riemann_has_its_symmetries() -> None:
    g = drawn(X)
    low = torch.einsum("al,lkij->akij", g, metric.riemann(drawn, X))
    scale = float(low.abs().max())
    assert float((low + low.transpose(0, 1)).abs().max()) <= 1e-12 * scale
    assert float((low - low.permute(2, 3, 0, 1)).abs().max()) <= 1e-12 * scale
    cyclic = low + low.permute(0, 2, 3, 1) + low.permute(0, 3, 1, 2)
    assert float(cyclic.abs().max()) <= 1e-12 * scale


@pytest.mark.parametrize(
    ("g", "x", "curvature"),
    [(half_plane, X, -1.0), (sphere, X[:2].abs(), 1.0), (simplex, X, 0.25)],
    ids=["hyperbolic", "sphere", "simplex"],
)
def test_space_forms_have_their_curvature(g: metric.Metric, x: Tensor, curvature: float, seed: int) -> None:
    u, v = torch.randn(2, len(x), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    n = len(x)
    assert float(metric.sectional(g, x, u, v)) == pytest.approx(curvature, abs=1e-11)
    assert float(metric.scalar(g, x)) == pytest.approx(n * (n - 1) * curvature, abs=1e-11)
    assert torch.allclose(metric.ricci(g, x), (n - 1) * curvature * g(x), atol=1e-11)


def test_scalar_curvature_does_not_depend_on_the_chart() -> None:
    def chart(y: Tensor) -> Tensor:
        return torch.stack([y[0] + 0.2 * y[1] ** 2, y[1] + 0.1 * y[0], y[2] * torch.exp(0.3 * y[0])])

    def other(y: Tensor) -> Tensor:
        return metric.pullback(lambda z: surface(chart(z)), y)

    y = torch.tensor([0.3, -0.4, 0.6], dtype=torch.float64)
    assert float(metric.scalar(other, y)) == pytest.approx(float(metric.scalar(drawn, chart(y))), rel=1e-10)


def test_transport_keeps_lengths_to_the_fourth_order_and_turns_around_a_latitude() -> None:
    at = torch.tensor(0.9, dtype=torch.float64)

    def latitude(t: Tensor) -> Tensor:
        return torch.stack([at, 2 * math.pi * t])

    v, errors = torch.tensor([1.0, 0.3], dtype=torch.float64), []
    start = latitude(torch.tensor(0.0, dtype=torch.float64))
    for steps in (20, 40):
        moved = metric.transport(sphere, latitude, v, steps)
        errors.append(abs(float(moved @ sphere(start) @ moved - v @ sphere(start) @ v)))
    assert 8 <= errors[0] / errors[1] <= 40
    moved = metric.transport(sphere, latitude, v, 160)
    frame = sphere(start).diagonal().sqrt()
    a, b = frame * v, frame * moved
    turned = torch.atan2(a[0] * b[1] - a[1] * b[0], a @ b)
    enclosed = 2 * math.pi * (1 - math.cos(0.9))
    off = min(abs(math.remainder(float(turned) + sign * enclosed, 2 * math.pi)) for sign in (-1, 1))
    assert off <= 2e-8


def test_a_geodesic_has_the_length_of_the_distance() -> None:
    x, v = torch.tensor([1.1, 0.2], dtype=torch.float64), torch.tensor([0.5, 0.9], dtype=torch.float64)
    end, velocity = metric.geodesic(sphere, x, v, 60)
    speed = float((v @ sphere(x) @ v).sqrt())
    assert float(Sphere().dist(embedded(x), embedded(end))) == pytest.approx(speed, abs=1e-8)
    assert float((velocity @ sphere(end) @ velocity).sqrt()) == pytest.approx(speed, abs=1e-8)
    straight = metric.length(sphere, lambda t: x + t * (end - x), 30)
    assert float(straight) > speed


def test_kl_is_fishers_quadratic_form_for_small_steps(seed: int) -> None:
    z, step = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p, errors = z.softmax(0), []
    for size in (0.1, 0.001):
        dz = size * step / step.norm()
        q = (z + dz).softmax(0)
        form = dz @ metric.fisher(p) @ dz / 2
        errors.append(abs(float((p * (p / q).log()).sum() / form - 1)))
    assert errors[0] <= 0.15
    assert errors[1] <= 1.6e-3


def test_more_than_16_dimensions_are_refused() -> None:
    with pytest.raises(ContractError, match="a metric of 17 dimensions was given: use at most 16"):
        metric.riemann(half_plane, torch.ones(17))
    with pytest.raises(ContractError, match="use one point"):
        metric.christoffel(half_plane, torch.ones(2, 3))
