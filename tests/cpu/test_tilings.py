"""Cuts of the work: the device's own, and tilings that a caller brings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hal_cpu.session import CpuSession
from hal_cpu.tiling import CpuTiling
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hal_core as hal
from hal_core import AttentionRequest, Causal, MaskKind, TilePlan
from hal_core.testing import reference, reference_gradients, relative_error, request_of

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"is_causal": True},
    {"window": (20, 5)},
    {"softcap": 5.0, "causal": Causal.BOTTOM_RIGHT},
)


def drawn(len_q: int, len_k: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, len_q, 16), torch.randn(2, 2, len_k, 16), torch.randn(2, 2, len_k, 24)


def uneven(request: AttentionRequest) -> TilePlan:
    """Row ranges of 1, 2, 4 ... rows, each with key ranges of 7, 14 ... keys."""

    def rows() -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
        start, size = 0, 1
        while start < request.len_q:
            spans, key, width = [], 0, 7
            while key < request.len_k:
                spans.append((key, min(key + width, request.len_k)))
                key, width = key + width, 2 * width
            yield start, min(start + size, request.len_q), tuple(spans)
            start, size = start + size, 2 * size

    return TilePlan.uneven(request, rows(), cut_by="test")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("blocks", [(16, 16), (1, 7), (64, 33), (0, 0)])
def test_a_brought_plan_is_followed_forward_and_backward(
    blocks: tuple[int, int], options: dict[str, Any], seed: int
) -> None:
    torch.manual_seed(seed)
    query, key, value = drawn(50, 70)
    request = request_of(query, key, value, grads=frozenset("qkv"), return_lse=True, **options)
    request = replace(request, tiling=("test", *blocks), grad_lse=False)
    plan = TilePlan.equal(request, *blocks, cut_by="test") if all(blocks) else uneven(request)
    session = CpuSession(hal.device("cpu:0"))
    assert session.autograd(request) == "explicit"
    prepared = session.prepare_attention(query, key, value, request=request, plan=plan)
    out, lse = session.compute_attention(prepared)
    want, want_lse = reference(query, key, value, **options)
    assert relative_error(out, want) <= 1e-5
    assert relative_error(lse, want_lse) <= 1e-5
    grad_out = torch.randn(out.shape)
    found = session.compute_attention_backward(prepared, out, lse, grad_out)
    for got, wanted in zip(found, reference_gradients(query, key, value, grad_out=grad_out, **options), strict=True):
        assert wanted is None or relative_error(got, wanted) <= 1e-5


@pytest.mark.parametrize("len_q", [1, 40])
def test_keys_that_a_plan_leaves_out_are_not_read(len_q: int, seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = drawn(len_q, 64)
    request = replace(request_of(query, key, value), tiling=("test", 0, 0))
    plan = TilePlan.uneven(request, [(0, len_q, ((0, 20), (44, 64)))], cut_by="test")
    key[:, :, 20:44] = value[:, :, 20:44] = torch.nan
    session = CpuSession(hal.device("cpu:0"))
    out = session.compute_attention(session.prepare_attention(query, key, value, request=request, plan=plan)).out
    left = [torch.cat((t[:, :, :20], t[:, :, 44:]), 2) for t in (key, value)]
    assert relative_error(out, reference(query, *left).out) <= 1e-5


def test_kernels_follow_the_sessions_own_tiling(seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = drawn(40, 64)

    class Half(CpuTiling):
        def plan(self, request: AttentionRequest, limits: Any, **content: Any) -> TilePlan:
            return TilePlan.uneven(request, [(0, request.len_q, ((0, 32),))], cut_by="cpu")

    session = CpuSession(hal.device("cpu:0"))
    session.tiling = Half()
    out = session.bind(request_of(query, key, value, softcap=5.0))(query, key, value)
    want = reference(query, key[:, :, :32], value[:, :, :32], softcap=5.0).out
    assert relative_error(out, want) <= 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_attention_takes_a_tiling(options: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    tensors = [t.requires_grad_() for t in drawn(50, 70)]
    tiling = CpuTiling(32, 16)
    out = hal.attention(*tensors, enable_gqa=True, backend="cpu", tiling=tiling, **options)
    grad_out = torch.randn(out.shape)
    found = torch.autograd.grad((out * grad_out).sum(), tensors)
    assert relative_error(out, reference(*tensors, **options).out) <= 1e-5
    for got, wanted in zip(found, reference_gradients(*tensors, grad_out=grad_out, **options), strict=False):
        assert relative_error(got, wanted) <= 1e-5


def test_plans_say_who_cuts() -> None:
    request, tiling = AttentionRequest(1, 8, 8, 1024, 1024, 64, 64, "float32"), CpuTiling()
    assert tiling.plan(request, {}).cut_by == "torch"
    assert tiling.plan(replace(request, lse=True), {}).cut_by == "torch"
    own = tiling.plan(replace(request, softcap=5.0), {})
    assert (own.cut_by, own.block_q, own.block_k) == ("cpu", 512, 512)
    decode = tiling.plan(replace(request, len_q=1, mask=MaskKind.BOOLEAN, lse=True), {})
    assert (decode.cut_by, decode.block_q, decode.block_k) == ("cpu", 1, 1024)


def test_choices_are_cuts_within_the_limits() -> None:
    request = AttentionRequest(1, 8, 8, 1024, 1024, 64, 64, "float32", softcap=5.0)
    choices = CpuTiling().choices(request, {"minimum": 128, "maximum": 512})
    assert (choices[0].block_q, choices[0].block_k) == (512, 512)
    assert len({choice.name for choice in choices}) == len(choices) > 3
    assert all(128 <= size <= 512 for choice in choices for size in (choice.block_q, choice.block_k))


class Products(TorchDispatchMode):
    """Counts products of a query tile and a chunk of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.bmm.out, torch.ops.aten.bmm.default)
        return func(*args, **(kwargs or {}))


def test_the_keys_of_a_window_are_one_chunk_of_each_row_tile() -> None:
    """Chunks start at the first key that a tile's rows see: at multiples of their size, many windows would be two."""
    query, key = torch.randn(1, 8, 2048, 16), torch.randn(1, 2, 2048, 16)
    with Products() as products:
        hal.attention(query, key, key, is_causal=True, window=(255, 0), enable_gqa=True, backend="cpu")
    assert products.count == 2048 // 64
