"""Attention on a CUDA device: own kernels and the dispatch beside torch's backends, in one run.

    python benchmarks/cuda_attention.py [--record] [--only forward,ragged,decode,special,host,error,flex]

Random data, device time, second-level cache flushed before each call, medians, calls interleaved with the peers'. Ratios are
the best peer's time over ours: above 1 is faster. FlexAttention, compiled for each shape, has a section of its own.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from record import parser, publish
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hal_core as hal
from hal_core.registry import registry
from hal_core.testing import BenchmarkRunner, reference, relative_error

DEVICE = "cuda:0"
SECTIONS = ("forward", "ragged", "decode", "special", "host", "error", "flex")
SDPA = torch.nn.functional.scaled_dot_product_attention


def open_device() -> tuple[Any, Any, Any]:
    """(device, backend, chip); the plugin is registered here where it is not installed."""
    try:
        registry.entry("cuda")
    except hal.UnknownBackendError:
        from hal_cuda.backend import CudaBackend

        hal.register(CudaBackend(), name="cuda")
    device = registry.find(DEVICE)[0]
    backend: Any = registry.backend_of(device)
    return device, backend, backend.chip(device)


class Bench:
    """One device under test, with its peers."""

    def __init__(self) -> None:
        self.device, self.backend, self.chip = open_device()
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self.runner = BenchmarkRunner(4, 21, device="cuda", flush=lambda: self.flush.random_(0, 7))

    def own(self, path: str, request: hal.AttentionRequest) -> Callable[..., Any]:
        from hal_cuda.session import CudaSession

        session = CudaSession(self.device, self.chip, lambda: self.backend.rates(self.device), paths=frozenset({path}))
        return session.bind(request)

    def times(self, functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median milliseconds of each function."""
        time.sleep(0.05)  # the board's power limit recovers
        found = self.runner.compare(functions)
        return {name: result.p50 for name, result in found.results.items()}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def native(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    with sdpa_kernel(backend):
        return SDPA(query, key, value, **options)


def peers(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> dict[str, Callable[[], Any]]:
    """The installed peers that run a call, by name."""
    found = {}
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("FA2", SDPBackend.FLASH_ATTENTION)):
        call = partial(native, backend, query, key, value, **options)
        try:
            call()
            torch.cuda.synchronize()
            found[name] = call
        except RuntimeError as error:
            print(f"{name} does not run {list(query.shape)}: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def attention_row(bench: Bench, batch: int, heads: int, length: int, dim: int, causal: bool) -> tuple[list[str], float, float]:
    """A row of the forward tables; the best peer's time over our kernel's, and over the dispatch's."""
    query, key, value = (normal(batch, heads, length, dim) for _ in range(3))
    request = hal.explain(query, key, value, is_causal=causal, backend=DEVICE).request
    own = bench.own("hopper" if bench.chip.capability == (9, 0) else "portable", request)
    dispatch = hal.bind(query, key, value, is_causal=causal, backend=DEVICE)
    given = (query, key, value)
    functions: dict[str, Callable[[], Any]] = {"own": partial(own, *given), "hal": partial(dispatch, *given)}
    functions |= peers(query, key, value, is_causal=causal)
    times = bench.times(functions)
    best = min(times[name] for name in functions if name not in ("own", "hal"))
    flops = 2.0 * request.visible_macs / 1e9
    rates = [f"{flops / times[name]:.0f}" if name in times else "-" for name in ("own", "hal", "cuDNN", "FA2")]
    ratios = [f"{best / times[name]:.3f}" for name in ("own", "hal")]
    row = [str(dim), str(length), "causal" if causal else "full", *rates, *ratios]
    return row, best / times["own"], best / times["hal"]


COLUMNS = ("head_dim", "tokens", "mask", "own", "hal", "cuDNN", "FA2", "best peer / own", "best peer / hal")


def forward(bench: Bench, options: Any) -> None:
    rows, own, dispatch = [], [], []
    a, b = normal(8192, 8192), normal(8192, 8192)
    for dim in (64, 128, 256, 96, 192):
        for length in (512, 2048, 8192, 16384):
            for causal in (False, True):
                row, ratio, whole = attention_row(bench, 16384 // length, 2048 // dim, length, dim, causal)
                rows.append(row)
                own.append(ratio)
                dispatch.append(whole)
    product = statistics.median(bench.times({"product": lambda: a @ b, "again": lambda: a @ b}).values())
    notes = [
        "TFLOP/s, bf16, 16384 tokens, hidden size 2048 (masked pairs not counted).",
        *_summary("own kernels", own), *_summary("dispatch", dispatch),
        f"cuBLAS 8192 cubed in the same run: {2 * 8192**3 / product / 1e9:.0f} TFLOP/s.", *conditions(bench),
    ]  # fmt: skip
    publish(options, "cuda_attention", "Forward", COLUMNS, rows, notes, "Forward")
    if options.record:
        draw(rows, 2 * 8192**3 / product / 1e9)


def draw(rows: list[list[str]], product: float) -> None:
    """docs/benchmarks/cuda_attention.png: rates over lengths, and the roofline under the measured ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from hal_cuda.rates import shipped
    from record import FOLDER

    figure, axes = plt.subplots(1, 4, figsize=(20, 4.5))
    for axis, dim in zip(axes, ("64", "128", "256"), strict=False):
        for mask, style in (("full", "-"), ("causal", "--")):
            picked = [row for row in rows if row[0] == dim and row[2] == mask]
            for column, colour in ((3, "tab:blue"), (5, "tab:orange"), (6, "tab:green")):
                points = [(int(row[1]), float(row[column])) for row in picked if row[column] != "-"]
                axis.plot(*zip(*points, strict=True), style, color=colour, label=f"{COLUMNS[column]}, {mask}")
        axis.set(title=f"head_dim {dim}", xlabel="tokens", ylabel="TFLOP/s", xscale="log", ylim=(0, product * 1.05))
    axes[0].legend(fontsize=8)
    table = shipped()
    bandwidth = table[1].bandwidth if table else math.nan
    reach = [2.0**n for n in range(4, 15)]
    axes[3].plot(reach, [min(product, x * bandwidth / 1e12) for x in reach], color="black", label="measured ceilings")
    for row in rows:
        intensity = int(row[1]) / (2 if row[2] == "causal" else 1) / 2  # 4 S^2 D operations on 8 S D bytes
        axes[3].plot(intensity, float(row[3]), "." if row[2] == "full" else "x", color="tab:blue")
    axes[3].set(title="roofline, own kernels", xlabel="operations a byte", ylabel="TFLOP/s", xscale="log", yscale="log")
    axes[3].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FOLDER / "cuda_attention.png", dpi=80)


def ragged(bench: Bench, options: Any) -> None:
    rows, own = [], []
    for dim in (64, 128, 256):
        for length in (500, 1000, 1500, 3000):
            for causal in (False, True):
                row, ratio, _ = attention_row(bench, 16384 // length, 2048 // dim, length, dim, causal)
                rows.append(row)
                own.append(ratio)
    notes = [*_summary("own kernels", own), *conditions(bench)]
    publish(options, "cuda_attention", "Ragged lengths", COLUMNS, rows, notes, "Ragged lengths")


def _summary(name: str, ratios: list[float]) -> list[str]:
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    return [f"Best peer's time over that of {name}: geometric mean {mean:.3f}, worst {min(ratios):.3f}."]


def decode(bench: Bench, options: Any) -> None:
    from hal_cuda.calibrate import read_bandwidth

    ceiling = read_bandwidth(bench.flush)
    rows = []
    shapes = ((1, 1024), (1, 8192), (1, 131072), (16, 8192), (64, 4096), (128, 1024))
    for batch, keys in shapes:
        query, key, value = normal(batch, 32, 1, 128), normal(batch, 8, keys, 128), normal(batch, 8, keys, 128)
        request = hal.explain(query, key, value, enable_gqa=True, backend=DEVICE).request
        own = bench.own("portable", request)
        functions: dict[str, Callable[[], Any]] = {"own": partial(own, query, key, value)}
        functions |= peers(query, key, value, enable_gqa=True)
        times = bench.times(functions)
        best = min(times[name] for name in functions if name != "own")
        share = request.bytes_moved / times["own"] * 1e3 / ceiling
        shown = [f"{times[name] * 1e3:.1f}" if name in times else "-" for name in ("own", "cuDNN", "FA2")]
        rows.append([str(batch), str(keys), *shown, f"{best / times['own']:.2f}", f"{share:.2f}"])
    rows.append(_paged_row(bench, ceiling))
    notes = [
        "Microseconds; one query, 32 query heads on 8 key heads, head_dim 128, bf16.",
        f"Read ceiling {ceiling / 1e12:.2f} TB/s.", *conditions(bench),
    ]  # fmt: skip
    columns = ("batch", "keys", "own", "cuDNN", "FA2", "best peer / own", "share of the ceiling")
    publish(options, "cuda_attention", "Decode", columns, rows, notes, "Decode")


def _paged_row(bench: Bench, ceiling: float) -> list[str]:
    """64 sequences of 1k to 32k keys in pages of 16."""
    generator = torch.Generator().manual_seed(1)
    held = torch.randint(1024, 32769, (64,), generator=generator, dtype=torch.int32)
    pages = -(-held // 16)
    total, most = int(pages.sum()), int(pages.max())
    order = torch.randperm(total, generator=generator).to(torch.int32)
    table = torch.zeros(64, most, dtype=torch.int32)
    start = 0
    for s, count in enumerate(pages.tolist()):
        table[s, :count] = order[start : start + count]
        start += count
    key, value = normal(total, 8, 16, 128), normal(total, 8, 16, 128)
    query, table, lengths = normal(64, 32, 1, 128), table.cuda(), held.cuda()
    tables = hal.SequenceTables(page_table=table, cache_seqlens=lengths)
    request = hal.explain(query, key, value, enable_gqa=True, page_table=table, cache_seqlens=lengths, backend=DEVICE).request
    own = bench.own("portable", request)
    call = partial(own, query, key, value, None, None, tables)
    times = bench.times({"own": call, "again": call})
    taken = min(times.values())
    nbytes = int(held.sum()) * 8 * 128 * 2 * 2
    return ["64", "1k to 32k, pages of 16", f"{taken * 1e3:.1f}", "-", "-", "-", f"{nbytes / taken * 1e3 / ceiling:.2f}"]


def special(bench: Bench, options: Any) -> None:
    """A sliding window and a sparse block plan at 32k tokens."""
    rows = []
    query, key, value = (normal(1, 32, 32768, 64) for _ in range(3))
    request = hal.explain(query, key, value, causal="top_left", window=(1023, 0), backend=DEVICE).request
    own = bench.own("hopper" if bench.chip.capability == (9, 0) else "portable", request)
    flash = torch.ops.aten._flash_attention_forward
    flipped = [t.transpose(1, 2).contiguous() for t in (query, key, value)]
    functions: dict[str, Callable[[], Any]] = {
        "own": partial(own, query, key, value),
        "FA2": lambda: flash(*flipped, None, None, 32768, 32768, 0.0, True, False, window_size_left=1023, window_size_right=0),
    }
    times = bench.times(functions)
    flops = 2.0 * request.visible_macs / 1e9
    own_ms, peer_ms = times["own"], times["FA2"]
    rows.append(["window 1024, head_dim 64", f"{own_ms:.3f}", f"{flops / own_ms:.0f}", "FA2", f"{peer_ms:.3f}"])
    query, key, value = (normal(1, 16, 32768, 128) for _ in range(3))
    blocks = 32768 // 128
    kept = blocks // 10
    indices = torch.stack([torch.randperm(blocks)[:kept].sort().values for _ in range(16 * blocks)])
    plan = hal.BlockPlan(
        128, 128, indices.view(1, 16, blocks, kept).to(torch.int32).cuda(),
        torch.full((1, 16, blocks), kept, dtype=torch.int32, device="cuda"),
    )  # fmt: skip
    request = hal.explain(query, key, value, block_plan=plan, backend=DEVICE).request
    own = bench.own("portable", request)
    dense = hal.bind(query, key, value, backend=DEVICE)
    functions = {"own": partial(own, query, key, value, None, plan), "dense": partial(dense, query, key, value)}
    functions |= peers(query, key, value)
    times = bench.times(functions)
    best = min((t, name) for name, t in times.items() if name != "own")
    own_ms, flops = times["own"], 2.0 * request.visible_macs / 1e9
    rows.append(["90% sparse plan, head_dim 128", f"{own_ms:.3f}", f"{flops / own_ms:.0f}", best[1], f"{best[0]:.3f}"])
    columns = ("call", "own ms", "own TFLOP/s", "peer", "peer ms")
    publish(options, "cuda_attention", "32k tokens", columns, rows, conditions(bench), "32k tokens")


def host(bench: Bench, options: Any) -> None:
    """Host time of one call on tensors so small that the device is never waited for."""
    rows = []
    for name, shape in (("1 x 1 x 128 x 128", (1, 1, 128, 128)), ("decode, 1 x 8 x 1 x 128", (1, 8, 1, 128))):
        query, key, value = (normal(*shape) for _ in range(3))
        bound = hal.bind(query, key, value, backend=DEVICE)
        calls: dict[str, Callable[[], Any]] = {
            "bound": partial(bound, query, key, value), "hal.attention": partial(hal.attention, query, key, value),
            "SDPA": partial(SDPA, query, key, value),
        }  # fmt: skip
        own = bench.own("hopper" if shape[2] > 16 and bench.chip.capability == (9, 0) else "portable", bound.decision.request)
        calls["own kernel"] = partial(own, query, key, value)
        best = dict.fromkeys(calls, math.inf)
        for _ in range(7):
            for label, call in calls.items():
                best[label] = min(best[label], _host_time(call))
        rows.append([name, *(f"{best[label]:.1f}" for label in ("own kernel", "bound", "hal.attention", "SDPA"))])
    publish(options, "cuda_attention", "Host time", ("call", "own kernel", "bound", "hal.attention", "SDPA"), rows,
            ["Microseconds of the host for one call, the least of 7 times 100."], "Host time")  # fmt: skip


def error(bench: Bench, options: Any) -> None:
    """Error of the output against float64, root mean square over five draws, beside torch's two kernels."""
    rows = []
    for dim in (64, 128, 256):
        for causal in (False, True):
            squares: dict[str, float] = {}
            for seed in range(5):
                torch.manual_seed(1000 * dim + seed)
                given = [normal(1, 4, 2048, dim) for _ in range(3)]
                want = reference(*given, is_causal=causal).out
                request = hal.explain(*given, is_causal=causal, backend=DEVICE).request
                own = bench.own("hopper" if bench.chip.capability == (9, 0) else "portable", request)
                calls = {"own": partial(own, *given), **peers(*given, is_causal=causal)}
                for name, call in calls.items():
                    squares[name] = squares.get(name, 0.0) + relative_error(call(), want) ** 2 / 5
            found = {name: square**0.5 for name, square in squares.items()}
            best = min(value for name, value in found.items() if name != "own")
            shown = [f"{found[name]:.3e}" if name in found else "-" for name in ("own", "cuDNN", "FA2")]
            rows.append([str(dim), "causal" if causal else "full", *shown, f"{found['own'] / best:.3f}"])
    columns = ("head_dim", "mask", "own", "cuDNN", "FA2", "own / best peer")
    notes = ["bf16, 1 x 4 x 2048 standard normal; the bar for the last column is 1.1.", *conditions(bench)]
    publish(options, "cuda_attention", "Error", columns, rows, notes, "Error")


def flex(bench: Bench, options: Any) -> None:
    """Own kernels beside torch's FlexAttention, compiled for each shape; the window too."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    masks: dict[str, Any] = {
        "causal": lambda b, h, q, k: q >= k, "window": lambda b, h, q, k: (q >= k) & (q - k <= 1023),
    }  # fmt: skip
    rows = []
    for dim, length, heads, kind in (
        (64, 2048, 32, "full"), (64, 8192, 32, "full"), (64, 8192, 32, "causal"), (64, 32768, 32, "window"),
        (128, 2048, 16, "full"), (128, 8192, 16, "full"), (128, 8192, 16, "causal"),
    ):  # fmt: skip
        given = [normal(max(16384 // length, 1), heads, length, dim) for _ in range(3)]
        wanted: dict[str, Any] = {
            "full": {}, "causal": {"is_causal": True}, "window": {"causal": "top_left", "window": (1023, 0)},
        }[kind]  # fmt: skip
        request = hal.explain(*given, backend=DEVICE, **wanted).request
        own = bench.own("hopper" if bench.chip.capability == (9, 0) else "portable", request)
        block = create_block_mask(masks[kind], None, None, length, length, device="cuda") if kind in masks else None
        theirs = partial(compiled, *given, block_mask=block)
        difference = relative_error(own(*given), theirs())
        times = bench.times({"own": partial(own, *given), "FlexAttention": theirs})
        rates = [2.0 * request.visible_macs / 1e9 / times[name] for name in ("own", "FlexAttention")]
        rows.append([
            str(dim), str(length), kind, *(f"{rate:.0f}" for rate in rates), f"{rates[0] / rates[1]:.2f}", f"{difference:.1e}",
        ])  # fmt: skip
    columns = ("head_dim", "tokens", "mask", "own", "FlexAttention", "own / FlexAttention", "difference of the results")
    publish(options, "cuda_attention", "FlexAttention", columns, rows, ["TFLOP/s, bf16.", *conditions(bench)], "FlexAttention")


RUN = {
    "forward": forward, "ragged": ragged, "decode": decode, "special": special, "host": host, "error": error, "flex": flex,
}  # fmt: skip


def _host_time(call: Callable[[], Any]) -> float:
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent * 1e4


def conditions(bench: Bench) -> list[str]:
    from hal_cuda import _nvml

    gpu = _nvml.Gpu(0)
    return [
        f"{gpu.name}, driver {_nvml.driver_version()}, cuDNN {torch.backends.cudnn.version()}, SM clock {gpu.clock('sm')} MHz, "
        f"{gpu.power():.0f} W after the run."
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default=",".join(SECTIONS), help="sections to run")
    chosen = options.parse_args()
    torch.manual_seed(int(time.time()))
    bench = Bench()
    with torch.no_grad():
        for section in chosen.only.split(","):
            RUN[section](bench, chosen)


if __name__ == "__main__":
    main()
