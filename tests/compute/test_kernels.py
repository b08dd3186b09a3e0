"""Kernels beside attention, on every device that provides them: against float64, and what they must keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.kernels import resolve
from hal_core.registry import registry
from hal_core.testing import relative_error

NAMES = ("vector_add", "reduce_sum", "matmul", "reaction_diffusion_step", "ricci_flow_step")


@pytest.fixture(params=["vulkan:0", "opencl:0"])
def device(request: pytest.FixtureRequest) -> str:
    try:
        registry.find(request.param)
    except (hal.DeviceUnavailableError, hal.UnknownBackendError) as absent:
        pytest.skip(str(absent))
    return str(request.param)


def doubled(values: Any) -> Any:
    return tuple(v.double() if isinstance(v, torch.Tensor) else v for v in values)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_its_reference(device: str, name: str, seed: int) -> None:
    spec = registry.kernel_specs()[name]
    given = resolve(spec.sampler)(torch.Generator().manual_seed(seed))
    want, got = resolve(spec.reference)(*doubled(given)), hal.kernel(name, device)(*given)
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    assert all(relative_error(x, y) <= spec.tolerance["float32"] for x, y in pairs)


def test_diffusion_alone_keeps_mass_and_the_maximum_principle(device: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    step = hal.kernel("reaction_diffusion_step", device)
    u, v = (torch.randn(3, 24, 33, generator=generator) for _ in range(2))
    mass, (low, high) = u.double().sum((1, 2)), (u.amin((1, 2)), u.amax((1, 2)))
    for _ in range(20):
        u, v = step(u, v, dt=1.0, diffusion_u=1.0, diffusion_v=0.5, reaction=0.0)
    assert torch.allclose(u.double().sum((1, 2)), mass, atol=2e-3)
    assert bool((u.amin((1, 2)) >= low - 1e-6).all() and (u.amax((1, 2)) <= high + 1e-6).all())


def test_a_uniform_field_reacts_without_diffusing(device: str) -> None:
    u, v = torch.full((1, 8, 8), 0.3), torch.full((1, 8, 8), -0.2)
    got = hal.kernel("reaction_diffusion_step", device)(u, v, dt=0.1, reaction=2.0, epsilon=0.5, decay=0.7, offset=0.1)
    assert torch.allclose(got[0], u + 0.1 * 2.0 * (u - u**3 - v))
    assert torch.allclose(got[1], v + 0.1 * 2.0 * 0.5 * (u - 0.7 * v + 0.1))


def test_ricci_flow_keeps_total_curvature_zero_and_tends_to_a_flat_metric(device: str, seed: int) -> None:
    step = hal.kernel("ricci_flow_step", device)
    phi = 0.4 * torch.randn(2, 16, 20, generator=torch.Generator().manual_seed(seed))
    first = phi.clone()
    for _ in range(600):
        phi = step(phi, 0.9 * float(torch.exp(2 * phi.min()) / 4))
    wide = phi.double()
    laplacian = wide.roll(1, 1) + wide.roll(-1, 1) + wide.roll(1, 2) + wide.roll(-1, 2) - 4 * wide
    # Curvature -exp(-2 phi) Laplacian(phi) times area exp(2 phi): Gauss-Bonnet on a torus gives 0.
    assert float(laplacian.sum((1, 2)).abs().max()) < 1e-9
    assert bool((phi.std((1, 2)) < 0.02 * first.std((1, 2))).all())
    assert bool((phi.amin((1, 2)) >= first.amin((1, 2)) - 1e-5).all())


@pytest.mark.parametrize(("name", "arguments", "words"), [
    ("ricci_flow_step", (torch.zeros(4, 4), 0.3), "exp(2 * min(phi)) / 4 = 0.25"),
    ("reaction_diffusion_step", (torch.zeros(4, 4), torch.zeros(4, 4), 1.5), "between 0 and 1"),
    ("vector_add", (torch.zeros(4), torch.zeros(5)), "make the shapes equal"),
    ("matmul", (torch.zeros(4, 3), torch.zeros(4, 3)), "[.., K, N]"),
    ("reduce_sum", (torch.zeros(4, dtype=torch.float64),), "pass float32"),
])  # fmt: skip
def test_bad_arguments_are_refused_with_the_fix(device: str, name: str, arguments: Any, words: str) -> None:
    with pytest.raises(hal.ContractError) as raised:
        hal.kernel(name, device)(*arguments)
    assert words in str(raised.value)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (64, 64, 64), (65, 1, 130)])
def test_matmul_of_ragged_shapes(device: str, shape: tuple[int, int, int], seed: int) -> None:
    generator, (m, k, n) = torch.Generator().manual_seed(seed), shape
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    assert relative_error(hal.kernel("matmul", device)(a, b), a.double() @ b.double()) <= 2e-6
    many = torch.randn(3, m, k, generator=generator)
    assert relative_error(hal.kernel("matmul", device)(many, b), many.double() @ b.double()) <= 2e-6
