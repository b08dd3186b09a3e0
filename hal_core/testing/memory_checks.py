"""Whether a device's memory is counted: buffers, what a session allocates, and the peak that it estimates.

READABLE: DLPack's numbers for CPU and CUDA, the memory that torch reads. SHARE, SLACK: how far the measured peak of a
call may lie from its estimate, above it or below: a share of the estimate, and bytes. NAMED: how many of the largest
allocations a finding names.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from .. import ContractError, MemoryLimitError
from ..request import DTYPE_BYTES, Causal, MaskKind
from .benchmark import allocator_peak
from .cases import QKV, Case
from .corners import members, nearest
from .findings import Failure, Measure
from .storage_watch import SMALL, StorageWatch
from .subject import PATHS, Subject

READABLE, SHARE, SLACK, NAMED = (1, 2), 0.1, SMALL, 4
_LARGE: dict[str, Any] = {"batch": 2, "heads_q": 4, "heads_kv": 4, "len_q": 256, "len_k": 256}


def _sized_cases(s: Subject) -> list[Case]:
    """Calls whose scores take far more than `SMALL`, one for each thing that changes what a call allocates."""
    c, base = s.capabilities, s.corners.base
    full, grouped = {"mask_shape": "full"}, {"heads_q": 4, "heads_kv": 2}
    large = {name: nearest(getattr(c, "length" if "len" in name else name[:5]), n) for name, n in _LARGE.items()}
    packed = tuple((nearest(c.length, q), nearest(c.length, k)) for q, k in ((256, 256), (128, 256)))
    changes: list[dict[str, Any]] = [
        {},
        {"mask": MaskKind.ADDITIVE, **full},
        {"mask": MaskKind.BOOLEAN, **full},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "mask": MaskKind.ADDITIVE, **full},
        {"dtype": "float16"},
        grouped,
        {"causal": Causal.TOP_LEFT},
        {"causal": Causal.BOTTOM_RIGHT, "lse": True, **grouped},
        {"len_q": nearest(c.length, 1), "len_k": nearest(c.length, 2048)},
        {"packed": True, "sequences": packed},
        *({"page_size": size, "sequences": ((1, 500), (1, 300))} for size in members(c.page_sizes, (16,), 64)[:1]),
        {"grads": QKV},
        {"grads": QKV, "mask": MaskKind.ADDITIVE, **full, **grouped},
    ]
    if s.quick:
        changes = [change for change in changes if change.get("dtype") != "float16"]
    cases = [s.corners.case("memory", large | change) for change in changes]
    kept = {str(case): case for case in cases if s.accepts(case.request)}
    if not kept:
        kept = {str(case): case for case in [s.corners.case("memory", {"dtype": base.dtype})]}
    # Torch keeps what it needs for a backward of its own: such calls are not held to the rule.
    return [case for case in kept.values() if not case.request.grads or s.session.autograd(case.request) == "explicit"]


def memory(s: Subject) -> Measure:
    """Everything that a call allocates beside its results comes from the session's memory, and is given back."""
    _hold_manager(s)
    manager, cases = s.session.memory, _sized_cases(s)
    allocated = reused = 0
    for n, case in enumerate(cases):
        inputs = case.draw(s.seed)
        for path in PATHS[n % 2 :][:1] if s.quick and n > 1 else PATHS:
            s.run(path, case, inputs)  # the first call may open or compile: it is not watched
            first, watch = manager.stats(), StorageWatch(manager)
            before = first.in_use
            with watch:
                result = s.run(path, case, inputs)
            allocated += manager.stats().allocations - first.allocations
            reused += manager.stats().reuses - first.reuses
            if wrong := watch.violations(inputs, result):
                most = max(wrong, key=lambda allocation: allocation.nbytes)
                more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
                raise Failure(f"{case}, by {path}: {most}{more}, and not from session.memory.allocate")
            del watch
            if manager.stats().in_use != before:
                gc.collect()
            if (held := manager.stats().in_use) != before:
                raise Failure(f"{case}, by {path}: {held:,} bytes are in use after the call, {before:,} before it")
    held = "views of a scratch tensor, or its name, outlive the block: del them, or work in a function called inside"
    lost = f"calls that were repeated allocated {allocated} buffers, and used none again: {held}"
    return Measure(detail=f"{len(cases)} calls", warning=lost if allocated and not reused else "")


def _hold_manager(s: Subject) -> None:
    """Buffers have the size that was asked for, freed ones are used again, and the peak starts anew after trim()."""
    manager = s.session.memory
    for shape, dtype in itertools.product(((1,), (3, 5), (2, 3, 64, 64)), s.corners.dtypes):
        buffer = manager.allocate(shape, dtype)
        given, asked = manager.to_torch(buffer), f"{list(shape)} of {dtype}"
        if tuple(given.shape) != shape or str(given.dtype) != f"torch.{dtype}":
            size = given.numel() * given.element_size()
            wanted = DTYPE_BYTES[dtype] * torch.Size(shape).numel()
            what = f"{list(given.shape)} of {given.dtype}, {size:,} bytes"
            raise Failure(f"the memory manager gave {what} where {asked}, {wanted:,} bytes, were asked for")
        del given
        manager.free(buffer)
    _expect(ContractError, "freeing a buffer twice", lambda: manager.free(buffer))
    first = manager.allocate((300, 300), "float32")
    if (peak := manager.stats().peak) < 360_000:
        raise Failure(f"a buffer of 360,000 bytes is in use, and the peak is {peak:,}")
    place = manager.to_torch(first).data_ptr()
    manager.free(first)
    before = manager.stats().reuses
    again = manager.allocate((300, 300), "float32")
    used_again = manager.stats().reuses > before or manager.to_torch(again).data_ptr() == place
    manager.free(again)
    if not used_again:
        raise Failure("a buffer was freed, and its memory not used again for the same size")
    manager.trim()
    stats = manager.stats()
    if stats.peak != stats.in_use:
        raise Failure(f"after trim() the peak is {stats.peak:,} bytes, and {stats.in_use:,} are in use")


