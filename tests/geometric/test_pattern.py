"""Where patterns form and how fast, against simulation; the Euler characteristic and the structure factor."""

from __future__ import annotations

import math

import pytest
import torch
from hal_geometric import flow, pattern
from torch import Tensor

from hal_core import ContractError

#: A fixed point of `flow.react` at 0 that is stable without diffusion and forms patterns of about 8 cells.
KINETICS = {"reaction": 0.3, "epsilon": 2.5, "decay": 0.8}
J = pattern.jacobian(0.0, **KINETICS)
DU = 0.3
DV = 1.3 * pattern.critical_ratio(J) * DU


def sets(seed: int, *shape: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) > 0.2).float()


def components(cells: Tensor, neighbours: int) -> int:
    """Connected components of a boolean grid, by 8 or 4 neighbours."""
    left = {(y, x) for y, x in cells.nonzero().tolist()}
    steps = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a or b) and (neighbours == 8 or not (a and b))]
    found = 0
    while left:
        found += 1
        todo = [left.pop()]
        while todo:
            y, x = todo.pop()
            near = {(y + a, x + b) for a, b in steps} & left
            left -= near
            todo += near
    return found


def test_the_euler_characteristic_is_components_minus_holes_on_100_fields(seed: int) -> None:
    fields = sets(seed, 100, 9, 11)
    got = pattern.euler(fields, torch.tensor([0.5]), device="cpu:0")[:, 0]
    for field, chi in zip(fields, got.tolist(), strict=True):
        outside = torch.nn.functional.pad(field == 0, (1, 1, 1, 1), value=True)
        holes = components(outside, 4) - 1  # closed pixels join at corners, open ones do not
        assert chi == components(field > 0, 8) - holes


def test_tiles_add_up_to_the_whole_exactly(kernel_device: str, seed: int) -> None:
    field = torch.randn(2, 37, 45, generator=torch.Generator().manual_seed(seed))
    levels = torch.tensor([-1.0, 0.0, 0.7])
    whole = pattern.euler(field, levels, device=kernel_device)
    tiles = pattern.euler(field, levels, tile=8)
    assert tiles.shape == (2, 5, 6, 3)
    assert torch.equal(tiles.sum((1, 2)), whole)
    assert torch.equal(pattern.euler(field.double(), levels), whole)


def test_the_structure_factor_is_the_transforms_power(kernel_device: str, seed: int) -> None:
    field = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(seed))
    want = torch.fft.fft2(field.double()).abs().square() / 240
    assert torch.allclose(pattern.structure_factor(field.double()), want, atol=1e-11)
    got = pattern.structure_factor(field, device=kernel_device)
    assert float((got - want).abs().max()) <= 1e-5 * float(want.max())
    wave = torch.cos(2 * math.pi * torch.arange(40).double() / 8).expand(16, -1)
    assert float(pattern.wavelength(wave)) == pytest.approx(8)


@pytest.mark.parametrize("decay", [0.5, 1.5, 4.0])
def test_fixed_points_are_a_pitchfork_with_stability_by_eigenvalues(decay: float) -> None:
    u, v, _, stable = pattern.fixed_points(decay=decay, epsilon=0.5)
    root = math.sqrt(1 - 1 / decay) if decay > 1 else None
    want = [0.0] if root is None else [-root, 0.0, root]
    assert u.tolist() == pytest.approx(want, abs=1e-9)
    start = torch.stack([u, v]).view(2, -1, 1, 1) + 1e-4
    late = flow.react(
        start[0].expand(-1, 4, 4), start[1].expand(-1, 4, 4), dt=0.05, steps=3000, epsilon=0.5, decay=decay
    )
    stays = (late[0][:, 0, 0] - u).abs() < 1e-3
    assert stays.tolist() == stable.tolist()


def test_fixed_points_of_an_offset_solve_the_equations() -> None:
    u, v, _, _ = pattern.fixed_points(decay=2.0, offset=0.05)
    assert len(u) == 3
    assert float((u - u**3 - v).abs().max()) <= 1e-14
    assert float((u - 2.0 * v + 0.05).abs().max()) <= 1e-14


