"""Entropies, masses and distances of attention against the weights themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hal_geometric import information
from torch import Tensor

import hal_core as hal
from hal_core import ContractError
from hal_core.testing import relative_error

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings, strategies as st  # noqa: E402


def draw(seed: int, spread: float = 1.0, count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [spread * torch.randn(2, 3, 48, 16, generator=generator) for _ in range(count)]


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q.double() @ k.double().mT / 4).softmax(-1)


def shannon(p: Tensor) -> Tensor:
    return torch.special.entr(p).sum(-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("spread", [0.5, 2.0, 3.0])  # scores of a deviation of 0.25, 4 and 9
def test_entropy_is_that_of_the_weights_on_every_device(device: str, spread: float, seed: int) -> None:
    q, k = draw(seed, spread)
    with hal.use(device, allow_simulated=True):
        found = information.entropy(q, k).double()
        second = information.renyi(q, k, 2.0).double()
    p = weights(q, k)
    assert float((found - shannon(p)).abs().max()) <= 1e-4
    assert float((second + p.square().sum(-1).log()).abs().max()) <= 1.2e-4
    assert bool((second >= -1e-4).all() and (second <= found + 2e-4).all() and (found <= math.log(48) + 1e-5).all())


def test_entropy_follows_causal_masks_and_has_a_gradient(seed: int) -> None:
    q, k = (t.double().requires_grad_() for t in draw(seed))
    found = information.entropy(q, k, is_causal=True, backend="cpu:0")
    hidden = torch.ones(48, 48, dtype=torch.bool).triu(1)
    scores = (q @ k.mT / 4).masked_fill(hidden, -torch.inf)
    want = -(scores.softmax(-1) * scores.log_softmax(-1).masked_fill(hidden, 0)).sum(-1)
    assert float((found - want).abs().max()) <= 1e-10
    got = torch.autograd.grad(found.sum(), [q, k])
    right = torch.autograd.grad(want.sum(), [q, k])
    assert all(relative_error(x, y) <= 1e-9 for x, y in zip(got, right, strict=True))


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), spread=st.floats(0.1, 3.0), order=st.sampled_from([0.5, 2.0, 3.0]))
def test_renyi_entropies_fall_with_their_order(seed: int, spread: float, order: float) -> None:
    q, k = (t.double() for t in draw(seed, spread))
    p = weights(q, k)
    with hal.use("cpu:0"):
        found = information.renyi(q, k, order)
        entropy = information.entropy(q, k)
    assert float((found - (p**order).sum(-1).log() / (1 - order)).abs().max()) <= 1e-9
    assert bool(((found <= entropy + 1e-9) == (order > 1)).all() or float(entropy.max()) < 1e-6)


def test_key_mass_is_the_column_sum_and_adds_up_to_the_rows(device: str, seed: int) -> None:
    q, k = draw(seed, 1.5)
    with hal.use(device, allow_simulated=True):
        found = information.key_mass(q, k).double()
    assert float((found / weights(q, k).sum(-2) - 1).abs().max()) <= 1.5e-4
    assert float((found.sum(-1) / 48 - 1).abs().max()) <= 1.3e-5


def test_head_distances_are_those_of_the_weights(device: str, seed: int) -> None:
    q, k, other_q, other_k = draw(seed, 1.2, 4)
    p, r = weights(q, k), weights(other_q, other_k)
    want = (p * r).sqrt().sum(-1)
    with hal.use(device, allow_simulated=True):
        found = {
            kind: information.head_distance(q, k, other_q, other_k, kind=kind).double()
            for kind in ("coefficient", "hellinger", "fisher_rao")
        }
    assert float((found["coefficient"] - want).abs().max()) <= 2e-5
    assert float((found["hellinger"] - (2 - 2 * want).sqrt()).abs().max()) <= 2e-4
    assert float((found["fisher_rao"] - 2 * want.arccos()).abs().max()) <= 4e-4


def test_fisher_rao_keeps_the_triangle_inequality(seed: int) -> None:
    heads = [t.double() for t in draw(seed, 1.5, 6)]
    pairs = list(zip(heads[::2], heads[1::2], strict=True))
    with hal.use("cpu:0"):
        d = [[information.head_distance(*a, *b) for b in pairs] for a in pairs]
    assert float(d[0][0].max()) <= 1e-6
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        assert bool((d[i][k] <= d[i][j] + d[j][k] + 1e-9).all())


def test_rank_lies_between_one_and_the_dimension_and_bounds_the_entropies(seed: int) -> None:
    x = torch.randn(5, 200, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.logspace(0, -3, 24, dtype=torch.float64)
    rank, stable, rho = information.effective_rank(x), information.stable_rank(x), information.density(x)
    assert bool((rank >= 1).all() and (rank <= 24).all() and (stable >= 1).all() and (stable <= rank**2).all())
    values = torch.linalg.eigvalsh(rho)
    entropy, second = torch.special.entr(values).sum(-1), -(rho @ rho).diagonal(dim1=1, dim2=2).sum(-1).log()
    assert bool((second <= entropy).all() and (entropy <= math.log(24)).all())
    assert torch.allclose(values.sum(-1), torch.ones(5, dtype=torch.float64))
    one = torch.outer(torch.randn(9), torch.randn(4)).double()
    assert float(information.effective_rank(one)) == pytest.approx(1, abs=1e-6)
    assert float(information.effective_rank(torch.zeros(3, 3))) == 0


def test_weights_that_are_no_plain_softmax_are_refused(seed: int) -> None:
    q, k = draw(seed)
    with pytest.raises(ContractError, match="an additive mask was given"):
        information.entropy(q, k, attn_mask=torch.zeros(48, 48))
    with pytest.raises(ContractError, match=r"entropy\(\) for 1"):
        information.renyi(q, k, 1.0)
    with pytest.raises(ContractError, match="use fisher_rao, hellinger"):
        information.head_distance(q, k, q, k, kind="euclid")