def peak_memory(s: Subject) -> Measure:
    """The most that a call allocates is what its estimate says, for everything that changes it."""
    found: list[Measure] = []
    calls: dict[str, Callable[[], Any]] = {}
    for n, case in enumerate(_sized_cases(s)):
        inputs = case.draw(s.seed)
        estimate = s.backend.estimate(case.request, s.device).memory
        # A backward is measured by the session alone: autograd's own bookkeeping is not the device's.
        for path in PATHS[:1] if case.request.grads else PATHS[n % 2 :][:1] if s.quick else PATHS:
            call = partial(s.run, path, case, inputs)
            call()
            peak = _peak(s, call)
            about = f"{case}, by {path}: {peak:,} bytes are allocated at the peak, {estimate:,} are estimated"
            allowed = int(SHARE * estimate + SLACK)
            about += f", {allowed:,} more or less are allowed"
            found.append(Measure(abs(peak - estimate), allowed, about))
            calls[about] = call
    worst, wrong = s.worse(*found), [measure for measure in found if measure.share > 1]
    if wrong:
        listed = "; ".join(measure.detail for measure in sorted(wrong, key=lambda m: -m.share)[:4])
        largest = _largest(s, calls[worst.detail])
        said = f"{len(wrong)} of {len(found)} calls, the worst first: {listed}{largest}"
        raise Failure(said, worst.error, worst.bound)
    return worst


def _largest(s: Subject, call: Callable[[], Any]) -> str:
    """The largest allocations of a call, with the plugin's lines; "" where none comes from torch."""
    s.session.memory.trim()
    with StorageWatch(None, least=0) as watch:
        kept = call()
    found = sorted(watch.violations(), key=lambda allocation: -allocation.nbytes)[:NAMED]
    del kept
    return f". The largest allocations of the worst: {'; '.join(map(str, found))}" if found else ""


def _peak(s: Subject, call: Callable[[], Any]) -> int:
    """The most bytes that one call allocates, counted by torch's allocator.

    Where the manager does not allocate through torch, the peak that it counts itself is added.
    """
    manager, device = s.session.memory, s.corners.base.device
    manager.trim()
    seen = allocator_peak(lambda: manager.free(manager.allocate((512, 512), "float32")), device)
    manager.trim()
    before = manager.stats().in_use
    peak = allocator_peak(call, device)
    return peak if seen >= 1 << 20 else peak + manager.stats().peak - before


def dlpack(s: Subject) -> Measure:
    """Buffers share memory by DLPack, outlive their release while somebody reads them, and limits are kept."""
    memory, tensor = s.session.memory, s.probe().draw(s.seed).key
    before, buffer = memory.stats(), memory.to_backend(tensor)
    back = memory.to_torch(buffer)
    shared, copies = back.data_ptr() == tensor.data_ptr(), memory.stats().copies - before.copies
    if not torch.equal(back.to(tensor.device), tensor) or shared == (copies > 0):
        raise Failure(f"to_backend {'shares' if shared else 'copied'} the memory, and stats() counts {copies} copies")
    memory.free(buffer)
    buffer, again = (memory.allocate((64, 64), "float32") for _ in range(2))
    if int(buffer.__dlpack_device__()[0]) in READABLE:
        consumer = torch.from_dlpack(buffer).fill_(7)  # type: ignore[attr-defined]
        if not bool((memory.to_torch(buffer) == 7).all()):
            raise Failure("DLPack gave a copy: a consumer's writes do not reach the buffer")
        memory.free(buffer)
        buffer = memory.allocate((64, 64), "float32")
        memory.to_torch(buffer).fill_(1)
        if not bool((consumer == 7).all()):
            raise Failure("a freed buffer's memory was handed out again while a DLPack consumer still read it")
    memory.free(buffer)
    memory.free(again)
    if (held := memory.stats().in_use) != before.in_use:
        raise Failure(f"after everything was freed {held:,} bytes are in use, {before.in_use:,} before")
    if (limit := memory.stats().limit) is not None:
        _expect(MemoryLimitError, "allocating past the limit", lambda: memory.allocate((limit + 1,), "float32"))
    return Measure(detail="zero-copy" if shared else "tensors are copied, and counted")


def _expect(kind: type[Exception], about: str, call: Callable[[], Any]) -> None:
    with suppress(kind):
        call()
        raise Failure(f"{about} did not raise {kind.__name__}")
