"""What a call allocates: all of it from the session's memory beside results, and as much as its estimate says."""

from __future__ import annotations

import gc
import sys
import timeit
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

import hal_core as hal
from hal_core.registry import registry

LIMIT = 1 << 16  # bytes of a tensor that a session may make without its memory manager
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "full": ((1, 8, 8, 512, 512, 64), {}),
    "long keys": ((1, 4, 2, 48, 3000, 64), {"lse": True}),
    "causal, half": ((2, 4, 4, 300, 300, 64), {"dtype": "float16", "causal": hal.Causal.TOP_LEFT}),
    "brain": ((1, 8, 8, 400, 400, 64), {"dtype": "bfloat16"}),
    "decode": ((4, 8, 2, 1, 2000, 64), {}),
    "padded": ((1, 4, 4, 500, 500, 80), {}),
    "mask of heads": ((1, 8, 8, 300, 300, 64), {"mask": hal.MaskKind.BOOLEAN, "mask_heads": 8}),
    "mask of heads, half": (
        (2, 4, 4, 200, 200, 32),
        {"mask": hal.MaskKind.ADDITIVE, "mask_heads": 4, "dtype": "float16"},
    ),
    "additive mask": ((1, 4, 4, 600, 600, 64), {"mask": hal.MaskKind.ADDITIVE}),
    "gradients": ((1, 4, 4, 100, 100, 64), {"grads": frozenset("qkv"), "lse": True}),
    "gradients, padded": ((2, 4, 4, 256, 256, 33), {"grads": frozenset("qkv"), "lse": True}),
    "gradients, mask": (
        (2, 4, 2, 256, 256, 33),
        {"mask": hal.MaskKind.ADDITIVE, "mask_batch": 2, "mask_heads": 4, "grads": frozenset("qkv"), "lse": True},
    ),
    "gradients, small mask": (
        (2, 4, 2, 100, 100, 33),
        {"mask": hal.MaskKind.ADDITIVE, "grads": frozenset("qkv"), "lse": True},
    ),
    "some gradients": ((1, 4, 2, 130, 90, 40), {"grads": frozenset("k"), "lse": True}),
}


def drawn(case: str, seed: int) -> tuple[hal.AttentionRequest, list[torch.Tensor], torch.Tensor | None]:
    (batch, heads, heads_kv, len_q, len_k, dim), options = CASES[case]
    options = {"dtype": "float32"} | options
    request = hal.AttentionRequest(batch, heads, heads_kv, len_q, len_k, dim, dim, **options)
    generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, request.dtype)
    shapes = (batch, heads, len_q, dim), (batch, heads_kv, len_k, dim), (batch, heads_kv, len_k, dim)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    mask = None
    if request.mask is not hal.MaskKind.NONE:
        mask = torch.randn(request.mask_batch, request.mask_heads, len_q, len_k, generator=generator)
        mask = mask > -3 if request.mask is hal.MaskKind.BOOLEAN else mask.to(dtype)
    return request, tensors, mask


def run(session: Any, request: hal.AttentionRequest, tensors: list[torch.Tensor], mask: Any) -> list[Any]:
    """The call, and its gradients where it asks for them; every result."""
    prepared = session.prepare_attention(*tensors, request=request)
    output = session.compute_attention(prepared, mask)
    if not request.grads:
        return [output]
    grad = tensors[0]
    return [output, session.compute_attention_backward(prepared, output.out, output.lse, grad, mask)]


def opened(device: str, request: hal.AttentionRequest) -> tuple[Any, Any]:
    """(backend, a session that has run the request and given its memory back)."""
    found = registry.find(device)[0]
    backend: Any = registry.backend_of(found)
    if request.dtype not in backend.capabilities(found).dtypes:
        pytest.skip(f"{device} has no {request.dtype}")
    return backend, hal.session(device)


@pytest.mark.parametrize("case", CASES)
def test_the_allocators_peak_is_what_the_estimate_says(device: str, case: str, seed: int) -> None:
    request, tensors, mask = drawn(case, seed)
    backend, session = opened(device, request)
    run(session, request, tensors, mask)  # compiles
    session.memory.trim()
    gc.collect()  # else what earlier tests left is freed inside, and counted off
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = run(session, request, tensors, mask)
    assert results
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    estimated = backend.estimate(request, registry.find(device)[0]).memory
    assert abs(peak - estimated) <= 0.1 * max(peak, estimated) + LIMIT, f"{peak:,} measured, {estimated:,} estimated"


