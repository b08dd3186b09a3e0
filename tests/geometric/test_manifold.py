"""Identities of spaces of constant curvature, in float64 to 1e-10, and against geoopt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hal_geometric.manifold import Euclidean, Lorentz, Manifold, Poincare, Product, Sphere, minkowski
from torch import Tensor

from hal_core import ContractError

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st  # noqa: E402

BAR = 1e-10
SPACES: list[Manifold] = [
    Euclidean(),
    Sphere(),
    Sphere(0.3),
    Lorentz(),
    Lorentz(-2.5),
    Poincare(),
    Poincare(-0.4),
    Product((Lorentz(), 2), (Sphere(2.0), 1), (Euclidean(), 1)),
]
named = pytest.mark.parametrize("space", SPACES, ids=repr)
draws = given(seed=st.integers(0, 2**31), n=st.integers(1, 6), spread=st.floats(0.05, 1.2))


def points(space: Manifold, seed: int, n: int, spread: float, count: int = 3) -> list[Tensor]:
    """Points around the origin, at most 2 * spread radii of curvature away."""
    generator = torch.Generator().manual_seed(seed)
    n = 4 if isinstance(space, Product) else n
    origin = space.origin(n, torch.float64).expand(5, -1)
    most = 2 * spread / max(abs(space.curvature), 1.0) ** 0.5
    drawn = [torch.randn(5, space.size(n), generator=generator, dtype=torch.float64) for _ in range(count)]
    drawn = [space.to_tangent(origin, v) for v in drawn]
    far = [most * torch.rand(5, 1, generator=generator, dtype=torch.float64) for _ in drawn]
    pairs = zip(drawn, far, strict=True)
    return [space.exp(origin, v * r / space.norm(origin, v).unsqueeze(-1)) for v, r in pairs]


def tangent(space: Manifold, x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return space.to_tangent(x, torch.randn(x.shape, generator=generator, dtype=torch.float64) * 0.5)


def close(x: Tensor, y: Tensor) -> None:
    assert float((x - y).abs().max() / (1 + y.abs().max())) <= BAR


@named
@settings(max_examples=25)
@draws
def test_exp_and_log_are_inverse_and_log_has_the_length_of_the_distance(
    space: Manifold, seed: int, n: int, spread: float
) -> None:
    x, y, _ = points(space, seed, n, spread)
    v = space.log(x, y)
    close(space.exp(x, v), y)
    close(space.norm(x, v), space.dist(x, y))
    close(space.log(x, space.exp(x, v)), v)


@named
@settings(max_examples=25)
@draws
def test_distance_is_symmetric_and_keeps_the_triangle_inequality(
    space: Manifold, seed: int, n: int, spread: float
) -> None:
    x, y, z = points(space, seed, n, spread)
    close(space.dist(x, y), space.dist(y, x))
    assert bool((space.dist(x, z) <= space.dist(x, y) + space.dist(y, z) + BAR).all())
    assert float(space.dist(x, x).abs().max()) == 0


@named
@settings(max_examples=25)
@draws
def test_transport_keeps_inner_products_and_takes_the_geodesic_to_itself(
    space: Manifold, seed: int, n: int, spread: float
) -> None:
    x, y, _ = points(space, seed, n, spread)
    u, v = tangent(space, x, seed), tangent(space, x, seed + 1)
    moved = space.transport(x, y, u), space.transport(x, y, v)
    close(space.inner(y, *moved), space.inner(x, u, v))
    close(space.to_tangent(y, moved[0]), moved[0])
    close(space.transport(x, y, space.log(x, y)), -space.log(y, x))


@settings(max_examples=40)
@draws
def test_the_ball_is_the_hyperboloid_by_an_isometry(seed: int, n: int, spread: float) -> None:
    for curvature in (-1.0, -0.4):
        ball, sheet = Poincare(curvature), Lorentz(curvature)
        x, y, _ = points(ball, seed, n, spread)
        close(ball.dist(x, y), sheet.dist(ball.to_lorentz(x), ball.to_lorentz(y)))
        close(ball.from_lorentz(ball.to_lorentz(x)), x)


def potential(space: Manifold, x: Tensor, centre: Tensor, weights: Tensor) -> Tensor:
    """What the centroid minimises."""
    if isinstance(space, Lorentz):
        return (weights * (-2 - 2 * minkowski(x, centre.unsqueeze(-2)))).sum(-1)
    return (weights * (x - centre.unsqueeze(-2)).square().sum(-1)).sum(-1)


@pytest.mark.parametrize("space", [Euclidean(), Sphere(), Lorentz()], ids=repr)
def test_the_centroid_is_better_than_200_points_around_it(space: Manifold, seed: int) -> None:
    x = torch.stack(points(space, seed, 3, 0.8, 12), -2)
    weights = torch.rand(5, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centre = space.centroid(x, weights)
    least = potential(space, x, centre, weights)
    for n in range(200):
        other = space.exp(centre, 0.3 ** (n % 5) * tangent(space, centre, seed + n))
        assert bool((potential(space, x, other, weights) > least).all())


def test_the_einstein_midpoint_is_the_centroid_of_the_hyperboloid(seed: int) -> None:
    ball = Poincare()
    x = torch.stack(points(ball, seed, 4, 0.8, 7), -2)
    klein = 2 * x / (1 + x.square().sum(-1, keepdim=True))  # Gulcehre et al. 2019, section 3.3
    gamma = 1 / (1 - klein.square().sum(-1, keepdim=True)).sqrt()
    middle = (gamma * klein).sum(-2) / gamma.sum(-2)
    want = middle / (1 + (1 - middle.square().sum(-1, keepdim=True)).sqrt())
    close(ball.centroid(x), want)


@pytest.mark.parametrize("radius", [0.5, 5.0, 8.0])
def test_lorentz_distances_do_not_cancel_in_float32(radius: float, seed: int) -> None:
    """Points `radius` from the origin and 1e-4 to 1 apart: arcosh(-<x, y>) is off by up to 100% here."""
    space, generator = Lorentz(), torch.Generator().manual_seed(seed)
    way = torch.nn.functional.normalize(torch.randn(200, 8, generator=generator, dtype=torch.float64), dim=-1)
    apart = 10 ** -(4 * torch.rand(200, 1, generator=generator, dtype=torch.float64))
    turned = torch.nn.functional.normalize(way + apart * torch.randn(way.shape, generator=generator).double(), dim=-1)
    x, y = space.lift(math.sinh(radius) * way).float(), space.lift(math.sinh(radius + 0.01) * turned).float()
    # The two points as they are in float32, put back onto the sheet in float64.
    want = space.dist(*(space.lift(p[..., 1:].double()) for p in (x, y)))
    got = Lorentz(check=False).dist(x, y).double()
    assert float(((got - want) / want).abs().max()) <= 8e-4


def test_distances_have_a_finite_gradient_where_points_meet() -> None:
    for space in SPACES[:7]:
        x = space.origin(3, torch.float64).clone().requires_grad_()
        space.dist(x, space.origin(3, torch.float64)).backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())


def test_boosting_to_the_origin_keeps_inner_products(seed: int) -> None:
    space = Lorentz()
    x, y, c = points(space, seed, 4, 1.2)
    moved = space.boost(c, x), space.boost(c, y)
    assert float((minkowski(*moved) - minkowski(x, y)).abs().max()) <= 1e-13
    close(space.boost(c, c), space.origin(4, torch.float64).expand_as(c))


def test_distances_and_transport_are_those_of_geoopt(seed: int) -> None:
    geoopt = pytest.importorskip("geoopt")
    sheet, other = Lorentz(), geoopt.Lorentz()
    x, y, _ = points(sheet, seed, 5, 1.0)
    v = tangent(sheet, x, seed)
    close(sheet.dist(x, y), other.dist(x, y))
    close(sheet.transport(x, y, v), other.transp(x, y, v))
    close(sheet.exp(x, v), other.expmap(x, v))
    ball, theirs = Poincare(), geoopt.PoincareBall()
    p, q = ball.from_lorentz(x), ball.from_lorentz(y)
    close(ball.dist(p, q), theirs.dist(p, q))
    close(ball.log(p, q), theirs.logmap(p, q))
    close(ball.transport(p, q, v[..., 1:]), theirs.transp(p, q, v[..., 1:]))
    sphere, round_ = Sphere(), geoopt.Sphere()
    a, b, _ = points(sphere, seed, 5, 1.0)
    close(sphere.dist(a, b), round_.dist(a, b))
    close(sphere.exp(a, tangent(sphere, a, seed)), round_.expmap(a, tangent(sphere, a, seed)))


@pytest.mark.parametrize(
    ("space", "curvature", "words"),
    [(Sphere, -1.0, "above 0"), (Lorentz, 1.0, "below 0"), (Poincare, 0.0, "below 0"), (Euclidean, 2.0, "of 0")],
)
def test_a_curvature_of_the_wrong_sign_is_refused(space: Any, curvature: float, words: str) -> None:
    with pytest.raises(ContractError, match=f"curvature {curvature} was given.*{words}"):
        space(curvature)


@pytest.mark.parametrize(
    ("space", "point"),
    [
        (Sphere(), [1.0, 0.1, 0.0]),
        (Lorentz(), [1.0, 0.5, 0.0]),
        (Lorentz(), [-1.0, 0.0, 0.0]),
        (Poincare(), [1.0, 0.2, 0.0]),
        (Lorentz(), [math.nan, 0.0, 0.0]),
        (Euclidean(), [math.inf, 0.0, 0.0]),
    ],
    ids=str,
)
def test_a_point_off_its_manifold_is_refused_with_the_fix(space: Manifold, point: list[float]) -> None:
    x = torch.tensor(point)
    with pytest.raises(ContractError, match=r"times as far off .* was given: pass it through project\(\)"):
        space.dist(x, space.origin(3 - space.size(0)))
