"""Estimated memory beside the peak of torch's CPU allocator, for every kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hal_cpu.backend import CpuBackend
from hal_cpu.session import CpuSession
from torch import Tensor

import hal_core as hal
from hal_core import Causal
from hal_core.testing import request_of

#: What an estimate may be off by: a tenth, and bytes.
SHARE, SLACK = 0.10, 64 << 10


def allocator_peak(call: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator holds at the call's peak beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


PLAIN: dict[str, Any] = {}
CASES: dict[str, dict[str, Any]] = {
    "native": {},
    "native, causal": {"is_causal": True},
    "native, boolean mask of every head": {"mask": (2, 8), "boolean": True},
    "native, additive mask of every head": {"mask": (2, 8)},
    "native, value dim": {"dim_v": 32},
    "native, strided": {"strided": True},
    "packed": {"len_q": 1, "len_k": 4096},
    "packed, rows": {"len_q": 7, "len_k": 2048},
    "packed, mask": {"len_q": 7, "len_k": 2048, "mask": (2, 1), "boolean": True},
    "fused": {"return_lse": True},
    "fused, shifted": {"causal": Causal.BOTTOM_RIGHT, "len_q": 300, "return_lse": True},
    "decode": {"len_q": 1, "len_k": 4096, "softcap": 20.0},
    "decode, mask of every head": {"len_q": 1, "len_k": 4096, "return_lse": True, "mask": (2, 8)},
    "decode, window": {"len_q": 4, "len_k": 4096, "window": (900, 0)},
    "tiled": {"softcap": 20.0},
    "tiled, window": {"window": (200, 0), "is_causal": True},
    "tiled, mask of every head": {"mask": (2, 8), "return_lse": True},
    "tiled, boolean mask of every head": {"mask": (2, 8), "boolean": True, "return_lse": True},
    "dropout": {"dropout_p": 0.1},
    "block plan": {"plan": True},
    "paged": {"page": 16, "len_q": 1, "len_k": 2048},
    "paged, many rows": {"page": 16, "len_q": 64, "len_k": 1024},
    "packed sequences": {"sequences": True},
    "backward, block plan": {"plan": True, "grads": "qkv"},
    "block plan, strided": {"plan": True, "strided": True, "len_k": 896},
    "backward, tiled": {"softcap": 20.0, "grads": "qkv"},
    "backward, mask": {"mask": (2, 8), "grads": "qkvm"},
    "backward, dropout": {"dropout_p": 0.2, "grads": "qkv"},
    "backward, fused": {"return_lse": True, "grads": "qkv"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_estimated_memory_is_the_allocators_peak(name: str, dtype: torch.dtype) -> None:
    options = dict(CASES[name])
    grads = frozenset("mask" if letter == "m" else letter for letter in options.pop("grads", ""))
    len_q, len_k, dim_v = options.pop("len_q", 700), options.pop("len_k", 900), options.pop("dim_v", 64)
    query = normal(2, 8, len_q, 64, dtype=dtype)
    key, value = normal(2, 2, len_k, 64, dtype=dtype), normal(2, 2, len_k, dim_v, dtype=dtype)
    mask = plan = tables = None
    if options.pop("strided", False):
        query, key, value = (t.mT.contiguous().mT for t in (query, key, value))
    if (shape := options.pop("mask", None)) is not None:
        mask = (
            torch.rand(*shape, len_q, len_k) > 0.3
            if options.pop("boolean", False)
            else normal(*shape, len_q, len_k, dtype=dtype)
        )
    if options.pop("plan", False):
        blocks = torch.arange(14, dtype=torch.int32).expand(1, 1, 11, 14)
        plan = hal.BlockPlan(64, 64, blocks, torch.full((1, 1, 11), 14, dtype=torch.int32))
    if (page := options.pop("page", None)) is not None:
        many = len_k // page
        key, value = (normal(2 * many, 2, page, 64, dtype=dtype) for _ in range(2))
        held = torch.full((2,), len_k, dtype=torch.int32)
        tables = hal.SequenceMetadata(page_table=torch.arange(2 * many).view(2, many).int(), cache_seqlens=held)
    if options.pop("sequences", False):
        query, key, value = (t.transpose(0, 1).reshape(1, t.shape[1], -1, t.shape[3]) for t in (query, key, value))
        ends = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (len_q, len_k))
        tables = hal.SequenceMetadata(*ends)
    request = request_of(query, key, value, mask, plan=plan, tables=tables, grads=grads, **options)
    device = hal.device("cpu:0")
    session = CpuSession(device)

    def call() -> Any:
        attend = session.bind(request)
        if not grads:
            return attend(query, key, value, mask, plan, tables, (0, 0))
        prepared = session.prepare_attention(query, key, value, request=request, plan=plan, tables=tables)
        out, lse = session.compute_attention(prepared, mask, rng=(0, 0))
        return out, lse, session.compute_attention_backward(prepared, out, lse, flowing, mask, rng=(0, 0))

    if grads:
        from dataclasses import replace

        request = replace(request, lse=True)
        flowing = normal(*query.shape[:3], dim_v, dtype=dtype)
    with torch.no_grad():
        call()  # what is made once in a process
        session.memory.trim()
        peak = allocator_peak(call)
    estimated = CpuBackend().estimate(request, device).memory
    assert abs(estimated - peak) <= SHARE * peak + SLACK, f"{peak:,} bytes at the peak, {estimated:,} estimated"


@pytest.mark.parametrize("kind", ["paged", "paged, many rows", "packed, widened", "packed, backward"])
def test_sequences_of_different_lengths_share_their_scratch_memory(kind: str) -> None:
    """The pool reuses a block for its own size class alone: each length would add one."""
    lengths = (500, 300, 400)
    session, len_q = CpuSession(hal.device("cpu:0")), 64 if kind == "paged, many rows" else 1

    def pooled(lengths: tuple[int, ...]) -> int:
        count, total, held = len(lengths), sum(lengths), torch.tensor(lengths, dtype=torch.int32)
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        if kind.startswith("paged"):
            query = torch.randn(count, 4, len_q, 64)
            key, value = torch.randn(2, total, 4, 1, 64)
            table = torch.zeros(count, max(lengths), dtype=torch.int32)
            for row, length, start in zip(table, lengths, ends.tolist(), strict=False):
                row[:length] = torch.arange(start, start + length)
            tables = hal.SequenceMetadata(page_table=table, cache_seqlens=held)
        else:
            dtype = torch.float16 if kind == "packed, widened" else torch.float32
            query, key, value = torch.randn(3, 1, 4, total, 64).to(dtype)
            tables = hal.SequenceMetadata(cu_seqlens_q=ends, cu_seqlens_k=ends)
        backward = kind == "packed, backward"
        request = request_of(
            query,
            key,
            value,
            tables=tables,
            softcap=20.0 if backward else None,
            return_lse=backward,
            grads=frozenset("qkv" if backward else ""),
        )
        session.memory.trim()
        prepared = session.prepare_attention(query, key, value, request=request, tables=tables)
        out, lse = session.compute_attention(prepared)
        if backward:
            session.compute_attention_backward(prepared, out, lse, torch.ones_like(out))
        return session.memory.stats().pooled

    assert 0 < pooled(lengths) <= max(pooled((length,)) for length in lengths)
    assert session.memory.stats().in_use == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_the_estimate_counts_the_threads_that_torch_has(threads: int) -> None:
    query = torch.randn(1, 4, 800, 64)
    request, device, before = request_of(query, query, query), hal.device("cpu:0"), torch.get_num_threads()
    attend = CpuSession(device).bind(request)
    torch.set_num_threads(threads)
    try:
        peak = allocator_peak(lambda: attend(query, query, query))
        assert CpuBackend().estimate(request, device).memory == peak
    finally:
        torch.set_num_threads(before)
