"""Where the session's memory comes from, and how much of it a call is estimated to take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hal_cuda
import pytest
import torch
from hal_cuda import cost
from hal_cuda.kernels import composed
from hal_cuda.kernels.portable import block_plans, launch
from hal_cuda.memory import StreamWorkspaces
from hal_cuda.runtime.context import Context
from hal_cuda.session import CudaSession
from hal_cuda.tiling import CudaTiling
from interpreted_device import CHIP, DEVICE, RATES
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from hal_core import AttentionRequest, BlockPlan, Buffer, Causal, MaskKind, MemoryStats, SequenceMetadata

LARGE = 1 << 16
PACKAGE = Path(hal_cuda.__file__).parent


class PlainMemory:
    """A memory manager without a pool: each buffer is a tensor of the size that was asked for.

    given: what was allocated, where somebody sets it to a list. live: buffers in use.
    """

    def __init__(self) -> None:
        self.given: list[Tensor] | None = None
        self.live = 0

    def allocate(self, shape: Any, dtype: str) -> Buffer:
        tensor = torch.empty(tuple(shape), dtype=getattr(torch, dtype))
        self.live += 1
        if self.given is not None:
            self.given.append(tensor)
        return Buffer(tensor, self, tensor.nbytes)

    def free(self, buffer: Buffer) -> None:
        buffer.release()
        self.live -= 1

    def to_backend(self, tensor: Tensor) -> Buffer:
        return Buffer(tensor, self, 0)

    def to_torch(self, buffer: Buffer) -> Tensor:
        return buffer.tensor  # type: ignore[no-any-return]

    def stats(self) -> MemoryStats:
        return MemoryStats(0, 0, 0, None, 0, 0, 0, 0)

    def trim(self) -> int:
        return 0


class _Watching(TorchFunctionMode):
    """Notes large storages that torch's functions return to the package, with the line that called them.

    Those that the memory manager allocates are not noted, as its code lies in this file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, str]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame.f_back is not None and "torch" in Path(frame.f_code.co_filename).parts:
            frame = frame.f_back
        if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            line = f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno}"
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > LARGE:
                    self.found.append((tensor, line))
        return result


def allocator_peak(call: Callable[[], Any]) -> int:
    """Bytes that torch's allocator held at most during a call beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    records = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        held += record.nbytes()
        peak = max(peak, held)
    del result
    return peak


BASE = AttentionRequest(
    batch=2, heads_q=4, heads_kv=2, len_q=160, len_k=192, dim_qk=64, dim_v=64, dtype="float64", lse=True
)
#: Requests whose path is torch's operations, without gradients.
COMPOSED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": Causal.BOTTOM_RIGHT, "lse": False},
    "window and softcap": {"window": (60, 20), "softcap": 4.0},
    "boolean mask of every head": {"mask": MaskKind.BOOLEAN, "mask_batch": 2, "mask_heads": 4},
    "additive mask": {"mask": MaskKind.ADDITIVE, "mask_heads": 4},
    "dropout": {"dropout": 0.25},
    "block plan": {"block_plan": (32, 32, 3)},
    "bfloat16": {"dtype": "bfloat16", "causal": Causal.TOP_LEFT},
    "packed": {"packed": True, "causal": Causal.BOTTOM_RIGHT},
}
#: Requests whose path is a kernel of the package.
PORTABLE: dict[str, dict[str, Any]] = {
    "plain": {"dtype": "float32"},
    "split keys": {
        "dtype": "float32",
        "batch": 1,
        "heads_kv": 4,
        "len_q": 16,
        "len_k": 3000,
        "dim_qk": 128,
        "dim_v": 128,
        "deterministic": True,
    },
    "block plan": {"dtype": "float32", "block_plan": (2, 2, 60)},
}


def operands(request: AttentionRequest, generator: torch.Generator) -> tuple[Any, ...]:
    """(query, key, value, mask, plan, tables, rng) of a request."""
    r, kind = request, getattr(torch, request.dtype)
    batch, times = (1, r.batch) if r.packed else (r.batch, 1)
    grads = "q" in r.grads
    shapes = ((r.heads_q, r.len_q, r.dim_qk), (r.heads_kv, r.len_k, r.dim_qk), (r.heads_kv, r.len_k, r.dim_v))
    given = [
        torch.randn(batch, heads, times * length, dim, generator=generator).to(kind).requires_grad_(grads)
        for heads, length, dim in shapes
    ]
    mask = plan = tables = None
    if r.mask is not MaskKind.NONE:
        mask = torch.randn(r.mask_batch, r.mask_heads, r.len_q, r.len_k, generator=generator)
        mask = mask > 0 if r.mask is MaskKind.BOOLEAN else mask.to(kind)
    if r.block_plan is not None:
        block_q, block_k, most = r.block_plan
        sizes = (r.batch, r.heads_q, -(-r.len_q // block_q))
        indices = torch.stack(
            [torch.randperm(-(-r.len_k // block_k), generator=generator)[:most] for _ in range(sizes[2])]
        )
        indices = indices.to(torch.int32).expand(*sizes, most).contiguous()
        plan = BlockPlan(block_q, block_k, indices, torch.full(sizes, most, dtype=torch.int32))
    if r.packed:
        ends = [torch.arange(r.batch + 1, dtype=torch.int32) * length for length in (r.len_q, r.len_k)]
        tables = SequenceMetadata(*ends)
    return (*given, mask, plan, tables, (1, 2))


def composed_call(request: AttentionRequest, memory: PlainMemory, given: tuple[Any, ...]) -> Callable[[], Any]:
    context = Context(CHIP, memory, StreamWorkspaces(memory), CudaTiling(CHIP, lambda request: "composed"))
    return lambda: composed.attend(request, context, *given)


def portable_call(request: AttentionRequest, memory: PlainMemory, given: tuple[Any, ...]) -> Callable[[], Any]:
    session = CudaSession(DEVICE, CHIP, lambda: RATES, memory=memory, paths=frozenset({"portable"}))
    session.take_workspaces()
    return lambda: session.bind(request)(*given)


CASES = [(composed_call, changes) for changes in COMPOSED.values()]
CASES += [(portable_call, changes) for changes in PORTABLE.values()]
NAMES = [f"torch operations, {name}" for name in COMPOSED] + [f"own kernel, {name}" for name in PORTABLE]


@pytest.fixture(autouse=True)
def _nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter is slow, and memory does not depend on what a kernel writes."""
    monkeypatch.setattr(launch, "launcher", lambda *_, **options: lambda *given: None)
    monkeypatch.setattr(block_plans, "launcher", lambda *_, **options: lambda *given: None)
    block_plans._launcher.cache_clear()

    def pattern(chip: Any, shape: Any, *others: Any, out: Tensor | None = None) -> Tensor:
        return (torch.empty(shape, dtype=torch.bool) if out is None else out).fill_(True)

    monkeypatch.setattr(composed, "dropout_pattern", pattern)
    yield
    block_plans._launcher.cache_clear()


