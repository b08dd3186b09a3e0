"""Patterns of reaction and diffusion: where they form, how fast, how wide; and the shape of fields.

Modes are named by the eigenvalue lam of the kernel's nine-point operator L, from 0 to -4/3 (see `flow.heat`). A
Jacobian is J = [[f_u, f_v], [g_u, g_v]] at a fixed point.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import hal_core as hal
from hal_core import ContractError
from hal_core.plugin_api import registry

#: Fastest modes beyond it are of a few cells: patterns of the grid and not of the equation.
MOST_MODE = 0.4


class FixedPoints(NamedTuple):
    """u, v: float64 [points], ascending in u. jacobian: [points, 2, 2]. stable: bool [points], without diffusion."""

    u: Tensor
    v: Tensor
    jacobian: Tensor
    stable: Tensor


class Turing(NamedTuple):
    """The stability of a fixed point under diffusion.

    Attributes:
        unstable: whether it is stable without diffusion and unstable with it. mode: lam of the fastest mode, 0 or less.
        rate: growth of that mode in continuous time, per unit time. critical_ratio: the Dv / Du from which on patterns
            form; inf where none do.
    """

    unstable: bool
    mode: float
    rate: float
    critical_ratio: float


def jacobian(u: Tensor | float, *, reaction: float = 1.0, epsilon: float = 0.5, decay: float = 1.0) -> Tensor:
    """J of `flow.react` at activator u: reaction [[1 - 3 u^2, -1], [epsilon, -epsilon decay]], [..., 2, 2] float64."""
    u = torch.as_tensor(u, dtype=torch.float64)
    one = torch.ones_like(u)
    rows = [torch.stack([1 - 3 * u**2, -one], -1), torch.stack([epsilon * one, -epsilon * decay * one], -1)]
    return reaction * torch.stack(rows, -2)


def fixed_points(
    *, reaction: float = 1.0, epsilon: float = 0.5, decay: float = 1.0, offset: float = 0.0
) -> FixedPoints:
    """Where `flow.react` rests: the real roots of decay u^3 + (1 - decay) u + offset = 0, v = u - u^3.

    Without offset 0, and from decay = 1 on +-sqrt(1 - 1/decay): a pitchfork. Stable where both eigenvalues of J have
    negative real parts.
    """
    if decay == 0:
        roots = torch.tensor([-offset], dtype=torch.float64)
    else:
        companion = torch.tensor([[0, 0, -offset / decay], [1, 0, (decay - 1) / decay], [0, 1, 0]], dtype=torch.float64)
        found = torch.linalg.eigvals(companion)
        found = found[found.imag.abs() <= 1e-6 * (1 + found.abs())].real
        for _ in range(4):  # Newton, where the root is simple
            slope = 3 * decay * found**2 + 1 - decay
            value = decay * found**3 + (1 - decay) * found + offset
            found = torch.where(slope.abs() > 1e-9, found - value / slope, found)
        roots = found.sort().values
    at = jacobian(roots, reaction=reaction, epsilon=epsilon, decay=decay)
    stable = (torch.linalg.eigvals(at).real < 0).all(-1)
    return FixedPoints(roots, roots - roots**3, at, stable)


def dispersion(j: Tensor, du: float, dv: float, mode: Tensor, dt: float | None = None) -> Tensor:
    """Growth per unit time of modes lam [...], [...]: the largest real part of an eigenvalue of J + lam diag(Du, Dv).

    With `dt`, of Euler steps: log max |1 + dt eigenvalue| / dt, what the kernel shows.
    """
    mode = torch.as_tensor(mode, dtype=torch.float64)
    matrix = j.double() + mode[..., None, None] * torch.diag(torch.tensor([du, dv], dtype=torch.float64))
    values: Tensor = torch.linalg.eigvals(matrix)
    if dt is None:
        return values.real.amax(-1)
    return (1 + dt * values).abs().amax(-1).log() / dt


def critical_ratio(j: Tensor) -> float:
    """The Dv / Du above which a stable fixed point is unstable to patterns; inf where none is.

    The larger root of Dv f_u + Du g_v = 2 sqrt(Du Dv det J) (Turing 1952; Murray, Mathematical Biology II, 2.3).
    """
    (fu, _), (_, gv) = j.tolist()
    det = float(torch.linalg.det(j.double()))
    if not (fu + gv < 0 < det) or fu <= 0:
        return math.inf
    half = (2 * det - fu * gv) / fu**2
    return float(half + math.sqrt(max(half**2 - (gv / fu) ** 2, 0.0)))


def turing(j: Tensor, du: float, dv: float) -> Turing:
    """Whether diffusion makes the fixed point with Jacobian J unstable: tr J < 0 < det J, and
    Dv f_u + Du g_v > 2 sqrt(Du Dv det J).

    The fastest mode is found among those of the grid, lam from 0 to -4/3. Where it is beyond -0.4 the pattern is the
    grid's own: scale both diffusions up.

    Raises:
        ContractError: a diffusion of 0 or less.
    """
    if min(du, dv) <= 0:
        raise ContractError(f"diffusions {du:g} and {dv:g} were given: use two above 0")
    ratio = critical_ratio(j)
    modes = -torch.linspace(0, 4 / 3, 4001, dtype=torch.float64)
    rates = dispersion(j, du, dv, modes)
    best = int(rates.argmax())
    grows = dv / du > ratio and float(rates[best]) > 0
    return Turing(grows, float(modes[best]), float(rates[best]), ratio)


def mode_of(a: Tensor | float, b: Tensor | float = 0.0) -> Tensor:
    """lam = (cos a + cos b + cos a cos b) / 3 - 1 of the wave exp(i (a x + b y))."""
    a, b = (torch.as_tensor(w, dtype=torch.float64) for w in (a, b))
    return (a.cos() + b.cos() + a.cos() * b.cos()) / 3 - 1


def structure_factor(field: Tensor, *, device: str | None = None) -> Tensor:
    """|F|^2 / (H W) with the discrete Fourier transform F of real fields [..., H, W], of their shape.

    Two products with [cos, sin] matrices, so it runs where `hal.kernel("matmul", device)` does; float64 on the host.
    """
    height, width = field.shape[-2:]
    rows, columns = _waves(height, field.dtype), _waves(width, field.dtype)
    multiply = torch.matmul if field.dtype == torch.float64 else hal.kernel("matmul", device)
    flat = field.reshape(-1, height, width)
    half = multiply(rows.expand(len(flat), -1, -1).contiguous(), flat.contiguous())  # [2 H, W]: cos and sin parts
    whole = multiply(half, columns.mT.expand(len(flat), -1, -1).contiguous())
    (cc, cs), (sc, ss) = (part.split(width, -1) for part in whole.split(height, -2))
    power = (cc - ss).square() + (cs + sc).square()
    found: Tensor = power / (height * width)
    return found.view(field.shape)


def _waves(n: int, dtype: torch.dtype) -> Tensor:
    """[cos; sin] of 2 pi j k / n, [2 n, n]."""
    k = torch.arange(n)
    angle = 2 * math.pi / n * (k.unsqueeze(1) * k % n).double()
    return torch.cat([angle.cos(), angle.sin()]).to(dtype)


def wavelength(field: Tensor, *, device: str | None = None) -> Tensor:
    """The mean wavelength in cells of fields [..., H, W], [...]: 2 pi over the power-weighted mean wave number."""
    centred = field - field.mean((-2, -1), keepdim=True)
    power: Tensor = structure_factor(centred, device=device).double()
    a, b = (2 * math.pi * torch.fft.fftfreq(n, dtype=torch.float64) for n in field.shape[-2:])
    number = (a.square().unsqueeze(1) + b.square()).sqrt()
    found: Tensor = 2 * math.pi * power.sum((-2, -1)) / (power * number).sum((-2, -1))
    return found


def euler(field: Tensor, levels: Tensor, *, tile: int | None = None, device: str | None = None) -> Tensor:
    """Euler characteristic V - E + F of the closed pixels with a value of at least each level: components minus holes.

    Args:
        field: [..., H, W], float32; on the host with `tile`, also float64. levels: [T].
        tile: the contributions of half-open square tiles of this side, which add up to the whole, exactly: the Euler
            measure (Baryshnikov & Ghrist 2009). The last tiles hold the field's lower and right border.

    Returns:
        int64 [..., T]; with `tile`, [..., tiles down, tiles across, T].
    """
    if tile is None and field.dtype == torch.float32:
        return hal.kernel("euler_characteristic", device)(field, levels.to(field.dtype))  # type: ignore[no-any-return]
    if tile is None:
        from pkgutil import resolve_name

        reference = resolve_name(registry.kernel_specs()["euler_characteristic"].reference)
        return reference(field, levels.to(field.dtype))  # type: ignore[no-any-return]
    if tile < 1:
        raise ContractError(f"tile {tile} was given: use 1 or more")
    inside = torch.nn.functional.pad(field.unsqueeze(-3) >= levels.to(field.dtype).view(-1, 1, 1), (1, 1, 1, 1))
    right, below, pixel = inside[..., :-1, 1:], inside[..., 1:, :-1], inside[..., 1:, 1:]
    corner = inside[..., :-1, :-1] | right | below | pixel
    counts = corner.long() - (right | pixel).long() - (below | pixel).long() + pixel.long()
    for axis, size in ((-2, field.shape[-2]), (-1, field.shape[-1])):
        place = (torch.arange(size + 1) // tile).clamp(max=(size - 1) // tile)
        shape = [*counts.shape]
        shape[axis] = int(place[-1]) + 1
        counts = torch.zeros(shape, dtype=torch.int64).index_add_(counts.dim() + axis, place, counts)
    return counts.movedim(-3, -1)
