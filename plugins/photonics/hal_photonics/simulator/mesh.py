"""Mach-Zehnder meshes: a unitary matrix as a rectangle of two-mode rotations, and what errors of their phases do.

Clements et al. 2016, Optica 3, 1460: N (N-1) / 2 interferometers, each T(theta, phi) on neighbouring modes m, m + 1,

    T = [[e^(i phi) cos theta, -sin theta], [e^(i phi) sin theta, cos theta]],    U = D * product of T

A real weight matrix is W = s U diag(d) V^T with d <= 1, two meshes and a row of attenuators.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Mesh(NamedTuple):
    """A decomposed unitary.

    Attributes:
        modes: [M, 2] mode pairs, in the order light meets them. theta, phi: [M] phases in rad.
        output: [N] phases after the last interferometer, rad.
    """

    modes: Tensor
    theta: Tensor
    phi: Tensor
    output: Tensor

    def matrix(self, error: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """The matrix [N, N] it performs, complex128, with Gaussian errors of rms `error` rad on theta and phi."""
        theta, phi = self.theta, self.phi
        if error:
            theta = theta + error * torch.randn(theta.shape, generator=generator, dtype=torch.float64)
            phi = phi + error * torch.randn(phi.shape, generator=generator, dtype=torch.float64)
        total = torch.eye(len(self.output), dtype=torch.complex128)
        rotations = _rotations(theta, phi)
        for (m, n), rotation in zip(self.modes.tolist(), rotations, strict=True):
            total[[m, n]] = rotation @ total[[m, n]]
        return torch.exp(1j * self.output).unsqueeze(1) * total


def _rotations(theta: Tensor, phi: Tensor) -> Tensor:
    """[M, 2, 2] complex128."""
    turn, cos, sin = torch.exp(1j * phi), torch.cos(theta), torch.sin(theta)
    return torch.stack([turn * cos, -sin + 0j, turn * sin, cos + 0j], -1).view(-1, 2, 2)


def decompose(unitary: Tensor) -> Mesh:
    """The Clements decomposition of a unitary [N, N].

    Elements below the diagonal are nulled diagonal by diagonal, alternately from the right (by inverse rotations) and
    from the left; the left ones are then moved through the remaining diagonal, D' T' = T^-1 D.
    """
    u = unitary.to(torch.complex128).clone()
    size = len(u)
    right: list[tuple[int, float, float]] = []
    left: list[tuple[int, float, float]] = []
    for k in range(size - 1):
        for j in range(k + 1):
            if k % 2 == 0:  # null u[size-1-j, k-j] with columns m, m+1
                row, m = size - 1 - j, k - j
                a, b = complex(u[row, m]), complex(u[row, m + 1])
                theta, phi = math.atan2(abs(a), abs(b)), _angle(a) - _angle(b)
                rotation = _one(theta, phi)
                u[:, m : m + 2] = u[:, m : m + 2] @ rotation.conj().T
                right.append((m, theta, phi))
            else:  # null u[size-1-k+j, j] with rows m, m+1
                row = size - 1 - k + j
                m = row - 1
                a, b = complex(u[m, j]), complex(u[row, j])
                theta, phi = math.atan2(abs(b), abs(a)), _angle(b) - _angle(a) + math.pi
                u[m : m + 2] = _one(theta, phi) @ u[m : m + 2]
                left.append((m, theta, phi))
    phases = [_angle(complex(entry)) for entry in torch.diagonal(u)]
    moved: list[tuple[int, float, float]] = []
    for m, theta, phi in reversed(left):  # T^-1(theta, phi) D = D' T(theta, phi')
        first, second = phases[m], phases[m + 1]
        phases[m], phases[m + 1] = second - phi + math.pi, second
        moved.append((m, theta, first - second + math.pi))
    order = right + moved
    modes = torch.tensor([[m, m + 1] for m, _, _ in order], dtype=torch.int64).view(-1, 2)
    thetas, phis = (torch.tensor([entry[i] for entry in order], dtype=torch.float64) for i in (1, 2))
    return Mesh(modes, thetas, phis, torch.tensor(phases, dtype=torch.float64))


def _one(theta: float, phi: float) -> Tensor:
    return _rotations(torch.tensor([theta], dtype=torch.float64), torch.tensor([phi], dtype=torch.float64))[0]


def _angle(value: complex) -> float:
    return math.atan2(value.imag, value.real) if value else 0.0


def realised(weights: Tensor, error: float, generator: torch.Generator | None = None) -> Tensor:
    """What two meshes and attenuators make of real weights [N, K] when every phase is off by rms `error` rad.

    Returns the real part [N, K], float64. Scale s is the largest singular value, so attenuators only attenuate.
    """
    left, values, right = torch.linalg.svd(weights.double(), full_matrices=True)
    outer = decompose(left).matrix(error, generator)
    inner = decompose(right).matrix(error, generator)
    middle = torch.zeros(weights.shape, dtype=torch.complex128)
    middle.diagonal().copy_(values)
    return (outer @ middle @ inner).real


def relative_error(size: int, error: float) -> float:
    """||U' - U|| / ||U|| of an N x N mesh with rms `error` rad on both phases: 1.2 sqrt(N) error, for N = 32 to 64.

    Fitted to `decompose` on Haar-random unitaries; a test holds it within 15%.
    """
    return 1.2 * math.sqrt(size) * error
