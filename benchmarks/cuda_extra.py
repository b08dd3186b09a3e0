"""The kernels beside attention on a CUDA device: each held to float64, then timed beside torch and the copy bandwidth.

    python benchmarks/cuda_extra.py [--record] [--only check,bandwidth,gelu,sweep]

`check` draws fresh inputs: odd sizes, strides, three dtypes, nothing at all, slots and pages that are not there. Times
are device time, medians, second-level cache flushed before each call, calls interleaved. `sweep` tries the Hopper
kernel's configurations of fused_gelu_linear.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from cuda_attention import board, open_device
from hal_cuda import kernels
from hal_cuda.kernels.extra import references
from hal_cuda.kernels.extra.checks import chip_of
from record import parser, publish
from torch import Tensor

from hal_core.testing import BenchmarkRunner, relative_error

SECTIONS = ("check", "bandwidth", "gelu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUND = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}
LANGUAGES = ("", "triton_")
#: Smallest share of the copy bandwidth, and smallest ratio of torch's time to ours.
SHARE, RATIO = 0.85, 1.0
Case = tuple[str, Callable[[], Any], Callable[[], Any], float]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def wide(*given: Any) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given]


def case(name: str, about: str, given: tuple[Any, ...], bound: float, reference: str = "", **options: Any) -> Case:
    """A kernel's call, its reference in float64, and the largest relative error."""
    meant = getattr(references, reference or name.removeprefix("triton_"))
    return (
        f"{name} {about}",
        lambda: getattr(kernels, name)(*given, **options),
        lambda: meant(*wide(*given), **options),
        bound,
    )


def cases() -> Iterator[Case]:
    yield from sums()
    yield from products()
    yield from rotations()
    yield from pages()
    for language, dtype in product(LANGUAGES, DTYPES):
        for causal in (False, True):
            given = (normal(2, 4, 77, 64, dtype=dtype), *(normal(2, 2, 99, 64, dtype=dtype) for _ in range(2)))
            bound = BOUND[dtype] * (5 if dtype == torch.float32 else 1)
            about = f"{dtype} causal={causal}"
            yield case(f"{language}flash_attention_forward", about, given, bound, is_causal=causal)


def sums() -> Iterator[Case]:
    for dtype in DTYPES:
        for count in (0, 1, 1001, (1 << 20) + 3):
            a, b = normal(count + 1, dtype=dtype), normal(count + 1, dtype=dtype)
            for begin in (0, 1):  # the second is not aligned
                x, y = a[begin : begin + count], b[begin : begin + count]
                about = f"{dtype} {count} from {begin}"
                yield (
                    f"vector_add {about}",
                    partial(kernels.vector_add, x, y),
                    partial(torch.add, x.double(), y.double()),
                    BOUND[dtype],
                )
        x, y = normal(33, 70, dtype=dtype).T, normal(70, 33, dtype=dtype)
        yield (
            f"vector_add {dtype} transposed",
            partial(kernels.vector_add, x, y),
            partial(torch.add, x.double(), y.double()),
            BOUND[dtype],
        )
    shapes: list[tuple[tuple[int, ...], int | None]] = [
        ((5, 1003), -1),
        ((3, 70, 50), 1),
        ((3, 70, 50), 0),
        ((3, 70, 64), 1),
        ((2, 9000, 64), 1),
        ((7, 1), 1),
        (((1 << 22) + 5,), None),
        ((2048, 4096), -1),
        ((4, 100003), -1),
        ((2, 0, 3), 1),
        ((), -1),
        ((50000, 8), 0),
        ((50000, 3), 0),
    ]
    for language, dtype, (shape, dim) in product(LANGUAGES, DTYPES, shapes):
        x = (normal(*shape, dtype=dtype) + 0.5) * 2.0**-7  # a sum of four millions stays within float16
        for about, given in {
            "": x,
            " a slice": x[..., 1:] if x.dim() else x,
            " transposed": x.mT if x.dim() > 1 else x,
        }.items():
            yield (
                f"{language}reduce_sum {dtype} {list(shape)} {dim}{about}",
                partial(getattr(kernels, f"{language}reduce_sum"), given, dim),
                partial(_torch_sum, given, dim),
                BOUND[dtype] * (2 if dtype == torch.float32 else 1),
            )
            if given.numel():
                yield (
                    f"{language}reduce_max {dtype} {list(shape)} {dim}{about}",
                    partial(getattr(kernels, f"{language}reduce_max"), given, dim),
                    partial(_torch_max, given, dim),
                    0.0,
                )
    for language in LANGUAGES:
        x = normal(70, 3000)
        x[3, 2000] = math.nan
        yield f"{language}reduce_max NaN", partial(_nans, language, x), partial(_nan_rows, x), 0.0


