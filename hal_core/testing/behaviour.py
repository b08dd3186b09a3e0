"""How a device behaves from call to call: threads, memory, reuse, tiles, partial results."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from ..attention import bind
from ..errors import ContractError, MemoryLimitError, UnsupportedError
from ..request import DTYPE_BYTES, AttentionOutput, AttentionRequest, Causal, Grads, MaskKind
from ..tiling import BlockPlan, TilePlan, merge_partials
from .cases import QKV, Case, Inputs
from .reference import reference, relative_error, request_of
from .subject import PATHS, Failure, Measure, Outcome, Skip, Subject

THREADS, ROUNDS = 8, 4
#: Most resident memory that may stay after the leak check's calls, whatever they return, in bytes.
RESIDENT_SLACK = 24 << 20
_MASKS: tuple[dict[str, Any], ...] = ({"mask": MaskKind.ADDITIVE}, {"mask": MaskKind.BOOLEAN})
_GROUPED: dict[str, Any] = {"heads_q": 4, "heads_kv": 2}
_GRADS: dict[str, Any] = {"grads": QKV}
_DLPACK_CPU, _DLPACK_CUDA = 1, 2


def contract(s: Subject) -> Measure:
    """The plainest request is taken, and session, memory and tiling have the protocol's methods."""
    plain = s.corners.base
    if not s.accepts(plain):
        reasons = [*s.capabilities.refusals(plain), *s.backend.check(plain, s.device)]
        raise Failure(f"{plain.describe()} is refused: {'; '.join(map(str, reasons))}")
    needed = {
        "": "autograd optimize_tiling prepare_attention compute_attention compute_attention_backward close __enter__ __exit__",
        "memory": "allocate free to_backend to_torch stats trim",
        "tiling": "needs_content compute_optimal_tile_size split_into_tiles plan",
    }
    for part, names in needed.items():
        holder = getattr(s.session, part) if part else s.session
        if missing := [name for name in names.split() if not hasattr(holder, name)]:
            raise Failure(f"{part or 'the session'} lacks {', '.join(missing)}")
    sizes = s.session.optimize_tiling(plain.len_k, plain.batch, plain.heads_q)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise Failure(f"optimize_tiling gave {sizes!r}: positive sizes by name are wanted")
    return s.hold(s.probe())


def prepared_reuse(s: Subject) -> Measure:
    """A prepared call serves other queries and stays what it was; `out=` is filled and tile_size changes nothing."""
    case, other = s.probe(), s.probe({"lse": True})
    inputs, fresh = case.draw(s.seed), other.draw(s.seed + 1)
    rng = s.rng(case.request)
    prepared = s.session.prepare_attention(*inputs[:3], request=case.request)
    worst = Measure()
    room = torch.empty_like(inputs.query)
    calls: tuple[tuple[str, Tensor, dict[str, Any]], ...] = (
        ("first", inputs.query, {}), ("with another query", fresh.query, {"query": fresh.query}), ("again", inputs.query, {}),
        ("with out=", inputs.query, {"out": room}),
    )  # fmt: skip
    for name, query, options in calls:
        got = s.session.compute_attention(prepared, rng=rng, **options)
        if "out" in options and got.out.data_ptr() != room.data_ptr():
            raise Failure("with out=: the result is in another tensor than the given one")
        worst = max(worst, _hold(s, f"prepared once, computed {name}", case, inputs._replace(query=query), got), key=_share)
    tiled = s.session.prepare_attention(*inputs[:3], 16, request=case.request)
    got = s.session.compute_attention(tiled, rng=rng)
    return max(worst, _hold(s, "with tile_size 16", case, inputs, got), key=_share)


def stale_keys(s: Subject) -> Measure:
    """Keys and values that changed since the last call are read anew, in place or in new tensors."""
    case, worst = s.probe(), Measure()
    for path in (*PATHS, "hal.bind"):
        inputs, call = case.draw(s.seed), None
        if path == "hal.bind":
            call = bind(*inputs[:3], backend=s.device.id)
        for change in ("first call", "keys and values changed in place", "new tensors"):
            fresh = case.draw(s.seed + 1 + len(change))
            if change == "new tensors":
                inputs = fresh
            elif change != "first call":
                inputs.key.copy_(fresh.key)
                inputs.value.copy_(fresh.value)
            rng = s.rng(case.request)
            got = s.run(path, case, inputs) if call is None else Outcome(call(*inputs[:3], rng=rng), None, Grads())
            worst = max(worst, _hold(s, f"{change}, by {path}", case, inputs, AttentionOutput(got.out)), key=_share)
    return worst


