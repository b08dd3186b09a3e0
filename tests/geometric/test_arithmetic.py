"""Bits of floats, exactly, and attention as a Markov chain."""

from __future__ import annotations

import math

import pytest
import torch
from hal_geometric import arithmetic

from hal_core import ContractError

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st  # noqa: E402


@settings(max_examples=60)
@given(numbers=st.lists(st.integers(-(2**12), 2**12), min_size=1, max_size=8))
def test_height_does_not_change_with_a_common_factor(numbers: list[int]) -> None:
    x = torch.tensor(numbers, dtype=torch.float64)
    common = math.gcd(*numbers) or 1
    want = (max(map(abs, numbers)) // common).bit_length()
    for factor in (1.0, 3.0, 12.0, 2.0**-9):
        assert arithmetic.height(x * factor) == want


def test_formats_have_their_bits(seed: int) -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(seed))
    for dtype, bits in ((torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)):
        assert int(arithmetic.significant_bits(x.to(dtype)).max()) == bits
    grid = torch.arange(-127, 128).float() * 0.03125
    assert arithmetic.height(grid) == 7
    odd = arithmetic.significant_bits(torch.tensor([0.0, 1.0, 3.0, 0.75, 10.0, -5.0]))
    assert odd.tolist() == [0, 1, 2, 2, 3, 3]
    assert arithmetic.height(torch.zeros(3)) == 0


def test_a_chain_has_its_stationary_distribution_and_its_bounds(seed: int) -> None:
    p = (2 * torch.randn(4, 40, 40, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    found = arithmetic.chain(p)
    moved = (found.stationary.unsqueeze(-2) @ p.double()).squeeze(-2)
    assert float((moved - found.stationary).abs().max()) <= 1e-7  # rows of float32 sum to 1 within rounding
    assert torch.allclose(found.stationary.sum(-1), torch.ones(4, dtype=torch.float64))
    assert bool((found.entropy_rate <= found.stationary_entropy).all())
    assert bool((found.stationary_entropy <= math.log(40)).all())
    assert bool((found.gap > 0).all() and (found.gap <= 1).all())
    exact = (2 * torch.randn(40, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).softmax(-1)
    pi = arithmetic.chain(exact).stationary
    assert float((pi @ exact - pi).abs().max()) <= 8e-16
    uniform = arithmetic.chain(torch.full((5, 5), 0.2, dtype=torch.float64))
    assert float(uniform.entropy_rate) == pytest.approx(math.log(5))
    assert float(uniform.gap) == pytest.approx(1, abs=1e-6)


def test_what_is_no_chain_is_refused() -> None:
    with pytest.raises(ContractError, match="several stationary distributions"):
        arithmetic.chain(torch.eye(3))
    with pytest.raises(ContractError, match="pass attention weights"):
        arithmetic.chain(torch.tensor([[1.5, -0.5], [0.5, 0.5]]))
    with pytest.raises(ContractError, match="finite floats"):
        arithmetic.height(torch.tensor([math.inf]))
