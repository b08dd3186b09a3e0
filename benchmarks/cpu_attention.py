"""The CPU device beside torch's scaled_dot_product_attention: decode, the grid, window, softcap, memory.

Functions that are compared run interleaved, in random order; a ratio is the median of the rounds' ratios, torch's time
over the device's, so above 1 is faster than torch. The grid is run three times. With `--against CHECKOUT` the shapes of
models are timed beside another checkout's CPU device instead.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import record
import torch
from checkouts import ROOT, Worker
from hal_cpu.calibrate import read_bandwidth
from hal_cpu.paths import native_module, path_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import hal_core as hal
from hal_core.testing import BenchmarkRunner, reference, relative_error, request_of
from hal_core.testing.benchmark import host_peak

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEAN_BAR = 0.98  # of --against
SECTIONS = ("decode", "grid", "window", "softcap", "memory", "native", "plans", "compiled")
NOTE = (
    "Ratio: time of torch's scaled_dot_product_attention over the device's; "
    "the 95% interval is over the rounds of one run."
)


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--section", choices=SECTIONS, action="append", help="only this section; may be repeated")
    parser.add_argument("--runs", type=int, default=3, help="runs of the grid (3)")
    parser.add_argument(
        "--quiet",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="repeat a comparison for up to this long "
        "while other programs keep the processors busy, and keep the quietest (0)",
    )
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="compare shapes of models with a checkout's")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of --against (12)")
    options = parser.parse_args()
    if options.against is not None:
        return against(options)
    global quiet_seconds
    quiet_seconds = options.quiet
    for section in options.section or SECTIONS:
        globals()[section](options)
    return 0


def against(options: argparse.Namespace) -> int:
    """Model shapes here and in another checkout, in turn; 1 where the geometric mean of the ratios misses its bar."""
    workers = [Worker("cpu_worker.py", checkout, "cpu") for checkout in (ROOT, options.against)]
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in workers[0].ask(None)}
    with Others(lambda: sum(worker.processor_seconds() for worker in workers)) as others:
        for number in range(options.rounds + 1):
            for name, found in times.items():
                for side in (0, 1) if number % 2 else (1, 0):
                    taken = workers[side].ask(name)
                    if number:  # the first round warms up
                        found[side].append(taken)
    for worker in workers:
        worker.close()
    ratios = {name: min(there) / min(here) for name, (here, there) in times.items()}
    rows = [
        [name, f"{min(there):.3f}", f"{min(here):.3f}", f"{ratios[name]:.3f}"] for name, (here, there) in times.items()
    ]
    mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
    notes = [
        f"Geometric mean {mean:.3f} over {len(rows)} shapes, worst {min(ratios.values()):.3f}; the bar is {MEAN_BAR}.",
        f"Least processor time of a call over {options.rounds} rounds in turn, one thread. Other programs took "
        f"{others.share:.0%} of the processors meanwhile.",
    ]
    columns = ("shape", "there, ms", "here, ms", "there / here")
    record.publish(options, "cpu", "Shapes of models, beside another checkout", columns, rows, notes, "Against")
    return int(mean < MEAN_BAR)


def compare(torchs: Callable[[], Any], ours: Callable[[], Any], seconds: float) -> tuple[float, float, str]:
    """(torch's milliseconds, ours, ratio with its interval), of the quietest of the tries that --quiet allows."""
    best: tuple[float, Any] | None = None
    begun = time.perf_counter()
    while best is None or (best[0] > BUSY and time.perf_counter() - begun < quiet_seconds):
        with Others() as others:
            found = BenchmarkRunner(warmup=3, timed=200, budget=seconds).compare(
                {"device": ours, "torch": torchs}, baseline="device"
            )
        if best is None or others.share < best[0]:
            best = (others.share, found)
        if best[0] > BUSY:
            time.sleep(min(1.0, quiet_seconds))
    others_shares.append(best[0])
    found = best[1]
    ratio = found.ratios["torch"]
    return (
        found.results["torch"].p50,
        found.results["device"].p50,
        f"{ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
    )


class Others:
    """The share of this machine's processors that other programs take inside the block; 0 where the system does not
    say.

    Args:
        own: processor seconds of what is timed.
    """

    def __init__(self, own: Callable[[], float] = time.process_time) -> None:
        self._own = own

    def __enter__(self) -> Others:
        self._before, self.share = self._ticks(), 0.0
        return self

    def __exit__(self, *_: object) -> None:
        (total, busy, own), (t, b, o) = self._ticks(), self._before
        self.share = max(busy - b - (own - o), 0.0) / max(total - t, 1e-9)

    def _ticks(self) -> tuple[float, float, float]:
        """Seconds of all processors, of those busy, and of what is timed."""
        try:
            fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return 0.0, 0.0, 0.0
        seconds = [n / os.sysconf("SC_CLK_TCK") for n in fields]
        return sum(seconds), sum(seconds) - seconds[3] - seconds[4], self._own()


#: Share of the processors from which other programs spoil a comparison.
BUSY = 0.05
quiet_seconds = 0.0
others_shares: list[float] = []


def publish(options: argparse.Namespace, title: str, columns: Any, rows: Any, notes: list[str], section: str) -> None:
    """Publish a section, with what other programs took of the machine meanwhile."""
    if others_shares:
        worst, middle = max(others_shares), statistics.median(others_shares)
        notes = [*notes, f"Other programs took {middle:.0%} of the processors meanwhile (median), at most {worst:.0%}."]
        others_shares.clear()
    record.publish(options, "cpu", title, columns, rows, notes, section)


def draw(batch: int, heads: int, length: int, dim: int, dtype: str) -> Tensor:
    return torch.randn(batch, heads, length, dim).to(DTYPES[dtype])


def decode(options: argparse.Namespace) -> None:
    """One query, 32 heads on 8, 8,192 keys: the bars are 8, 2.2 and 1.3 times torch, and 0.25 of the read bandwidth."""
    bandwidth = read_bandwidth()
    rows = []
    for dtype, dim, masked, bar in (
        ("bfloat16", 128, False, "8"),
        ("float32", 128, False, "2.2"),
        ("float32", 64, False, "1.3"),
        ("bfloat16", 64, False, ""),
        ("float16", 128, False, ""),
        ("bfloat16", 128, True, ""),
        ("float32", 128, True, ""),
    ):
        query, key, value = draw(1, 32, 1, dim, dtype), draw(1, 8, 8192, dim, dtype), draw(1, 8, 8192, dim, dtype)
        mask = (torch.arange(8192) >= 1000).view(1, 1, 1, -1) if masked else None
        bound = hal.bind(query, key, value, mask, enable_gqa=True, backend="cpu")
        theirs, ours, ratio = compare(
            lambda q=query, k=key, v=value, m=mask: sdpa(q, k, v, m, enable_gqa=True),
            lambda b=bound, q=query, k=key, v=value, m=mask: b(q, k, v, m),
            5.0,
        )
        share = (key.nbytes + value.nbytes) / (ours / 1e3) / bandwidth
        name = f"{dtype}, head_dim {dim}" + (", padding mask" if masked else "")
        rows.append([name, f"{theirs:.2f}", f"{ours:.2f}", ratio, bar, f"{share:.2f}"])
    publish(
        options,
        "Decode: batch 1, 32 heads on 8, 1 query, 8,192 keys",
        ("case", "torch ms", "device ms", "ratio", "bar", "share of read bandwidth"),
        rows,
        [f"Read bandwidth in the same run: {bandwidth / 1e9:.1f} GB/s; the bar for its share is 0.25.", NOTE],
        "Decode",
    )


def grid(options: argparse.Namespace) -> None:
    """Lengths 128 to 8,192, head sizes 32 to 256, three dtypes, full and causal; cases over 1 ms count."""
    heads = {128: 16, 512: 8, 2048: 4, 8192: 1}
    ratios: dict[tuple[Any, ...], list[float]] = {}
    times: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for _ in range(options.runs):
        for length, count in heads.items():
            for dim in (32, 64, 128, 256):
                for dtype in DTYPES:
                    for causal in (False, True):
                        case = (dtype, dim, length, count, causal)
                        theirs, ours, ratio = _grid_case(*case)
                        ratios.setdefault(case, []).append(float(ratio.split()[0]))
                        times.setdefault(case, []).append((theirs, ours))
    rows, counted = [], []
    for case, found in ratios.items():
        dtype, dim, length, count, causal = case
        theirs, ours = (statistics.median(pair[side] for pair in times[case]) for side in (0, 1))
        if theirs < 1.0:
            continue
        counted.append(statistics.median(found))
        shape = f"{dtype}, {count} heads, {length} x {length}, head_dim {dim}" + (", causal" if causal else "")
        rows.append([shape, f"{theirs:.2f}", f"{ours:.2f}", f"{counted[-1]:.3f}", ", ".join(f"{r:.2f}" for r in found)])
    mean = math.exp(statistics.fmean(map(math.log, counted)))
    summary = f"Geometric mean {mean:.3f} over {len(counted)} cases above 1 ms, worst {min(counted):.3f}"
    publish(
        options,
        "Grid: batch 1, equal lengths",
        ("case", "torch ms", "device ms", "ratio", "ratio of each run"),
        rows,
        [f"{summary}; the bars are 0.99 and 0.95."],
        "Grid",
    )


def _grid_case(dtype: str, dim: int, length: int, heads: int, causal: bool) -> tuple[float, float, str]:
    query, key, value = (draw(1, heads, length, dim, dtype) for _ in range(3))
    return compare(
        lambda: sdpa(query, key, value, is_causal=causal),
        lambda: hal.attention(query, key, value, is_causal=causal, backend="cpu"),
        1.0,
    )


def window(options: argparse.Namespace) -> None:
    """A causal window of 256 keys out of 4,096, beside torch with the same window as a boolean mask."""
    rows = []
    visible = torch.ones(4096, 4096, dtype=torch.bool).tril().triu(-255)
    for dtype in DTYPES:
        query, key, value = (draw(1, 8, 4096, 64, dtype) for _ in range(3))
        bound = hal.bind(query, key, value, is_causal=True, window=(255, 0), backend="cpu")
        theirs, ours, ratio = compare(
            lambda q=query, k=key, v=value: sdpa(q, k, v, visible),
            lambda b=bound, q=query, k=key, v=value: b(q, k, v),
            5.0,
        )
        rows.append([dtype, f"{theirs:.1f}", f"{ours:.1f}", ratio])
    publish(
        options,
        "Window: 8 heads, 4,096 x 4,096, head_dim 64, 256 keys up to the diagonal",
        ("dtype", "torch with a mask, ms", "device ms", "ratio"),
        rows,
        [NOTE],
        "Window",
    )


def softcap(options: argparse.Namespace) -> None:
    """Softcap beside torch without it: torch has none to compare with."""
    rows = []
    for dtype in DTYPES:
        for causal in (False, True):
            for cap in (50.0, 100.0):
                query, key, value = (draw(1, 8, 4096, 64, dtype) for _ in range(3))
                bound = hal.bind(query, key, value, is_causal=causal, softcap=cap, backend="cpu")
                theirs, ours, _ = compare(
                    lambda q=query, k=key, v=value, c=causal: sdpa(q, k, v, is_causal=c),
                    lambda b=bound, q=query, k=key, v=value: b(q, k, v),
                    4.0,
                )
                name = f"{dtype}, softcap {cap:g}" + (", causal" if causal else "")
                rows.append([name, f"{theirs:.1f}", f"{ours:.1f}", f"{ours / theirs:.2f}"])
    publish(
        options,
        "Softcap: 8 heads, 4,096 x 4,096, head_dim 64, beside torch without a softcap",
        ("case", "torch ms", "device ms", "device over torch"),
        rows,
        ["The bar is 4 times torch's time, the aim 2."],
        "Softcap",
    )


def native(options: argparse.Namespace) -> None:
    """Which path serves plain calls, and its processor time beside torch's: prefill and decode, recorded apart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        prefill = [
            (heads, heads_kv, length, length, dim, causal)
            for dim in (64, 128)
            for heads, heads_kv, length, causal in (
                (16, 16, 512, False),
                (16, 16, 512, True),
                (8, 8, 1500, False),
                (8, 8, 2048, False),
                (16, 2, 2048, True),
            )
        ]
        small = [(8, 8, n, n, 64, False) for n in (16, 64, 128, 196)]
        decoding = [
            (heads, heads_kv, 1, length, dim, False)
            for dim in (64, 128)
            for heads, heads_kv, length in ((16, 16, 1024), (32, 8, 2048), (8, 8, 8192), (32, 8, 8192), (32, 4, 32768))
        ]
        for title, shapes in (("Prefill", prefill), ("Below 200 tokens", small), ("Decode, one query", decoding)):
            _native_table(options, title, shapes)
    finally:
        torch.set_num_threads(threads)


def _native_table(options: argparse.Namespace, title: str, shapes: list[tuple[Any, ...]]) -> None:
    rows, ratios = [], dict[str, list[float]]()
    reading = _read_seconds_per_byte()
    for dtype in DTYPES:
        for heads, heads_kv, len_q, len_k, dim, causal in shapes:
            query = draw(1, heads, len_q, dim, dtype)
            key, value = draw(1, heads_kv, len_k, dim, dtype), draw(1, heads_kv, len_k, dim, dtype)
            bound = hal.bind(query, key, value, is_causal=causal, enable_gqa=True, backend="cpu")
            path = path_of(request_of(query, key, value, is_causal=causal))
            group = heads // heads_kv  # errors are those of the first key head
            exact = reference(query[:, :group], key[:, :1], value[:, :1], is_causal=causal).out
            mine, torchs = bound(query, key, value), sdpa(query, key, value, is_causal=causal, enable_gqa=True)
            error = relative_error(mine[:, :group], exact) / relative_error(torchs[:, :group], exact)
            theirs, ours = _processor_times(
                lambda q=query, k=key, v=value, c=causal: sdpa(q, k, v, is_causal=c, enable_gqa=True),
                lambda b=bound, q=query, k=key, v=value: b(q, k, v),
            )
            pairs = len_q * (len_q + 1) // 2 if causal else len_q * len_k
            speed = f"{4 * heads * pairs * dim / ours / 1e9:.0f} GFLOP/s"
            if len_q == 1:
                speed = f"{(key.nbytes + value.nbytes) / ours / 1e9:.1f} GB/s"
                speed += f", {(key.nbytes + value.nbytes) * reading / ours:.2f} of the loop"
            ratios.setdefault(dtype, []).append(theirs / ours)
            shape = f"{dtype}, heads {heads}/{heads_kv}, {len_q} x {len_k}, head_dim {dim}" + causal * ", causal"
            rows.append(
                [shape, path, f"{theirs * 1e3:.3f}", f"{ours * 1e3:.3f}", f"{theirs / ours:.2f}", speed, f"{error:.2f}"]
            )
    means = [
        f"{dtype}: geometric mean {math.exp(statistics.fmean(map(math.log, found))):.2f}, worst {min(found):.2f}"
        for dtype, found in ratios.items()
    ]
    notes = [
        f"{'; '.join(means)}.",
        "Least processor time of a call of one thread, in turn with torch's; other programs use the machine meanwhile, "
        "which processor time leaves out but for shared caches and memory. "
        f"A loop that reads and prefetches took {1e-9 / reading:.1f} GB/s. Error: over torch's, both against float64.",
    ]
    columns = ("case", "path", "torch ms", "device ms", "torch / device", "speed", "error / torch's")
    record.publish(options, "cpu_native", f"{title}: the CPU device beside torch", columns, rows, notes, title)


def plans(options: argparse.Namespace) -> None:
    """Block plans beside torch's dense attention, one thread: random blocks of 64, as many for each query block."""
    rows, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype, (length, part, heads), own in itertools.product(
            DTYPES, ((2048, 4, 8), (8192, 10, 2)), (False, True)
        ):
            query, key, value = (draw(1, heads, length, 64, dtype) for _ in range(3))
            count = length // 64
            indices = torch.rand(1, heads if own else 1, count, count).topk(count // part).indices.int()
            counts = torch.full(indices.shape[:3], count // part, dtype=torch.int32)
            plan = hal.BlockPlan(64, 64, indices, counts)
            path = path_of(request_of(query, key, value, plan=plan))
            mask = hal.expand_block_plan(plan, length, length)[:, :1]
            first = query[:, :1], key[:, :1], value[:, :1]
            exact = reference(*first, mask, request=request_of(*(t.double() for t in first), mask)).out
            found = hal.attention(query, key, value, block_plan=plan, backend="cpu")
            theirs, ours = _processor_times(
                lambda q=query, k=key, v=value: sdpa(q, k, v),
                lambda q=query, k=key, v=value, p=plan: hal.attention(q, k, v, block_plan=p, backend="cpu"),
            )
            shape = f"{dtype}, {length} tokens, {heads} heads of 64, 1/{part} of the blocks, "
            shape += "a pattern of each head" if own else "one pattern"
            error = f"{relative_error(found[:, :1], exact):.1e}"
            rows.append([shape, path, f"{theirs * 1e3:.1f}", f"{ours * 1e3:.1f}", f"{theirs / ours:.2f}", error])
    finally:
        torch.set_num_threads(threads)
    notes = [
        "Least processor time of a call of one thread, in turn with torch's dense call; other programs use the machine "
        f"meanwhile (load {os.getloadavg()[0]:.0f}). Error: against masked attention in float64."
    ]
    columns = ("case", "path", "dense torch ms", "device ms", "torch / device", "error")
    record.publish(options, "cpu_native", "Block plans beside dense attention", columns, rows, notes, "Block plans")


def compiled(options: argparse.Namespace) -> None:
    """The kernels of hal-cpu-native beside torch's, one thread, whatever path the device would take: decode, additive
    masks, and the backward pass from a given output and log-sum-exp.
    """
    import hal_cpu_native as kernels

    threads, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)

    def add(what: str, theirs: Callable[[], Any], ours: Callable[[], Any]) -> None:
        torchs, mine = _processor_times(theirs, ours)
        rows.append([what, f"{torchs * 1e3:.2f}", f"{mine * 1e3:.2f}", f"{torchs / mine:.2f}"])

    try:
        for dtype in DTYPES:
            for heads, heads_kv, length, dim in ((16, 16, 1024, 64), (32, 8, 2048, 64), (8, 8, 8192, 128)):
                one, key, value = draw(1, heads, 1, dim, dtype), *(draw(1, heads_kv, length, dim, dtype) for _ in "kv")
                add(
                    f"{dtype}, decode, heads {heads}/{heads_kv}, 1 x {length}, head_dim {dim}",
                    lambda q=one, k=key, v=value: sdpa(q, k, v, enable_gqa=True),
                    lambda q=one, k=key, v=value: kernels.attention(q, k, v, threads=1),
                )
            query, key, value = (draw(1, 4, 1024, 64, dtype) for _ in range(3))
            mask = draw(1, 1, 1024, 1024, dtype)
            add(
                f"{dtype}, additive mask, 4 heads, 1024 x 1024, head_dim 64",
                lambda q=query, k=key, v=value, m=mask: sdpa(q, k, v, m),
                lambda q=query, k=key, v=value, m=mask: kernels.attention(q, k, v, m, threads=1),
            )
            query, key, value, grad = (draw(1, 2, 2048, 64, dtype) for _ in range(4))
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)
            given = (query, key, value, out, lse, grad)
            backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            add(
                f"{dtype}, backward, 2 heads, 2048 x 2048, head_dim 64, causal",
                lambda a=given, f=backward: f(a[5], *a[:5], 0.0, True),
                lambda a=given: kernels.attention_backward(*a[:4], a[4].contiguous(), a[5], band=(None, 0), threads=1),
            )
        notes = [
            f"Instruction set: {kernels.instruction_sets()[-1]}. Least processor time of a call of one thread, in turn "
            f"with torch's; other programs use the machine meanwhile (load {os.getloadavg()[0]:.0f})."
        ]
        columns = ("case", "torch ms", "kernel ms", "torch / kernel")
        title = "Compiled kernels"
        record.publish(options, "cpu_native", f"{title} beside torch's", columns, rows, notes, title)
    finally:
        torch.set_num_threads(threads)


def _processor_times(theirs: Callable[[], Any], ours: Callable[[], Any]) -> tuple[float, float]:
    """Least seconds of processor time of each, called in turn for half a second, at least 5 and at most 60 times; calls
    below a millisecond are repeated within a measurement.
    """
    calls, least = (theirs, ours), [math.inf, math.inf]
    repeats = []
    for call in calls:
        call()
        start = time.process_time()
        call()
        repeats.append(max(1, min(50, int(2e-3 / max(time.process_time() - start, 1e-6)))))
    begun = time.process_time()
    for number in range(60):
        if number >= 5 and time.process_time() - begun > 0.5:
            break
        for side in (0, 1) if number % 2 else (1, 0):
            start = time.process_time()
            for _ in range(repeats[side]):
                calls[side]()
            least[side] = min(least[side], (time.process_time() - start) / repeats[side])
    return least[0], least[1]


def _read_seconds_per_byte() -> float:
    """Processor seconds per byte of a loop that reads and prefetches more than the last cache holds; of torch's sum
    where hal-cpu-native is absent.
    """
    numbers = torch.ones(192 << 20, dtype=torch.uint8)
    if native_module():
        import hal_cpu_native

        call = lambda: hal_cpu_native.read(numbers, 1)  # noqa: E731
    else:
        floats = numbers.view(torch.float32)
        call = floats.sum
    best = math.inf
    for _ in range(9):
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return best / numbers.nbytes


def memory(options: argparse.Namespace) -> None:
    """Peak memory of a tiled call at 16,384 and 32,768 tokens, one head."""
    rows, held = [], {}
    calls = (
        ("softcap", {"softcap": 50.0}),
        ("causal bottom-right, log-sum-exp", {"causal": "bottom_right", "return_lse": True}),
    )
    for name, extra in calls:
        for length in (16384, 32768):
            query, key, value = (draw(1, 1, length, 64, "float32") for _ in range(3))

            def call(q: Tensor = query, k: Tensor = key, v: Tensor = value, e: dict[str, Any] = extra) -> Any:
                return hal.attention(q, k, v, backend="cpu", **e)

            hal.session("cpu:0").memory.trim()
            held[name, length], how = host_peak(call)
        peaks = [held[name, length] for length in (16384, 32768)]
        ratio = f"{peaks[1] / peaks[0]:.2f}" if None not in peaks else "not available"
        rows.append([name, *(f"{p:.1f}" if p is not None else "not available" for p in peaks), ratio])
    publish(
        options,
        "Memory: 1 head, head_dim 64, float32, output included",
        ("case", "16,384 tokens, MB", "32,768 tokens, MB", "ratio"),
        rows,
        [f"Measured as: {how}. The bar for the ratio is 2.2."],
        "Memory",
    )


if __name__ == "__main__":
    sys.exit(main())