def inputs_unchanged(s: Subject) -> Measure:
    """No call writes to its inputs, forward or backward."""
    cases = [s.probe(), s.probe(*_MASKS, {"causal": Causal.TOP_LEFT}, _GROUPED, _GRADS)]
    for case, layout, path in itertools.product(cases, ("contiguous", "heads last", "expanded"), PATHS):
        laid = attrs.evolve(case, layout=layout)
        inputs = laid.draw(s.seed)
        watched = [t for part in inputs if part is not None for t in (part if type(part) is not Tensor else [part])]
        watched = [t for t in watched if isinstance(t, Tensor)]
        before = [t.clone() for t in watched]
        s.run(path, laid, inputs)
        for name, tensor, copy in zip(Inputs._fields, watched, before, strict=False):
            if not torch.equal(tensor, copy):
                raise Failure(f"{laid}, by {path}: {name if tensor is getattr(inputs, name) else 'an input'} was changed in place")
    return Measure()


def threads(s: Subject) -> Measure:
    """Eight threads at once give what one gives, dropout and noise included."""
    wishes: tuple[tuple[dict[str, Any], ...], ...] = ((), _MASKS, ({"causal": Causal.TOP_LEFT}, _GROUPED), (_GRADS,), ({"dropout": 0.2},))
    cases = list({str(case): case for case in (s.probe(*wish) for wish in wishes)}.values())
    work = [(n, path, case, case.draw(s.seed + n)) for n in range(THREADS) for path, case in zip(PATHS * 3, cases, strict=False)]
    alone = [s.run(path, case, inputs, n) for n, path, case, inputs in work]
    barrier, found, worst = threading.Barrier(THREADS), list[BaseException](), [Measure()]

    def one(number: int) -> None:
        barrier.wait()
        try:
            for _ in range(1 if s.quick else ROUNDS):
                for (n, path, case, inputs), want in zip(work, alone, strict=True):
                    if n == number:
                        worst.append(_same(s, f"{case}, by {path} in 8 threads", case, s.run(path, case, inputs, n), want))
        except BaseException as error:  # carried to the thread that waits
            found.append(error)

    pool = [threading.Thread(target=one, args=(number,)) for number in range(THREADS)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    if found:
        raise found[0]
    return max(worst, key=_share)


def deterministic(s: Subject) -> Measure:
    """Where determinism is claimed, equal calls give bitwise equal results."""
    if not s.claims("deterministic"):
        raise Skip("not claimed")
    for wishes in ((), (*_MASKS, _GROUPED, _GRADS)):
        case = s.probe({"deterministic": True}, *wishes)
        inputs = case.draw(s.seed)
        for path in PATHS:
            first = s.run(path, case, inputs)
            for _ in range(3):
                if not all(torch.equal(a, b) for a, b in _pairs(s.run(path, case, inputs), first)):
                    raise Failure(f"{case}, by {path}: two equal calls differ, and determinism is claimed")
    return Measure()


def random_numbers(s: Subject) -> Measure:
    """Dropout and noise follow (seed, offset) alone: the same pair repeats, another one differs."""
    case = s.probe({"dropout": 0.3}, _GRADS)
    if s.rng(case.request) is None:
        raise Skip("neither dropout nor noise is claimed")
    inputs, worst = case.draw(s.seed), Measure()
    for path in PATHS:
        first, other = s.run(path, case, inputs, 0), s.run(path, case, inputs, 1)
        worst = max(worst, _same(s, f"{case}, by {path}, the same rng again", case, s.run(path, case, inputs, 0), first), key=_share)
        if torch.equal(first.out, other.out):
            raise Failure(f"{case}, by {path}: another offset gave the same result: rng is ignored")
    return worst


def tiles(s: Subject) -> Measure:
    """Tile plans cover every visible pair once, show nothing hidden as full, and keep the given limits."""
    tiling, found = s.session.tiling, 0
    options = itertools.product(({}, {"causal": Causal.TOP_LEFT}, {"causal": Causal.BOTTOM_RIGHT}), ({}, {"window": (9, 4)}))
    limits: tuple[dict[str, int], ...] = ({}, {"available_memory": 1 << 16}, {"block_q": 16, "block_k": 24})
    for (causal, window), lengths, limit in itertools.product(options, s.corners.lengths(), limits):
        request = replace(s.corners.base, len_q=lengths[0], len_k=lengths[1], **causal, **window)
        if not s.accepts(request) or 0 in lengths:
            continue
        q, k = s.corners.case("tiles", "", {"len_q": lengths[0], "len_k": lengths[1]}).draw(s.seed)[:2]
        plan = tiling.plan(request, limit, **({"query": q, "key": k} if tiling.needs_content else {}))
        _check_plan(request, limit, plan)
        found += 1
    tensor = s.corners.case("tiles", "", {}).draw(s.seed).key
    for size in (1, 16, tensor.shape[2] + 1):
        parts = tiling.split_into_tiles(tensor, size)
        if any(part.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() for part in parts):
            raise Failure(f"split_into_tiles({size}) copied: views are wanted")
        if not torch.equal(torch.cat(parts, 2), tensor) or any(part.shape[2] > size for part in parts):
            raise Failure(f"split_into_tiles({size}) of {list(tensor.shape)} lost or repeated tokens")
    return Measure(detail=f"{found} plans")


def _check_plan(request: AttentionRequest, limit: dict[str, int], plan: Any) -> None:
    about = f"{request.describe()} with limits {limit}"
    if isinstance(plan, BlockPlan):
        columns = -(-request.len_k // plan.block_k)
        listed = torch.arange(plan.indices.shape[-1]) < plan.counts.cpu().unsqueeze(-1)
        entries = plan.indices.cpu().masked_fill(~listed, -1).sort(-1).values
        if bool((entries >= columns).any()) or bool(((entries.diff() == 0) & (entries[..., 1:] >= 0)).any()):
            raise Failure(f"{about}: a block lies outside, or is listed twice")
        return
    if not isinstance(plan, TilePlan):
        raise Failure(f"{about}: plan() gave a {type(plan).__name__}, TilePlan or BlockPlan are wanted")
    times = torch.zeros(request.len_q, request.len_k, dtype=torch.int32)
    visible = _visible(request)
    for tile in plan.tiles:
        rows, columns = slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop)
        spans = (tile.q_stop - tile.q_start, tile.k_stop - tile.k_start)
        if not (0 < spans[0] <= limit.get("block_q", plan.block_q) and 0 < spans[1] <= limit.get("block_k", plan.block_k)):
            raise Failure(f"{about}: {tile} is larger than its blocks")
        if tile.q_start < 0 or tile.k_start < 0 or tile.q_stop > request.len_q or tile.k_stop > request.len_k:
            raise Failure(f"{about}: {tile} reaches outside")
        size = (spans[0] * request.dim_qk + spans[1] * (request.dim_qk + request.dim_v)) * DTYPE_BYTES[request.dtype]
        if size > limit.get("available_memory", size):
            raise Failure(f"{about}: the operands of {tile} take {size:,} bytes")
        if tile.full and not bool(visible[rows, columns].all()):
            raise Failure(f"{about}: {tile} is called full, and part of it is hidden")
        times[rows, columns] += 1
    if bool((times[visible] != 1).any()) or bool((times > 1).any()):
        raise Failure(f"{about}: visible pairs lie in {sorted(set(times[visible].tolist()))} tiles, 1 is wanted")


def _visible(request: AttentionRequest) -> Tensor:
    """[len_q, len_k] boolean, read off the reference: keys that carry weight."""
    query, key = torch.zeros(1, 1, request.len_q, 1), torch.zeros(1, 1, request.len_k, 1)
    options = {"causal": request.causal, "diagonal": request.diagonal, "window": request.window}
    return reference(query, key, torch.eye(request.len_k)[None, None], **options).out[0, 0] > 0


def merges(s: Subject) -> Measure:
    """Parts of the keys, one of them dead, merge into the whole by their log-sum-exp; and backward takes the whole's."""
    if not s.claims("lse"):
        raise Skip("no log-sum-exp is claimed, so parts cannot be merged")
    boolean = MaskKind.BOOLEAN in s.capabilities.masks
    case = s.probe({"lse": True}, *([{"mask": MaskKind.BOOLEAN}] if boolean else []), _GROUPED, {"grads": QKV, "lse": True})
    if case.request.grads and s.session.autograd(case.request) != "explicit" and not s.claims("lse", "backward"):
        case = attrs.evolve(case, request=replace(case.request, grads=frozenset()))
    inputs = case.draw(s.seed)
    mask = torch.ones(1, 1, 1, case.request.len_k, dtype=torch.bool, device=inputs.query.device) if boolean else None
    cuts = sorted({0, s.corners.base.len_k // 3, 2 * s.corners.base.len_k // 3, s.corners.base.len_k})
    spans = [span for span in itertools.pairwise(cuts) if span[1] - span[0] in s.capabilities.length]
    if len(spans) < 2 or spans[-1][1] != cuts[-1] or len(spans) != len(cuts) - 1:
        raise Skip("the claimed lengths leave no shorter parts")
    if mask is not None:
        mask[..., spans[1][0] : spans[1][1]] = False
        mask = mask.expand(*inputs.query.shape[:3], -1).clone()
        mask[:, :, 1] = False
    inputs = inputs._replace(mask=mask)
    want = s.want(attrs.evolve(case, request=replace(case.request, grads=frozenset())), inputs)
    parts = [_part(inputs, start, stop) for start, stop in spans]
    results = []
    for part in parts:
        request = replace(request_of(*part[:4]), lse=True)
        prepared = s.session.prepare_attention(*part[:3], request=request)
        results.append(s.session.compute_attention(prepared, part.mask, rng=s.rng(request)))
    out, lse = merge_partials(torch.stack([r.out for r in results]), torch.stack([r.lse for r in results]))
    numerics = s.capabilities.numerics[case.request.dtype]
    worst = Measure()
    # A part's rounding and the merge's come on top of each other: twice the bound.
    for what, got, wanted, bound in (("out", out, want.out, 2 * numerics.relative), ("log-sum-exp", lse, want.lse, 2 * numerics.lse)):
        assert wanted is not None
        worst = max(worst, _bounded(f"{what} merged from {len(parts)} parts of the keys", relative_error(got, wanted), bound), key=_share)
    return max(worst, _backward_of_parts(s, case, inputs, parts, out, lse), key=_share) if case.request.grads else worst


def _backward_of_parts(s: Subject, case: Case, inputs: Inputs, parts: list[Inputs], out: Tensor, lse: Tensor) -> Measure:
    """Gradients of the whole from each part's backward, given the whole's (out, lse): what a ring does."""
    want = s.want(case, inputs).grads
    found = []
    for part in parts:
        request = replace(request_of(*part[:4]), lse=True, grads=QKV)
        prepared = s.session.prepare_attention(*part[:3], request=request)
        try:
            found.append(s.session.compute_attention_backward(prepared, out, lse, inputs.grad_out, part.mask, rng=s.rng(request)))
        except UnsupportedError:
            if s.session.autograd(request) == "explicit":
                raise
            return Measure()  # a native session need not have a backward of its own
    grads = (sum(g.query.double() for g in found), *(torch.cat([g[i] for g in found], 2) for i in (1, 2)))
    bound, worst = s.capabilities.numerics[case.request.dtype].gradient or 0.0, Measure()
    for name, got, wanted in zip(Grads._fields, grads, want, strict=False):
        about = f"gradient of {name} from {len(parts)} parts with the whole's (out, lse)"
        worst = max(worst, _bounded(about, relative_error(got, wanted), 2 * bound), key=_share)
    return worst


def _part(inputs: Inputs, start: int, stop: int) -> Inputs:
    mask = None if inputs.mask is None else inputs.mask[..., start:stop]
    return inputs._replace(key=inputs.key[:, :, start:stop], value=inputs.value[:, :, start:stop], mask=mask)


def dlpack(s: Subject) -> Measure:
    """Buffers share memory by DLPack, outlive their release while somebody reads them, and limits are kept."""
    memory = s.session.memory
    before = memory.stats()
    tensor = s.corners.case("dlpack", "", {}).draw(s.seed).key
    buffer = memory.to_backend(tensor)
    back = memory.to_torch(buffer)
    shared = back.data_ptr() == tensor.data_ptr()
    if not torch.equal(back.to(tensor.device), tensor):
        raise Failure("to_backend and to_torch changed the values")
    if shared == (memory.stats().copies > before.copies):
        raise Failure(f"to_backend {'shares' if shared else 'copied'} the memory, and stats() says {memory.stats().copies} copies")
    memory.free(buffer)
    buffer = memory.allocate((64, 64), "float32")
    if int(buffer.__dlpack_device__()[0]) not in (_DLPACK_CPU, _DLPACK_CUDA):
        memory.free(buffer)
        return Measure(detail="no consumer on this machine reads the device's memory")
    consumer = torch.from_dlpack(buffer)
    consumer.fill_(7)
    if not bool((memory.to_torch(buffer) == 7).all()):
        raise Failure("DLPack gave a copy: a consumer's writes do not reach the buffer")
    memory.free(buffer)
    later = [memory.allocate((64, 64), "float32") for _ in range(8)]
    for each in later:
        memory.to_torch(each).fill_(1)
    if not bool((consumer == 7).all()):
        raise Failure("a freed buffer's memory was handed out again while a DLPack consumer still read it")
    for each in later:
        memory.free(each)
    if (held := memory.stats().in_use) != before.in_use:
        raise Failure(f"after everything was freed {held:,} bytes are in use, {before.in_use:,} before")
    _expect(ContractError, "freeing a buffer twice", lambda: memory.free(buffer))
    if (limit := memory.stats().limit) is not None:
        _expect(MemoryLimitError, f"allocating past the limit of {limit:,} bytes", lambda: memory.allocate((limit + 1,), "float32"))
    return Measure(detail="zero-copy" if shared else "tensors are copied, and counted")


def reopen(s: Subject) -> Measure:
    """A session closes twice without harm, its results stay, and the device opens again, apart from other sessions."""
    case = s.probe()
    inputs, kept = case.draw(s.seed), s.session
    with s.backend.open(s.device) as session:
        first = s.by_session(case, inputs, session=session)
        copy = first.out.clone()
    session.close()
    session.close()
    if not torch.equal(first.out, copy):
        raise Failure("a result changed when its session was closed")
    with s.backend.open(s.device) as again:
        worst = _same(s, "after closing and opening again", case, s.by_session(case, inputs, session=again), first)
    return max(worst, _same(s, "by a session left open while another closed", case, s.by_session(case, inputs, session=kept), first), key=_share)


def leaks(s: Subject) -> Measure:
    """Many calls leave no buffers, tensors or memory behind."""
    length = s.probe({"len_q": 256, "len_k": 256, "heads_q": 4, "heads_kv": 4, "batch": 1}, {"grads": QKV})
    inputs = length.draw(s.seed)
    for _ in range(5):
        s.run("session", length, inputs)
    before, calls = _held(s), 0
    stop = time.monotonic() + (1.5 if s.quick else 4.0)
    while calls < 20 or (calls < 400 and time.monotonic() < stop):
        s.run(PATHS[calls % 2], length, inputs, calls)
        calls += 1
    after = _held(s)
    returned = calls * inputs.grad_out.nbytes
    names = ("bytes in use by the session's memory", "live tensors", "bytes of torch's CUDA memory", "bytes resident")
    slack = (0, calls // 4, returned // 4, max(returned // 4, RESIDENT_SLACK))
    for name, first, last, allowed in zip(names, before, after, slack, strict=True):
        if last - first > allowed:
            raise Failure(f"{calls} calls left {last - first:,} {name} behind", float(last - first), float(allowed))
    return Measure(detail=f"{calls} calls")


def _held(s: Subject) -> tuple[int, int, int, int]:
    gc.collect()
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    cuda = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    status = Path("/proc/self/statm")
    resident = int(status.read_text().split()[1]) * 4096 if status.exists() else 0
    return s.session.memory.stats().in_use, tensors, cuda, resident


def _hold(s: Subject, about: str, case: Case, inputs: Inputs, got: AttentionOutput) -> Measure:
    """Hold one result's output to the reference."""
    numerics = s.capabilities.numerics[case.request.dtype]
    error = relative_error(got.out, s.want(case, inputs).out)
    return _bounded(f"{case}, {about}: out", error, numerics.relative * (2 if numerics.noisy else 1))


def _bounded(about: str, error: float, bound: float) -> Measure:
    if not error <= bound:
        raise Failure(f"{about} is wrong by {error:.2g}, {bound:.2g} allowed", error, bound)
    return Measure(error, bound)


def _same(s: Subject, about: str, case: Case, got: Outcome, want: Outcome) -> Measure:
    bound = s.rerun_bound(case.request)
    error = max(relative_error(a, b) for a, b in _pairs(got, want))
    if not error <= bound:
        raise Failure(f"{about}: the result differs by {error:.2g} from the first one, {bound:.2g} allowed", error, bound)
    return Measure(error, bound)


def _pairs(a: Outcome, b: Outcome) -> Iterator[tuple[Tensor, Tensor]]:
    for x, y in zip((a.out, a.lse, *a.grads), (b.out, b.lse, *b.grads), strict=True):
        if x is not None and y is not None:
            yield x, y


def _share(measure: Measure) -> float:
    return measure.share


def _expect(kind: type[Exception], about: str, call: Any) -> None:
    try:
        call()
    except kind:
        return
    raise Failure(f"{about} did not raise {kind.__name__}")
