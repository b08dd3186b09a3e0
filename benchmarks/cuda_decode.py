"""Attention of one query on a long cache, on a CUDA device: the own kernel beside the installed peers, in one run.

    python benchmarks/cuda_decode.py [--record] [--only shapes,sweep] [--sweep-file FILE]

Random data, device time, second-level cache flushed before each call, medians, calls interleaved with the peers'.
Ratios are the best peer's time over ours: above 1 is faster. Peers are cuDNN and FlashAttention-2 as torch ships them
and, where it is installed, FlashInfer on pages of 16. `sweep` times every split of the keys and several tiles of each
shape, and shows how far the model's choice lies behind the best of them (its regret).
"""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from cuda_attention import DEVICE, Bench, conditions, normal
from hal_cuda.calibrate import read_bandwidth
from hal_cuda.discovery import Chip
from hal_cuda.kernels.portable import launch
from hal_cuda.kernels.portable.mask_tiles import mask_constants, mask_steps
from hal_cuda.kernels.portable.schedule import MOST_JOINED
from hal_cuda.memory import StreamWorkspaces
from hal_cuda.runtime.context import Context
from hal_cuda.runtime.launch import compiled
from hal_cuda.tiling import CudaTiling, Splits, Tiles
from record import parser, publish
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, PooledMemory, SequenceMetadata
from hal_core.testing import reference, relative_error

SECTIONS = ("shapes", "caches", "paged", "sweep", "cache_sweep")
#: (batch, keys, head size) of each group of query heads; the last two batches of keys fill the device many times over.
CALLS = (
    (1, 8192, 128),
    (1, 32768, 128),
    (8, 4096, 128),
    (32, 2048, 128),
    (64, 1024, 128),
    (256, 512, 128),
    (4, 8192, 64),
    (32, 1024, 64),
    (2, 4096, 256),
    (16, 2048, 256),
)
#: Query heads and key heads of each group and head size, as models have them.
HEADS = {
    (1, 64): (32, 32),
    (1, 128): (32, 32),
    (1, 256): (16, 16),
    (4, 64): (32, 8),
    (4, 128): (32, 8),
    (4, 256): (16, 4),
    (8, 64): (64, 8),
    (8, 128): (64, 8),
    (8, 256): (32, 4),
    (16, 64): (64, 4),
    (16, 128): (32, 2),
    (16, 256): (16, 1),
}
#: Tiles that the sweep tries for a head size, (keys, warps, stages).
SWEPT = {
    64: ((128, 4, 3), (64, 4, 4)),
    128: ((64, 4, 4), (128, 4, 3), (64, 4, 3)),
    256: ((64, 4, 3), (32, 4, 3), (32, 4, 4)),
}
PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)


class Shape(NamedTuple):
    """One call: a query token for each of `batch` sequences of `keys` keys."""

    group: int
    batch: int
    keys: int
    dim: int
    cache: str | None = None

    @property
    def heads(self) -> tuple[int, int]:
        return HEADS[self.group, self.dim]

    def request(self) -> AttentionRequest:
        heads_q, heads_kv = self.heads
        return AttentionRequest(
            batch=self.batch,
            heads_q=heads_q,
            heads_kv=heads_kv,
            len_q=1,
            len_k=self.keys,
            dim_qk=self.dim,
            dim_v=self.dim,
            dtype="bfloat16",
            device=DEVICE,
            cache_dtype=self.cache,
        )

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value in bf16."""
        heads_q, heads_kv = self.heads
        cache = (self.batch, heads_kv, self.keys, self.dim)
        return normal(self.batch, heads_q, 1, self.dim), normal(*cache), normal(*cache)

    @property
    def bytes_read(self) -> int:
        """Of keys and values, their scales of tokens included."""
        heads_kv, request = self.heads[1], self.request()
        return request.bytes_moved + (4 * self.batch * heads_kv * self.keys if self.cache else 0)


SHAPES = [Shape(group, *call) for group in (1, 4, 8, 16) for call in CALLS]
CACHED = [
    Shape(*call, cache)
    for call in ((4, 1, 32768, 128), (4, 32, 8192, 128), (8, 32, 4096, 128), (8, 32, 4096, 64), (1, 16, 4096, 128))
    for cache in ("int8", "int4", "float8_e4m3fn")
]
#: Triton's names of keys and values of a cache, whose values are read as words of two bytes.
TYPES = {None: ("bf16", "bf16"), "int8": ("i8", "i16"), "int4": ("u8", "i16"), "float8_e4m3fn": ("fp8e4nv", "i16")}
CACHE_TILES = ((128, 4, 3), (256, 8, 3), (128, 8, 3), (256, 4, 3))


def compile_ahead(kernels: list[tuple[AttentionRequest, Tiles, bool, int]], chip: Chip) -> None:
    """Compile kernels into Triton's disk cache, a few in each of 16 processes."""
    begun = time.time()
    kernels = sorted(dict.fromkeys(kernels), key=lambda kernel: kernel[3])  # those that compile others first
    with ProcessPoolExecutor(16, multiprocessing.get_context("spawn")) as pool:
        failed = [text for text in pool.map(_compile, kernels, [chip] * len(kernels)) if text]
    print(f"{len(kernels)} kernels compiled in {time.time() - begun:.0f} s", *failed[:5], file=sys.stderr, flush=True)


