"""Additive masks with the lowest finite numbers, as Hugging Face writes them: finite, so never the same as -inf."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hal_core as hal
from hal_core.testing import reference, reference_gradients, relative_error

LOWEST = torch.finfo(torch.float32).min
#: Options that lead to torch's kernel, packed heads, the decode kernel and the tiled kernel.
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"return_lse": True},
    {"softcap": 5.0, "return_lse": True},
    {"window": (9, 9)},
    {"is_causal": True, "return_lse": True},
)


def operands(len_q: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and a mask: row 0 wholly at the lowest number, row 1 in part, and the first batch's row 0 with
    -inf among it.
    """
    query = torch.randn(2, 4, len_q, 16, dtype=dtype)
    key, value = (torch.randn(2, 2, 24, 16, dtype=dtype) for _ in range(2))
    mask = torch.zeros(2, 1, len_q, 24, dtype=dtype)
    lowest = torch.finfo(dtype).min
    mask[:, :, 0] = lowest
    mask[:, :, -1, 5:] = lowest
    mask[0, :, 0, 3:7] = -math.inf
    if len_q == 1:
        mask[1] = lowest
    return query, key, value, mask


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("len_q", [1, 3, 40])
def test_a_row_at_the_lowest_finite_number_gives_the_mean(len_q: int, options: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value, mask = operands(len_q)
    result = hal.attention(query, key, value, mask, enable_gqa=True, backend="cpu", **options)
    out, lse = result if isinstance(result, tuple) else (result, None)
    want, want_lse = reference(query, key, value, mask, **options)
    assert relative_error(out, want) <= 1e-5
    if lse is not None:
        assert relative_error(lse, want_lse) <= 1e-5
        assert torch.equal(lse.isinf(), want_lse.isinf())


@pytest.mark.parametrize("len_q", [1, 40])
def test_the_output_does_not_depend_on_the_log_sum_exp_being_asked_for(len_q: int, seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value, mask = operands(len_q)
    plain = hal.attention(query, key, value, mask, enable_gqa=True, backend="cpu")
    with_lse = hal.attention(query, key, value, mask, enable_gqa=True, backend="cpu", return_lse=True).out
    assert relative_error(with_lse, plain) <= 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("trainable", [False, True])
def test_gradients_of_rows_at_the_lowest_number_agree_with_float64(
    options: dict[str, Any], trainable: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    query, key, value, mask = operands(40)
    leaves = [t.requires_grad_() for t in (query, key, value)] + [mask.requires_grad_(trainable)]
    result = hal.attention(*leaves, enable_gqa=True, backend="cpu", **options)
    out = result[0] if isinstance(result, tuple) else result
    grad_out = torch.randn(out.shape)
    (out * grad_out).sum().backward()
    wanted = reference_gradients(query, key, value, mask, grad_out=grad_out, **options)
    for leaf, grad in zip(leaves, wanted, strict=True):
        if leaf.requires_grad:
            assert leaf.grad is not None
            error = float((leaf.grad.double() - grad).norm())
            assert error <= 1e-5 * (float(grad.norm()) + 0.1 * float(grad_out.norm()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_the_lowest_number_of_every_dtype_is_finite(dtype: torch.dtype, options: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value, mask = operands(40, dtype)
    result = hal.attention(query, key, value, mask, enable_gqa=True, backend="cpu", **options)
    out = result[0] if isinstance(result, tuple) else result
    bound = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-12}[dtype]
    assert relative_error(out, reference(query, key, value, mask, **options).out) <= bound
