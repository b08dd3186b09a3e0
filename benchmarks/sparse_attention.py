r"""Sparse attention against dense attention in one run: every pattern, scoring and planning included.

    python benchmarks/sparse_attention.py [--record]  # 8,192 tokens on the CPU
    python benchmarks/sparse_attention.py --device cuda:0 --length 32768 --heads 16 --dim 128 --block 128 \
        --dtype bfloat16

Random data; medians of interleaved rounds; on the CPU elapsed or processor time, on a CUDA device that of its events.
"given plan" is the time with the plan ready. The rate counts the products of the blocks that are read alone. A bar is
on the patterns at 90%: 4 times the dense call on the CPU, 5 times the fastest dense call on CUDA.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import record
import torch
from hal_nn.sparse import SparseGate, SparsePattern, plan_density, tiling_of
from hal_nn.sparse.attention import request_of
from torch.nn.attention import SDPBackend, sdpa_kernel

import hal_core as hal

BARS = {"cpu": 4.0, "cuda": 5.0}


def timed(call: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    """Milliseconds of one call."""
    if device == "cpu":
        start = clock()
        call()
        return (clock() - start) * 1e3
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def interleaved(
    calls: dict[str, Callable[[], Any]], device: str, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median milliseconds of each call."""
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(timed(call, device, clock))
    return {name: statistics.median(times) for name, times in found.items()}


def dense_calls(tensors: list[Any], causal: bool) -> dict[str, Callable[[], Any]]:
    """torch's own attention: on CUDA each of its fast kernels, and hal's choice."""
    sdpa = torch.nn.functional.scaled_dot_product_attention
    kernels: dict[str, Any] = {"SDPA": None}
    if tensors[0].is_cuda:
        kernels = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION}

    def made(kernel: Any) -> Callable[[], Any]:
        def call() -> Any:
            with nullcontext() if kernel is None else sdpa_kernel(kernel):
                return sdpa(*tensors, is_causal=causal)

        return call

    calls = {name: made(kernel) for name, kernel in kernels.items()}
    return calls | {"hal dense": lambda: hal.attention(*tensors, is_causal=causal)}


def main() -> int:
    options = record.parser(__doc__)
    options.add_argument("--device", default="cpu:0")
    options.add_argument("--length", type=int, default=8192)
    options.add_argument("--heads", type=int, default=4)
    options.add_argument("--dim", type=int, default=64)
    options.add_argument("--block", type=int, default=64)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--threads", type=int, help="torch threads")
    options.add_argument("--processor-time", action="store_true", help="for a machine that others use")
    options.add_argument("--causal", action="store_true")
    options.add_argument("--patterns", nargs="+", default=[each.value for each in SparsePattern])
    given = options.parse_args()
    kind = given.device.split(":")[0]
    place = "cpu" if kind == "cpu" else given.device
    clock = time.process_time if given.processor_time else time.perf_counter
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    shape = (1, given.heads, given.length, given.dim)
    tensors = [torch.randn(shape, device=place, dtype=getattr(torch, given.dtype)) for _ in range(3)]
    causal = "top_left" if given.causal else "none"
    request = request_of(*tensors, causal, None)
    rows, missed = [], False
    for sparsity in given.sparsity:
        calls = dense_calls(tensors, given.causal)
        peers, shares = list(calls), {}
        for name in given.patterns:
            extra: list[dict[str, Any]] = [{}]
            if name == "learned":
                extra = [{"gate": SparseGate(given.heads, given.dim).to(place)}]
            elif name == "dynamic_threshold":
                extra = [{}, {"score": "antidiagonal"}, {"stride": given.block, "budget": "row"}]
            for more in extra:
                tiling = tiling_of(name, sparsity, given.block, **more)
                label = " ".join([name, *(f"{k} {v}" for k, v in more.items() if k != "gate")])
                plan = tiling.plan(request, {}, query=tensors[0], key=tensors[1])
                shares[label] = plan_density(plan, request)

                def whole(tiling: Any = tiling) -> Any:
                    return hal.attention(*tensors, causal=causal, tiling=tiling, backend=given.device)

                def ready(plan: Any = plan) -> Any:
                    return hal.attention(*tensors, causal=causal, block_plan=plan, backend=given.device)

                calls |= {label: whole, f"{label}, given plan": ready}
        found = interleaved(calls, kind, given.rounds, clock)
        fastest = min(peers, key=lambda name: found[name])
        rows += [[f"{sparsity:.0%}", name, f"{found[name]:.3f}", "", "", "", ""] for name in peers]
        pairs = (given.length + 1) / 2 / given.length if given.causal else 1.0
        for label, density in shares.items():
            ratio, bar = found[fastest] / found[label], BARS.get(kind)
            flops = 4 * given.heads * given.length**2 * given.dim * pairs * density
            rate = flops / found[f"{label}, given plan"] / 1e9
            verdict = "" if bar is None or sparsity != 0.9 else "held" if ratio >= bar else "missed"
            missed |= verdict == "missed"
            ready_ms = f"{found[f'{label}, given plan']:.3f}"
            rows.append(
                [f"{sparsity:.0%}", label, f"{found[label]:.3f}", ready_ms, f"{ratio:.2f}", f"{rate:.2f}", verdict]
            )
    what = (
        f"{given.length:,} tokens, {given.heads} heads of {given.dim}, {given.dtype}, {causal}, blocks of {given.block}"
    )
    columns = ("sparsity", "pattern", "ms", "ms, given plan", "against dense", "Tflop/s", "bar")
    timed_by = "Processor time of all threads" if given.processor_time and kind == "cpu" else "Elapsed time"
    notes = (f"{what}. {timed_by}. Bar at 90%: {BARS.get(kind)} times the fastest dense call.",)
    name = "sparse_attention" if kind == "cpu" else f"sparse_attention_{kind}"
    record.publish(given, name, "Sparse attention against dense", columns, rows, notes, what)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
