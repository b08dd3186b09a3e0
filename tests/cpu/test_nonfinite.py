"""NaN and infinity stay in their own batch entry and key head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import hal_core as hal

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"return_lse": True},
    {"is_causal": True},
    {"softcap": 5.0, "return_lse": True},
    {"window": (9, 9)},
    {"dropout_p": 0.2, "rng": (1, 2)},
    {"attn_mask": torch.ones(1, 1, dtype=torch.bool).expand(40, 40).tril()},
    {"attn_mask": torch.zeros(40, 40)},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_other_batch_entries_and_heads_are_equal_bit_for_bit(
    bad: float, dtype: torch.dtype, options: dict[str, Any], seed: int
) -> None:
    torch.manual_seed(seed)
    clean = [torch.randn(2, heads, 40, 16).to(dtype) for heads in (4, 2, 2)]
    for which in range(3):
        untouched = []
        for number in (1.0, bad):
            tensors = [t.clone() for t in clean]
            tensors[which][0, 0, 0, 3] = number  # batch entry 0, key head 0: query heads 0 and 1 read it
            leaves = [t.requires_grad_() for t in tensors]
            result = hal.attention(*leaves, enable_gqa=True, backend="cpu", **options)
            found = list(result) if isinstance(result, tuple) else [result]
            found += torch.autograd.grad(found[0].square().sum(), leaves)
            untouched.append([part for t in found for part in (t[1], t[0, t.shape[1] // 2 :])])
        for want, got in zip(*untouched, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"softcap": 5.0}, {"window": (9, 0)}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_cache_with_a_bad_number_leaves_other_heads_alone(bad: float, options: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    query = torch.randn(2, 4, 1, 16)
    key, value = (torch.randn(2, 2, 3000, 16) for _ in range(2))
    results = []
    for number in (1.0, bad):
        key[0, 0, 2990, 3] = value[0, 0, 7, 3] = number
        result = hal.attention(query, key, value, enable_gqa=True, backend="cpu", **options)
        results.append(result[0] if isinstance(result, tuple) else result)
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0, 2:], results[1][0, 2:])
