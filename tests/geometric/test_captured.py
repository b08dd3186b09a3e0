"""Ordering and planning captured as a CUDA graph: refusals everywhere, results where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hal_geometric import AdaptiveTiling, CapturedAttention, adaptive_attention

from hal_core import ContractError

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def clustered(length: int, noise: float, heads_kv: int = 2) -> list[torch.Tensor]:
    """Query of 2 heads, key and value; fresh draws."""
    topics = torch.randn(1, heads_kv, 16, 64)
    key, query = (
        topics[:, :, torch.randint(16, (length,))] + noise * torch.randn(1, heads_kv, length, 64) for _ in range(2)
    )
    tensors = 2 * query.repeat_interleave(2 // heads_kv, 1), key, torch.randn(1, heads_kv, length, 64)
    return [t.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16) for t in tensors]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it is captured")
def test_tensors_elsewhere_are_sent_to_the_plain_call() -> None:
    with pytest.raises(ContractError, match=r"tensors on cpu were given.*call adaptive_attention"):
        CapturedAttention(*clustered(256, 0.1))


@gpu
@pytest.mark.parametrize("heads_kv", [1, 2])
def test_calls_are_those_of_adaptive_attention(heads_kv: int) -> None:
    """Draws of one shape, the last without topics, whose rows are bounded each by itself or which runs dense."""
    tiling = AdaptiveTiling(0.01, block=64, device="cuda:0")
    captured = CapturedAttention(*clustered(2048, 0.1, heads_kv), tiling, backend="cuda")
    results = []
    for noise in (0.1, 0.2, 5.0):
        tensors = clustered(2048, noise, heads_kv)
        found, want = captured(*tensors), adaptive_attention(*tensors, tiling, order=True, backend="cuda")
        assert found.density == pytest.approx(want.density, rel=1e-5)
        assert found.dense == want.dense
        assert torch.equal(found.plan.counts, want.plan.counts)
        assert torch.equal(found.plan.indices, want.plan.indices)
        assert torch.equal(found.out, want.out)
        results.append((found, want))
    for found, want in results:  # a later call writes nothing into an earlier one's result
        assert torch.equal(found.out, want.out)
        assert torch.equal(found.plan.indices, want.plan.indices)


@gpu
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q[:, :, :-64], k, v), "was made for"),
        (lambda q, k, v: (q.float(), k, v), "was made for"),
        (lambda q, k, v: (q.clone().requires_grad_(), k, v), "require gradients"),
    ],
)
def test_other_calls_are_refused(change: Any, words: str) -> None:
    tensors = clustered(256, 0.1)
    captured = CapturedAttention(*tensors, backend="cuda")
    with pytest.raises(ContractError, match=words):
        captured(*change(*tensors))


@gpu
def test_other_modes_are_refused() -> None:
    with pytest.raises(ContractError, match="'certified' without a scorer"):
        CapturedAttention(*clustered(256, 0.1), AdaptiveTiling(mode="exact"))
