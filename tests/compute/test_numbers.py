"""Values at the edges of float32: the lowest finite masks, large softcaps, and another default dtype of torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import hal_core as hal
from hal_core.testing import reference, relative_error

LOWEST = torch.finfo(torch.float32).min


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes]


@pytest.mark.parametrize(("len_q", "len_k"), [(1, 3), (3, 500), (40, 70), (200, 1300)])
def test_a_row_wholly_at_the_lowest_mask_value_is_the_mean_of_its_values(
    device: str, len_q: int, len_k: int, seed: int
) -> None:
    query, key, value = draw(seed, (1, 2, len_q, 32), (1, 2, len_k, 32), (1, 2, len_k, 32))
    mask = torch.full((len_q, len_k), LOWEST)
    out, lse = hal.attention(query, key, value, attn_mask=mask, backend=device, return_lse=True)
    assert relative_error(out, value.mean(2, keepdim=True).expand_as(out)) <= 1e-5
    assert relative_error(lse, torch.full_like(lse, LOWEST)) <= 1e-6


def test_a_lowest_mask_value_hides_its_key_beside_others(device: str, seed: int) -> None:
    query, key, value = draw(seed, (2, 2, 40, 32), (2, 2, 70, 32), (2, 2, 70, 32))
    mask = torch.zeros(2, 1, 40, 70).masked_fill_(torch.arange(70) % 3 > 0, LOWEST)
    mask[:, :, 5] = torch.where(torch.arange(70) == 11, -2e38, LOWEST)  # lower values differ from each other too
    out, lse = hal.attention(query, key, value, attn_mask=mask, backend=device, return_lse=True)
    want = reference(query, key, value, mask)
    assert relative_error(out, want.out) <= 1e-5
    assert relative_error(lse, want.lse) <= 1e-5


def test_gradients_of_rows_at_the_lowest_mask_value_are_those_of_the_mean(device: str, seed: int) -> None:
    query, key, value, grad = draw(seed, (1, 2, 20, 32), (1, 2, 30, 32), (1, 2, 30, 32), (1, 2, 20, 32))
    mask = torch.zeros(20, 30).masked_fill_(torch.arange(20)[:, None] % 2 == 0, LOWEST)
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    hal.attention(*leaves, attn_mask=mask, backend=device).backward(grad)
    # The same scores without the constant of each row, which float64 holds beside them and float32 does not.
    uniform = torch.where(mask < 0, 0.0, 1.0).double()
    exact = [t.double().requires_grad_() for t in (query, key, value)]
    scores = exact[0] @ exact[1].transpose(2, 3) * 32**-0.5 * uniform
    (scores.softmax(-1) @ exact[2]).backward(grad.double())
    assert relative_error(leaves[2].grad, exact[2].grad) <= 2e-5
    odd = slice(1, None, 2)
    assert relative_error(leaves[0].grad[:, :, odd], exact[0].grad[:, :, odd]) <= 2e-5
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


@pytest.mark.parametrize("softcap", [1e-2, 1.0, 30.0, 1e3, 1e5, 1e8])
def test_softcaps_of_any_size_agree_with_float64(device: str, softcap: float, seed: int) -> None:
    query, key, value = draw(seed, (1, 2, 24, 32), (1, 2, 50, 32), (1, 2, 50, 32))
    out, lse = hal.attention(query, key, value, softcap=softcap, backend=device, return_lse=True)
    want = reference(query, key, value, softcap=softcap)
    assert relative_error(out, want.out) <= 1e-5
    assert relative_error(lse, want.lse) <= 1e-5


@pytest.mark.usefixtures("float64_by_default")
def test_masks_are_float32_whatever_torchs_default_dtype_is(device: str, seed: int) -> None:
    query, key, value = draw(seed, (1, 2, 24, 32), (1, 2, 300, 32), (1, 2, 300, 32))
    mask = (torch.arange(300) % 100 > 60).view(1, 300)
    out = hal.attention(query, key, value, attn_mask=mask, backend=device)
    assert relative_error(out, reference(query, key, value, mask).out) <= 1e-5
