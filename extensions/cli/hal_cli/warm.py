"""`hal warm`: compile ahead, in several processes, what a device's first calls would wait for."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from hal_core.plugin_api import (
    DTYPE_BYTES,
    AttentionRequest,
    Causal,
    CommandResult,
    ContractError,
    Device,
    MaskKind,
    Table,
    find_devices,
    registry,
)

from . import model_config
from .model_config import Layers

#: Lengths of prompts, whole tiles and cut short, and of caches: kernels are chosen by them.
PROMPTS = (512, 1000, 2048, 3001, 8192)
CACHES = (256, 1024, 4096, 16384, 65536)
BATCHES = (1, 8, 64)
#: What is compiled where no model is named: common head sizes and groups.
COMMON = (
    *(Layers(8, heads_kv, dim, dim) for dim in (64, 128) for heads_kv in (8, 2, 1)),
    *(Layers(8, 8, dim, dim, causal=False) for dim in (64, 128)),
)


class Piece(NamedTuple):
    """What one piece of work gave. kernels: how many; None where it failed, with `error`. seconds: it took."""

    device: str
    name: str
    kernels: int | None
    seconds: float
    error: str = ""


def run(options: argparse.Namespace) -> CommandResult:
    """Compile, and say what was compiled; exit code 1 where a piece failed."""
    if options.processes is not None and options.processes < 1:
        raise ContractError(f"--processes {options.processes} was given: pass 1 or more")
    devices = find_devices(options.device)
    kinds = COMMON if options.model is None else tuple(model_config.layers(model_config.read(options.model)))
    dtypes = tuple(name for name in (options.dtype or "").split(",") if name)
    if unknown := [name for name in dtypes if name not in DTYPE_BYTES]:
        raise ContractError(f"--dtype {','.join(unknown)} was given: pass names among {', '.join(DTYPE_BYTES)}")
    begun = time.perf_counter()
    work, idle = [], []
    for device in devices:
        warm_up = getattr(registry.backend_of(device), "warm_up", None)
        found = [] if warm_up is None else warm_up(device, list(requests(device, kinds, dtypes, options.training)))
        work += [(device.id, *piece) for piece in found]
        if not found:
            idle.append(device.id)
    pieces = compiled(work, options.processes or os.cpu_count() or 1, options.progress)
    return shown(pieces, idle, time.perf_counter() - begun)


def requests(
    device: Device, kinds: Sequence[Layers], dtypes: Sequence[str], training: bool
) -> Iterator[AttentionRequest]:
    """What a model's first calls ask: prompts, steps with a cache, and with `training` steps with gradients."""
    for kind in kinds:
        for dtype in dtypes or (kind.dtype if kind.dtype in DTYPE_BYTES else "bfloat16",):
            one = AttentionRequest(
                batch=1,
                heads_q=kind.heads,
                heads_kv=kind.heads_kv,
                len_q=0,
                len_k=0,
                dim_qk=kind.dim_qk,
                dim_v=kind.dim_v,
                dtype=dtype,
                device=device.reads[0] if device.reads else "cpu",
                causal=Causal.TOP_LEFT if kind.causal else Causal.NONE,
                window=None if kind.window is None else (kind.window - 1, None if kind.causal else kind.window - 1),
                softcap=kind.softcap,
                scale=kind.scale,
            )
            yield from _of_layers(one, training)


def _of_layers(one: AttentionRequest, training: bool) -> Iterator[AttentionRequest]:
    plain = {"causal": Causal.NONE, "window": None}
    for length in PROMPTS:
        prompt = _changed(one, len_q=length, len_k=length)
        yield from (prompt, _changed(prompt, lse=True))
        if training:
            yield _changed(prompt, lse=True, grads=frozenset({"q", "k", "v"}))
    masked = _changed(one, len_q=2048, len_k=2048, mask=MaskKind.BOOLEAN, **plain)
    yield from (masked, _changed(masked, mask=MaskKind.ADDITIVE, lse=True))
    if one.causal is Causal.NONE:
        return
    behind = _changed(one, causal=Causal.BOTTOM_RIGHT)
    yield _changed(behind, len_q=300, len_k=1324)
    for length in CACHES:
        for batch in BATCHES:
            yield _changed(behind, batch=batch, len_q=1, len_k=length)
            yield _changed(one, batch=batch, len_q=1, len_k=length, **plain)


def _changed(request: AttentionRequest, **changes: Any) -> AttentionRequest:
    from dataclasses import replace

    return replace(request, **changes)


def compiled(
    work: Sequence[tuple[str, str, Callable[[], int]]], processes: int, progress: Callable[[str, float], None]
) -> list[Piece]:
    """Run pieces of work, (device, name, function), in processes of their own; in the order in which they end."""
    if not work:
        return []
    done: list[Piece] = []
    context = multiprocessing.get_context("spawn")  # a forked process could not use a device that its parent uses
    with ProcessPoolExecutor(min(processes, len(work)), mp_context=context) as pool:
        waiting = {pool.submit(_timed, function): (device, name) for device, name, function in work}
        progress(f"compiling in {min(processes, len(work))} processes", 0.0)
        for ended in as_completed(waiting):
            device, name = waiting[ended]
            try:
                kernels, seconds = ended.result()
                done.append(Piece(device, name, kernels, seconds))
            except BrokenProcessPool:
                done.append(
                    Piece(device, name, None, 0.0, "a process that compiled ended without a word: out of memory?")
                )
            except Exception as error:  # one kernel that does not compile must not keep the others from it
                done.append(Piece(device, name, None, 0.0, f"{type(error).__name__}: {error}"))
            progress(name, len(done) / len(work))
    return done


def _timed(function: Callable[[], int]) -> tuple[int, float]:
    begun = time.perf_counter()
    return function(), time.perf_counter() - begun


def shown(pieces: Sequence[Piece], idle: Sequence[str], seconds: float) -> CommandResult:
    """The pieces as a table and as plain values."""
    failed = [piece for piece in pieces if piece.kernels is None]
    kernels = sum(piece.kernels or 0 for piece in pieces)
    text = [f"{device} offers nothing to compile ahead." for device in idle]
    if pieces:
        text.append(
            f"{kernels} kernels are ready, in {seconds:.1f} s" + (f"; {len(failed)} failed." if failed else ".")
        )
    text += [f"{piece.device}: {piece.name}: {piece.error}" for piece in failed]
    rows = [
        [piece.device, piece.name, str(piece.kernels), f"{piece.seconds:.1f} s"]
        for piece in sorted(pieces, key=lambda piece: (piece.device, piece.name))
        if piece.kernels is not None
    ]
    tables = [Table("", ["device", "attention", "kernels", "took"], rows)] if rows else []
    data = {
        "seconds": seconds,
        "kernels": kernels,
        "pieces": [piece._asdict() for piece in pieces],
        "nothing to compile": list(idle),
    }
    return CommandResult(data, tables, text, 1 if failed else 0)
