"""Attention on every device that runs compute programs: what the conformance kit does not ask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core.testing import relative_error


@pytest.mark.parametrize("given", [torch.float32, torch.float16])
def test_gradients_come_from_an_output_of_either_dtype(device: str, given: torch.dtype, seed: int) -> None:
    generator, session = torch.Generator().manual_seed(seed), hal.session(device)
    query, key, value, grad = (torch.randn(1, 2, 17, 32, generator=generator).half() for _ in range(4))
    request = hal.AttentionRequest(1, 2, 2, 17, 17, 32, 32, "float16", lse=True, grads=frozenset("qkv"))
    prepared: Any = session.prepare_attention(query, key, value, request=request)
    out, lse = session.compute_attention(prepared)
    found = session.compute_attention_backward(prepared, out.to(given), lse, grad.to(given))
    leaves = [t.double().requires_grad_() for t in (query, key, value)]
    torch.nn.functional.scaled_dot_product_attention(*leaves).backward(grad.double())
    assert all(relative_error(x, leaf.grad) <= 5e-3 for x, leaf in zip(found, leaves, strict=False))


def test_a_large_batch_of_short_sequences_is_attended_to(device: str, seed: int) -> None:
    """65,600 units, where many drivers take 65,535 work groups along a dimension."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(8200, 8, 2, 32, generator=generator) for _ in range(3))
    out = hal.attention(query, key, value, backend=device)
    assert relative_error(out, torch.nn.functional.scaled_dot_product_attention(query, key, value)) <= 1e-5