class Watching(TorchFunctionMode):
    """Notes tensors that torch functions made, with where they were called."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, int, str]] = []
        self.kept: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                frame = sys._getframe(1)
                place, inside = f"{frame.f_code.co_filename}:{frame.f_lineno} {function}", False
                while frame is not None and not inside:
                    inside, frame = frame.f_code.co_name in ("allocate", "allocate_host"), frame.f_back  # type: ignore[assignment]
                if not inside and tensor.untyped_storage().nbytes() > LIMIT:
                    self.kept.append(tensor)  # so that no other storage takes its address
                    self.made.append((tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes(), place))
        return result


@pytest.mark.parametrize("case", CASES)
def test_everything_beside_results_comes_from_the_sessions_memory(device: str, case: str, seed: int) -> None:
    request, tensors, mask = drawn(case, seed)
    _, session = opened(device, request)
    session.memory.trim()
    for _ in range(2):  # new, and from a pool or a recording
        with Watching() as watching:
            results = run(session, request, tensors, mask)
        mine = {t.untyped_storage()._cdata for t in tree_leaves(results) if isinstance(t, torch.Tensor)}
        assert not [place for storage, _, place in watching.made if storage not in mine]


def test_trim_gives_everything_back_and_resets_the_peak(device: str, seed: int) -> None:
    request, tensors, _ = drawn("padded", seed)
    _, session = opened(device, request)
    run(session, request, tensors, None)
    assert session.memory.stats().in_use == 0
    assert session.memory.trim() > 0
    stats = session.memory.stats()
    assert (stats.in_use, stats.pooled, stats.peak) == (0, 0, 0)


def test_a_buffer_of_a_mebibyte_is_had_and_given_back_in_microseconds(device: str) -> None:
    """Beside copying a dictionary of 1,000 entries in the same moment, which takes longer on any processor."""
    memory, yardstick = hal.memory(device), dict.fromkeys(range(1000))
    memory.free(memory.allocate((1 << 18,), "float32"))

    def cycle() -> None:
        memory.free(memory.allocate((1 << 18,), "float32"))

    ratios = []
    for _ in range(20):
        taken = timeit.timeit(cycle, number=200)
        ratios.append(taken / timeit.timeit(yardstick.copy, number=200))
    assert min(ratios) < 5.0


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (40, 3)}])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
def test_a_callers_tiling_is_followed(device: str, options: dict[str, Any], heads: tuple[int, int], seed: int) -> None:
    from hal_core.testing import reference, relative_error

    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, heads[0], 70, 64, generator=generator)
    key, value = (torch.randn(1, heads[1], 130, 64, generator=generator) for _ in range(2))
    found = registry.find(device)[0]
    sizes = sorted(registry.backend_of(found).capabilities(found).tile_sizes)  # type: ignore[arg-type]
    want = reference(query, key, value, **options)
    for block_q, block_k in [(sizes[0], sizes[-1]), (sizes[-1], sizes[0])]:
        tiling = hal.DenseTiling(block_q, block_k)
        out, lse = hal.attention(
            query, key, value, backend=device, tiling=tiling, return_lse=True, enable_gqa=True, **options
        )
        assert relative_error(out, want.out) <= 1e-5
        assert relative_error(lse, want.lse) <= 1e-5


def test_block_sizes_that_no_kernel_has_are_refused(device: str) -> None:
    query = torch.randn(1, 2, 70, 64)
    with pytest.raises(hal.UnsupportedError, match="til"):
        hal.attention(query, query, query, backend=device, tiling=hal.DenseTiling(24, 24))


def test_the_sessions_tiling_says_how_its_kernels_cut(device: str) -> None:
    session, request = hal.session(device), drawn("full", 0)[0]
    plan = session.tiling.plan(request, {})
    assert isinstance(plan, hal.TilePlan)
    assert plan.cut_by == device[:-2]
    assert min(plan.block_q, plan.block_k) >= 1
    few = session.tiling.plan(replace(request, len_q=1), {})
    assert isinstance(few, hal.TilePlan)
    assert few.block_q <= plan.block_q
