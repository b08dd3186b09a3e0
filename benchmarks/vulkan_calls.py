"""What a recorded call of a Vulkan device costs the host, beside the device's own time.

python benchmarks/vulkan_calls.py [--record]. One small call, B1 H8 128x128 D64 float16, again and again. "whole" is the
host's clock from the call to its return; "device" is the device's clock over all recorded commands, transfers included;
"host" is
the difference, call by call: Python, the copies between the tensors and mapped memory, submission and waiting. With
tensors on CUDA a call returns before the device is done, so that all of its time is the host's own; "and synchronise"
waits for CUDA.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hal_vulkan.runtime import open_device
from record import parser, publish

import hal_core as hal

SHAPE = (1, 8, 128, 64)
Timed = tuple[float, float | None]  # seconds: by the host's clock, by the device's


def timed(session: Any, run: Callable[[], Any], calls: int, settle: Callable[[], Any]) -> list[Timed]:
    """Each call by itself, after three that are not counted; `settle` runs between calls, untimed."""
    found: list[Timed] = []
    for _ in range(calls + 3):
        start = time.perf_counter()
        run()
        whole = time.perf_counter() - start
        settle()
        found.append((whole, session.recorder.device_seconds_in_all))
    return found[3:]


def row(name: str, found: list[Timed], *, waits: bool) -> list[str]:
    """Medians in microseconds. `waits`: whether the call returns after the device is done."""
    whole = statistics.median(w for w, _ in found)
    inside = [d for _, d in found if d is not None]
    host = statistics.median(w - (d or 0.0) for w, d in found) if waits else whole
    device = f"{statistics.median(inside) * 1e6:.1f}" if inside else "no clock"
    return [name, f"{whole * 1e6:.1f}", device, f"{host * 1e6:.1f}" if inside or not waits else "not measured"]


def rows_of(session: Any, calls: int) -> list[list[str]]:
    request = hal.AttentionRequest(
        batch=1,
        heads_q=SHAPE[1],
        heads_kv=SHAPE[1],
        len_q=SHAPE[2],
        len_k=SHAPE[2],
        dim_qk=SHAPE[3],
        dim_v=SHAPE[3],
        dtype="float16",
    )
    nothing = lambda: None  # noqa: E731 - what happens between calls
    query, key, value = (torch.randn(SHAPE).half() for _ in range(3))
    bound = session.bind(request)
    run = lambda: bound(query, key, value)  # noqa: E731 - the call that is timed
    table = [row("host tensors", timed(session, run, calls, nothing), waits=True)]
    gpu, kept = session.recorder.gpu, next(iter(session.recorder._kept.values()))
    again = lambda: gpu.wait(gpu.submit(kept._commands), "run again", 10.0)  # noqa: E731 - the commands alone
    table.append(row("the recorded commands alone", timed(session, again, calls, nothing), waits=True))
    if session.recorder.card is None:
        return table
    settle = torch.cuda.synchronize
    query, key, value = (t.cuda() for t in (query, key, value))
    table.append(row("CUDA tensors", timed(session, run, calls, settle), waits=False))
    buffers = [session.memory.allocate(SHAPE, "float16") for _ in range(4)]
    query, key, value, out = (session.memory.to_torch(buffer).normal_() for buffer in buffers)
    table.append(row("CUDA tensors in the device's memory", timed(session, run, calls, settle), waits=False))
    prepared = session.prepare_attention(query, key, value, request=request)
    into = lambda: session.compute_attention(prepared, out=out)  # noqa: E731 - the result in place, too
    table.append(row("the same, and the result", timed(session, into, calls, settle), waits=False))
    both = lambda: (into(), settle())  # noqa: E731 - until CUDA knows that Vulkan is done
    table.append(row("the same, and synchronise", timed(session, both, calls, nothing), waits=True))
    for buffer in buffers:
        session.memory.free(buffer)
    return table


def both_ways(session: Any, calls: int, setting: str, cases: Sequence[tuple[int, ...]], dtype: str) -> list[list[str]]:
    """Whole calls with large tensors copied at once, and the other way, interleaved: `setting` says from which size
    on.
    """
    table, usual = [], getattr(open_device, setting)
    for heads, heads_kv, len_q, len_k, dim in cases:
        query = torch.randn(1, heads, len_q, dim).to(getattr(torch, dtype))
        key, value = (torch.randn(1, heads_kv, len_k, dim).to(query.dtype) for _ in range(2))
        bound = session.bind(
            hal.AttentionRequest(
                batch=1,
                heads_q=heads,
                heads_kv=heads_kv,
                len_q=len_q,
                len_k=len_k,
                dim_qk=dim,
                dim_v=dim,
                dtype=dtype,
            )
        )
        found: dict[int, list[tuple[float, int]]] = {1 << 62: [], usual: []}
        for size in found:  # allocate, and wake what sleeps
            setattr(open_device, setting, size)
            bound(query, key, value)
            session.recorder.forget()
        for _ in range(calls):
            for size, times in found.items():
                setattr(open_device, setting, size)
                before, start = session.memory.stats().copied, time.perf_counter()
                bound(query, key, value)
                times.append((time.perf_counter() - start, session.memory.stats().copied - before))
                session.recorder.forget()  # a recording made one way is not run the other way
        setattr(open_device, setting, usual)
        copied, other = (statistics.median(seconds for seconds, _ in times) * 1e3 for times in found.values())
        mib = [f"{times[0][1] / 2**20:.1f}" for times in found.values()]
        name = f"B1 H{heads}/{heads_kv} {len_q}x{len_k} D{dim} {dtype}"
        table.append([name, f"{copied:.2f}", mib[0], f"{other:.2f}", mib[1], f"{copied / other:.2f}x"])
    return table


def main() -> None:
    options = parser(sys.modules["__main__"].__doc__)
    options.add_argument("--device", default="vulkan:0")
    options.add_argument("--calls", type=int, default=300)
    chosen = options.parse_args()
    device = next((d for d in hal.devices() if d.id == chosen.device), None)
    if device is None:
        sys.stdout.write(f"{chosen.device} is not present here: nothing was measured\n")
        return
    columns = ["B1 H8 128x128 D64 float16", "whole us", "device us", "host us"]
    note = (
        f"Driver: {device.driver}. Medians of {chosen.calls} calls. Whole: from the call to its return. Device: all "
        "recorded commands by the device's clock, transfers included. Host: the difference, call by call. Calls with "
        "tensors on CUDA return before the device is done: all of their time is the host's. To synchronise is to wait "
        "for the turns of both interfaces on the card."
    )
    session: Any = hal.session(device.id)
    publish(
        chosen,
        "vulkan",
        f"Host time of a recorded call on {device.model} ({device.fidelity})",
        columns,
        rows_of(session, chosen.calls),
        [note],
    )
    where, few = f"on {device.model} ({device.fidelity})", max(chosen.calls // 20, 3)
    note = "Medians of whole calls, interleaved."
    if session.recorder.mapped:
        cases = [(8, 8, 1024, 1024, 64), (32, 8, 1, 8192, 64), (8, 8, 64, 16384, 64)]
        columns = ["call", "copied ms", "MiB copied", "in place ms", "MiB copied", "copied / in place"]
        rows = both_ways(session, few, "IMPORT_FROM", cases, "float32")
        publish(chosen, "vulkan", f"Host memory read in place {where}", columns, rows, [note])
    else:
        cases = [(16, 16, 4096, 4096, 128), (32, 8, 1, 65536, 128)]
        columns = ["call", "at once ms", "MiB copied", "by the ring ms", "MiB copied", "at once / ring"]
        rows = both_ways(session, few, "STREAM_FROM", cases, "float16")
        publish(chosen, "vulkan", f"Large host tensors through the staging ring {where}", columns, rows, [note])


if __name__ == "__main__":
    main()
