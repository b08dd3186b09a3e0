"""References of the kernels beside attention in plain torch, computed in the inputs' precision, and their samplers."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def _randn(*shape: int, generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def vector_add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def draw_vector_add(generator: Generator) -> tuple[Tensor, Tensor]:
    return _randn(3, 1001, generator=generator), _randn(3, 1001, generator=generator)


def reduce_sum(x: Tensor) -> Tensor:
    return x.sum()


def draw_reduce_sum(generator: Generator) -> tuple[Tensor]:
    return (_randn(5, 1003, generator=generator) + 0.5,)


def spread(field: Tensor) -> Tensor:
    """The nine-point average (1/6 for edge neighbours, 1/12 for corners) minus the middle, on a periodic grid.

    To second order it is h^2 / 3 times the Laplacian, h being the spacing.
    """
    rows = field.roll(1, -2), field.roll(-1, -2)
    edges = rows[0] + rows[1] + field.roll(1, -1) + field.roll(-1, -1)
    corners = sum(row.roll(1, -1) + row.roll(-1, -1) for row in rows)
    return edges / 6 + corners / 12 - field


def reaction_diffusion_step(
    u: Tensor,
    v: Tensor,
    dt: float = 0.1,
    diffusion_u: float = 0.2,
    diffusion_v: float = 1.0,
    reaction: float = 1.0,
    epsilon: float = 0.5,
    decay: float = 1.0,
    offset: float = 0.0,
    steps: int = 1,
) -> tuple[Tensor, Tensor]:
    """Explicit Euler steps of an activator u and an inhibitor v (FitzHugh 1961, Nagumo 1962; diffusion by Turing
    1952).

    du/dt = diffusion_u * spread(u) + reaction * (u - u^3 - v)
    dv/dt = diffusion_v * spread(v) + reaction * epsilon * (u - decay * v + offset)

    With reaction = 0 the sums of u and v are kept, and for dt * diffusion <= 1 no new extremes appear: each new value
    is then an average of old ones with weights of 0 or more.
    """
    for _ in range(steps):
        new_u = u + dt * (diffusion_u * spread(u) + reaction * (u - u**3 - v))
        new_v = v + dt * (diffusion_v * spread(v) + reaction * epsilon * (u - decay * v + offset))
        u, v = new_u, new_v
    return u, v


def draw_reaction_diffusion_step(generator: Generator) -> tuple[Tensor, Tensor]:
    return _randn(2, 31, 45, generator=generator), _randn(2, 31, 45, generator=generator)


def ricci_flow_step(phi: Tensor, dt: float, steps: int = 1) -> Tensor:
    """Explicit steps of Ricci flow of the metric exp(2 phi) * identity on a periodic grid of unit spacing.

    d phi / dt = exp(-2 phi) * Laplacian(phi), five-point Laplacian (Hamilton 1988, the Ricci flow on surfaces). The
    maximum principle holds for dt <= exp(2 * min(phi)) / 4.
    """
    for _ in range(steps):
        neighbours = phi.roll(1, -2) + phi.roll(-1, -2) + phi.roll(1, -1) + phi.roll(-1, -1)
        phi = phi + dt * torch.exp(-2 * phi) * (neighbours - 4 * phi)
    return phi


def draw_ricci_flow_step(generator: Generator) -> tuple[Tensor, float]:
    phi = 0.3 * _randn(2, 31, 45, generator=generator)
    return phi, 0.2 * float(torch.exp(2 * phi.min()))


def euler_characteristic(field: Tensor, levels: Tensor) -> Tensor:
    """Corners minus edges plus pixels of the closed pixels with a value of at least each level, [..., T], int64."""
    inside = torch.nn.functional.pad(field.unsqueeze(-3) >= levels.view(-1, 1, 1), (1, 1, 1, 1))
    right, below, pixel = inside[..., :-1, 1:], inside[..., 1:, :-1], inside[..., 1:, 1:]
    corners = inside[..., :-1, :-1] | right | below | pixel
    counts = corners.long() - (right | pixel).long() - (below | pixel).long() + pixel.long()
    return counts.sum((-2, -1))


def draw_euler_characteristic(generator: Generator) -> tuple[Tensor, Tensor]:
    field = _randn(2, 31, 45, generator=generator)
    return field, torch.cat([torch.linspace(-2, 2, 4, dtype=torch.float32), field[0, 0, :1]])  # a level that is met