def _nans(language: str, x: Tensor) -> Tensor:
    found: Tensor = getattr(kernels, f"{language}reduce_max")(x, 1)
    return found.isnan().double()


def _nan_rows(x: Tensor) -> Tensor:
    return x.isnan().any(1).double()


def _torch_sum(x: Tensor, dim: int | None) -> Tensor:
    return x.double().sum() if dim is None else x.double().sum(dim)


def _torch_max(x: Tensor, dim: int | None) -> Tensor:
    return x.double().max() if dim is None else x.double().amax(dim)


def products() -> Iterator[Case]:
    sizes = [
        (130, 88, 72),
        (1, 1, 1),
        (257, 520, 512),
        (512, 768, 1024),
        (300, 1000, 200),
        (100, 64, 75),
        (129, 77, 64),
    ]
    sizes += [(1024, 1024, 1024), (5, 300, 0), (0, 8, 8), (1000, 2056, 328)]
    for language, dtype, (m, n, k) in product(LANGUAGES, DTYPES, sizes):
        x, w, bias = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype) / max(k, 1) ** 0.5, normal(n, dtype=dtype)
        name, about = f"{language}fused_gelu_linear", f"{dtype} {m}x{n}x{k}"
        bound = BOUND[dtype] * (2 if dtype == torch.float32 else 1)
        yield case(name, about, (x, w, bias), bound)
        yield case(name, f"{about} tanh, no bias", (x, w), bound, use_tanh_approx=True)
        stored = w.T.contiguous()
        yield case(name, f"{about} stored [K, N]", (x, stored.T, bias), bound)
        padded = torch.zeros(m, k + 3, device="cuda", dtype=dtype)
        padded[:, :k] = x
        yield case(name, f"{about} padded rows", (padded[:, :k], w, bias), bound)
    for language in LANGUAGES:
        given = [normal(130, 72), normal(88, 72) / 8, normal(88)]
        linear = getattr(kernels, f"{language}fused_gelu_linear")
        for place, what in enumerate(("X", "W", "bias")):
            yield (
                f"{language}fused_gelu_linear gradient of {what}",
                partial(_gradient, linear, given, place),
                partial(_gradient, references.fused_gelu_linear, wide(*given), place),
                1e-5,
            )


def _gradient(linear: Callable[..., Tensor], given: list[Tensor], place: int) -> Tensor:
    leaves = [t.detach().clone().requires_grad_() for t in given]
    with torch.enable_grad():
        linear(*leaves).square().sum().backward()
    found = leaves[place].grad
    assert found is not None
    return found


def rotations() -> Iterator[Case]:
    for language in LANGUAGES:
        for length, dim in ((1000, 48), (200000, 64), (1, 2), (0, 8), (77, 6)):
            tables = getattr(kernels, f"{language}rope_precompute_freqs")
            yield (
                f"{language}rope_precompute_freqs {length}, {dim}",
                partial(tables, length, dim, 500000.0),
                partial(_tables, length, dim),
                2e-7,
            )
    forms = [
        (2, 6, 2, 37, 24),
        (1, 8, 8, 1000, 128),
        (3, 1, 5, 65, 64),
        (2, 4, 4, 1, 6),
        (1, 3, 2, 50, 2),
        (2, 9, 1, 70, 80),
    ]
    forms += [(0, 2, 2, 4, 8), (1, 0, 2, 4, 8)]
    for language, dtype, (batch, heads, heads_k, length, dim) in product(LANGUAGES, DTYPES, forms):
        q, k = normal(batch, heads, length, dim, dtype=dtype), normal(batch, heads_k, length, dim, dtype=dtype)
        cos, sin = (t.float().cuda() for t in references.rope_precompute_freqs(length + 9, dim))
        last = normal(batch, length, heads, dim, dtype=dtype).transpose(1, 2)
        about = f"{dtype} {batch}x{heads}/{heads_k}x{length}x{dim}"
        bound = BOUND[dtype]
        yield case(f"{language}rope_forward", about, (q, k, cos, sin), bound)
        yield case(f"{language}rope_forward", f"{about} heads last", (last, k, cos, sin), bound)
        yield case(f"{language}rope_forward_fused", about, (q, k), bound)
        yield case(f"{language}rope_forward_fused", f"{about} base 500", (last, k, 500.0), bound)


