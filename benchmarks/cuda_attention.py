"""Attention on a CUDA device: own kernels and the dispatch beside torch's backends and the installed peers, in one run.

    python benchmarks/cuda_attention.py [--record] [--only forward,ragged,packed,decode,special,host,error,flex]

Random data, device time, second-level cache flushed before each call, medians, calls interleaved with the peers'.
Ratios are the best peer's time over ours: above 1 is faster. Peers are cuDNN and FlashAttention-2 as torch ships them
and, where installed, FlashAttention-4, FlashInfer and cuDNN's own frontend (see hal_cuda.benchmark); the dispatch is
held to torch's two, which it may choose. FlexAttention, compiled for each shape, has a section of its own.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from hal_cuda.benchmark import Peers
from hal_cuda.calibrate import on_path, read_bandwidth
from hal_cuda.cost import shipped
from hal_cuda.discovery import find
from hal_cuda.runtime import nvml
from record import FOLDER, parser, publish
from torch import Tensor

import hal_core as hal
from hal_core.registry import registry
from hal_core.testing import BenchmarkRunner, reference, relative_error
from hal_core.testing.bench_setup import Call, Ceilings

DEVICE = "cuda:0"
SECTIONS = ("forward", "ragged", "packed", "decode", "special", "host", "error", "flex")
SDPA = torch.nn.functional.scaled_dot_product_attention
TORCH = ("cuDNN", "FA2")  # peers that torch ships, which the dispatch may choose
PEERS = (*TORCH, "FA4")


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
        self.forward_path = "hopper" if self.chip.capability == (9, 0) else "portable"
        self.peers = Peers()
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self.runner = BenchmarkRunner(4, 21, device="cuda", flush=lambda: self.flush.random_(0, 7))

    def own(self, path: str, request: hal.AttentionRequest) -> Callable[..., Any]:
        """A request bound to one path of the plugin."""
        return on_path(self.device, self.chip, self.backend.rates(self.device), path, request)

    def times(self, functions: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Median milliseconds of each function."""
        time.sleep(0.05)  # the board's power limit recovers
        found = self.runner.compare(functions)
        return {name: result.p50 for name, result in found.results.items()}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def three(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one shape."""
    return normal(*shape), normal(*shape), normal(*shape)


class Row(NamedTuple):
    """One call of the forward tables: its shape, its operations, milliseconds by column."""

    dim: int
    length: int
    causal: bool
    flops: float
    times: dict[str, float]

    def rate(self, column: str) -> float:
        """Operations a second."""
        return self.flops / self.times[column] * 1e3

    def ratio(self, column: str, names: tuple[str, ...] = PEERS) -> float:
        """Time of the best of `names` that ran over a column's time."""
        return min(self.times[name] for name in names if name in self.times) / self.times[column]

    def shown(self) -> list[str]:
        rates = [f"{self.rate(name) / 1e12:.0f}" if name in self.times else "-" for name in ("own", "hal", *PEERS)]
        ratios = [self.ratio("own"), self.ratio("own", TORCH), self.ratio("hal", TORCH)]
        return [
            str(self.dim),
            str(self.length),
            "causal" if self.causal else "full",
            *rates,
            *(f"{r:.3f}" for r in ratios),
        ]


def attention_row(bench: Bench, batch: int, heads: int, length: int, dim: int, causal: bool) -> Row:
    given = three(batch, heads, length, dim)
    request = hal.explain(*given, is_causal=causal, backend=DEVICE).request
    dispatch = hal.bind(*given, is_causal=causal, backend=DEVICE)
    calls: dict[str, Call] = {
        "own": partial(bench.own(bench.forward_path, request), *given),
        "hal": partial(dispatch, *given),
    }
    return Row(
        dim, length, causal, 2.0 * request.visible_macs, bench.times(calls | bench.peers.dense(*given, causal=causal))
    )


COLUMNS = (
    "head_dim",
    "tokens",
    "mask",
    "own",
    "hal",
    *PEERS,
    "best peer / own",
    "best of torch / own",
    "best of torch / hal",
)


def forward(bench: Bench, options: Any) -> None:
    rows = [
        attention_row(bench, 16384 // length, 2048 // dim, length, dim, causal)
        for dim in (64, 128, 256, 96, 192)
        for length in (512, 2048, 8192, 16384)
        for causal in (False, True)
    ]
    a, b = normal(8192, 8192), normal(8192, 8192)
    product = (
        2 * 8192**3 / statistics.median(bench.times({"product": lambda: a @ b, "again": lambda: a @ b}).values()) * 1e3
    )
    long = [row for row in rows if row.dim == 128 and not row.causal and row.length >= 8192]
    notes = [
        "TFLOP/s, bf16, 16384 tokens, hidden size 2048 (masked pairs not counted).",
        *summary(rows),
        f"cuBLAS 8192 cubed in the same run: {product / 1e12:.0f} TFLOP/s; head size 128 full over it: "
        + ", ".join(f"{row.rate('own') / product:.2f} at {row.length}" for row in long)
        + ".",
        *(
            f"FA4's time over that of own kernels, head size {dim}, 8k {name}: {row.ratio('own', ('FA4',)):.3f}."
            for dim, name, row in ((r.dim, "causal" if r.causal else "full", r) for r in rows if r.length == 8192)
            if "FA4" in row.times
        ),
        *conditions(bench),
    ]
    publish(options, "cuda_attention", "Forward", COLUMNS, [row.shown() for row in rows], notes, "Forward")
    if options.record:
        draw_rows(rows, product)


def draw_rows(rows: list[Row], product: float) -> None:
    """docs/benchmarks/cuda_attention.png: rates over lengths, and the own kernels under the measured ceilings."""
    from hal_cli.bench_picture import draw

    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    roofline: dict[str, list[tuple[float, float]]] = {"full": [], "causal": []}
    for row in rows:
        mask = "causal" if row.causal else "full"
        curves = panels.setdefault(f"head_dim {row.dim}", {}) if row.dim in (64, 128, 256) else {}
        for name in ("own", *PEERS):
            if name in row.times:
                curves.setdefault(f"{name}, {mask}", []).append((row.length, row.rate(name)))
        moved = 4 * 16384 * 2048 * 2  # bytes: query, key, value, output
        roofline[mask].append((row.flops / moved, row.rate("own")))
    table = shipped()
    ceilings = None if table is None else Ceilings(product, table[1].bandwidth, "measured")
    draw(FOLDER / "cuda_attention.png", panels, roofline, ceilings)


def ragged(bench: Bench, options: Any) -> None:
    rows = [
        attention_row(bench, 16384 // length, 2048 // dim, length, dim, causal)
        for dim in (64, 128, 256)
        for length in (500, 1000, 1500, 3000)
        for causal in (False, True)
    ]
    notes = [*summary(rows), *conditions(bench)]
    publish(
        options, "cuda_attention", "Ragged lengths", COLUMNS, [row.shown() for row in rows], notes, "Ragged lengths"
    )


def summary(rows: list[Row]) -> list[str]:
    """Geometric mean and worst of the ratios."""
    lines = []
    for column, names, what in (
        ("own", PEERS, "best peer's time over that of own kernels"),
        ("own", TORCH, "best of torch over own kernels"),
        ("hal", TORCH, "best of torch over the dispatch"),
    ):
        mean = math.exp(statistics.fmean(math.log(row.ratio(column, names)) for row in rows))
        worst = min(rows, key=partial(Row.ratio, column=column, names=names))
        place = f"head size {worst.dim}, {worst.length} tokens, {'causal' if worst.causal else 'full'}"
        lines.append(f"The {what}: geometric mean {mean:.3f}, worst {worst.ratio(column, names):.3f} ({place}).")
    return lines


def packed(bench: Bench, options: Any) -> None:
    """Sequences side by side in a batch of 1; each result is held to float64 in its first two heads."""
    rows, names = [], ("own", "FA2", "FA4", "FlashInfer")
    for dim, lengths, shown, causal in (
        (128, [2048] * 8, "8 x 2048", True),
        (128, [512] * 32, "32 x 512", True),
        (64, [512] * 32, "32 x 512", True),
        (128, [8192] + [256] * 32, "8192, 32 x 256", False),
        (64, _MIXED, "32 of 17 to 1000", False),
        (128, _MIXED, "32 of 17 to 1000", True),
        (256, [2048] * 8, "8 x 2048", True),
    ):
        tokens, longest = sum(lengths), max(lengths)
        given = three(1, 2048 // dim, tokens, dim)
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
        request = hal.explain(
            *given,
            backend=DEVICE,
            is_causal=causal,
            cu_seqlens_q=ends,
            cu_seqlens_k=ends,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
        ).request
        calls: dict[str, Call] = {
            "own": partial(
                _packed_out, bench.own(bench.forward_path, request), *given, hal.SequenceMetadata(ends, ends)
            ),
            **bench.peers.packed(*given, ends, longest, causal),
        }
        want = torch.cat(
            [
                reference(*(t[:, :2, end - length : end] for t in given), is_causal=causal).out
                for length, end in zip(lengths, ends[1:].tolist(), strict=True)
            ],
            2,
        )
        errors = {name: relative_error(call()[:, :2], want) for name, call in calls.items()}
        times = bench.times(calls)
        flops = sum(2.0 * replace(request, batch=1, len_q=n, len_k=n, packed=False).visible_macs for n in lengths)
        best = min(time for name, time in times.items() if name != "own")
        rows.append(
            [
                str(dim),
                shown,
                "causal" if causal else "full",
                *(f"{flops / times[name] / 1e9:.0f}" if name in times else "-" for name in names),
                f"{best / times['own']:.2f}",
                f"{errors['own']:.2e}",
                f"{min(error for name, error in errors.items() if name != 'own'):.2e}",
            ]
        )
    columns = ("head_dim", "sequences", "mask", *names, "best peer / own", "own error", "best peer's error")
    notes = [
        "TFLOP/s, bf16, hidden size 2048; errors against float64. The own time holds the making of the table of tiles.",
        *conditions(bench),
    ]
    publish(options, "cuda_attention", "Packed lengths", columns, rows, notes, "Packed lengths")


_MIXED = [17 + 983 * (n * n % 61) // 60 for n in range(32)]


def _packed_out(call: Callable[..., Any], *given: Any) -> Tensor:
    query, key, value, tables = given
    out: Tensor = call(query, key, value, None, None, tables)
    return out


def decode(bench: Bench, options: Any) -> None:
    ceiling = read_bandwidth(bench.flush)
    rows = []
    for batch, keys in ((1, 1024), (1, 8192), (1, 131072), (16, 8192), (64, 4096), (128, 1024)):
        given = normal(batch, 32, 1, 128), normal(batch, 8, keys, 128), normal(batch, 8, keys, 128)
        request = hal.explain(*given, enable_gqa=True, backend=DEVICE).request
        own = bench.own("portable", request)
        times = bench.times({"own": partial(own, *given), **bench.peers.decode(*given)})
        rows.append(_decode_row(str(batch), str(keys), times, request.bytes_moved, ceiling))
        del given
    rows.append(_paged_row(bench, ceiling))
    notes = [
        "Microseconds; one query, 32 query heads on 8 key heads, head_dim 128, bf16. FlashInfer: the faster of its two "
        "kernels, on pages of 16.",
        f"Read ceiling {ceiling / 1e12:.2f} TB/s.",
        *conditions(bench),
    ]
    columns = ("batch", "keys", "own", "cuDNN", "FA2", "FlashInfer", "best peer / own", "share of the ceiling")
    publish(options, "cuda_attention", "Decode", columns, rows, notes, "Decode")


def _decode_row(batch: str, keys: str, times: dict[str, float], nbytes: int, ceiling: float) -> list[str]:
    """times: milliseconds by name. nbytes: read by the call. ceiling: bytes a second."""
    flashinfer = [time for name, time in times.items() if name.startswith("FlashInfer")]
    known = {name: time for name, time in times.items() if not name.startswith("FlashInfer")}
    known |= {"FlashInfer": min(flashinfer)} if flashinfer else {}
    best = min((time for name, time in known.items() if name != "own"), default=math.nan)
    shown = [f"{known[name] * 1e3:.1f}" if name in known else "-" for name in ("own", "cuDNN", "FA2", "FlashInfer")]
    return [batch, keys, *shown, f"{best / known['own']:.2f}", f"{nbytes / known['own'] * 1e3 / ceiling:.2f}"]


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
    query, key, value = normal(64, 32, 1, 128), normal(total, 8, 16, 128), normal(total, 8, 16, 128)
    tables = hal.SequenceMetadata(page_table=table.cuda(), cache_seqlens=held.cuda())
    request = hal.explain(
        query,
        key,
        value,
        enable_gqa=True,
        page_table=tables.page_table,
        cache_seqlens=tables.cache_seqlens,
        backend=DEVICE,
    ).request
    call = partial(bench.own("portable", request), query, key, value, None, None, tables)
    times = bench.times({"own": call, "again": call, **bench.peers.paged(query, key, value, tables)})
    del times["again"]
    return _decode_row("64", "1k to 32k, pages of 16", times, int(held.sum()) * 8 * 128 * 2 * 2, ceiling)


def special(bench: Bench, options: Any) -> None:
    """A sliding window and a sparse block plan at 32k tokens."""
    rows = []
    given = three(1, 32, 32768, 64)
    request = hal.explain(*given, causal="top_left", window=(1023, 0), backend=DEVICE).request
    own = bench.own(bench.forward_path, request)
    times = bench.times({"own": partial(own, *given), **bench.peers.window(*given, 1023)})
    rows.append(_special_row("window 1024, head_dim 64", times, 2.0 * request.visible_macs))
    given = three(1, 16, 32768, 128)
    blocks = 32768 // 128
    kept = blocks // 10
    indices = torch.stack([torch.randperm(blocks)[:kept].sort().values for _ in range(16 * blocks)])
    plan = hal.BlockPlan(
        128,
        128,
        indices.view(1, 16, blocks, kept).to(torch.int32).cuda(),
        torch.full((1, 16, blocks), kept, dtype=torch.int32, device="cuda"),
    )
    request = hal.explain(*given, block_plan=plan, backend=DEVICE).request
    calls: dict[str, Call] = {"own": partial(bench.own("portable", request), *given, None, plan)}
    calls["hal, dense"] = partial(hal.bind(*given, backend=DEVICE), *given)
    times = bench.times(calls | bench.peers.dense(*given))
    rows.append(_special_row("90% sparse plan, head_dim 128, peers dense", times, 2.0 * request.visible_macs))
    columns = ("call", "own ms", "own TFLOP/s", "hal, dense", *PEERS, "best / own")
    publish(options, "cuda_attention", "32k tokens", columns, rows, conditions(bench), "32k tokens")


def _special_row(call: str, times: dict[str, float], flops: float) -> list[str]:
    best = min(time for name, time in times.items() if name != "own")
    others = [f"{times[name]:.3f}" if name in times else "-" for name in ("hal, dense", *PEERS)]
    return [call, f"{times['own']:.3f}", f"{flops / times['own'] / 1e9:.0f}", *others, f"{best / times['own']:.3f}"]


def host(bench: Bench, options: Any) -> None:
    """Host time of one call, 100 of them queued: the device is not waited for."""
    rows = []
    for name, path, heads, len_q, len_k in (
        ("1 x 1 x 128 x 128", bench.forward_path, (1, 1), 128, 128),
        ("decode, 32/8 heads, 1024 keys", "portable", (32, 8), 1, 1024),
    ):
        given = normal(1, heads[0], len_q, 128), normal(1, heads[1], len_k, 128), normal(1, heads[1], len_k, 128)
        bound = hal.bind(*given, enable_gqa=True, backend=DEVICE)
        calls: dict[str, Call] = {
            "bound": partial(bound, *given),
            "hal.attention": partial(hal.attention, *given, enable_gqa=True),
            "SDPA": partial(SDPA, *given, enable_gqa=True),
            "own kernel": partial(bench.own(path, bound.decision.request), *given),
        }
        best = dict.fromkeys(calls, math.inf)
        for _ in range(7):
            for label, call in calls.items():
                best[label] = min(best[label], _host_time(call))
        rows.append([name, *(f"{best[label]:.1f}" for label in ("own kernel", "bound", "hal.attention", "SDPA"))])
    publish(
        options,
        "cuda_attention",
        "Host time",
        ("call", "own kernel", "bound", "hal.attention", "SDPA"),
        rows,
        ["Microseconds of the host for one call, head_dim 128, bf16, the least of 7 times 100."],
        "Host time",
    )


def error(bench: Bench, options: Any) -> None:
    """Error of the output against float64, root mean square over five draws, beside the peers'."""
    rows = []
    for dim in (64, 96, 128, 192, 256):
        for causal in (False, True):
            squares: dict[str, float] = {}
            for seed in range(5):
                torch.manual_seed(1000 * dim + seed)
                given = three(1, 4, 2048, dim)
                want = reference(*given, is_causal=causal).out
                request = hal.explain(*given, is_causal=causal, backend=DEVICE).request
                own = bench.own(bench.forward_path, request)
                calls = {"own": partial(own, *given), **bench.peers.dense(*given, causal=causal)}
                for name, call in calls.items():
                    squares[name] = squares.get(name, 0.0) + relative_error(call(), want) ** 2 / 5
            found = {name: square**0.5 for name, square in squares.items()}
            best = min(value for name, value in found.items() if name != "own")
            shown = [f"{found[name]:.3e}" if name in found else "-" for name in ("own", *PEERS)]
            rows.append([str(dim), "causal" if causal else "full", *shown, f"{found['own'] / best:.3f}"])
    columns = ("head_dim", "mask", "own", *PEERS, "own / best peer")
    notes = ["bf16, 1 x 4 x 2048 standard normal; the bar for the last column is 1.1.", *conditions(bench)]
    publish(options, "cuda_attention", "Error", columns, rows, notes, "Error")


def flex(bench: Bench, options: Any) -> None:
    """Own kernels beside torch's FlexAttention, compiled for each shape; the window too."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    masks: dict[str, Any] = {
        "causal": lambda b, h, q, k: q >= k,
        "window": lambda b, h, q, k: (q >= k) & (q - k <= 1023),
    }
    rows = []
    for dim, length, heads, kind in (
        (64, 2048, 32, "full"),
        (64, 8192, 32, "full"),
        (64, 8192, 32, "causal"),
        (64, 32768, 32, "window"),
        (128, 2048, 16, "full"),
        (128, 8192, 16, "full"),
        (128, 8192, 16, "causal"),
    ):
        given = three(max(16384 // length, 1), heads, length, dim)
        wanted: dict[str, Any] = {
            "full": {},
            "causal": {"is_causal": True},
            "window": {"causal": "top_left", "window": (1023, 0)},
        }[kind]
        request = hal.explain(*given, backend=DEVICE, **wanted).request
        own = bench.own(bench.forward_path, request)
        block = create_block_mask(masks[kind], None, None, length, length, device="cuda") if kind in masks else None
        theirs = partial(compiled, *given, block_mask=block)
        difference = relative_error(own(*given), theirs())
        times = bench.times({"own": partial(own, *given), "FlexAttention": theirs})
        rates = [2.0 * request.visible_macs / 1e9 / times[name] for name in ("own", "FlexAttention")]
        rows.append(
            [
                str(dim),
                str(length),
                kind,
                *(f"{rate:.0f}" for rate in rates),
                f"{rates[0] / rates[1]:.2f}",
                f"{difference:.1e}",
            ]
        )
    columns = ("head_dim", "tokens", "mask", "own", "FlexAttention", "own / FlexAttention", "difference of the results")
    publish(
        options,
        "cuda_attention",
        "FlexAttention",
        columns,
        rows,
        ["TFLOP/s, bf16.", *conditions(bench)],
        "FlexAttention",
    )


RUN = {
    "forward": forward,
    "ragged": ragged,
    "packed": packed,
    "decode": decode,
    "special": special,
    "host": host,
    "error": error,
    "flex": flex,
}


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
    versions = ", ".join(f"{name} {version}" for name, version in bench.peers.versions.items())
    notes = [*dict.fromkeys(bench.peers.notes)]
    bench.peers.notes.clear()
    return [board(), f"Peers: {versions}.", *(f"{note}." for note in notes)]


def board() -> str:
    """The GPU and its driver, and clock and power as they are now."""
    gpu = find().gpus[0]
    clock = f"SM clock {gpu.clock('sm')} MHz, {gpu.power():.0f} W after the run"
    return f"{gpu.name}, driver {nvml.driver_version()}, {clock}."


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
