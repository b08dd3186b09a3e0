"""Kernels beside attention, on every device that provides them: against float64, and what they must keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.registry import registry, resolve
from hal_core.testing import relative_error

NAMES = ("vector_add", "reduce_sum", "matmul", "reaction_diffusion_step", "ricci_flow_step", "euler_characteristic")


@pytest.fixture(params=["cpu:0", "cpu:0 by torch", "vulkan:0", "opencl:0"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device; the CPU also without its compiled kernels, where hal-cpu-native is installed."""
    name, _, by_torch = request.param.partition(" ")
    try:
        registry.find(name)
    except (hal.DeviceUnavailableError, hal.UnknownBackendError) as absent:
        pytest.skip(str(absent))
    if not by_torch:
        yield name
        return
    from hal_cpu import paths

    if not paths.native_module():
        pytest.skip(f"cpu:0 runs torch's operators alone: hal-cpu-native is {paths.why_no_native_module()}")
    with paths.offering("never"):
        yield name


def doubled(values: Any) -> Any:
    return tuple(v.double() if isinstance(v, torch.Tensor) else v for v in values)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_its_reference(device: str, name: str, seed: int) -> None:
    spec = registry.kernel_specs()[name]
    given = resolve(spec.sampler)(torch.Generator().manual_seed(seed))
    want, got = resolve(spec.reference)(*doubled(given)), hal.kernel(name, device)(*given)
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    assert all(relative_error(x, y) <= spec.tolerance["float32"] for x, y in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_results_do_not_depend_on_torchs_default_dtype(device: str, name: str, seed: int) -> None:
    spec = registry.kernel_specs()[name]
    given = resolve(spec.sampler)(torch.Generator().manual_seed(seed))
    want = hal.kernel(name, device)(*given)
    torch.set_default_dtype(torch.float64)
    try:
        drawn = resolve(spec.sampler)(torch.Generator().manual_seed(seed))
        got = hal.kernel(name, device)(*given)
    finally:
        torch.set_default_dtype(torch.float32)
    pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
    assert all(torch.equal(x, y) for x, y in pairs)
    assert all(x.dtype == torch.float32 for x in drawn if isinstance(x, torch.Tensor))


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


def test_diffusion_spreads_a_point_by_the_nine_point_stencil(device: str) -> None:
    u = torch.zeros(1, 5, 7)
    u[0, 0, 0] = 1.0  # in a corner: the grid is periodic
    got, _ = hal.kernel("reaction_diffusion_step", device)(u, u, dt=1.0, diffusion_u=1.0, diffusion_v=0.0, reaction=0.0)
    want = torch.zeros(5, 7)
    for row, column in ((0, 1), (0, 6), (1, 0), (4, 0)):
        want[row, column] = 1 / 6
    for row, column in ((1, 1), (1, 6), (4, 1), (4, 6)):
        want[row, column] = 1 / 12
    assert torch.allclose(got[0], want, atol=1e-7)


def test_at_its_step_limit_ricci_flow_makes_no_new_extremes_and_beyond_it_would(device: str) -> None:
    phi = torch.zeros(1, 8, 8)
    phi[0, ::2, 1::2] = phi[0, 1::2, ::2] = 0.01  # the field that the limit is made for: it changes sign at every point
    limit = float(torch.exp(2 * phi.min()) / 4)
    got = hal.kernel("ricci_flow_step", device)(phi, limit)
    assert bool((got >= phi.min() - 1e-7).all() and (got <= phi.max() + 1e-7).all())
    beyond = resolve(registry.kernel_specs()["ricci_flow_step"].reference)(phi.double(), 1.1 * limit)
    assert bool((beyond > phi.max() + 1e-4).any())


def test_every_field_of_a_batch_steps_by_itself(device: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(3, 9, 70, generator=generator) for _ in range(2))
    step, flow = hal.kernel("reaction_diffusion_step", device), hal.kernel("ricci_flow_step", device)
    together, phi = step(u, v), 0.3 * u
    dt = 0.2 * float(torch.exp(2 * phi.min()))
    flowed = flow(phi, dt)
    for n in range(3):
        alone = step(u[n], v[n])
        assert torch.equal(together[0][n], alone[0])
        assert torch.equal(together[1][n], alone[1])
        assert torch.equal(flowed[n], flow(phi[n], dt))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("ricci_flow_step", (torch.zeros(4, 4), 0.3), "exp(2 * min(phi)) / 4 = 0.25"),
        ("reaction_diffusion_step", (torch.zeros(4, 4), torch.zeros(4, 4), 1.5), "between 0 and 1"),
        ("vector_add", (torch.zeros(4), torch.zeros(5)), "make the shapes equal"),
        ("matmul", (torch.zeros(4, 3), torch.zeros(4, 3)), "[.., K, N]"),
        ("reduce_sum", (torch.zeros(4, dtype=torch.float64),), "pass float32"),
        ("ricci_flow_step", (torch.zeros(4, 4), 0.1, 0), "steps 0 was given"),
        ("euler_characteristic", (torch.zeros(4, 4), torch.zeros(2, 2)), "and [T]"),
    ],
)
def test_bad_arguments_are_refused_with_the_fix(device: str, name: str, arguments: Any, words: str) -> None:
    with pytest.raises(hal.ContractError) as raised:
        hal.kernel(name, device)(*arguments)
    assert words in str(raised.value)