def _compile(kernel: tuple[AttentionRequest, Tiles, bool, int], chip: Chip) -> str:
    """Compile one kernel; gives the error as text, or nothing."""
    request, tiles, split, joins = kernel

    def made(chip: Chip, fn: Any, signature: Any, constants: Any, divisible: Any = None, **options: Any) -> Any:
        return compiled(chip, fn, signature, constants, divisible or {}, options)

    memory = PooledMemory("cpu")
    context = Context(chip, memory, StreamWorkspaces(memory), CudaTiling(chip, lambda request: "portable"))
    try:
        with mock.patch.object(launch, "launcher", made):
            path = launch.PortablePath(request, context)
            types = ("u8", *_types(request))
            tokens = request.cache_dtype is not None
            of_mask = tuple(mask_constants(None).items()), tuple(mask_steps(None).items())
            chosen = launch._Chosen(tiles, types, of_mask, True, split, joins, True, False, False, True, tokens)
            path._kernel(chosen, torch.bfloat16)
    except Exception as error:
        return f"{tiles}: {error}"
    return ""


def _types(request: AttentionRequest) -> tuple[str, str]:
    key, value = TYPES[request.cache_dtype]
    return key, key if request.cache_dtype == "int4" and request.dim_v < 128 else value


class Forced(CudaTiling):
    """A tiling that is told its tiles and the parts of the keys."""

    def __init__(self, chip: Chip, tiles: Tiles, parts: int) -> None:
        super().__init__(chip, lambda request: "portable")
        self._tiles, self._parts = tiles, parts

    def tiles(self, request: AttentionRequest) -> Tiles:
        return self._tiles

    def splits(self, request: AttentionRequest, tiles: Tiles, len_q: int, len_k: int, batch: int) -> Splits:
        steps = -(-len_k // tiles.keys)
        each = -(-steps // self._parts)
        return Splits(-(-steps // each), each * tiles.keys)


def shapes(bench: Bench, options: Any) -> None:
    """The model's choice against the peers."""
    chosen = [_chosen(bench, shape) for shape in SHAPES]
    ceiling, rows, ratios, timed = read_bandwidth(bench.flush), [], [], []
    for shape, (tiles, splits, _) in zip(SHAPES, chosen, strict=True):
        given, request = shape.tensors(), shape.request()
        own = partial(bench.own("portable", request), *given)
        peers = bench.peers.decode(*given)
        error = relative_error(own(), next(iter(peers.values()))())
        assert error < 1e-2, (shape, error)
        times = bench.times({"own": own, **peers})
        best = min(time for name, time in times.items() if name != "own")
        ratios.append((best / times["own"], shape))
        timed.append(times)
        flashinfer = min((time for name, time in times.items() if name.startswith("FlashInfer")), default=math.nan)
        heads_q, heads_kv = shape.heads
        rows.append(
            [
                *map(str, (shape.group, f"{heads_q}/{heads_kv}", shape.dim, shape.batch, shape.keys)),
                *(f"{times.get(name, math.nan) * 1e3:.1f}" for name in ("own", "cuDNN", "FA2")),
                "-" if math.isnan(flashinfer) else f"{flashinfer * 1e3:.1f}",
                f"{best / times['own']:.3f}",
                f"{request.bytes_moved / times['own'] * 1e3 / ceiling:.2f}",
                f"{tiles.keys}x{tiles.warps}x{tiles.stages}, {splits.programs}",
            ]
        )
        del given, own, peers
    columns = (
        "group",
        "heads",
        "head_dim",
        "batch",
        "keys",
        "own",
        "cuDNN",
        "FA2",
        "FlashInfer",
        "best peer / own",
        "share of the ceiling",
        "keys x warps x stages, parts",
    )
    worst, where = min(ratios)
    alone = [times["cuDNN"] / times["own"] for times in timed if "cuDNN" in times]
    notes = [
        "Microseconds; one query, bf16. FlashInfer: the faster of its two kernels, on pages of 16.",
        f"Best peer's time over ours: geometric mean {geometric(r for r, _ in ratios):.3f}, worst {worst:.3f}: {where}",
        f"cuDNN's time over ours: geometric mean {geometric(alone):.3f}, worst {min(alone):.3f}.",
        f"Read ceiling {ceiling / 1e12:.2f} TB/s.",
        *conditions(bench),
    ]
    publish(options, "cuda_decode", "Decode over 40 shapes", columns, rows, notes, "Shapes")


def caches(bench: Bench, options: Any) -> None:
    """Quantised caches beside bf16: bytes and time of one call, and the error against the codes' numbers."""
    found = [_chosen(bench, shape) for shape in CACHED]
    ceiling, rows = read_bandwidth(bench.flush), []
    for shape, (tiles, splits, _) in zip(CACHED, found, strict=True):
        given, request = shape.tensors(), shape.request()
        bf16 = partial(bench.own("portable", replace(request, cache_dtype=None)), *given)
        given, tables = quantised(str(shape.cache), *given)
        own = partial(bench.own("portable", request), *given, None, None, tables)
        want = reference(given[0][:1].double(), *(t[:1].double() for t in numbers(given, tables))).out
        error = relative_error(own()[:1], want)
        times = bench.times({"own": own, "bf16": bf16})
        rows.append(
            [
                *map(str, shape),
                f"{shape.bytes_read / 1e6:.1f}",
                f"{replace(request, cache_dtype=None).bytes_moved / 1e6:.1f}",
                *(f"{times[name] * 1e3:.1f}" for name in ("own", "bf16")),
                f"{times['bf16'] / times['own']:.2f}",
                f"{shape.bytes_read / times['own'] * 1e3 / ceiling:.2f}",
                f"{error:.1e}",
                f"{tiles.keys}x{tiles.warps}x{tiles.stages}, {splits.programs}",
            ]
        )
        print(rows[-1], flush=True)
        del given, own, bf16, want, tables
    columns = ("group", "batch", "keys", "head_dim", "cache", "MB read", "MB of bf16", "microseconds", "bf16")
    columns += ("bf16 / quantised", "share of the ceiling", "error", "keys x warps x stages, parts")
    notes = [
        "One bf16 query; keys scaled by channel, values by token, whose scales are read too. The error is against "
        "float64 over the numbers that the codes stand for, rounded to bf16.",
        f"Read ceiling {ceiling / 1e12:.2f} TB/s.",
        *conditions(bench),
    ]
    publish(options, "cuda_decode", "Quantised caches", columns, rows, notes, "Quantised caches")


def paged_request(cache: str | None) -> AttentionRequest:
    """64 sequences of up to 32k keys in pages of 16, 32 query heads on 8 key heads."""
    shape = Shape(4, 64, 32768, 128, cache)
    return replace(shape.request(), page_size=16)


def paged(bench: Bench, options: Any) -> None:
    """Pages of sequences of 1k to 32k keys, in bf16 and quantised."""
    generator = torch.Generator().manual_seed(1)
    held = torch.randint(1024, 32769, (64,), generator=generator, dtype=torch.int32)
    pages = -(-held // 16)
    order, table = torch.randperm(int(pages.sum()), generator=generator).to(torch.int32), torch.zeros(64, 2048).int()
    for s, (count, end) in enumerate(zip(pages.tolist(), pages.cumsum(0).tolist(), strict=True)):
        table[s, :count] = order[end - count : end]
    ceiling, rows, plain = read_bandwidth(bench.flush), [], (len(order), 8, 16, 128)
    where = {"page_table": table.cuda(), "cache_seqlens": held.cuda()}
    query, key, value = normal(64, 32, 1, 128), normal(*plain), normal(*plain)
    calls: dict[str, Callable[[], Any]] = {}
    for cache in (None, "int8", "int4", "float8_e4m3fn"):
        given, scales = (key, value), {}
        if cache is not None:
            made = hal.quantize_cache(key, value, cache, shared=True)
            given, scales = (made.key, made.value), {"key_scale": made.key_scale, "value_scale": made.value_scale}
        tables = SequenceMetadata(**where, **scales)
        calls[cache or "bf16"] = partial(bench.own("portable", paged_request(cache)), query, *given, None, None, tables)
    want = calls["bf16"]()
    errors = {name: relative_error(call(), want) for name, call in calls.items()}
    for name, time_ms in bench.times(calls).items():
        tokens = {"bf16": 512, "int4": 128}.get(name, 256) + (0 if name == "bf16" else 4)
        nbytes = int(held.sum()) * 8 * tokens
        shown = [f"{nbytes / 1e6:.0f}", f"{time_ms * 1e3:.1f}", f"{nbytes / time_ms * 1e3 / ceiling:.2f}"]
        rows.append([name, *shown, f"{errors[name]:.1e}"])
    columns = ("cache", "MB read", "microseconds", "share of the ceiling", "difference from bf16")
    notes = ["64 sequences of 1k to 32k keys, pages of 16, 32 query heads on 8 key heads.", *conditions(bench)]
    publish(options, "cuda_decode", "Paged caches", columns, rows, notes, "Paged caches")


def geometric(values: Any) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def _chosen(bench: Bench, shape: Shape) -> tuple[Tiles, Splits, list[Any]]:
    """What the device's tiling chooses, and the kernels to compile for it."""
    request, tiling = shape.request(), CudaTiling(bench.chip, lambda request: "portable")
    tiles = tiling.tiles(request)
    splits = tiling.splits(request, tiles, 1, shape.keys, shape.batch)
    return tiles, splits, [(_kernel_of(shape), tiles, splits.programs > 1, _joins(splits.programs))]


def _kernel_of(shape: Shape) -> AttentionRequest:
    """The request of a kernel, the same for all lengths and batches."""
    return replace(shape.request(), batch=1, len_k=8192)


def _joins(parts: int) -> int:
    """Parts that the kernel to compile joins at once; with it, the one that joins none is compiled."""
    return 0 if parts == 1 else MOST_JOINED


def sweep(bench: Bench, options: Any) -> None:
    """Tiles and parts of every shape."""
    sweep_of(bench, options, SHAPES, "Tiles and parts", "Sweep")


def cache_sweep(bench: Bench, options: Any) -> None:
    """The same of quantised caches."""
    sweep_of(bench, options, CACHED, "Tiles and parts of quantised caches", "Sweep of caches")


def sweep_of(bench: Bench, options: Any, chosen: list[Shape], title: str, section: str) -> None:
    found, cells = [], [(shape, list(_cells(shape, options.tiles))) for shape in chosen]
    begun, rows = time.time(), []
    for shape, tried in cells:
        given, request, tables = shape.tensors(), shape.request(), None
        calls: dict[str, Callable[[], Any]] = {}
        if shape.cache is None:
            calls |= bench.peers.decode(*given)
            want = next(iter(calls.values()))()
        else:
            bf16 = launch.PortablePath(replace(request, cache_dtype=None), hal.session(DEVICE)._context)  # type: ignore[attr-defined]
            calls["bf16"] = partial(bf16, *given)
            given, tables = quantised(shape.cache, *given)
            want = bf16(given[0], *numbers(given, tables)).out
        session: Any = hal.session(DEVICE)
        model = _chosen(bench, shape)[:2]
        labels = {}
        for tiles, parts in [(model[0], 0), *tried]:
            tiling = (
                CudaTiling(bench.chip, lambda request: "portable") if not parts else Forced(bench.chip, tiles, parts)
            )
            path = launch.PortablePath(request, session._context._replace(tiling=tiling))
            name = f"{tiles.keys},{tiles.warps},{tiles.stages},{parts}" if parts else "model"
            try:
                call = partial(path, *given, tables=tables)
                error = relative_error(call().out, want)
            except Exception as failure:
                print(shape, name, failure, file=sys.stderr)
                continue
            if not error < 1e-2:
                print(shape, name, "error", error, file=sys.stderr, flush=True)
            calls[name], labels[name] = call, parts
        times = _medians(bench, calls)
        peer = min(value for name, value in times.items() if name not in labels)
        swept = {name: value for name, value in times.items() if labels.get(name)}
        best = min(swept, key=lambda name: swept[name])
        found.append({"shape": shape._asdict(), "heads": shape.heads, "model": str(model), "times": times})
        rows.append(
            [
                *map(str, shape[:4]),
                shape.cache or "bf16",
                f"{peer * 1e3:.1f}",
                f"{times['model'] * 1e3:.1f}",
                f"{swept[best] * 1e3:.1f}",
                best,
                f"{times['model'] / swept[best]:.3f}",
                f"{peer / times['model']:.3f}",
                f"{peer / swept[best]:.3f}",
            ]
        )
        print(rows[-1], f"{time.time() - begun:.0f} s", flush=True)
        if options.sweep_file:
            Path(f"{options.sweep_file}_{section.replace(' ', '_')}.json").write_text(
                json.dumps(found), encoding="utf-8"
            )
        del given, calls, want
        if time.time() - begun > options.seconds:
            break
    columns = ("group", "batch", "keys", "head_dim", "cache", "best peer", "model", "best", "which", "regret")
    columns += ("peer / model", "peer / best")
    notes = [
        "Microseconds; `which` is keys, warps, stages of the tile and parts of the keys.",
        "Geometric means: regret {:.3f}, best peer over the model {:.3f}, over the best {:.3f}.".format(
            *(geometric(float(row[place]) for row in rows) for place in (9, 10, 11))
        ),
        *conditions(bench),
    ]
    publish(options, "cuda_decode", title, columns, rows, notes, section)


def quantised(
    cache: str, query: Tensor, key: Tensor, value: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], SequenceMetadata]:
    """(query, codes of key and value), and their scales."""
    made = hal.quantize_cache(key, value, cache)
    return (query, made.key, made.value), SequenceMetadata(key_scale=made.key_scale, value_scale=made.value_scale)


def numbers(given: Sequence[Tensor], tables: SequenceMetadata) -> list[Tensor]:
    """Key and value of a quantised cache, in bf16."""
    return [hal.dequantized(c, s).bfloat16() for c, s in zip(given[1:], tables[4:], strict=True)]


def _cells(shape: Shape, most: int) -> Any:
    """Tiles and parts worth trying: several tiles for groups of 1 and 8, fewer for the others."""
    tiles = (SWEPT[shape.dim] if shape.cache is None else CACHE_TILES)[:most]
    whole = shape.batch * shape.heads[1]
    for (keys, warps, stages), parts in product(tiles, PARTS):
        steps = -(-shape.keys // keys)
        each = -(-steps // parts)
        exact = -(-steps // each) == parts
        if exact and (parts == 1 or whole * parts <= 16 * 132) and (parts > 1 or whole * steps >= 64 or steps == 1):
            yield Tiles(16, keys, warps, stages), parts


def _medians(bench: Bench, calls: dict[str, Callable[[], Any]], rounds: int = 7) -> dict[str, float]:
    """Median milliseconds of interleaved calls, which have run before."""
    time.sleep(0.02)
    clocked: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            bench.flush.random_(0, 7)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            clocked[name].append((start, stop))
    torch.cuda.synchronize()
    return {n: statistics.median(a.elapsed_time(b) for a, b in pairs) for n, pairs in clocked.items()}


def kernels_of(bench: Bench, section: str, most: int) -> list[Any]:
    """What a section launches, as `compile_ahead` takes it."""
    if section == "paged":
        tiling, made = CudaTiling(bench.chip, lambda request: "portable"), []
        for cache in (None, "int8", "int4", "float8_e4m3fn"):
            request = paged_request(cache)
            tiles = tiling.tiles(request)
            parts = tiling.splits(request, tiles, 1, request.len_k, 64).programs
            made.append((request, tiles, parts > 1, 0))
        return made
    shapes = CACHED if "cache" in section else SHAPES
    shapes = [*shapes, *dict.fromkeys(shape._replace(cache=None) for shape in shapes)]
    found = [kernel for shape in shapes for kernel in _chosen(bench, shape)[2]]
    if "sweep" in section:
        tried = [shape for shape in shapes if shape.cache or section == "sweep"]
        cells = [(shape, *cell) for shape in tried for cell in _cells(shape, most)]
        found += [(_kernel_of(shape), tiles, parts > 1, _joins(parts)) for shape, tiles, parts in cells]
    return found


RUN = {"shapes": shapes, "caches": caches, "sweep": sweep, "cache_sweep": cache_sweep, "paged": paged}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default="shapes", help=f"sections to run, of {', '.join(SECTIONS)}")
    options.add_argument("--tiles", type=int, default=8, help="tiles that the sweep tries for a head size")
    options.add_argument("--sweep-file", default="", help="where the sweep leaves its times, as JSON")
    options.add_argument("--seconds", type=float, default=600, help="after which the sweep ends")
    chosen = options.parse_args()
    torch.manual_seed(int(time.time()))
    bench = Bench()
    with torch.no_grad():
        sections = chosen.only.split(",")
        compile_ahead([k for section in sections for k in kernels_of(bench, section, chosen.tiles)], bench.chip)
        for section in sections:
            RUN[section](bench, chosen)


if __name__ == "__main__":
    main()
