"""The CPU's session: which path requests take, memory and its limit, threads, repeatability."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hal_cpu.backend import CAPABILITIES, CpuBackend
from hal_cpu.discovery import this_machine
from hal_cpu.paths import path_of
from hal_cpu.session import CpuSession
from torch.nn.functional import scaled_dot_product_attention as sdpa

import hal_core as hal
from hal_core import AttentionRequest, Causal, MaskKind, MemoryLimitError
from hal_core.testing import request_of

PLAIN = AttentionRequest(2, 8, 8, 512, 512, 64, 64, "float32")
DECODE = AttentionRequest(1, 32, 8, 1, 1024, 64, 64, "float32")


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (PLAIN, "native"),
        (replace(PLAIN, causal=Causal.TOP_LEFT), "native"),
        (replace(PLAIN, mask=MaskKind.BOOLEAN), "native"),
        (replace(PLAIN, dim_v=32, grads=frozenset("qkv")), "native"),
        (replace(PLAIN, lse=True), "fused"),
        (replace(PLAIN, causal=Causal.BOTTOM_RIGHT), "fused"),
        (replace(PLAIN, causal=Causal.TOP_LEFT, diagonal=3), "fused"),
        (replace(PLAIN, causal=Causal.TOP_LEFT, mask=MaskKind.BOOLEAN), "tiled"),
        (replace(PLAIN, softcap=30.0), "tiled"),
        (replace(PLAIN, window=(10, 10)), "tiled"),
        (replace(PLAIN, dropout=0.1), "tiled"),
        (replace(PLAIN, mask=MaskKind.ADDITIVE, grads=frozenset({"mask"})), "tiled"),
        (DECODE, "packed"),
        (replace(DECODE, causal=Causal.BOTTOM_RIGHT), "packed"),
        (replace(DECODE, mask=MaskKind.BOOLEAN), "packed"),
        (replace(DECODE, grads=frozenset("q")), "native"),
        (replace(DECODE, softcap=30.0), "decode"),
        (replace(DECODE, page_size=16), "decode"),
        (replace(DECODE, len_k=1 << 22), "packed"),
    ],
    ids=str,
)
def test_requests_take_the_path_that_is_right_and_fast(request_: AttentionRequest, path: str) -> None:
    assert path_of(request_) == path


def test_a_plain_call_is_torchs_own_bit_for_bit(seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(2, 4, 100, 32) for _ in range(3))
    assert torch.equal(
        hal.attention(query, key, value, is_causal=True, backend="cpu"), sdpa(query, key, value, is_causal=True)
    )


def test_torch_differentiates_plain_calls_and_the_core_the_others() -> None:
    session = CpuSession(hal.devices()[0])
    assert session.autograd(replace(PLAIN, grads=frozenset("qkv"))) == "native"
    assert session.autograd(replace(PLAIN, grads=frozenset("qkv"), softcap=5.0)) == "explicit"


def test_scratch_over_the_limit_is_refused_before_it_is_allocated() -> None:
    session = CpuSession(hal.devices()[0], limit=1 << 16)
    query = torch.randn(1, 4, 512, 64)
    prepared = session.prepare_attention(query, query, query, request=request_of(query, query, query, softcap=5.0))
    with pytest.raises(MemoryLimitError) as refused:
        session.compute_attention(prepared)
    assert refused.value.requested > refused.value.limit == 1 << 16
    assert session.memory.stats().in_use == session.memory.stats().peak == 0


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"softcap": 5.0, "dropout_p": 0.2}, {"window": (5, 5)}], ids=str)
def test_scratch_is_given_back_and_used_again(options: dict[str, object]) -> None:
    session = CpuSession(hal.devices()[0])
    query = torch.randn(1, 4, 300, 64)
    prepared = session.prepare_attention(query, query, query, request=request_of(query, query, query, **options))
    for _ in range(3):
        session.compute_attention(prepared, rng=(0, 0))
    stats = session.memory.stats()
    assert stats.in_use == 0
    assert stats.reuses == 2
    session.close()
    session.close()
    assert session.memory.stats().pooled == 0


@pytest.mark.parametrize("backward", [False, True])
def test_memory_grows_with_the_lengths_and_not_their_product(backward: bool) -> None:
    peaks = []
    for length in (2048, 4096):
        session = CpuSession(hal.devices()[0])
        query = torch.randn(1, 1, length, 8)
        grads = frozenset("qkv") if backward else frozenset()
        request = request_of(query, query, query, softcap=5.0, return_lse=True, grads=grads)
        prepared = session.prepare_attention(query, query, query, request=request)
        out, lse = session.compute_attention(prepared)
        if backward:
            session.compute_attention_backward(prepared, out, lse, out)
        peaks.append(session.memory.stats().peak + out.nbytes)
    assert peaks[1] <= 2.2 * peaks[0]


@pytest.mark.parametrize(
    "change",
    [
        {"softcap": 30.0},
        {"softcap": 30.0, "grads": frozenset("qkv"), "lse": True},
        {"window": (100, 0)},
        {"dropout": 0.1},
        {"len_q": 1, "softcap": 30.0},
        {"len_q": 1, "softcap": 30.0, "dtype": "bfloat16"},
        {"len_q": 1, "batch": 9, "softcap": 1.0},
    ],
    ids=str,
)
def test_estimated_memory_covers_what_is_used(change: dict[str, object]) -> None:
    request = replace(AttentionRequest(2, 8, 2, 700, 900, 64, 32, "float32"), **change)
    device = hal.devices()[0]
    dtype = getattr(torch, request.dtype)
    query = torch.randn(request.batch, 8, request.len_q, 64).to(dtype)
    key, value = (torch.randn(request.batch, 2, request.len_k, dim).to(dtype) for dim in (64, 32))
    session = CpuSession(device)
    prepared = session.prepare_attention(query, key, value, request=request)
    out, lse = session.compute_attention(prepared, rng=(0, 0))
    results = out.nbytes + (lse.nbytes if lse is not None else 0)
    if request.grads:
        grads = session.compute_attention_backward(prepared, out, lse, out)
        results += sum(grad.nbytes for grad in grads if grad is not None)
    assert session.memory.stats().peak + results <= CpuBackend().estimate(request, device).memory


def test_eight_threads_give_what_one_gives(seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 4, 300, 32) for _ in range(3))
    calls = [{"softcap": 5.0}, {"window": (20, 0)}, {"return_lse": True}, {}]
    want = [hal.attention(query, key, value, backend="cpu", **options) for options in calls]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda options: hal.attention(query, key, value, backend="cpu", **options), calls * 8))
    for number, got in enumerate(found):
        for one, other in zip(_tensors(got), _tensors(want[number % 4]), strict=True):
            assert torch.equal(one, other)


def _tensors(result: object) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)  # type: ignore[return-value]


def test_a_bound_call_reads_lengths_from_its_tensors(seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = torch.randn(1, 8, 1, 32), torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32)
    for options in ({}, {"softcap": 5.0}, {"return_lse": True}):
        bound = hal.bind(query, key, value, enable_gqa=True, max_len_k=4096, backend="cpu", **options)
        for length in (1, 7, 300, 4096):
            key, value = torch.randn(1, 2, length, 32), torch.randn(1, 2, length, 32)
            want = hal.attention(query, key, value, enable_gqa=True, backend="cpu", **options)
            for one, other in zip(_tensors(bound(query, key, value)), _tensors(want), strict=True):
                assert torch.allclose(one, other, atol=1e-5)


def test_out_is_written_where_it_is_given() -> None:
    session = CpuSession(hal.devices()[0])
    query = torch.randn(1, 2, 40, 8)
    out = torch.full_like(query, math.nan)
    prepared = session.prepare_attention(query, query, query, request=request_of(query, query, query, softcap=2.0))
    assert session.compute_attention(prepared, out=out).out is out
    assert out.isfinite().all()


def test_queries_stream_past_prepared_keys() -> None:
    session = CpuSession(hal.devices()[0])
    query, other = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 9, 8)
    request = request_of(query, query, query)
    prepared = session.prepare_attention(query, query, query, request=request)
    assert torch.equal(session.compute_attention(prepared, query=other).out, sdpa(other, query, query))


@pytest.mark.parametrize("change", [{"page_size": 16}, {"cache_dtype": "float8_e4m3fn"}])
def test_gradients_through_a_cache_are_refused(change: dict[str, object]) -> None:
    backend, device = CpuBackend(), hal.devices()[0]
    request = replace(DECODE, grads=frozenset("q"), **change)
    assert not CAPABILITIES.refusals(request)
    assert [refusal.code for refusal in backend.check(request, device)] == ["backward"]
    assert not list(backend.check(replace(request, grads=frozenset()), device))


def test_tile_sizes_come_from_the_cache() -> None:
    session = CpuSession(hal.devices()[0])
    tile = session.optimize_tiling(1 << 20, 1, 8)["tile_size"]
    assert tile * (4 * 64 * 4 + 4 * tile) <= this_machine().l2 < 2 * tile * (4 * 64 * 4 + 8 * tile)
    assert session.optimize_tiling(40, 1, 8)["tile_size"] == 64
