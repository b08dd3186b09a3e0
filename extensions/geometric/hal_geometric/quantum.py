"""Finite-dimensional quantum states: distances, entropies, geometric tensor and phase.

States psi are [..., d], density matrices rho [..., d, d] (Hermitian, of 0 or more, trace 1), both real or complex.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import jacfwd

from hal_core import ContractError


def evolve(hamiltonian: Tensor, psi: Tensor, time: float = 1.0) -> Tensor:
    """exp(-i H t) psi of a Hermitian H [..., d, d], [..., d] complex: norm and energy <psi, H psi> stay."""
    _hermitian(hamiltonian)
    complex_type = torch.promote_types(hamiltonian.dtype, torch.complex64)
    unitary = torch.linalg.matrix_exp(-1j * time * hamiltonian.to(complex_type))
    found: Tensor = unitary @ psi.to(complex_type).unsqueeze(-1)
    return found.squeeze(-1)


def _hermitian(matrix: Tensor) -> None:
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ContractError(f"a matrix {list(matrix.shape)} was given: use [..., d, d]")
    eps = torch.finfo(matrix.dtype).eps
    if not bool((matrix - matrix.mH).abs().max() <= 64 * eps * (matrix.abs().max() + eps)):
        raise ContractError("a matrix that is not Hermitian was given: use (a + a.mH) / 2")


def _root(rho: Tensor) -> Tensor:
    """The square root of a matrix of 0 or more."""
    values, vectors = torch.linalg.eigh(rho)
    root: Tensor = vectors * values.clamp_min(0).sqrt().unsqueeze(-2) @ vectors.mH
    return root


def fidelity(rho: Tensor, sigma: Tensor) -> Tensor:
    """F = (tr sqrt(sqrt(rho) sigma sqrt(rho)))^2, [...], between 0 and 1 (Uhlmann 1976).

    Computed as the squared nuclear norm of sqrt(rho) sqrt(sigma): singular values do not lose digits near 0, as
    eigenvalues of the product do. For pure states |<psi, phi>|^2.
    """
    _hermitian(rho)
    _hermitian(sigma)
    values: Tensor = torch.linalg.svdvals(_root(rho) @ _root(sigma))
    return values.sum(-1).square()


def bures(rho: Tensor, sigma: Tensor) -> Tensor:
    """sqrt(2 - 2 sqrt F), [...], a distance; of diagonal matrices the Hellinger distance of the diagonals."""
    return (2 - 2 * fidelity(rho, sigma).sqrt()).clamp_min(0).sqrt()


def fubini_study(psi: Tensor, phi: Tensor) -> Tensor:
    """arccos |<psi, phi>| of unit vectors, [...], at most pi / 2; as an arctangent, so that near states keep digits."""
    psi, phi = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (psi, phi))
    overlap = (psi.conj() * phi).sum(-1, keepdim=True)
    rest: Tensor = torch.linalg.vector_norm(phi - overlap * psi, dim=-1)
    return torch.atan2(rest, overlap.abs()[..., 0])


def von_neumann(rho: Tensor) -> Tensor:
    """S = -tr rho log rho in nats, [...]; 0 <= S <= log d."""
    _hermitian(rho)
    values: Tensor = torch.linalg.eigvalsh(rho)
    parts: Tensor = torch.special.entr(values.clamp_min(0))
    return parts.sum(-1)


def partial_trace(rho: Tensor, sizes: Sequence[int], keep: Sequence[int]) -> Tensor:
    """The reduced density matrix of the factors `keep` of a product of spaces of `sizes`, [..., d', d']."""
    total = 1
    for size in sizes:
        total *= size
    if rho.shape[-2:] != (total, total) or not set(keep) <= set(range(len(sizes))):
        raise ContractError(
            f"rho {list(rho.shape)}, sizes {list(sizes)} and keep {list(keep)} were given: use [..., d, d] with d the "
            "product of the sizes, and numbers of factors"
        )
    lead, count = rho.shape[:-2], len(sizes)
    cut = rho.reshape(*lead, *sizes, *sizes)
    left = count
    for n in reversed(range(count)):
        if n not in keep:
            cut = cut.diagonal(dim1=len(lead) + n, dim2=len(lead) + left + n).sum(-1)
            left -= 1
    kept = 1
    for n in sorted(set(keep)):
        kept *= sizes[n]
    return cut.reshape(*lead, kept, kept)


def geometric_tensor(state: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Q_ij = <d_i psi, (1 - |psi><psi|) d_j psi> of a family of unit vectors state: [n] -> [d], [n, n] complex.

    Its real part is the Fubini-Study metric; -2 times its imaginary part the Berry curvature (Provost & Vallee 1980).
    """
    psi = state(x)
    slopes = jacfwd(lambda y: torch.view_as_real(state(y)))(x)
    slope = torch.complex(slopes[:, 0], slopes[:, 1])  # [d, n]
    along = psi.conj() @ slope
    found: Tensor = slope.mH @ slope - along.conj().unsqueeze(1) * along.unsqueeze(0)
    return found


def berry_phase(states: Tensor) -> Tensor:
    """-Im log prod <psi_k, psi_k+1> around a closed loop of states [points, d], [], in (-pi, pi].

    It does not depend on the phases of the states (Pancharatnam 1956, Berry 1984).
    """
    overlaps = (states.conj() * states.roll(-1, 0)).sum(-1)
    return -(overlaps / overlaps.abs()).prod().angle()


def as_real(matrix: Tensor) -> Tensor:
    """[[Re, -Im], [Im, Re]], [..., 2 d, 2 d]: products of these are products of complex matrices, for devices without
    complex numbers (`hal.kernel("matmul", device)`).
    """
    re, im = matrix.real, matrix.imag
    return torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
