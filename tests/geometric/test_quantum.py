"""Laws of quantum states, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hal_geometric import quantum
from torch import Tensor

import hal_core as hal
from hal_core import ContractError

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st  # noqa: E402

BAR = 1e-12
seeds = given(seed=st.integers(0, 2**31), d=st.integers(2, 6))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128)


def mixed(seed: int, d: int) -> Tensor:
    a = random(seed, d, d)
    rho = a @ a.mH
    return rho / rho.diagonal().sum().real


@settings(max_examples=30)
@seeds
def test_evolution_keeps_norm_energy_and_entropy(seed: int, d: int) -> None:
    a, psi = random(seed, d, d), random(seed + 1, d)
    h, psi = (a + a.mH) / 2, psi / torch.linalg.vector_norm(psi)
    late = quantum.evolve(h, psi, 1.7)
    assert float((torch.linalg.vector_norm(late) - 1).abs()) <= BAR
    assert float((late.conj() @ h @ late - psi.conj() @ h @ psi).abs()) <= 10 * BAR
    rho = mixed(seed + 2, d)
    u = quantum.evolve(h, torch.eye(d, dtype=torch.complex128), 1.7).mT
    later = u @ rho @ u.mH
    later = (later + later.mH) / 2
    assert float(quantum.von_neumann(later) - quantum.von_neumann(rho)) == pytest.approx(0, abs=10 * BAR)
    assert float(later.diagonal().sum().real) == pytest.approx(1, abs=10 * BAR)


@settings(max_examples=30)
@seeds
def test_bures_is_a_distance_and_of_diagonals_hellingers(seed: int, d: int) -> None:
    a, b, c = (mixed(seed + n, d) for n in range(3))
    ab, bc, ac = quantum.bures(a, b), quantum.bures(b, c), quantum.bures(a, c)
    assert float(ac) <= float(ab + bc) + 1e-9
    assert float((quantum.fidelity(a, b) - quantum.fidelity(b, a)).abs()) <= BAR
    p, q = (m.diagonal().real for m in (a, b))
    hellinger = (2 - 2 * (p * q).sqrt().sum()).sqrt()
    assert float((quantum.bures(torch.diag(p), torch.diag(q)) - hellinger).abs()) <= 1e-10


@settings(max_examples=30)
@seeds
def test_entropies_of_parts_are_subadditive_and_keep_araki_and_liebs_bound(seed: int, d: int) -> None:
    rho = mixed(seed, 2 * d)
    parts = [quantum.partial_trace(rho, [2, d], [n]) for n in range(2)]
    whole, a, b = (float(quantum.von_neumann(m)) for m in (rho, *parts))
    assert abs(a - b) - BAR <= whole <= a + b + BAR
    assert 0 <= whole <= math.log(2 * d) + BAR
    product = torch.kron(parts[0], parts[1])
    assert torch.allclose(quantum.partial_trace(product, [2, d], [1]), parts[1], atol=BAR)


def test_pure_states_have_the_fidelity_of_their_overlap(seed: int) -> None:
    psi, phi = (x / torch.linalg.vector_norm(x) for x in random(seed, 2, 5))
    overlap = float((psi.conj() @ phi).abs())
    pure = [torch.outer(x, x.conj()) for x in (psi, phi)]
    assert float(quantum.fidelity(*pure)) == pytest.approx(overlap**2, abs=1e-6)
    assert float(quantum.fubini_study(psi, phi)) == pytest.approx(math.acos(overlap), abs=1e-12)
    near = psi + 1e-9 * phi
    assert 0 < float(quantum.fubini_study(psi, near)) < 2e-9


def bloch(x: Tensor) -> Tensor:
    half = x[0] / 2
    zero = torch.zeros_like(half)
    return torch.complex(
        torch.stack([half.cos(), half.sin() * x[1].cos()]), torch.stack([zero, half.sin() * x[1].sin()])
    )


def test_the_bloch_sphere_has_a_quarter_of_its_metric_and_half_its_curvature() -> None:
    x = torch.tensor([0.8, 0.3], dtype=torch.float64)
    q = quantum.geometric_tensor(bloch, x)
    want = torch.diag(torch.tensor([0.25, 0.25 * math.sin(0.8) ** 2], dtype=torch.float64))
    assert torch.allclose(q.real, want, atol=1e-15)
    assert float(-2 * q.imag[0, 1]) == pytest.approx(-math.sin(0.8) / 2, abs=1e-15)


def test_the_berry_phase_is_half_the_solid_angle_in_any_gauge(seed: int) -> None:
    around = 2 * math.pi * torch.arange(400, dtype=torch.float64) / 400
    states = torch.stack([bloch(torch.stack([torch.tensor(0.8, dtype=torch.float64), a])) for a in around])
    phases = torch.rand(400, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = float(quantum.berry_phase(states * torch.exp(2j * math.pi * phases)))
    assert math.remainder(got + math.pi * (1 - math.cos(0.8)), 2 * math.pi) == pytest.approx(0, abs=2.5e-4)
    assert got == pytest.approx(float(quantum.berry_phase(states)), abs=1e-12)


def test_complex_products_run_as_real_ones_on_a_device(kernel_device: str, seed: int) -> None:
    a, b = random(seed, 5, 5), random(seed + 1, 5, 5)
    assert torch.allclose(quantum.as_real(a) @ quantum.as_real(b), quantum.as_real(a @ b), atol=1e-15)
    multiply = hal.kernel("matmul", kernel_device)
    got = multiply(quantum.as_real(a).float(), quantum.as_real(b).float())
    assert float((got - quantum.as_real(a @ b)).abs().max()) <= 1e-5


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(ContractError, match="not Hermitian"):
        quantum.von_neumann(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(ContractError, match="product of the sizes"):
        quantum.partial_trace(torch.eye(4), [2, 3], [0])