@pytest.mark.parametrize(("bind", "changes"), CASES, ids=NAMES)
def test_large_buffers_come_from_the_session_s_memory(
    generator: torch.Generator, bind: Any, changes: dict[str, Any]
) -> None:
    request, memory = replace(BASE, **changes), PlainMemory()
    given = operands(request, generator)
    call = bind(request, memory, given)
    call()
    held, memory.given = memory.live, []
    with _Watching() as watching:
        result = call()
    own = [*given[:4], *(given[4] or ()), *(result if isinstance(result, tuple) else (result,)), *memory.given]
    known = {tensor.untyped_storage().data_ptr() for tensor in own if isinstance(tensor, Tensor)}
    assert not {line for tensor, line in watching.found if tensor.untyped_storage().data_ptr() not in known}
    assert memory.live == held


@pytest.mark.parametrize("grads", [False, True], ids=["forward", "with gradients"])
@pytest.mark.parametrize("changes", COMPOSED.values(), ids=list(COMPOSED))
def test_the_estimate_of_torch_s_operations_is_the_allocator_s_peak(
    generator: torch.Generator, changes: dict[str, Any], grads: bool
) -> None:
    options = dict(changes, grads=frozenset("qkv")) if grads else changes
    request = replace(BASE, **options)
    given = operands(request, generator)
    call = composed_call(request, PlainMemory(), given)
    call()
    peak = allocator_peak(call)
    estimated = cost.memory(request, "composed", CHIP)
    assert abs(estimated - peak) <= 0.1 * peak + LARGE, (estimated, peak)


@pytest.mark.parametrize("changes", PORTABLE.values(), ids=list(PORTABLE))
def test_the_estimate_of_the_own_kernel_is_what_it_allocates(
    generator: torch.Generator, changes: dict[str, Any]
) -> None:
    request, memory = replace(BASE, **changes), PlainMemory()
    call = portable_call(request, memory, operands(request, generator))
    memory.given = []
    out, lse = call()
    taken = out.nbytes + lse.nbytes + sum(tensor.nbytes for tensor in memory.given)
    assert abs(cost.memory(request, "portable", CHIP) - taken) <= 0.1 * taken + LARGE