def _tables(length: int, dim: int) -> tuple[Tensor, ...]:
    return tuple(t.cuda() for t in references.rope_precompute_freqs(length, dim, 500000.0))


def pages() -> Iterator[Case]:
    forms = [(7, 3, 8, 24), (40, 8, 16, 128), (5, 1, 1, 3), (6, 2, 5, 10), (300, 2, 7, 64)]
    for language, dtype, (count, heads, size, dim) in product(LANGUAGES, DTYPES, forms):
        tokens = count * size * 2 // 3
        slots = torch.randperm(count * size, device="cuda")[:tokens].to(torch.int32)
        slots[: min(tokens, 2)] = torch.tensor([-1, count * size], dtype=torch.int32, device="cuda")[: min(tokens, 2)]
        guarded = torch.full((count + 2, 2, heads, size, dim), 7.0, device="cuda", dtype=dtype)
        guarded[1:-1].normal_()
        keys, values = normal(tokens, heads, dim, dtype=dtype), normal(heads, tokens, dim, dtype=dtype).transpose(0, 1)
        about = f"{dtype} {count}x{heads}x{size}x{dim}"
        append = getattr(kernels, f"{language}paged_kv_cache_append")
        yield (
            f"{language}paged_kv_cache_append {about}",
            partial(_appended, append, guarded, slots, keys, values),
            partial(_appended_reference, guarded, slots, keys, values),
            0.0,
        )
        table = torch.randint(-2, count + 2, (5, 6), device="cuda", dtype=torch.int32)
        lengths = torch.tensor([size * 6, size * 9, 0, 1, size * 3 + 1], device="cuda", dtype=torch.int32)
        for most in (size * 8 + 1, size * 2, 0):
            given = (guarded[1:-1], table, lengths, most)
            yield case(f"{language}paged_kv_cache_read", f"{about} most {most}", given, 0.0)
        yield (
            f"{language}PagedKVCache {about}",
            partial(_cached, language, keys, values, size),
            partial(_kept, keys, values),
            0.0,
        )


def _appended(append: Callable[..., Any], guarded: Tensor, *given: Tensor) -> Tensor:
    found = guarded.clone()
    append(found[1:-1], *given)
    return found


def _appended_reference(guarded: Tensor, *given: Tensor) -> Tensor:
    found = guarded.double()
    found[1:-1] = references.paged_kv_cache_append(found[1:-1], *given)
    return found


