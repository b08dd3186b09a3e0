"""Quantised caches and used lengths on a GPU: its instructions take codes apart that the interpreter lacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.testing import reference, relative_error


def held_to_float64(gpu: str, dtype: str, kind: torch.dtype, dim: int, len_q: int, **options: Any) -> float:
    query = torch.randn(3, 16, len_q, dim, device=gpu).to(kind)
    key, value = (torch.randn(3, 2, 1500, dim, device=gpu) for _ in range(2))
    key[..., 1::9] *= 12.0
    query[..., 1::9] /= 12.0
    cache = hal.quantize_cache(key, value, dtype, **options)
    given = {"key_scale": cache.key_scale, "value_scale": cache.value_scale, "causal": "bottom_right"}
    out = hal.attention(query, cache.key, cache.value, enable_gqa=True, backend=gpu, **given)
    numbers = [hal.dequantized(c, s, torch.float64) for c, s in zip(cache[:2], cache[2:], strict=True)]
    return relative_error(out, reference(query.double(), *numbers, causal="bottom_right").out)


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("dim", [64, 128])
def test_codes_are_read_as_the_numbers_they_stand_for(gpu: str, dtype: str, dim: int) -> None:
    for kind, bound in ((torch.bfloat16, 5e-3), (torch.float16, 1e-3)):
        for len_q in (1, 40):
            assert held_to_float64(gpu, dtype, kind, dim, len_q) <= bound


def test_values_may_be_scaled_by_head(gpu: str) -> None:
    assert held_to_float64(gpu, "int8", torch.bfloat16, 128, 1, values="head", shared=True) <= 5e-3


def test_used_lengths_end_each_cache(gpu: str) -> None:
    query = torch.randn(3, 8, 1, 128, device=gpu, dtype=torch.bfloat16)
    key, value = (torch.randn(3, 2, 4000, 128, device=gpu, dtype=torch.bfloat16) for _ in range(2))
    held = torch.tensor([4000, 1, 1234], device=gpu, dtype=torch.int32)
    for s, count in enumerate(held.tolist()):
        key[s, :, count:] = torch.nan
    out = hal.attention(query, key, value, enable_gqa=True, cache_seqlens=held, backend=gpu)
    for s, count in enumerate(held.tolist()):
        want = reference(query[s, None], key[s, None, :, :count], value[s, None, :, :count]).out
        assert relative_error(out[s, None], want) <= 5e-3
