"""Operands to e4m3, in Triton's interpreter. Run by tests/cuda/test_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from hal_cuda.kernels.fp8.operands import BLOCK, Quantised, Quantiser, blocks_of, padded, quantised_bytes
from hal_cuda.kernels.fp8.wish import Wish
from hal_cuda.memory import borrowing
from interpreted_device import CONTEXT
from torch import Tensor

from hal_core import AttentionRequest

#: Half a step of e4m3 relative to the number, at most.
HALF_STEP = 1 / 16
SCALE = 0.1


def quantised(
    wish: Wish, dim: int, generator: torch.Generator, lengths: tuple[int, int] = (300, 333)
) -> tuple[Quantised, Tensor, Tensor, Tensor]:
    query, key, value = (
        torch.randn(2, heads, length, dim, generator=generator).to(torch.float16)
        for heads, length in ((4, lengths[0]), (2, lengths[1]), (2, lengths[1]))
    )
    key += 3
    with borrowing(CONTEXT.memory) as borrow:
        found = Quantiser(CONTEXT, wish)(borrow, query, key, value, SCALE, True)
        return Quantised(*(None if t is None else t.clone() for t in found)), query, key, value


def scales(x: Tensor, wish: Wish) -> Tensor:
    """Largest magnitude over 448, of each block or head."""
    blocks = x.float().abs().amax(3).split(BLOCK, 2)
    largest = torch.stack([block.amax(2) for block in blocks], 2)
    return (largest if wish.scales == "block" else largest.amax(2, keepdim=True)) / 448


def spread(scale: Tensor, length: int) -> Tensor:
    """A scale for each token."""
    if scale.shape[2] == 1:
        return scale.unsqueeze(3)
    return scale.repeat_interleave(BLOCK, 2)[:, :, :length, None]


def in_token_order(value: Tensor, dim: int, length: int) -> Tensor:
    """[batch, heads, length, dim] of a quantised value, by the order that `quantise_values` describes."""
    batch, heads = value.shape[:2]
    tiles = value.float().view(batch, heads, -1, dim, 8, 4, 2, 2)  # a column of a tile: 16 a + 4 c + 2 j + e
    tokens = tiles.permute(0, 1, 2, 4, 6, 5, 7, 3)  # token 16 a + 8 j + 2 c + e
    return tokens.reshape(batch, heads, -1, dim)[:, :, :length]


@pytest.mark.parametrize("wish", [Wish("block"), Wish("head"), Wish("block", True), Wish("head", True)], ids=str)
@pytest.mark.parametrize("dim", [64, 96])
def test_operands_times_their_scales_are_what_was_given(wish: Wish, dim: int, generator: torch.Generator) -> None:
    found, query, key, value = quantised(wish, dim, generator)
    mean = key.float().mean(2, keepdim=True) if wish.centred else 0.0
    wide = padded(dim)
    turned = in_token_order(found.value, wide, value.shape[2])
    for got, scale, want in (
        (found.query.float(), found.query_scale, query.float()),
        (found.key.float(), found.key_scale, key.float() - mean),
        (turned, found.value_scale, value.float()),
    ):
        assert not got[..., dim:].any()
        torch.testing.assert_close(scale, scales(want, wish), rtol=1e-3, atol=0)
        each = spread(scale, want.shape[2])
        # Of the number itself, or of the smallest number that has all its digits.
        allowed = HALF_STEP * want.abs().maximum(each * 2**-6)
        assert ((got[..., :dim] * each - want).abs() <= allowed * 1.01).all()


def test_products_with_the_mean_of_the_keys(generator: torch.Generator) -> None:
    found, query, key, _ = quantised(Wish("block", True), 64, generator)
    mean = key.float().mean(2, keepdim=True).repeat_interleave(2, 1)
    assert found.dots is not None
    torch.testing.assert_close(found.dots, (query.float() * mean).sum(3) * SCALE, rtol=1e-3, atol=1e-3)


def test_values_behind_the_last_token_are_zero(generator: torch.Generator) -> None:
    found, _, _, value = quantised(Wish("block"), 64, generator, (64, 130))
    whole = in_token_order(found.value, 64, 2 * BLOCK)
    assert whole[:, :, : value.shape[2]].any()
    assert not whole[:, :, value.shape[2] :].any()


def test_a_block_of_zeros_has_the_scale_1(generator: torch.Generator) -> None:
    query, key = torch.randn(1, 1, 130, 64, generator=generator).half(), torch.zeros(1, 1, 130, 64).half()
    with borrowing(CONTEXT.memory) as borrow:
        found = Quantiser(CONTEXT, Wish())(borrow, query, key, key, SCALE, False)
        assert (found.key_scale == 1).all()
        assert (found.value_scale == 1).all()
        assert found.dots is None
        assert not found.key.float().any()


@pytest.mark.parametrize("wish", [Wish("block"), Wish("head", True)], ids=str)
def test_the_bytes_that_estimates_count_are_those_that_are_borrowed(wish: Wish, generator: torch.Generator) -> None:
    query, key = (torch.randn(2, heads, 300, 96, generator=generator).half() for heads in (4, 2))
    counted = 0
    with borrowing(CONTEXT.memory) as borrow:

        def counting(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            nonlocal counted
            counted += torch.Size(shape).numel() * dtype.itemsize
            return borrow(shape, dtype)

        Quantiser(CONTEXT, wish)(counting, query, key, key, SCALE, True)  # type: ignore[arg-type]
    options = (("fp8", wish.scales + " centred" * wish.centred),)
    request = AttentionRequest(
        batch=2,
        heads_q=4,
        heads_kv=2,
        len_q=300,
        len_k=300,
        dim_qk=96,
        dim_v=96,
        dtype="float16",
        lse=True,
        options=options,
    )
    assert counted == quantised_bytes(request)
    assert blocks_of(300) == 3
