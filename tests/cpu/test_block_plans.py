"""Block plans as products over gathered blocks: agreement with a masked float64 reference, and the time they save."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hal_cpu.paths import path_of
from torch import Tensor

import hal_core as hal
from hal_core.testing import reference, relative_error, request_of


def plan_of(
    batch: int, heads: int, rows: int, columns: int, most: int, size: tuple[int, int] = (32, 32)
) -> hal.BlockPlan:
    """Random lists that are padded, and that hold some blocks twice."""
    indices = torch.randint(0, columns, (batch, heads, rows, most), dtype=torch.int32)
    return hal.BlockPlan(*size, indices, torch.randint(0, most + 1, (batch, heads, rows), dtype=torch.int32))


@pytest.mark.parametrize("causal", ["none", "top_left", "bottom_right"])
@pytest.mark.parametrize("plan_heads", [1, 4])
@pytest.mark.parametrize("lengths", [(96, 96), (100, 150), (20, 150), (1, 150), (150, 40)])
def test_products_over_blocks_agree_with_float64(
    lengths: tuple[int, int], plan_heads: int, causal: str, seed: int
) -> None:
    torch.manual_seed(seed)
    len_q, len_k = lengths
    query, key, value = torch.randn(2, 4, len_q, 16), torch.randn(2, 2, len_k, 16), torch.randn(2, 2, len_k, 24)
    plan = plan_of(2, plan_heads, -(-len_q // 32), -(-len_k // 32), 2)
    request = request_of(query, key, value, plan=plan, causal=causal, return_lse=True)
    assert path_of(request) == "blocks"
    leaves = [t.requires_grad_() for t in (query, key, value)]
    options: dict[str, Any] = {"block_plan": plan, "causal": causal, "enable_gqa": True, "backend": "cpu"}
    out, lse = hal.attention(*leaves, return_lse=True, **options)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    mask = hal.expand_block_plan(plan, len_q, len_k)
    want = reference(*wide, mask, request=request_of(*wide, mask, causal=causal))
    assert relative_error(out, want.out) <= 1e-5
    finite = want.lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert relative_error(lse[finite], want.lse[finite]) <= 1e-5
    if float(want.out.detach().abs().max()) == 0:
        return
    flowing = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, flowing)
    for mine, theirs in zip(got, torch.autograd.grad(want.out, wide, flowing.double()), strict=True):
        assert relative_error(mine, theirs) <= 1e-5


def test_blocks_that_no_row_sees_are_not_read(seed: int) -> None:
    """NaN in keys that the plan leaves out, and in padding entries' blocks, does not reach any result."""
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 2, 128, 16) for _ in range(3))
    key[:, :, 96:], value[:, :, 96:] = torch.nan, torch.inf
    indices = torch.tensor([[0, 3, 3], [2, 0, 3], [1, 2, 3], [0, 3, 3]], dtype=torch.int32)[None, None]
    plan = hal.BlockPlan(32, 32, indices, torch.tensor([[[1, 2, 2, 0]]], dtype=torch.int32))
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out = hal.attention(*leaves, block_plan=plan, backend="cpu")
    assert bool(out.isfinite().all())
    assert float(out[:, :, 96:].detach().abs().max()) == 0
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in grads)
    assert float(grads[1][:, :, 96:].abs().max()) == 0


def median_processor_time(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Of interleaved rounds, in one thread: what other programs do does not count."""
    times: list[list[float]] = [[] for _ in calls]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(rounds + 1):
            for place, call in enumerate(calls):
                start = time.process_time()
                call()
                if number:
                    times[place].append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return [statistics.median(each) for each in times]


@pytest.mark.slow
@pytest.mark.parametrize("block", [32, 64])
def test_a_quarter_of_the_blocks_takes_less_time_than_dense_attention(block: int, seed: int) -> None:
    torch.manual_seed(seed)
    tensors = [torch.randn(1, 8, 2048, 64) for _ in range(3)]
    count = 2048 // block
    indices = torch.rand(1, 8, count, count).topk(count // 4).indices.int()
    plan = hal.BlockPlan(block, block, indices, torch.full((1, 8, count), count // 4, dtype=torch.int32))

    def sparse() -> Tensor:
        return hal.attention(*tensors, block_plan=plan, backend="cpu")  # type: ignore[no-any-return]

    sparse_time, dense_time = median_processor_time(
        [sparse, lambda: torch.nn.functional.scaled_dot_product_attention(*tensors)], 7
    )
    assert sparse_time < dense_time
