"""Flows of fields, metrics and attention, in explicit steps on any device that provides the kernels.

Fields are [..., height, width] on a periodic grid of unit spacing. float32 runs on the device that `device` names
(None: the first that provides the kernel), all steps in one call; float64 runs the same steps on the host,
differentiably.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hal_core as hal
from hal_core import ContractError
from hal_core.plugin_api import registry


def _kernel(name: str, field: Tensor, device: str | None) -> Callable[..., Any]:
    """The device's kernel for float32, its reference for float64."""
    if field.dtype == torch.float32:
        return hal.kernel(name, device)
    if field.dtype != torch.float64:
        raise ContractError(f"a field of {field.dtype} was given: use float32 or float64")
    if device is not None:
        raise ContractError(f"a float64 field and device {device!r} were given: use float32 there, or no device")
    from pkgutil import resolve_name

    return resolve_name(registry.kernel_specs()[name].reference)  # type: ignore[no-any-return]


def _step(dt: float, *diffusions: float) -> None:
    if not (dt > 0 and all(0 <= dt * d <= 1 for d in diffusions)):
        raise ContractError(
            f"dt {dt:g} with diffusion {', '.join(f'{d:g}' for d in diffusions)} was given: keep dt above 0 and "
            "dt * diffusion between 0 and 1, the limit of the maximum principle"
        )


def heat(
    field: Tensor, *, dt: float = 1.0, diffusion: float = 1.0, steps: int = 1, device: str | None = None
) -> Tensor:
    """u <- u + dt D L u, `steps` times, of the field's shape.

    L is the nine-point average minus the middle. Its eigenvalue on exp(i (a x + b y)) is lam = (cos a + cos b +
    cos a cos b) / 3 - 1, from 0 to -4/3, so that a mode decays by 1 + dt D lam a step. The mean is kept, and for
    dt D <= 1 the maximum principle holds. Runs as `reaction_diffusion_step` without reaction, one half of the batch in
    each of its fields.

    Raises:
        ContractError: dt * diffusion above 1.
    """
    _step(dt, diffusion)
    run = _kernel("reaction_diffusion_step", field, device)
    flat = field.reshape(-1, *field.shape[-2:])
    half = -(-len(flat) // 2)
    first, second = flat[:half], flat[half:]
    if len(second) < half:
        second = torch.cat([second, torch.zeros_like(first[:1])])
    options = {"diffusion_u": diffusion, "diffusion_v": diffusion, "reaction": 0.0, "steps": steps}
    u, v = run(first.contiguous(), second.contiguous(), dt=dt, **options)
    return torch.cat([u, v])[: len(flat)].view(field.shape)


def react(u: Tensor, v: Tensor, *, dt: float = 0.1, device: str | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Steps of an activator u and an inhibitor v (FitzHugh 1961, Nagumo 1962), of their shape.

        du/dt = diffusion_u L u + reaction (u - u^3 - v)
        dv/dt = diffusion_v L v + reaction epsilon (u - decay v + offset)

    Args:
        options: diffusion_u (0.2), diffusion_v (1.0), reaction (1.0), epsilon (0.5), decay (1.0), offset (0.0),
            steps (1).

    Raises:
        ContractError: dt * diffusion above 1.
    """
    _step(dt, options.get("diffusion_u", 0.2), options.get("diffusion_v", 1.0))
    return _kernel("reaction_diffusion_step", u, device)(u, v, dt=dt, **options)  # type: ignore[no-any-return]


def ricci_limit(phi: Tensor) -> float:
    """The longest step of `ricci` with a maximum principle: exp(2 min phi) / 4."""
    return float(torch.exp(2 * phi.min()) / 4)


def ricci(phi: Tensor, *, dt: float | None = None, steps: int = 1, device: str | None = None) -> Tensor:
    """Ricci flow of g = exp(2 phi) 1 on a torus: d phi / dt = exp(-2 phi) Laplacian(phi) = -K, of phi's shape.

    The five-point Laplacian keeps Gauss-Bonnet, sum K dA = 0, exactly, and the maximum principle up to the limit. Area
    drifts by an error of first order in dt.

    Args:
        dt: None: 0.9 of `ricci_limit(phi)`, which the minimum does not leave.

    Raises:
        ContractError: a longer step.

    Source: Hamilton 1988, The Ricci flow on surfaces.
    """
    limit = ricci_limit(phi)
    dt = 0.9 * limit if dt is None else dt
    if not 0 < dt <= limit:
        raise ContractError(f"dt {dt:g} was given: keep it above 0, up to exp(2 * min(phi)) / 4 = {limit:.6g}")
    return _kernel("ricci_flow_step", phi, device)(phi, dt, steps=steps)  # type: ignore[no-any-return]


def curvature(phi: Tensor) -> Tensor:
    """The Gauss curvature K = -exp(-2 phi) Laplacian(phi) of exp(2 phi) 1, of phi's shape; dA = exp(2 phi)."""
    neighbours = phi.roll(1, -2) + phi.roll(-1, -2) + phi.roll(1, -1) + phi.roll(-1, -1)
    return -torch.exp(-2 * phi) * (neighbours - 4 * phi)


def space_form(curvature: float, n: int, time: float) -> float:
    """The factor 1 - 2 (n - 1) K t by which Ricci flow scales the metric of a space of constant curvature K.

    Raises:
        ContractError: a time after which a sphere has shrunk to a point.
    """
    factor = 1 - 2 * (n - 1) * curvature * time
    if factor <= 0:
        raise ContractError(f"time {time:g} was given: this sphere vanishes at {1 / (2 * (n - 1) * curvature):g}")
    return factor


def attention(
    query: Tensor,
    key: Tensor,
    x: Tensor,
    *,
    dt: float = 1.0,
    steps: int = 1,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """x <- (1 - dt) x + dt P x with the weights P of query and key: heat on the attention graph, [B, H, L, dim_v].

    P x is `hal.attention(query, key, x)`: memory of order L. sum_i pi_i x_i is kept for the stationary pi of P, the
    maximum principle holds for dt <= 1, and differences of rows fall per step by |1 - dt + dt lam_2| in the end, with
    the second eigenvalue of P: the rate of over-smoothing.

    Args:
        query, key: [B, H, L, d]. x: [B, H, L, dim_v]. options: of `hal.attention`.

    Raises:
        ContractError: dt above 1.
    """
    if not 0 < dt <= 1 or steps < 1:
        raise ContractError(f"dt {dt:g} and {steps} steps were given: keep dt above 0, up to 1, and steps 1 or more")
    for _ in range(steps):
        x = torch.lerp(x, hal.attention(query, key, x, scale=scale, **options), dt)
    return x


def leapfrog(
    q: Tensor, p: Tensor, force: Callable[[Tensor], Tensor], *, dt: float, steps: int = 1
) -> tuple[Tensor, Tensor]:
    """Stoermer-Verlet steps of q'' = force(q) with unit mass: (q, p) of the given shapes.

    p += dt/2 force(q), q += dt p, p += dt/2 force(q): symplectic, reversible, an energy error of order dt^2.
    """
    if not dt or steps < 1:
        raise ContractError(f"dt {dt:g} and {steps} steps were given: use a step other than 0, and 1 step or more")
    pull = force(q)
    for _ in range(steps):
        p = p + dt / 2 * pull
        q = q + dt * p
        pull = force(q)
        p = p + dt / 2 * pull
    return q, p
