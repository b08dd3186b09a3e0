"""The protocols on a GPU: memory as the estimate says, tilings that are followed, times without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_reference import agrees, draw, exact, on_path

import hal_core as hal
from hal_core import AttentionRequest, Causal, DenseTiling, MaskKind
from hal_core.registry import registry

SLACK = 1 << 16
MASKED = {"mask": MaskKind.BOOLEAN, "mask_batch": 2, "mask_heads": 8}


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("portable", {}),
        ("portable", MASKED),
        ("portable", {"dtype": "float32", "lse": True}),
        ("portable", {"len_q": 1, "len_k": 65536, "deterministic": True}),
        ("hopper", {"lse": True}),
        ("flash", {}),
        ("cudnn", {}),
        ("flash", {"grads": frozenset("qkv")}),
        ("flash", {"grads": frozenset("qkv"), "heads_kv": 2}),
        ("cudnn", {"grads": frozenset("qkv")}),
        ("composed", {"dtype": "float64", "lse": True}),
        ("composed", {"dtype": "float64", "causal": Causal.BOTTOM_RIGHT, **MASKED}),
        ("composed", {"dtype": "float64", "grads": frozenset("qkv"), "softcap": 4.0}),
        ("composed", {"dtype": "float64", "grads": frozenset("qkv"), **MASKED}),
    ],
)
def test_the_allocator_s_peak_is_the_estimate(gpu: str, seed: int, path: str, changes: dict[str, Any]) -> None:
    from hal_cuda import cost

    fields: dict[str, Any] = {
        "batch": 2,
        "heads_q": 8,
        "heads_kv": 8,
        "len_q": 1024,
        "len_k": 1024,
        "dtype": "bfloat16",
    }
    request = AttentionRequest(**{**fields, "dim_qk": 64, "dim_v": 64, "device": gpu, **changes})
    backend: Any = registry.backend_of(gpu)
    chip = backend.chip(registry.find(gpu)[0])
    if path == "hopper" and chip.capability != (9, 0):
        pytest.skip("the Hopper kernel needs compute capability 9.0")
    kind, r = getattr(torch, request.dtype), request
    query = draw(seed, r.batch, r.heads_q, r.len_q, r.dim_qk, kind).requires_grad_(bool(r.grads))
    key, value = (draw(seed + i, r.batch, r.heads_kv, r.len_k, 64, kind).requires_grad_(bool(r.grads)) for i in (1, 2))
    mask = None
    if r.mask is MaskKind.BOOLEAN:
        mask = torch.rand(r.mask_batch, r.mask_heads, r.len_q, r.len_k, device="cuda") > 0.4
    call = on_path(gpu, path, request)
    grad_out = draw(seed + 3, r.batch, r.heads_q, r.len_q, 64, kind)

    def run() -> Any:
        result = call(query, key, value, mask, None, None, None)
        if not r.grads:
            return result
        out = result[0] if isinstance(result, tuple) else result
        return result, torch.autograd.grad(out, (query, key, value), grad_out)

    for _ in range(2):
        result = run()
        del result
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    taken = torch.cuda.max_memory_allocated() - before
    del result
    estimated = cost.memory(request, path, chip)
    assert abs(estimated - taken) <= 0.1 * taken + SLACK, (estimated, taken)


@pytest.mark.parametrize("sizes", [(32, 64), (64, 64), (128, 32), (128, 128)])
def test_a_tiling_of_the_caller_gives_the_same_result(gpu: str, seed: int, sizes: tuple[int, int]) -> None:
    for len_q, options in ((1, {}), (500, {"causal": "bottom_right"}), (700, {"window": (100, 50)})):
        query = draw(seed, 2, 4, len_q, 64, torch.bfloat16)
        key, value = (draw(seed + i, 2, 2, 800, 64, torch.bfloat16) for i in (1, 2))
        got = hal.attention(
            query, key, value, enable_gqa=True, return_lse=True, tiling=DenseTiling(*sizes), backend=gpu, **options
        )
        agrees(got, exact(query, key, value, **options), torch.bfloat16)


def test_a_tiling_of_the_caller_is_refused_where_torch_cuts(gpu: str, seed: int) -> None:
    query = draw(seed, 1, 2, 64, 64, torch.bfloat16).requires_grad_()
    with pytest.raises(hal.UnsupportedError, match="tiling"):
        hal.attention(query, query, query, tiling=DenseTiling(64, 64), backend=gpu)
    wide = draw(seed, 1, 2, 64, 256, torch.float32)
    with pytest.raises(hal.UnsupportedError, match="shared memory"):
        hal.attention(wide, wide, wide, tiling=DenseTiling(128, 128), backend=gpu)


def test_a_call_is_timed_without_waiting_for_it(gpu: str, seed: int) -> None:
    session: Any = hal.session(gpu)
    query = draw(seed, 1, 8, 4096, 64, torch.bfloat16)
    hal.attention(query, query, query, backend=gpu)
    times: list[float] = []
    stop = session.timer(times.append)
    torch.cuda._sleep(50_000_000)
    hal.attention(query, query, query, backend=gpu)
    stop()
    assert not times
    session.synchronize()
    (seconds,) = times
    assert 1e-3 < seconds < 10


def test_a_session_gives_its_workspaces_back(gpu: str) -> None:
    from hal_cuda.memory import CudaMemory, StreamWorkspaces

    memory = CudaMemory(0)
    workspaces = StreamWorkspaces(memory)
    assert workspaces.on(torch.cuda.current_stream().cuda_stream) is not None
    assert memory.stats().in_use == 16 * ((1 << 20) + 4096)
    workspaces.close()
    assert memory.stats().in_use == 0
    memory.trim()
    assert memory.stats().peak == 0