def _cached(language: str, keys: Tensor, values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    tokens, heads, dim = keys.shape
    backend = "triton" if language else "cuda"
    cache = kernels.PagedKVCache(-(-tokens // size) + 3, size, heads, dim, keys.dtype, backend)
    cache.append(5, keys[:1], values[:1])
    cache.append(2, keys[: size + 1], values[: size + 1])
    cache.free_sequence(5)
    cache.append(2, keys[size + 1 :], values[size + 1 :])
    k, v = cache.read([2, 9])
    return k[0].transpose(0, 1), v[0].transpose(0, 1)


def _kept(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return keys.double(), values.double()


def check(options: Any) -> int:
    """Rows of what failed, and how many were right; returns the number of failures."""
    worst: dict[str, tuple[float, float, int]] = {}
    failed: list[list[str]] = []
    for name, call, meant, bound in cases():
        kernel = name.split()[0]
        try:
            error = worst_error(call(), meant())
        except Exception as problem:  # the next kernel may be right
            lines = traceback.format_exception(problem)
            failed.append([name, f"{type(problem).__name__}: {str(problem).splitlines()[0][:160]}", f"{bound:.1g}"])
            print(name, "".join(lines[-3:]), file=sys.stderr)
            if "CUDA" in str(problem) and "illegal" in str(problem):
                break  # nothing on the device works any more
            continue
        most, _, count = worst.get(kernel, (0.0, 0.0, 0))
        worst[kernel] = (
            max(most, error / bound if bound else error * 1e9),
            max(bound, worst.get(kernel, (0, 0, 0))[1]),
            count + 1,
        )
        if not error <= bound:
            failed.append([name, f"{error:.3g}", f"{bound:.1g}"])
    rows = [[name, str(count), f"{share:.2f}"] for name, (share, _, count) in worst.items()]
    columns = ("kernel", "cases that ran", "worst error over its bound")
    notes = [f"{len(failed)} cases failed.", board()]
    publish(options, "cuda_extra", "Against float64", columns, rows, notes, "Against float64")
    for row in failed[:60]:
        print("FAILED", *row, sep=" | ")
    return len(failed)


def worst_error(got: Any, want: Any) -> float:
    """The largest relative error of a result, or of several."""
    pairs = list(zip(got, want, strict=True)) if isinstance(got, tuple) else [(got, want)]
    for x, y in pairs:
        assert x.shape == y.shape, f"shape {list(x.shape)}, {list(y.shape)} wanted"
    return max(relative_error(x, y) if y.numel() else 0.0 for x, y in pairs)


class Clock:
    """Device times of calls, interleaved. The device waits a little before each, so that the host is ahead."""

    def __init__(self) -> None:
        self._buffer = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        self.runner = BenchmarkRunner(4, 21, device="cuda", flush=self._flush)

    def _flush(self) -> None:
        self._buffer.random_(0, 7)
        torch.cuda._sleep(400_000)

    def times(self, calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Median seconds by name."""
        time.sleep(0.1)  # the board's power limit recovers
        if len(calls) == 1:
            calls = calls | {"again": next(iter(calls.values()))}
        return {name: result.p50 / 1e3 for name, result in self.runner.compare(calls).results.items()}


def bandwidth(options: Any) -> int:
    clock, missed = Clock(), 0
    rows: list[list[str]] = []
    source = normal(1 << 29, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy: dict[str, Callable[[], Any]] = {"copy": partial(target.copy_, source)}
    bf16 = torch.bfloat16
    for name, moved, calls in moves():
        found = clock.times(copy | calls)
        ceiling = 2 * source.nbytes / found["copy"]
        shown = [name, f"{moved / 1e9:.2f}", f"{ceiling / 1e12:.2f}"]
        for who in ("cuda", "triton", "torch"):
            shown.append(f"{moved / found[who] / ceiling:.3f}" if who in found else "-")
        best = max(moved / found[who] / ceiling for who in ("cuda", "triton") if who in found)
        missed += best < SHARE
        rows.append([*shown, f"{best:.3f}", "held" if best >= SHARE else "missed"])
        torch.cuda.empty_cache()
    columns = ("call", "GB", "copy TB/s", "cuda", "triton", "torch", "better of ours", f"bar {SHARE}")
    notes = [f"Shares of the bandwidth of copying {source.nbytes / 1e9:.1f} GB in the same run; {bf16}.", board()]
    publish(options, "cuda_extra", "Bandwidth", columns, rows, notes, "Bandwidth")
    return missed


def moves() -> Iterator[tuple[str, int, dict[str, Callable[[], Any]]]]:
    """(name, bytes moved, calls) of each kernel that memory bounds."""
    bf16 = torch.bfloat16
    x = normal(8192, 65536, dtype=bf16)
    for name, given, dim in (
        ("reduce_sum 8192 x 65536, rows", x, -1),
        ("reduce_sum 8192 x 65536, columns", x, 0),
        ("reduce_sum 2^29, all", x.view(-1), None),
        ("reduce_sum 2^20 x 512, rows", x.view(1 << 20, 512), -1),
    ):
        yield (
            name,
            given.nbytes,
            {
                "cuda": partial(kernels.reduce_sum, given, dim),
                "triton": partial(kernels.triton_reduce_sum, given, dim),
                "torch": partial(torch.sum, given) if dim is None else partial(torch.sum, given, dim),
            },
        )
    yield (
        "reduce_max 2^29, all",
        x.nbytes,
        {"cuda": partial(kernels.reduce_max, x), "triton": partial(kernels.triton_reduce_max, x), "torch": x.max},
    )
    a, b = x.view(-1)[: 1 << 28], x.view(-1)[1 << 28 :]
    yield (
        "vector_add 2^28",
        3 * a.nbytes,
        {"cuda": partial(kernels.vector_add, a, b), "torch": partial(torch.add, a, b)},
    )
    del x, a, b
    q, k = normal(8, 32, 8192, 128, dtype=bf16), normal(8, 8, 8192, 128, dtype=bf16)
    cos, sin = kernels.triton_rope_precompute_freqs(8192, 128)
    for layout in ("heads first", "heads last"):
        if layout == "heads last":
            q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
        yield (
            f"rope_forward 8 x 32/8 x 8192 x 128, {layout}",
            2 * (q.nbytes + k.nbytes),
            {lang: partial(getattr(kernels, f"{p}rope_forward"), q, k, cos, sin) for lang, p in _both()},
        )
        yield (
            f"rope_forward_fused, {layout}",
            2 * (q.nbytes + k.nbytes),
            {lang: partial(getattr(kernels, f"{p}rope_forward_fused"), q, k) for lang, p in _both()},
        )
    del q, k
    heads, size, dim, tokens = 8, 16, 128, 1 << 18
    pool = normal(tokens // size + 100, 2, heads, size, dim, dtype=bf16)
    keys, values = normal(tokens, heads, dim, dtype=bf16), normal(tokens, heads, dim, dtype=bf16)
    slots = torch.randperm(pool.shape[0] * size, device="cuda")[:tokens].to(torch.int32)
    yield (
        "paged_kv_cache_append 2^18 x 8 x 128, slots at random",
        2 * (keys.nbytes + values.nbytes),
        {
            lang: partial(getattr(kernels, f"{p}paged_kv_cache_append"), pool, slots, keys, values)
            for lang, p in _both()
        },
    )
    table = torch.randperm(pool.shape[0], device="cuda")[: tokens // size].to(torch.int32).view(64, -1)
    lengths = torch.full((64,), tokens // 64, dtype=torch.int32, device="cuda")
    yield (
        "paged_kv_cache_read 64 x 8 x 4096 x 128, pages at random",
        2 * (keys.nbytes + values.nbytes),
        {
            lang: partial(getattr(kernels, f"{p}paged_kv_cache_read"), pool, table, lengths, tokens // 64)
            for lang, p in _both()
        },
    )


def _both() -> tuple[tuple[str, str], ...]:
    return (("cuda", ""), ("triton", "triton_"))


def gelu(options: Any) -> int:
    from hal_cuda.kernels.extra import gelu_linear

    clock, missed = Clock(), 0
    rows: list[list[str]] = []
    for (m, n, k), dtype, tanh, bias, stored in (
        ((4096, 4096, 4096), torch.bfloat16, False, True, False),
        ((4096, 4096, 4096), torch.float16, False, True, False),
        ((4096, 4096, 4096), torch.bfloat16, True, True, False),
        ((4096, 4096, 4096), torch.bfloat16, False, False, False),
        ((4096, 4096, 4096), torch.bfloat16, True, True, True),
        ((8192, 16384, 4096), torch.bfloat16, False, True, False),
        ((8192, 3072, 768), torch.bfloat16, True, True, True),
        ((1000, 3000, 1000), torch.bfloat16, False, True, False),
    ):
        x, b = normal(m, k, dtype=dtype), normal(n, dtype=dtype) if bias else None
        w = (normal(k, n, dtype=dtype) / k**0.5).T if stored else normal(n, k, dtype=dtype) / k**0.5
        out = torch.empty(m, n, dtype=dtype, device="cuda")
        calls: dict[str, Callable[[], Any]] = {
            "torch": partial(_torch, x, w, b, tanh),
            "product": partial(torch.nn.functional.linear, x, w, b),
            "triton": partial(kernels.triton_fused_gelu_linear, x, w, b, tanh),
            "portable": partial(gelu_linear.portable, x, w, b, out, tanh),
            "cuda": partial(kernels.fused_gelu_linear, x, w, b, tanh),
        }
        want = _torch(x.double(), w.double(), None if b is None else b.double(), tanh) if m * n * k < 1 << 37 else None
        errors = [relative_error(calls[who](), want) if want is not None else math.nan for who in ("triton", "torch")]
        del want
        found = clock.times(calls)
        ratio = found["torch"] / found["triton"]
        missed += ratio < RATIO and not rows
        rate = [f"{2 * m * n * k / found[who] / 1e12:.0f}" for who in calls]
        kind = f"{str(dtype).removeprefix('torch.')}{' tanh' if tanh else ' erf'}{'' if bias else ', no bias'}"
        rows.append(
            [f"{m} x {n} x {k}", kind + (", W [K, N]" if stored else ""), *rate, f"{ratio:.3f}"]
            + [f"{error:.2e}" for error in errors]
        )
    columns = ("M x N x K", "call", *calls, "torch / triton", "error", "torch's error")
    notes = ["TFLOP/s. `product`: torch's linear alone; `portable`: the Triton kernel for every GPU.", board()]
    publish(options, "cuda_extra", "fused_gelu_linear", columns, rows, notes, "fused_gelu_linear")
    return missed


def _torch(x: Tensor, w: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    """Torch's two operations."""
    product = torch.nn.functional.linear(x, w, bias)
    return torch.nn.functional.gelu(product, approximate="tanh" if tanh else "none")


def sweep(options: Any) -> int:
    """Configurations of the Hopper kernel at 4096 cubed, against torch's two operations."""
    from hal_cuda.kernels.extra import gelu_linear
    from hal_cuda.kernels.extra.gelu_config import GeluConfig

    clock, chip = Clock(), chip_of(torch.device("cuda"))
    x, w, b = (normal(*shape, dtype=torch.bfloat16) for shape in ((4096, 4096), (4096, 4096), (4096,)))
    w /= 64
    out = torch.empty_like(x)
    want = _torch(x, w, b, False).double()
    torch_call = {"torch": partial(_torch, x, w, b, False)}
    rows: list[list[str]] = []
    for columns, depth, stages, (parts, buffers), together in product(
        (256, 128), (64, 128), (3, 4, 6), ((4, 2), (4, 4), (2, 1), (2, 2), (1, 1)), (4, 8, 16, 32)
    ):
        shared = stages * (128 + columns) * depth * 2 + 2 * buffers * 64 * columns // parts * 2 + 16 * stages
        if shared > 231_000 or (together != 8 and (parts, buffers) != (4, 2)) or shared < 130_000:
            continue
        config = GeluConfig(
            columns=columns, depth=depth, stages=stages, parts=parts, buffers=buffers, together=together
        )
        shown = [*map(str, (columns, depth, stages, parts, buffers, together))]
        call = partial(gelu_linear.hopper, x, w, b, out, config, chip)
        try:
            out.zero_()
            call()
            error = relative_error(out, want)
            found = clock.times(torch_call | {"own": call})
            rate, ratio = 2 * 4096**3 / found["own"] / 1e12, found["torch"] / found["own"]
            rows.append([*shown, f"{rate:.0f}", f"{ratio:.3f}", f"{error:.1e}"])
        except Exception as problem:
            rows.append([*shown, "-", "-", str(problem)[:60]])
    rows.sort(key=lambda row: row[7], reverse=True)
    names = ("columns", "depth", "stages", "parts", "buffers", "together", "TFLOP/s", "torch / own", "error")
    publish(options, "cuda_extra", "Configurations", names, rows, [board()], "Configurations")
    return 0


RUN = {"check": check, "bandwidth": bandwidth, "gelu": gelu, "sweep": sweep}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--only", default=",".join(SECTIONS), help="sections to run")
    chosen = options.parse_args()
    seed = int(time.time())
    print(f"seed {seed}", file=sys.stderr)
    torch.manual_seed(seed)
    open_device()
    with torch.no_grad():
        failures = {section: RUN[section](chosen) for section in chosen.only.split(",")}
    print(", ".join(f"{section}: {count} failed" for section, count in failures.items()), file=sys.stderr)
    return int(any(failures.values()))


if __name__ == "__main__":
    sys.exit(main())
