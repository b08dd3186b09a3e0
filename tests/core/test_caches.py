"""Making caches of few bits, and reading them as numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hal_core as hal

STEPS = {"int8": 1 / 127, "int4": 1 / 7, "float8_e4m3fn": 1 / 14, "float8_e5m2": 1 / 7}


@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize("values", ["token", "head"])
def test_numbers_come_back_within_half_a_step(dtype: str, values: str) -> None:
    key, value = torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    key[..., 5] *= 100.0
    cache = hal.quantize_cache(key, value, dtype, values=values)
    largest = value.abs().amax(-1 if values == "token" else (2, 3), keepdim=True)
    for codes, scale, numbers, bound in (
        (cache.key, cache.key_scale, key, key.abs().amax(2, keepdim=True)),
        (cache.value, cache.value_scale, value, largest),
    ):
        assert bool(((hal.dequantized(codes, scale) - numbers).abs() <= bound * STEPS[dtype] * 0.501).all())


def test_two_int4_share_a_byte_the_even_channel_below() -> None:
    numbers = torch.tensor([[-7.0, 7.0, 3.0, -1.0]]).view(1, 1, 1, 4)
    cache = hal.quantize_cache(numbers, numbers, "int4")
    assert cache.value.flatten().tolist() == [0x79, 0xF3]
    assert torch.equal(hal.dequantized(cache.value, cache.value_scale), numbers)


def test_new_tokens_fit_the_scales_of_their_cache() -> None:
    key, value = torch.randn(1, 2, 30, 8), torch.randn(1, 2, 31, 8)
    cache = hal.quantize_cache(key, value[:, :, :30])
    more = hal.quantize_cache(100.0 * key[:, :, :1], value[:, :, 30:], key_scale=cache.key_scale)
    assert torch.equal(more.key_scale, cache.key_scale)
    assert int(more.key.abs().max()) == 127
    codes = torch.cat([cache.key, more.key], 2), torch.cat([cache.value, more.value], 2)
    scales = {"key_scale": cache.key_scale, "value_scale": torch.cat([cache.value_scale, more.value_scale], 2)}
    assert hal.attention(key[:, :, :1], *codes, backend="cpu", **scales).shape == (1, 2, 1, 8)


def test_zeros_and_pages_have_scales() -> None:
    zeros, pages = torch.zeros(1, 1, 4, 8), torch.randn(5, 2, 16, 8)
    assert torch.equal(hal.dequantized(*hal.quantize_cache(zeros, zeros)[0::2]), zeros)
    cache = hal.quantize_cache(pages, pages, shared=True)
    assert cache.key_scale.shape == (1, 2, 1, 8)
    assert cache.value_scale.shape == (5, 2, 16, 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int3"}, "cache dtype 'int3'"),
        ({"values": "channel"}, "values 'channel'"),
        ({"dtype": "int4"}, "use even ones"),
    ],
)
def test_what_cannot_be_quantized_is_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(hal.ContractError, match=said):
        hal.quantize_cache(torch.randn(1, 1, 4, 7), torch.randn(1, 1, 4, 7), **options)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (torch.randn(1, 2, 300, 8), torch.randn(1, 2, 10, 8)),
        (torch.randn(2, 30, 8), torch.randn(2, 30, 8)),
        ([1.0], [2.0]),
    ],
)
def test_keys_and_values_that_are_no_cache_are_refused(key, value):
    with pytest.raises(hal.ContractError, match=r"use tensors of \[batch, heads_kv, length, dim\]"):
        hal.quantize_cache(key, value, "int8")
