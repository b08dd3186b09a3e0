"""Kernels beside attention: vectors, matrices, and fields on periodic grids. Inputs and results are float32 on the
host.

This module checks the arguments and allocates the results; the device's `Runner` runs the program of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hal_core.plugin_api import ContractError

#: Steps of a flow that are recorded and submitted together; longer calls are several submissions.
MOST_REPEATS = 256
#: Elements of a field up to which one work group takes all steps of it, by the program NAMEs (plural) of a kernel NAME:
#: starting a program for each step takes longer than the step.
GROUP_FIELD = 64 * 64


class Runner(Protocol):
    """Runs one of a device's programs on host tensors."""

    def __call__(
        self,
        name: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        integers: Sequence[int],
        floats: Sequence[float] = (),
        *,
        extent: tuple[int, int, int],
        what: str,
        repeats: int = 1,
    ) -> None:
        """Fill `outputs`; `inputs` stay as they are.

        Args:
            integers, floats: the program's further arguments, in this order.
            extent: elements of the result along x, y and z. what: the work for messages, "add vectors".
            repeats: how often the program runs, on its own outputs from the second time on: they are of the inputs'
                shapes. Nothing crosses to the host in between.
        """

    def reduction_parts(self, count: int) -> int:
        """Number of partial sums that reduce_sum leaves of `count` elements."""


def vector_add(run: Runner, a: Tensor, b: Tensor) -> Tensor:
    """a + b of one shape."""
    _check("vector_add", a, b)
    if a.shape != b.shape:
        raise ContractError(f"vector_add was given {list(a.shape)} and {list(b.shape)}: make the shapes equal")
    out = torch.empty(a.shape, dtype=torch.float32)
    if a.numel():
        *given, result = map(torch.atleast_1d, (a, b, out))  # runners pad and cut the last dimension
        run("vector_add", given, [result], [a.numel()], extent=(a.numel(), 1, 1), what="add vectors")
    return out


def reduce_sum(run: Runner, x: Tensor) -> Tensor:
    """The sum of all elements, a tensor without dimensions."""
    _check("reduce_sum", x)
    if not x.numel():
        return torch.zeros((), dtype=torch.float32)
    parts = torch.empty(run.reduction_parts(x.numel()), dtype=torch.float32)
    run("reduce_sum", [torch.atleast_1d(x)], [parts], [x.numel()], extent=(len(parts), 1, 1), what="add up a tensor")
    return parts.double().sum().float()


