"""Kernels beside attention: vectors, matrices, and fields on periodic grids. float32 on the host in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hal_core import ContractError

from .recorder import Recorder

_THREADS = 64
_CONSTANTS = (0, _THREADS)  # constant 0 belongs to the attention shaders


def vector_add(recorder: Recorder, a: Tensor, b: Tensor) -> Tensor:
    """a + b of one shape."""
    _check("vector_add", a, b)
    if a.shape != b.shape:
        raise ContractError(f"vector_add was given {list(a.shape)} and {list(b.shape)}: make the shapes equal")
    out = torch.empty(a.shape)
    if a.numel():
        with recorder.call("add vectors") as commands:
            operands = [commands.stage(a), commands.stage(b), commands.result(out)]
            groups = min(-(-a.numel() // _THREADS), 4096)
            commands.dispatch("vector_add", _CONSTANTS, operands, [a.numel()], "i", (groups, 1, 1))
            commands.finish()
    return out


def reduce_sum(recorder: Recorder, x: Tensor) -> Tensor:
    """The sum of all elements, a tensor without dimensions."""
    _check("reduce_sum", x)
    if not x.numel():
        return torch.zeros(())
    groups = min(-(-x.numel() // (_THREADS * 16)), 256)
    parts = torch.empty(groups * _THREADS)
    with recorder.call("add up a tensor") as commands:
        operands = [commands.stage(x.reshape(-1)), commands.result(parts)]
        commands.dispatch("reduce_sum", _CONSTANTS, operands, [x.numel()], "i", (groups, 1, 1))
        commands.finish()
    return parts.double().sum().float()


def matmul(recorder: Recorder, a: Tensor, b: Tensor) -> Tensor:
    """a [batch..., M, K] @ b [batch..., K, N]; either may come without the batch dimensions."""
    _check("matmul", a, b)
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
        raise ContractError(f"matmul was given {list(a.shape)} and {list(b.shape)}: use [.., M, K] and [.., K, N]")
    lead = a.shape[:-2] or b.shape[:-2]
    if any(t.shape[:-2] not in ((), lead) for t in (a, b)):
        raise ContractError(f"matmul was given {list(a.shape)} and {list(b.shape)}: make the batch dimensions equal")
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    out = torch.empty(*lead, m, n)
    if not out.numel() or not k:
        return out.zero_()
    with recorder.call("multiply matrices") as commands:
        strides = [t.shape[-2] * t.shape[-1] if t.dim() > 2 else 0 for t in (a, b)]
        operands = [commands.stage(a), commands.stage(b), commands.result(out)]
        groups = (-(-n // (4 * _THREADS)), -(-m // 4), out.numel() // (m * n))
        commands.dispatch("matmul", _CONSTANTS, operands, [m, n, k, *strides], "5i", groups)
        commands.finish()
    return out


def reaction_diffusion_step(
    recorder: Recorder, u: Tensor, v: Tensor, dt: float = 0.1, diffusion_u: float = 0.2, diffusion_v: float = 1.0,
    reaction: float = 1.0, epsilon: float = 0.5, decay: float = 1.0, offset: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One explicit Euler step of an activator u and an inhibitor v on a periodic grid (FitzHugh 1961, Nagumo 1962).

        du/dt = diffusion_u * L(u) + reaction * (u - u^3 - v)
        dv/dt = diffusion_v * L(v) + reaction * epsilon * (u - decay * v + offset)

    L is the nine-point average (1/6 for edge neighbours, 1/12 for corners) minus the middle: h^2 / 3 of the Laplacian.

    Args:
        u, v: [..., height, width], float32.

    Raises:
        ContractError: dt * max(diffusion_u, diffusion_v) > 1, where the maximum principle would be lost.
    """
    _check("reaction_diffusion_step", u, v)
    if u.shape != v.shape or u.dim() < 2 or not u.numel():
        raise ContractError(f"fields {list(u.shape)} and {list(v.shape)} were given: use one shape [..., height, width]")
    if dt * max(diffusion_u, diffusion_v) > 1 or min(dt, diffusion_u, diffusion_v) < 0:
        given = f"dt {dt:g} with diffusion {diffusion_u:g} and {diffusion_v:g}"
        raise ContractError(f"{given} was given: keep dt * diffusion between 0 and 1")
    height, width = u.shape[-2:]
    out = torch.empty(u.shape), torch.empty(u.shape)
    numbers = [height, width, dt, diffusion_u, diffusion_v, reaction, epsilon, decay, offset]
    with recorder.call("step a reaction-diffusion system") as commands:
        operands = [commands.stage(u), commands.stage(v), *map(commands.result, out)]
        groups = (-(-width // _THREADS), height, u.numel() // (height * width))
        commands.dispatch("reaction_diffusion_step", _CONSTANTS, operands, numbers, "2i7f", groups)
        commands.finish()
    return out


def ricci_flow_step(recorder: Recorder, phi: Tensor, dt: float) -> Tensor:
    """One explicit step of Ricci flow of the metric exp(2 phi) * identity on a periodic grid of unit spacing.

        d phi / dt = exp(-2 phi) * Laplacian(phi)        (five-point Laplacian)

    Args:
        phi: [..., height, width], float32. dt: at most exp(2 * min(phi)) / 4, which keeps the maximum principle.

    Raises:
        ContractError: a larger dt.

    Source: Hamilton 1988, the Ricci flow on surfaces.
    """
    _check("ricci_flow_step", phi)
    if phi.dim() < 2 or not phi.numel():
        raise ContractError(f"phi {list(phi.shape)} was given: use [..., height, width]")
    limit = float(torch.exp(2 * phi.min()) / 4)
    if not 0 <= dt <= limit:
        raise ContractError(f"dt {dt:g} was given: keep it between 0 and exp(2 * min(phi)) / 4 = {limit:.6g} for this field")
    height, width = phi.shape[-2:]
    out = torch.empty(phi.shape)
    with recorder.call("step a Ricci flow") as commands:
        operands = [commands.stage(phi), commands.result(out)]
        groups = (-(-width // _THREADS), height, phi.numel() // (height * width))
        commands.dispatch("ricci_flow_step", _CONSTANTS, operands, [height, width, dt], "2if", groups)
        commands.finish()
    return out


def _check(name: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ContractError(f"{name} was given {tensor.dtype} on {tensor.device}: pass float32 tensors on the CPU")
        if tensor.numel() >= 1 << 31:
            raise ContractError(f"{name} was given {tensor.numel():,} elements: use fewer than {1 << 31:,}")


KERNELS: dict[str, Callable[..., Any]] = {
    "vector_add": vector_add, "reduce_sum": reduce_sum, "matmul": matmul,
    "reaction_diffusion_step": reaction_diffusion_step, "ricci_flow_step": ricci_flow_step,
}  # fmt: skip