def test_tensors_without_dimensions_are_added_too(device: str) -> None:
    total = hal.kernel("vector_add", device)(torch.tensor(1.5), torch.tensor(2.0))
    assert total.shape == ()
    assert float(total) == 3.5
    assert float(hal.kernel("reduce_sum", device)(torch.tensor(2.5))) == 2.5


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (64, 64, 64), (65, 1, 130)])
def test_matmul_of_ragged_shapes(device: str, shape: tuple[int, int, int], seed: int) -> None:
    generator, (m, k, n) = torch.Generator().manual_seed(seed), shape
    a, b = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    assert relative_error(hal.kernel("matmul", device)(a, b), a.double() @ b.double()) <= 2e-6
    many = torch.randn(3, m, k, generator=generator)
    assert relative_error(hal.kernel("matmul", device)(many, b), many.double() @ b.double()) <= 2e-6


def test_a_kernel_that_is_not_there_is_refused_with_those_that_are(device: str) -> None:
    with hal.session(device) as session, pytest.raises(hal.UnsupportedError, match="no kernel 'sort': it has euler"):
        session.kernel("sort")


@pytest.mark.parametrize("steps", [2, 3, 100, 257])
def test_many_steps_in_one_call_are_the_steps_one_by_one(device: str, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, v = (0.3 * torch.randn(2, 9, 13, generator=generator) for _ in range(2))
    step, flow = hal.kernel("reaction_diffusion_step", device), hal.kernel("ricci_flow_step", device)
    given, dt = (u.clone(), v.clone()), 0.2 * float(torch.exp(2 * u.min()))
    together, flowed = step(u, v, dt=0.5, epsilon=0.7, offset=0.1, steps=steps), flow(u, dt, steps=steps)
    assert torch.equal(u, given[0])
    assert torch.equal(v, given[1])
    one, phi = (u, v), u
    for _ in range(steps):
        one, phi = step(*one, dt=0.5, epsilon=0.7, offset=0.1), flow(phi, dt)
    assert all(torch.equal(x, y) for x, y in zip((*together, flowed), (*one, phi), strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (9, 1), (2, 65, 33), (120, 128), (2000, 2)])
def test_many_steps_of_any_shape_are_those_of_the_reference(device: str, shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, v = (0.1 * torch.randn(2, *shape, generator=generator)).unbind()
    step, flow = hal.kernel("reaction_diffusion_step", device), hal.kernel("ricci_flow_step", device)
    stable = {"dt": 0.05, "reaction": 0.3, "epsilon": 2.5, "decay": 0.8}  # rounding does not grow
    reference = resolve("hal_compute.references:reaction_diffusion_step")
    for steps in (5, 256):
        want = reference(u.double(), v.double(), steps=steps, **stable)
        got = step(u, v, steps=steps, **stable)
        assert all(float((x - y).abs().max()) <= 1e-5 for x, y in zip(got, want, strict=True))
        flowed = resolve("hal_compute.references:ricci_flow_step")(u.double(), 0.05, steps=steps)
        assert float((flow(u, 0.05, steps=steps) - flowed).abs().max()) <= 1e-5


def test_fields_larger_than_a_band_step_as_the_reference_does(device: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(2, 150, 700, generator=generator) for _ in range(2))
    want = resolve("hal_compute.references:reaction_diffusion_step")(u.double(), v.double(), steps=3)
    got = hal.kernel("reaction_diffusion_step", device)(u, v, steps=3)
    assert all(relative_error(x, y) <= 2e-6 for x, y in zip(got, want, strict=True))


def test_the_euler_characteristic_counts_components_minus_holes(device: str) -> None:
    ring = torch.zeros(6, 7)
    ring[1:5, 1:6] = 1.0
    ring[2, 2] = ring[3, 4] = 0.5
    corner = torch.zeros(6, 7)
    corner[0, 0] = corner[1, 1] = corner[5, 6] = 1.0  # the first two touch at a corner
    corner[3, 3] = torch.nan
    count = hal.kernel("euler_characteristic", device)
    got = count(torch.stack([ring, corner]), torch.tensor([1.0, 0.5, 0.0, 2.0]))
    assert got.dtype == torch.int64
    assert got.tolist() == [[-1, 1, 1, 0], [2, 2, 0, 0]]
