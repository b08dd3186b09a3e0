"""Laws of the flows: mass, extremes, decay of modes, Gauss-Bonnet, over-smoothing, symplecticity."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hal_geometric import flow, pattern
from torch import Tensor

import hal_core as hal
from hal_core import ContractError


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_heat_keeps_mass_and_the_maximum_principle_in_float64(seed: int) -> None:
    u = draw(seed, 3, 24, 31)
    late = flow.heat(u, steps=500)
    assert float((late.sum((1, 2)) - u.sum((1, 2))).abs().max()) <= 1e-10
    one = flow.heat(u)
    assert bool((one.amax((1, 2)) <= u.amax((1, 2))).all() and (one.amin((1, 2)) >= u.amin((1, 2))).all())


def test_heat_keeps_mass_on_devices_and_takes_odd_batches(kernel_device: str, seed: int) -> None:
    u = draw(seed, 3, 24, 31, dtype=torch.float32)
    late = flow.heat(u, steps=500, device=kernel_device)
    assert late.shape == u.shape
    scale = float(u.double().abs().sum((1, 2)).max())
    assert float((late.double().sum((1, 2)) - u.double().sum((1, 2))).abs().max()) / scale <= 1e-6
    assert float((late.double() - flow.heat(u.double(), steps=500)).abs().max()) <= 1e-5


def test_modes_decay_by_their_eigenvalue(seed: int) -> None:
    height, width = 12, 20
    y, x = torch.arange(height).double().view(-1, 1), torch.arange(width).double()
    for k, m in ((1, 0), (2, 3), (6, 10)):
        a, b = 2 * math.pi * k / height, 2 * math.pi * m / width
        wave = torch.cos(a * y + b * x)
        want = (1 + 0.7 * float(pattern.mode_of(a, b))) * wave
        assert torch.allclose(flow.heat(wave, dt=0.7), want, atol=1e-13)
    assert float(pattern.mode_of(math.pi, 0.0)) == pytest.approx(-4 / 3)


def test_ricci_flow_keeps_gauss_bonnet_and_flattens(seed: int) -> None:
    phi = 0.4 * draw(seed, 16, 20)
    first = float(flow.curvature(phi).abs().max())
    for _ in range(3):
        phi = flow.ricci(phi, steps=300)
        k, area = flow.curvature(phi), torch.exp(2 * phi)
        assert abs(float((k * area).sum())) <= 1e-13
    assert float(flow.curvature(phi).abs().max()) <= 9e-5 * first


def test_area_drifts_by_the_first_order_in_dt(seed: int) -> None:
    phi = 0.4 * draw(seed, 16, 16)
    limit, drift = flow.ricci_limit(phi), []
    for parts in (1, 2, 4):
        late = flow.ricci(phi, dt=limit / parts, steps=40 * parts)
        drift.append(abs(float(torch.exp(2 * late).sum() / torch.exp(2 * phi).sum()) - 1))
    assert 1.6 <= drift[0] / drift[1] <= 3
    assert 1.6 <= drift[1] / drift[2] <= 3


def test_flows_agree_between_a_device_and_the_host(kernel_device: str, seed: int) -> None:
    u, v = 0.3 * draw(seed, 2, 9, 14)
    want = flow.react(u, v, dt=0.3, steps=40)
    got = flow.react(u.float(), v.float(), dt=0.3, steps=40, device=kernel_device)
    assert all(float((x - y).abs().max()) <= 1e-5 for x, y in zip(got, want, strict=True))
    phi = flow.ricci(u.float(), dt=0.01, steps=40, device=kernel_device)
    assert float((phi - flow.ricci(u, dt=0.01, steps=40)).abs().max()) <= 1e-5


def test_space_forms_scale_by_their_curvature() -> None:
    assert flow.space_form(1.0, 2, 0.25) == pytest.approx(0.5)
    assert flow.space_form(-1.0, 3, 0.5) == pytest.approx(3.0)
    with pytest.raises(ContractError, match=r"vanishes at 0\.5"):
        flow.space_form(1.0, 2, 0.6)


def test_attention_flow_keeps_the_stationary_mass_and_extremes_and_smooths_at_the_second_eigenvalue(seed: int) -> None:
    q, k = (draw(seed + n, 1, 1, 30, 8) for n in range(2))
    p = (q[0, 0] @ k[0, 0].T / 8**0.5).softmax(-1)
    values, vectors = torch.linalg.eig(p.T)
    pi = vectors[:, values.real.argmax()].real
    pi = pi / pi.sum()
    x = draw(seed + 2, 1, 1, 30, 8)
    with hal.use("cpu:0"):
        one = flow.attention(q, k, x, dt=0.5)
        late = flow.attention(q, k, x, dt=0.5, steps=60)
        later = flow.attention(q, k, late, dt=0.5)
    assert torch.allclose(pi @ one[0, 0], pi @ x[0, 0], atol=1e-12)
    assert bool((one.amax(2) <= x.amax(2)).all() and (one.amin(2) >= x.amin(2)).all())
    spread = [float((y[0, 0] - pi @ y[0, 0]).norm()) for y in (late, later)]
    second = float((0.5 + 0.5 * torch.linalg.eigvals(p)).abs().sort().values[-2])
    assert spread[1] / spread[0] == pytest.approx(second, rel=0.02)


def test_leapfrog_is_symplectic_reversible_and_of_second_order() -> None:
    def force(q: Tensor) -> Tensor:
        return -q.sin()

    q, p = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda z: torch.cat(flow.leapfrog(z[:1], z[1:], force, dt=0.1, steps=30)))(
        torch.cat([q, p])
    )
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1, abs=1e-13)
    there = flow.leapfrog(q, p, force, dt=0.1, steps=50)
    back = flow.leapfrog(there[0], -there[1], force, dt=0.1, steps=50)
    assert float((back[0] - q).abs()) <= 1e-12

    def worst(dt: float) -> float:
        a, b, start, most = q, p, float(p**2 / 2 - q.cos()), 0.0
        for _ in range(int(8 / dt)):
            a, b = flow.leapfrog(a, b, force, dt=dt)
            most = max(most, abs(float(b**2 / 2 - a.cos()) - start))
        return most

    errors = [worst(dt) for dt in (0.1, 0.05, 0.025)]
    assert all(3.5 <= a / b <= 4.5 for a, b in pairwise(errors))


def test_steps_beyond_their_limit_are_refused() -> None:
    u = torch.zeros(8, 8)
    with pytest.raises(ContractError, match="between 0 and 1, the limit of the maximum principle"):
        flow.heat(u, dt=1.5)
    with pytest.raises(ContractError, match=r"exp\(2 \* min\(phi\)\) / 4 = 0.25"):
        flow.ricci(u, dt=0.3)
    with pytest.raises(ContractError, match="up to 1"):
        flow.attention(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), dt=1.1)
    with pytest.raises(ContractError, match="use float32 there, or no device"):
        flow.heat(u.double(), device="cpu:0")
