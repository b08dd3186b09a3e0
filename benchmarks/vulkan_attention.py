"""Attention through Vulkan beside torch's scaled_dot_product_attention.

python benchmarks/vulkan_attention.py [--record]. On a CPU's driver (lavapipe) both are timed on the host, interleaved
in one run. On a GPU the tensors lie on the host and whole calls carry the copies; the ratio is of the device's own
time, by its clock, to torch's on the same card where torch sees it (TF32 off, device events). Decoding is also given as
a share of the rate at which a sum of torch's reads that card's memory, in the same run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from record import parser, publish

import hal_core as hal
from hal_core.testing import BenchmarkRunner

CPU_CASES = [
    (1, 8, 8, 1024, 1024, 64, "float32", False),
    (1, 8, 8, 1024, 1024, 64, "float32", True),
    (1, 8, 8, 1024, 1024, 64, "float16", False),
    (1, 8, 8, 1024, 1024, 128, "float32", False),
    (16, 12, 12, 30, 30, 32, "float32", False),
    (1, 32, 8, 1, 8192, 64, "float32", False),
]
GPU_CASES = [
    (1, 16, 16, 4096, 4096, 64, "float32", False),
    (1, 16, 16, 4096, 4096, 128, "float32", False),
    (1, 16, 16, 4096, 4096, 64, "float16", False),
    (1, 16, 16, 4096, 4096, 128, "float16", False),
    (1, 16, 16, 4096, 4096, 64, "float32", True),
    (1, 32, 8, 1, 131072, 128, "float16", False),
]
#: What matrices are for; Vulkan alone.
MATRIX_CASES = [
    (1, 16, 16, 4096, 4096, 64, "float16", True),
    (1, 16, 16, 4096, 4096, 128, "float16", True),
    (1, 8, 8, 16384, 16384, 64, "float16", False),
    (1, 8, 8, 16384, 16384, 128, "float16", False),
    (1, 8, 8, 16384, 16384, 128, "float16", True),
    (1, 16, 16, 4096, 4096, 96, "float16", False),
    (1, 16, 16, 4096, 4096, 256, "float16", False),
    (1, 16, 16, 4096, 4096, 128, "bfloat16", False),
    (1, 32, 8, 1, 131072, 64, "float16", False),
    (1, 32, 8, 1, 131072, 128, "bfloat16", False),
    (1, 32, 8, 1, 131072, 128, "float32", False),
]


def read_rate() -> float | None:
    """Bytes a second that torch reads of its card's memory; None where there is no card or no CUDA plugin to measure
    it.
    """
    try:
        from hal_cuda.calibrate import read_bandwidth
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    return read_bandwidth(torch.empty(256 << 20, dtype=torch.uint8, device="cuda"))


def processor_ratio(torch_call: Callable[[], object], our_call: Callable[[], object], calls: int) -> str:
    """torch's processor time over ours, of all threads: other work disturbs it less than times. Medians, calls in
    turn.
    """
    spent: dict[Callable[[], object], list[float]] = {torch_call: [], our_call: []}
    for _ in range(calls):
        for call, times in spent.items():
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    return f"{statistics.median(spent[torch_call]) / statistics.median(spent[our_call]):.2f}x"


def measure(device: hal.Device, case: tuple[Any, ...], calls: int, reading: float | None) -> list[str]:
    """A table row: the call, torch's and our times in ms, their ratio, the rate, and, on a processor's driver, the
    ratio of processor times, on a card the share of `reading` bytes a second that decoding reaches.
    """
    batch, heads, heads_kv, len_q, len_k, dim, dtype, causal = case
    place = "cpu" if reading is None else "cuda"  # where drawing is faster
    query = torch.randn(batch, heads, len_q, dim, device=place).to(getattr(torch, dtype)).cpu()
    key, value = (torch.randn(batch, heads_kv, len_k, dim, device=place).to(query.dtype).cpu() for _ in range(2))
    options = {"is_causal": causal, "enable_gqa": heads != heads_kv}
    ours = partial(hal.attention, query, key, value, backend=device.id, **options)
    attention = torch.nn.functional.scaled_dot_product_attention
    if device.fidelity is hal.Fidelity.EMULATED:
        with torch.no_grad():
            both = {"torch": partial(attention, query, key, value, **options), "hal": ours}
            found = BenchmarkRunner(3, calls, budget=40).compare(both)
            share = processor_ratio(both["torch"], both["hal"], calls)
        peer, whole = found.results["torch"].p50, found.results["hal"].p50
        inside = whole
    else:
        session: Any = hal.session(device.id)
        whole, inside = BenchmarkRunner(3, calls, budget=20).run(ours, "hal").p50, 0.0
        times = []
        for _ in range(calls):
            ours()
            times.append(session.device_seconds or 0.0)
        inside, peer = statistics.median(times) * 1e3, 0.0
        read = (key.nbytes + value.nbytes) / max(inside, 1e-9) * 1e3
        share = f"{read / reading:.2f}" if len_q == 1 and inside and reading else ""
        if torch.cuda.is_available():
            torch.backends.cuda.matmul.allow_tf32 = False
            there = [t.cuda() for t in (query, key, value)]
            with torch.no_grad():
                peer = BenchmarkRunner(5, 50, device="cuda").run(partial(attention, *there, **options), "torch").p50
    macs = batch * heads * len_q * len_k * 2 * dim / (2 if causal else 1)
    name = f"B{batch} H{heads}/{heads_kv} {len_q}x{len_k} D{dim} {dtype}{' causal' if causal else ''}"
    rate = 2 * macs / (inside * 1e9) if inside else 0.0
    return [
        name,
        f"{peer:.3f}",
        f"{whole:.3f}",
        f"{inside:.3f}",
        f"{peer / inside:.2f}x" if peer and inside else "not measured",
        f"{rate:.3f}",
        share,
    ]


def main(backend: str) -> None:
    """Measure the first device of a backend, or the one named with --device."""
    options = parser(sys.modules["__main__"].__doc__)
    options.add_argument("--device", default=f"{backend}:0")
    options.add_argument("--calls", type=int, default=20)
    chosen = options.parse_args()
    found = [d for d in hal.devices() if d.id == chosen.device]
    if not found:
        sys.stdout.write(f"{chosen.device} is not present here: nothing was measured\n")
        return
    device = found[0]
    cases = CPU_CASES if device.fidelity is hal.Fidelity.EMULATED else GPU_CASES
    reading = read_rate() if cases is GPU_CASES else None
    more = MATRIX_CASES if backend == "vulkan" and cases is GPU_CASES else []
    rows = [measure(device, case, chosen.calls, reading) for case in [*cases, *more]]
    peer = "torch on the same processor, interleaved" if cases is CPU_CASES else "torch on the same card, TF32 off"
    read = "" if reading is None else f" A sum of torch's reads {reading / 1e12:.2f} TB/s."
    publish(
        chosen,
        backend,
        f"Attention on {device.model} ({device.fidelity})",
        [
            "call",
            "torch ms",
            "whole call ms",
            "device ms",
            "torch / device",
            "TFLOP/s",
            "by processor time" if cases is CPU_CASES else "of read rate",
        ],
        rows,
        [f"Driver: {device.driver}. Medians of {chosen.calls} calls; {peer}.{read}"],
    )


if __name__ == "__main__":
    main("vulkan")
