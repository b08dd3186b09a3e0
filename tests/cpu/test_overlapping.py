"""Tensors whose elements share memory: overlapping windows and expanded dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hal_core as hal
from hal_core.testing import relative_error

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"scale": 0.3},
    {"return_lse": True},
    {"causal": "bottom_right", "diagonal": 1},
    {"softcap": 5.0},
    {"attn_mask": torch.ones(1, 1, dtype=torch.bool)},
)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-12}


def overlapping(length: int, dtype: torch.dtype) -> Tensor:
    """[2, 2, length, 16] in which each row begins one number after the one before."""
    return torch.randn(2, 2, length + 15).to(dtype).unfold(2, 16, 1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("which", ["query", "key", "value", "all"])
def test_overlapping_rows_give_what_copies_give(
    which: str, dtype: torch.dtype, options: dict[str, Any], seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = {name: torch.randn(2, 2, 4, 16).to(dtype) for name in ("query", "key", "value")}
    for name in tensors if which == "all" else (which,):
        tensors[name] = overlapping(4, dtype)
    want = hal.attention(
        *(t.clone(memory_format=torch.contiguous_format) for t in tensors.values()), **options, backend="cpu"
    )
    got = hal.attention(*tensors.values(), **options, backend="cpu")
    for one, other in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want)), strict=True):
        assert relative_error(one, other) <= BOUNDS[dtype]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_gradients_of_overlapping_rows_are_those_of_copies(
    dtype: torch.dtype, options: dict[str, Any], seed: int
) -> None:
    torch.manual_seed(seed)
    base = torch.randn(2, 2, 19).to(dtype).requires_grad_()
    key, value = (torch.randn(2, 2, 4, 16).to(dtype) for _ in range(2))
    found = []
    for copied in (False, True):
        query = base.unfold(2, 16, 1)
        result = hal.attention(query.contiguous() if copied else query, key, value, **options, backend="cpu")
        out = result if isinstance(result, Tensor) else result.out
        found += torch.autograd.grad(out.square().sum(), base)
    assert relative_error(*found) <= 4 * BOUNDS[dtype]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_expanded_dimensions_give_what_copies_give(dim: int, options: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    shape = [2, 2, 5, 16]
    shape[dim] = 1
    tensors = [torch.randn(shape).expand(2, 2, 5, 16) for _ in range(3)]
    want = hal.attention(*(t.contiguous() for t in tensors), **options, backend="cpu")
    got = hal.attention(*tensors, **options, backend="cpu")
    for one, other in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want)), strict=True):
        assert relative_error(one, other) <= 1e-5
