"""`QuantumGeometricCore`: its three operations have the laws of their definitions."""

from __future__ import annotations

import pytest
import torch
from hal_geometric import QuantumGeometricCore, arithmetic, flow

from hal_core import ContractError


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_pattern_flow_is_a_flow_of_the_same_shape(kernel_device: str, seed: int) -> None:
    core, x = QuantumGeometricCore(kernel_device), 0.3 * draw(seed, 2, 8, 10)
    assert torch.equal(core.compute_pattern_flow(x), flow.heat(x, device=kernel_device))
    assert torch.equal(
        core.compute_pattern_flow(x, flow="ricci", steps=3), flow.ricci(x, steps=3, device=kernel_device)
    )
    reacted = flow.react(x, torch.zeros_like(x), steps=2, decay=2.0, device=kernel_device)[0]
    assert torch.equal(core.compute_pattern_flow(x, flow="react", steps=2, decay=2.0), reacted)
    assert core.compute_pattern_flow(x.double()).dtype == torch.float64
    with pytest.raises(ContractError, match="use heat, ricci or react"):
        core.compute_pattern_flow(x, flow="path integral")


def test_the_four_numbers_are_those_of_the_chain_and_the_height(seed: int) -> None:
    pattern = draw(seed, 2, 3, 12, 12).softmax(-1)
    found = QuantumGeometricCore().analyze_arithmetic_dynamics(pattern)
    chain = arithmetic.chain(pattern)
    assert found.shape == (2, 3, 4)
    assert torch.equal(found[..., 1:], torch.stack(chain[1:], -1))
    assert float(found[1, 2, 0]) == arithmetic.height(pattern[1, 2])
    with pytest.raises(ContractError, match="pass attention weights"):
        QuantumGeometricCore().analyze_arithmetic_dynamics(draw(seed, 4, 4))


@pytest.mark.parametrize("tile", [None, 6])
def test_low_rank_tiles_are_idempotent_and_lose_the_tail(tile: int | None, seed: int) -> None:
    core, x = QuantumGeometricCore(), draw(seed, 2, 18, 14).double()
    found = core.apply_motivic_structure(x, 2, tile)
    assert torch.allclose(core.apply_motivic_structure(found, 2, tile), found, atol=1e-13)
    tail = 0.0
    for band in x.split(tile or 18, 1):
        for part in band.split(tile or 14, 2):
            tail += float(torch.linalg.svdvals(part)[:, 2:].square().sum())
    assert float((x - found).square().sum()) == pytest.approx(tail, rel=1e-12)
    with pytest.raises(ContractError, match="use 1 or more"):
        core.apply_motivic_structure(x, 0)
