"""A tile of attention, and that its metrics are what their formulas say."""

from __future__ import annotations

import pytest
import torch
from hal_geometric import QuantumMotivicTile, arithmetic, information
from torch import Tensor

import hal_core as hal
from hal_core import ContractError


@pytest.fixture(autouse=True)
def _on_the_cpu() -> None:
    hal.configure(backend="cpu:0")


def tokens(seed: int, batch: int = 2, length: int = 24, dim: int = 16) -> Tensor:
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def tile(seed: int, **options: object) -> QuantumMotivicTile:
    torch.manual_seed(seed)
    return QuantumMotivicTile(24, 16, 4, **options)  # type: ignore[arg-type]


def test_it_is_multi_head_attention_of_its_projections(seed: int) -> None:
    found, x = tile(seed), tokens(seed)
    q, k, v = (p(x).view(2, 24, 4, 4).transpose(1, 2) for p in (found.query, found.key, found.value))
    want = found.out(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    assert torch.allclose(found(x), want, atol=1e-6)
    found(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in found.parameters())


def test_metrics_are_those_of_their_formulas(seed: int) -> None:
    found, x = tile(seed, motive_rank=3), tokens(seed)
    out = found(x)
    metrics = found.get_metrics()
    assert metrics["effective_rank"] == pytest.approx(float(information.effective_rank(out).mean()))
    assert metrics["effective_rank"] <= 3 + 1e-3
    assert metrics["motive_height"] == arithmetic.height(out)
    assert metrics["ifq"] == pytest.approx(float(out.norm() / x.norm()))
    assert 0 < metrics["quantum_entropy"] <= 1.0987
    assert 0 < metrics["load_distribution"] <= 1 + 1e-6
    assert 0 < metrics["ae"] <= 3.1781
    whole = tile(seed)(x)
    assert metrics["cer"] == pytest.approx(float((whole - out).square().sum() / whole.square().sum()), rel=1e-4)
    assert metrics["flow"] == 0


def test_flow_is_the_hellinger_distance_to_neighbours(seed: int) -> None:
    one, other, x = tile(seed), tile(seed + 1), tokens(seed)
    one.add_neighbor(other)
    one(x), other(x)
    q, k, a, b = (p(x).view(2, 24, 4, 4).transpose(1, 2) for p in (one.query, one.key, other.query, other.key))
    p, r = ((u @ w.mT / 2).softmax(-1) for u, w in ((q, k), (a, b)))
    want = float((2 - 2 * (p * r).sqrt().sum(-1)).sqrt().mean())
    assert one.get_metrics()["flow"] == pytest.approx(want, rel=1e-3)
    assert other.get_metrics()["flow"] == pytest.approx(want, rel=1e-3)


def test_resolution_adapts_to_the_energy_and_is_recorded(seed: int) -> None:
    found, x = tile(seed), tokens(seed)
    found(x)
    resolution = found.adapt_resolution(0.9)
    assert resolution < 1
    assert found.resolution_history == [1.0, resolution]
    found(x)
    assert found.get_metrics()["cer"] <= 0.1
    block = found.balance_load()
    assert block >= 16
    assert block & (block - 1) == 0
    assert found(x).shape == x.shape


def test_sizes_that_cannot_be_are_refused(seed: int) -> None:
    with pytest.raises(ContractError, match="heads that divide"):
        QuantumMotivicTile(8, 10, 3)
    with pytest.raises(ContractError, match="up to 1"):
        QuantumMotivicTile(8, 8, resolution=1.5)
    with pytest.raises(ContractError, match="1 to 24 tokens, 16"):
        tile(seed)(torch.zeros(1, 30, 16))
    with pytest.raises(ContractError, match="call it on tokens first"):
        tile(seed).get_metrics()
