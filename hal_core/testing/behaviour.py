"""How a device behaves from call to call: reuse, threads, repetition, partial results, closing, leaks.

SWITCH_INTERVAL: seconds after which Python changes threads in the thread check, so that state which threads share is
overwritten in the middle of a call. RESIDENT_SLACK: bytes that resident memory may grow in the leak check, whatever
the calls return.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from .. import UnsupportedError, bind, merge_partials
from ..request import Causal, Grads, MaskKind
from .cases import QKV, Case, Inputs
from .comparisons import explained_share, right, same
from .findings import Failure, Measure, Skip, bounded, pairs
from .reference import relative_error, request_of
from .subject import PATHS, Subject

THREADS, ROUNDS, SWITCH_INTERVAL, RESIDENT_SLACK = 8, 4, 1e-6, 24 << 20
_MASKED: tuple[dict[str, Any], ...] = ({"mask": MaskKind.ADDITIVE}, {"mask": MaskKind.BOOLEAN})
_CAUSAL: dict[str, Any] = {"causal": Causal.TOP_LEFT}
_GROUPED: dict[str, Any] = {"heads_q": 4, "heads_kv": 2}
_GRADS: dict[str, Any] = {"grads": QKV}


def contract(s: Subject) -> Measure:
    """The plainest request is taken and right, and tile sizes are positive numbers."""
    plain = s.corners.base
    if reasons := [*s.capabilities.refusals(plain), *s.backend.check(plain, s.device)]:
        raise Failure(f"{plain.describe()} is refused: {'; '.join(map(str, reasons))}")
    sizes = s.session.optimize_tiling(plain.len_k, plain.batch, plain.heads_q)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        raise Failure(f"optimize_tiling gave {sizes!r}: positive sizes by name are wanted")
    return s.hold(s.probe())


def prepared_reuse(s: Subject) -> Measure:
    """A prepared call serves other queries and stays what it was; `out=` is filled and tile_size changes nothing."""
    case, worst = s.probe(), Measure()
    inputs, other = case.draw(s.seed), case.draw(s.seed + 1).query
    prepared, tiled = (s.session.prepare_attention(*inputs[:3], size, request=case.request) for size in (None, 16))
    room = torch.empty_like(inputs.query)
    for about, call, query, options in (
        ("computed first", prepared, inputs.query, {}),
        ("with another query", prepared, other, {"query": other}),
        ("computed again", prepared, inputs.query, {}),
        ("with out=", prepared, inputs.query, {"out": room}),
        ("with tile_size 16", tiled, inputs.query, {}),
    ):
        out = s.session.compute_attention(call, rng=s.rng(case.request), **options).out
        if "out" in options and out.data_ptr() != room.data_ptr():
            raise Failure("with out=: the result is in another tensor than the given one")
        worst = s.worse(worst, right(s, about, case, inputs._replace(query=query), out))
    return worst


def stale_keys(s: Subject) -> Measure:
    """Keys and values that changed since the last call are read anew, in place or in new tensors."""
    case, worst = s.probe(), Measure()
    for path in (*PATHS, "hal.bind"):
        inputs = case.draw(s.seed)
        call = bind(*inputs[:3], backend=s.device.id) if path == "hal.bind" else None
        for n, change in enumerate(("first call", "keys and values changed in place", "new tensors")):
            fresh = case.draw(s.seed + n)
            if change == "new tensors":
                inputs = fresh
            inputs.key.copy_(fresh.key)
            inputs.value.copy_(fresh.value)
            out = call(*inputs[:3], rng=s.rng(case.request)) if call else s.run(path, case, inputs).out
            worst = s.worse(worst, right(s, f"{change}, by {path}", case, inputs, out))
        for name in ("value", "key"):  # the key changes last: it matters because its value now stands out
            stale = s.want(case, inputs._replace(**{name: getattr(inputs, name).clone()})).out
            getattr(inputs, name)[-1, -1, -1, -1] += 200
            out = call(*inputs[:3], rng=s.rng(case.request)) if call else s.run(path, case, inputs).out
            if not (share := explained_share(out, s.want(case, inputs).out, stale)) >= 0.5:
                what = f"one late element of {name} was changed in place, and the result does not follow"
                raise Failure(f"{case}, by {path}: {what} (share {share:.2f})", 1 - share, 0.5)
    return worst


def results_stay(s: Subject) -> Measure:
    """A result that is kept does not change while later calls run, and shares no memory with theirs."""
    for case, path in itertools.product((s.probe({"lse": True}), s.probe(*_MASKED, _GROUPED, _GRADS)), PATHS):
        kept = s.run(path, case, case.draw(s.seed))
        copies = [x.clone() for x, _ in pairs(kept, kept)]
        for n in (1, 2):
            later = s.run(path, case, case.draw(s.seed + n), n)
            for (x, y), copy in zip(pairs(kept, later), copies, strict=True):
                if not torch.equal(x, copy):
                    raise Failure(f"{case}, by {path}: a result that was kept changed while another call ran")
                if x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() != 0:
                    raise Failure(f"{case}, by {path}: two results that are both kept lie in the same memory")
    return Measure()


def huge_strides(s: Subject) -> Measure:
    """Rows that lie so far apart that offsets pass 2^31 elements are read right."""
    case = s.probe({"dtype": "bfloat16"}, {"dtype": "float16"}) if s.corners.base.device == "cpu" else s.probe()
    inputs = case.draw(s.seed)
    batch, heads, length, dim = inputs.key.shape
    size = batch * heads * max(dim, inputs.value.shape[3])
    apart = max((1 << 31) // max(length - 1, 1), 2 * size)
    try:
        room = torch.empty(apart * (length - 1) + 2 * size, dtype=inputs.key.dtype, device=inputs.key.device)
    except RuntimeError as full:
        raise Skip(f"no room for tensors this far apart: {full}") from full
    key, value = (
        room.as_strided(t.shape, (heads * t.shape[3], t.shape[3], apart, 1), offset).copy_(t)
        for t, offset in ((inputs.key, 0), (inputs.value, size))
    )
    return s.hold(case, inputs._replace(key=key, value=value))


def inputs_unchanged(s: Subject) -> Measure:
    """No call writes to its inputs, forward or backward."""
    for probe in (s.probe(), s.probe(*_MASKED, _CAUSAL, _GROUPED, _GRADS)):
        for layout, path in itertools.product(("contiguous", "heads last", "expanded"), PATHS):
            case = attrs.evolve(probe, layout=layout)
            inputs = case.draw(s.seed)
            copies = [part.clone() if isinstance(part, Tensor) else None for part in inputs]
            s.run(path, case, inputs)
            for name, tensor, copy in zip(Inputs._fields, inputs, copies, strict=True):
                if copy is not None and not torch.equal(tensor, copy):  # type: ignore[arg-type]
                    raise Failure(f"{case}, by {path}: {name} was changed in place")
    return Measure()


def threads(s: Subject) -> Measure:
    """Eight threads at once give what one gives, dropout and noise included."""
    cases = [s.probe(*wish) for wish in ((), _MASKED, (_CAUSAL, _GROUPED), (_GRADS,), ({"dropout": 0.2},))]
    paths, barrier = itertools.cycle(PATHS), threading.Barrier(THREADS)
    work = [[(next(paths), case, case.draw(s.seed + n), n) for case in cases] for n in range(THREADS)]
    alone = [[s.run(*call) for call in calls] for calls in work]

    def one(number: int) -> Measure:
        barrier.wait()
        pairs = list(zip(work[number], alone[number], strict=True)) * ROUNDS
        return s.worse(*(same(s, f"by {call[0]} in 8 threads", call[1], s.run(*call), want) for call, want in pairs))

    with _switching_often(), ThreadPoolExecutor(THREADS) as pool:
        return s.worse(*pool.map(one, range(THREADS)))


@contextmanager
def _switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def repeats(s: Subject) -> Measure:
    """Equal calls give equal results, bitwise where determinism is claimed; dropout and noise follow (seed, offset)
    alone.
    """
    asked, worst = {"deterministic": True}, Measure()
    for case, path in itertools.product(
        (s.probe(asked, *_MASKED, _GROUPED, _GRADS), s.probe(asked, {"dropout": 0.3})), PATHS
    ):
        inputs, r = case.draw(s.seed), case.request
        first, *again = (s.run(path, case, inputs) for _ in range(4))
        if r.deterministic and not all(torch.equal(a, b) for each in again for a, b in pairs(each, first)):
            raise Failure(f"{case}, by {path}: equal calls differ, and determinism is claimed")
        worst = s.worse(worst, *(same(s, f"by {path}, repeated", case, each, first) for each in again))
        if s.rng(r) is not None and torch.equal(first.out, s.run(path, case, inputs, 1).out):
            raise Failure(f"{case}, by {path}: another offset gave the same result: rng is ignored")
    return worst


def merges(s: Subject) -> Measure:
    """Parts of the keys, one of them fully masked, merge into the whole by their log-sum-exp; backward takes the
    whole's.
    """
    case = s.probe({"lse": True}, {"mask": MaskKind.BOOLEAN}, _GROUPED)
    if not case.request.lse:
        raise Skip("no log-sum-exp is claimed, so parts cannot be merged")
    length, inputs = case.request.len_k, case.draw(s.seed)
    cuts = list(itertools.pairwise((0, length // 3, 2 * length // 3, length)))
    if any(stop - start not in s.capabilities.length for start, stop in cuts):
        raise Skip("the claimed lengths leave no shorter parts")
    if inputs.mask is not None:
        inputs.mask[..., slice(*cuts[1])] = False
    parts = []
    for start, stop in cuts:
        mask = None if inputs.mask is None else inputs.mask[..., start:stop]
        parts.append(inputs._replace(key=inputs.key[:, :, start:stop], value=inputs.value[:, :, start:stop], mask=mask))
    found = [s.by_session(attrs.evolve(case, request=request_of(*part[:4], return_lse=True)), part) for part in parts]
    out, lse = merge_partials(
        torch.stack([f.out for f in found]), torch.stack([f.lse for f in found if f.lse is not None])
    )
    numerics, want = s.capabilities.numerics[case.request.dtype], s.want(case, inputs)
    about = f"merged from {len(parts)} parts of the keys"
    # A part's rounding and the merge's come on top of each other: twice the bound.
    worst = bounded(f"{case}, {about}: out", relative_error(out, want.out), 2 * numerics.relative)
    assert want.lse is not None
    worst = s.worse(worst, bounded(f"{case}, {about}: log-sum-exp", relative_error(lse, want.lse), 2 * numerics.lse))
    case = attrs.evolve(case, request=replace(case.request, grads=QKV))
    return s.worse(worst, _backward_of_parts(s, case, inputs, parts, out, lse)) if s.accepts(case.request) else worst


def _backward_of_parts(
    s: Subject, case: Case, inputs: Inputs, parts: list[Inputs], out: Tensor, lse: Tensor
) -> Measure:
    """Gradients of the whole from each part's backward, given the whole's (out, lse): what a ring does."""
    want, found, session = s.want(case, inputs).grads, [], s.session
    for part in parts:
        request = request_of(*part[:4], return_lse=True, grads=QKV)
        prepared, rng = session.prepare_attention(*part[:3], request=request), s.rng(request)
        try:
            found.append(session.compute_attention_backward(prepared, out, lse, inputs.grad_out, part.mask, rng=rng))
        except UnsupportedError:
            if session.autograd(request) == "explicit":
                raise
            return Measure()  # a native session need not have a backward of its own
    grads = (sum(g.query.double() for g in found), *(torch.cat([g[i] for g in found], 2) for i in (1, 2)))
    about, bound = (
        "by parts, given the whole's (out, lse)",
        2 * (s.capabilities.numerics[case.request.dtype].gradient or 0),
    )
    pairs = zip(Grads._fields, grads, want, strict=False)
    return s.worse(*(bounded(f"gradient of {name} {about}", relative_error(x, w), bound) for name, x, w in pairs))


def reopen(s: Subject) -> Measure:
    """A session closes twice without harm, its results stay, and the device opens again, apart from other sessions."""
    case, other = s.probe(), s.session
    inputs, worst, first = case.draw(s.seed), Measure(), s.by_session(case, case.draw(s.seed))
    for _ in range(2):
        with s.backend.open(s.device) as session:
            found = s.by_session(case, inputs, session=session)
            copy = found.out.clone()
        session.close()
        if not torch.equal(found.out, copy):
            raise Failure("a result changed when its session was closed")
        worst = s.worse(worst, same(s, "by a session opened again", case, found, first))
    return s.worse(worst, same(s, "by a session left open", case, s.by_session(case, inputs, session=other), first))


def leaks(s: Subject) -> Measure:
    """Many calls leave no buffers, tensors or memory behind."""
    case = s.probe({"len_q": 256, "len_k": 256, "heads_q": 4, "heads_kv": 4, "batch": 1}, _GRADS)
    inputs, calls = case.draw(s.seed), 0
    for path in PATHS * 3:
        s.run(path, case, inputs)
    before, stop = _held(s), time.monotonic() + (1.5 if s.quick else 4.0)
    while calls < 20 or (calls < 400 and time.monotonic() < stop):
        s.run(PATHS[calls % 2], case, inputs, calls)
        calls += 1
    some = calls * inputs.grad_out.nbytes // 4
    names = ("bytes in use by the session's memory", "live tensors", "bytes resident")
    for name, first, last, slack in zip(
        names, before, _held(s), (0, calls // 4, max(some, RESIDENT_SLACK)), strict=True
    ):
        if last - first > slack:
            raise Failure(f"{calls} calls left {last - first:,} {name} behind", float(last - first), float(slack))
    return Measure(detail=f"{calls} calls")


def _held(s: Subject) -> tuple[int, int, int]:
    gc.collect()
    tensors, status = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()), Path("/proc/self/statm")
    resident = int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0
    return s.session.memory.stats().in_use, tensors, resident