def matmul(run: Runner, a: Tensor, b: Tensor) -> Tensor:
    """a [batch..., M, K] @ b [batch..., K, N]; either may come without the batch dimensions."""
    _check("matmul", a, b)
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
        raise ContractError(f"matmul was given {list(a.shape)} and {list(b.shape)}: use [.., M, K] and [.., K, N]")
    lead = a.shape[:-2] or b.shape[:-2]
    if any(t.shape[:-2] not in ((), lead) for t in (a, b)):
        raise ContractError(f"matmul was given {list(a.shape)} and {list(b.shape)}: make the batch dimensions equal")
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    out = torch.empty((*lead, m, n), dtype=torch.float32)
    if not out.numel() or not k:
        return out.zero_()
    strides = [t.shape[-2] * t.shape[-1] if t.dim() > 2 else 0 for t in (a, b)]
    extent = (n, m, out.numel() // (m * n))
    run("matmul", [a, b], [out], [m, n, k, *strides], extent=extent, what="multiply matrices")
    return out


def reaction_diffusion_step(
    run: Runner,
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
    """Explicit Euler steps of an activator u and an inhibitor v on a periodic grid (FitzHugh 1961, Nagumo 1962).

        du/dt = diffusion_u * L(u) + reaction * (u - u^3 - v)
        dv/dt = diffusion_v * L(v) + reaction * epsilon * (u - decay * v + offset)

    L is the nine-point average (1/6 for edge neighbours, 1/12 for corners) minus the middle: h^2 / 3 of the Laplacian.

    Args:
        u, v: [..., height, width], float32. steps: how many, on the device: the fields come back once.

    Raises:
        ContractError: dt * max(diffusion_u, diffusion_v) > 1, for which the maximum principle does not hold.
    """
    _check("reaction_diffusion_step", u, v)
    if u.shape != v.shape or u.dim() < 2 or not u.numel():
        raise ContractError(
            f"fields {list(u.shape)} and {list(v.shape)} were given: use one shape [..., height, width]"
        )
    if dt * max(diffusion_u, diffusion_v) > 1 or min(dt, diffusion_u, diffusion_v) < 0:
        given = f"dt {dt:g} with diffusion {diffusion_u:g} and {diffusion_v:g}"
        raise ContractError(f"{given} was given: keep dt * diffusion between 0 and 1")
    height, width = u.shape[-2:]
    numbers = (dt, diffusion_u, diffusion_v, reaction, epsilon, decay, offset)
    extent, what = (width, height, u.numel() // (height * width)), "step a reaction-diffusion system"
    for repeats in _portions(steps):
        out = torch.empty(u.shape, dtype=torch.float32), torch.empty(u.shape, dtype=torch.float32)
        run("reaction_diffusion_step", [u, v], out, [height, width], numbers, extent=extent, what=what, repeats=repeats)
        u, v = out
    return u, v


def ricci_flow_step(run: Runner, phi: Tensor, dt: float, steps: int = 1) -> Tensor:
    """Explicit steps of Ricci flow of the metric exp(2 phi) * identity on a periodic grid of unit spacing.

        d phi / dt = exp(-2 phi) * Laplacian(phi)        (five-point Laplacian)

    Args:
        phi: [..., height, width], float32. dt: at most exp(2 * min(phi)) / 4, which keeps the maximum principle; the
            minimum does not fall, so the limit of the first step holds for all. steps: how many, on the device.

    Raises:
        ContractError: a larger dt.

    Source: Hamilton 1988, the Ricci flow on surfaces.
    """
    _check("ricci_flow_step", phi)
    if phi.dim() < 2 or not phi.numel():
        raise ContractError(f"phi {list(phi.shape)} was given: use [..., height, width]")
    limit = float(torch.exp(2 * phi.min()) / 4)
    if not 0 <= dt <= limit:
        raise ContractError(
            f"dt {dt:g} was given: keep it between 0 and exp(2 * min(phi)) / 4 = {limit:.6g} for this field"
        )
    height, width = phi.shape[-2:]
    extent = (width, height, phi.numel() // (height * width))
    for repeats in _portions(steps):
        out = torch.empty(phi.shape, dtype=torch.float32)
        what = "step a Ricci flow"
        run("ricci_flow_step", [phi], [out], [height, width], [dt], extent=extent, what=what, repeats=repeats)
        phi = out
    return phi


def _portions(steps: int) -> Iterator[int]:
    if type(steps) is not int or steps < 1:
        raise ContractError(f"steps {steps!r} was given: use a whole number of 1 or more")
    yield from [MOST_REPEATS] * (steps // MOST_REPEATS)
    if steps % MOST_REPEATS:
        yield steps % MOST_REPEATS


def euler_characteristic(run: Runner, field: Tensor, levels: Tensor) -> Tensor:
    """chi = V - E + F of the closed pixels whose value is at least a level: components minus holes.

    Pixels are squares with their edges and corners; corners that touch connect. The device counts, at each grid point,
    the corner, the two edges and the pixel to its right and below that belong to the set (a 2 x 2 stencil), row by row.

    Args:
        field: [..., height, width], float32. NaN belongs to no set. levels: [T], float32.

    Returns:
        [..., T], int64, exact.

    Source: Baryshnikov & Ghrist 2009 (Euler characteristic as a measure).
    """
    _check("euler_characteristic", field, levels)
    if field.dim() < 2 or not field.numel() or levels.dim() != 1 or not len(levels):
        raise ContractError(
            f"field {list(field.shape)} and levels {list(levels.shape)} were given: use [..., height, width] and [T]"
        )
    height, width = field.shape[-2:]
    fields, count = field.numel() // (height * width), len(levels)
    parts = torch.empty((fields, count, height + 1), dtype=torch.int32)
    extent, what = (height + 1, count, fields), "count an Euler characteristic"
    run("euler_characteristic", [field, levels], [parts], [height, width, count], extent=extent, what=what)
    return parts.sum(-1, dtype=torch.int64).view(*field.shape[:-2], count)


def _check(name: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ContractError(f"{name} was given {tensor.dtype} on {tensor.device}: pass float32 tensors on the CPU")
        if tensor.numel() >= 1 << 31:
            raise ContractError(f"{name} was given {tensor.numel():,} elements: use fewer than {1 << 31:,}")


KERNELS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (vector_add, reduce_sum, matmul, reaction_diffusion_step, ricci_flow_step, euler_characteristic)
}