def test_patterns_form_from_the_critical_ratio_on() -> None:
    ratio, du = pattern.critical_ratio(J), DU
    modes = -torch.linspace(0, 4 / 3, 20001, dtype=torch.float64)
    below, above = (float(pattern.dispersion(J, du, r * ratio * du, modes).max()) for r in (0.99, 1.01))
    assert below < 0 < above
    assert not pattern.turing(J, du, 0.99 * ratio * du).unstable
    assert pattern.turing(J, du, 1.01 * ratio * du).unstable
    assert pattern.critical_ratio(pattern.jacobian(0.9, **KINETICS)) == math.inf


def test_modes_grow_at_their_rate_on_every_device(kernel_device: str, seed: int) -> None:
    """Random noise of 1e-5: each growing mode's amplitude over 200 steps, in a grid of 32 x 32."""
    du, dv, dt, steps = DU, DV, 0.45, 200
    generator = torch.Generator().manual_seed(seed)
    u, v = (1e-5 * torch.randn(32, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    options = {"dt": dt, "diffusion_u": du, "diffusion_v": dv, **KINETICS}
    u, v = flow.react(u, v, steps=150, **options)  # the second eigenvector dies out
    double = flow.react(u, v, steps=steps, **options)[0]
    single = flow.react(u.float(), v.float(), steps=steps, device=kernel_device, **options)[0].double()
    wave = 2 * math.pi * torch.fft.fftfreq(32, dtype=torch.float64)
    rate = pattern.dispersion(J, du, dv, pattern.mode_of(wave.view(-1, 1), wave), dt)
    growing = rate > 0.5 * rate.max()
    assert int(growing.sum()) >= 8
    for late, bar in ((double, 1e-3), (single, 1e-2)):
        ratio = torch.fft.fft2(late).abs() / torch.fft.fft2(u).abs()
        found = ratio.log() / (steps * dt)
        assert float((found / rate - 1)[growing].abs().max()) <= bar


@pytest.mark.parametrize("mode", [(4, 1), (3, 2), (5, 5), (16, 16)])
def test_a_single_mode_grows_or_decays_at_its_rate_exactly(mode: tuple[int, int]) -> None:
    """An eigenvector of the step's matrix at one wave, small enough for its cube to be nothing."""
    side, dt, steps = 32, 0.45, 20
    a, b = (2 * math.pi * n / side for n in mode)
    at = pattern.mode_of(a, b)
    values, vectors = torch.linalg.eig(J + float(at) * torch.diag(torch.tensor([DU, DV], dtype=torch.float64)))
    first = int((1 + dt * values).abs().argmax())
    assert abs(complex(values[first]).imag) < 1e-12
    y, x = torch.arange(side).double().view(-1, 1), torch.arange(side).double()
    u, v = (1e-8 * float(part.real) * torch.cos(a * y + b * x) for part in vectors[:, first])
    late = flow.react(u, v, dt=dt, diffusion_u=DU, diffusion_v=DV, steps=steps, **KINETICS)[0]
    found = math.log(float(late.norm() / u.norm())) / (steps * dt)
    want = float(pattern.dispersion(J, DU, DV, torch.as_tensor(at, dtype=torch.float64).view(1), dt)[0])
    assert found == pytest.approx(want, rel=2e-10, abs=1e-12)


def test_a_grown_pattern_has_the_fastest_modes_wavelength(kernel_device: str, seed: int) -> None:
    found = pattern.turing(J, DU, DV)
    assert abs(found.mode) <= pattern.MOST_MODE
    generator = torch.Generator().manual_seed(seed)
    u, v = (0.01 * torch.randn(48, 48, generator=generator) for _ in range(2))
    u, _ = flow.react(u, v, dt=0.45, diffusion_u=DU, diffusion_v=DV, steps=4000, device=kernel_device, **KINETICS)
    assert float(u.std()) > 0.05
    expected = 2 * math.pi / math.sqrt(-3 * found.mode)  # L is a third of the Laplacian
    assert float(pattern.wavelength(u, device=kernel_device)) == pytest.approx(expected, rel=0.25)


def test_bad_diffusions_and_tiles_are_refused() -> None:
    with pytest.raises(ContractError, match="use two above 0"):
        pattern.turing(J, 0.0, 1.0)
    with pytest.raises(ContractError, match="tile 0 was given"):
        pattern.euler(torch.zeros(4, 4), torch.zeros(1), tile=0)
