"""Interferometer meshes and micro-rings: what they realise without errors, and how errors grow."""

from __future__ import annotations

import math

import pytest
import torch
from hal_photonics.simulator import mesh, ring
from hal_photonics.simulator.imperfections import MESH_PAIR


def haar(size: int, draw: torch.Generator) -> torch.Tensor:
    """A random unitary, uniform over the group."""
    gauss = torch.randn(size, size, generator=draw, dtype=torch.complex128)
    q, r = torch.linalg.qr(gauss)
    return q * (torch.diagonal(r) / torch.diagonal(r).abs())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16, 33])
def test_a_decomposed_unitary_comes_back(draw: torch.Generator, size: int) -> None:
    unitary = haar(size, draw)
    found = mesh.decompose(unitary)
    assert len(found.theta) == size * (size - 1) // 2
    assert float((found.matrix() - unitary).norm() / unitary.norm()) < 1e-12
    assert bool((found.modes[:, 1] == found.modes[:, 0] + 1).all()) or size == 1


@pytest.mark.parametrize("size", [32, 48, 64])
def test_phase_errors_grow_as_the_root_of_the_size(draw: torch.Generator, size: int) -> None:
    """Row 9: 1.2 sqrt(N) sigma for N = 32 to 64, within 15%."""
    sigma, unitary = 0.01, haar(size, draw)
    found = mesh.decompose(unitary)
    errors = [float((found.matrix(sigma, draw) - unitary).norm() / unitary.norm()) for _ in range(4)]
    assert sum(errors) / 4 == pytest.approx(mesh.relative_error(size, sigma), rel=0.15)


def test_the_quick_model_of_a_mesh_matches_a_decomposed_one(draw: torch.Generator) -> None:
    size, sigma = 32, 0.01
    errors = []
    for _ in range(4):
        weights = torch.randn(size, size, generator=draw)
        errors.append(float((mesh.realised(weights, sigma, draw) - weights).norm() / weights.norm()))
    assert sum(errors) / 4 == pytest.approx(MESH_PAIR * mesh.relative_error(size, sigma), rel=0.15)


def test_a_mesh_without_errors_realises_any_real_matrix(draw: torch.Generator) -> None:
    weights = torch.randn(5, 8, generator=draw, dtype=torch.float64)
    assert float((mesh.realised(weights, 0.0) - weights).norm()) < 1e-11


def test_rings_realise_weights_and_temperature_moves_them() -> None:
    weights = torch.linspace(-0.95, 1, 40)
    exact = {"span": 10.0, "fwhm": 2e10, "shift": 8.6e9, "crosstalk": 0.0}
    assert torch.allclose(ring.realised(weights, temperature_error=torch.zeros(40), **exact), weights, atol=1e-5)
    # 0.1 K is 0.86 GHz, 0.043 of a width of 20 GHz: at half transmission the slope is 2 per width.
    half = ring.realised(torch.zeros(1), temperature_error=torch.tensor([0.1]), **exact)
    assert float(half) == pytest.approx(-2 * 0.043, rel=0.06)


def test_heat_of_a_neighbour_moves_a_ring() -> None:
    common = {"span": 10.0, "fwhm": 2e10, "shift": 8.6e9, "temperature_error": torch.zeros(3)}
    alone = ring.realised(torch.tensor([0.0, 0.0, 0.0]), crosstalk=0.0, **common)
    warmed = ring.realised(torch.tensor([-0.9, 0.0, 0.0]), crosstalk=0.05, **common)
    assert float(warmed[1]) < float(alone[1]) - 0.05


def test_published_ring_precisions_are_within_reach_of_the_model() -> None:
    """8.5 bits by dithering, 11.3 with a self-referenced loop: a detuning noise of 1/1000 and 1/7000 of a width."""
    assert ring.precision_bits(1 / 1150) == pytest.approx(8.5, abs=0.1)
    assert ring.precision_bits(1 / 2300) - ring.precision_bits(1 / 1150) == pytest.approx(1, abs=1e-6)
    assert math.isfinite(ring.precision_bits(1e-9))
