"""Gradients of attention on a CUDA device: own kernels beside the installed peers, and whole calls beside SDPA.

    python benchmarks/cuda_gradients.py [--record] [--only error,accuracy,backward,special,deterministic,models,host]
        [--match TEXT]

Random data, device time, second-level cache flushed before each call, medians, calls interleaved with the peers'.
Ratios are the best peer's time over ours: above 1 is faster. `backward` times the gradients alone, from a forward's
result; `models` times forward and backward together through `hal.attention`, beside
`F.scaled_dot_product_attention` with torch's defaults on the same tensors, and counts 1 where both launched the same
kernels. Peers are cuDNN and FlashAttention-2 as torch ships them, and FlashAttention-4 where it is installed.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from cuda_attention import DEVICE, SDPA, Bench, conditions, normal, open_device
from hal_cuda.cost import OWN
from model_shapes import SHAPES, Shape
from record import parser, publish
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hal_core as hal
from hal_core.frontend.dispatch import bucketed
from hal_core.testing import relative_error

SECTIONS = ("error", "accuracy", "backward", "special", "deterministic", "models", "host")
SEEDS = 5
PEERS = ("cuDNN", "FA2", "FA4")


def heads_of(dim: int) -> int:
    """Heads of a model of hidden size 2048."""
    return 2048 // dim


def exact_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in float64, by autograd through plain steps."""
    request = hal.explain(query, key, value, backend=DEVICE, enable_gqa=True, **options).request
    leaves = [t.detach().double().requires_grad_() for t in (query, key, value)]
    group = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(group, 1) for t in leaves[1:])
    scores = leaves[0] @ keys.mT * request.effective_scale
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    band = hal.dense_mask(request, query.shape[2], key.shape[2], device=query.device)
    if band is not None:
        scores = scores.masked_fill(~band, -math.inf)
        scores = scores.masked_fill(~band.any(-1, keepdim=True), 0.0)
    weights = torch.softmax(scores, -1)
    if band is not None:
        weights = weights * band.any(-1, keepdim=True)
    out = weights @ values
    return torch.autograd.grad(out, leaves, grad_out.double())


def forward_result(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the own forward."""
    with torch.no_grad():
        result = hal.attention(query, key, value, backend=DEVICE, return_lse=True, enable_gqa=True, **options)
    return result.out, result.lse


def own_backward(chip: Any, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, **options: Any) -> Any:
    """The own backward, ready to call on a forward's result, and that result."""
    from hal_cuda.kernels.gradients import OwnBackward

    session: Any = hal.session(DEVICE)
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    request = hal.explain(*leaves, backend=DEVICE, return_lse=True, enable_gqa=True, **options).request
    path = "hopper" if chip.capability == (9, 0) else "portable"
    out, lse = forward_result(query, key, value, **options)
    return partial(OwnBackward(path, request, session._context), query, key, value, out, lse, grad_out)


def torch_backward(
    backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, causal: bool
) -> Callable[[], Any]:
    """The backward of one of torch's attention backends."""
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    with torch.enable_grad(), sdpa_kernel(backend):
        out = SDPA(*leaves, is_causal=causal, enable_gqa=query.shape[1] != key.shape[1])
    return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)


def fa4_backward(bench: Bench, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, **options: Any) -> Any:
    """FlashAttention-4's backward; None where it is not installed or refuses."""
    module = bench.peers._modules.get("FlashAttention-4")
    if module is None:
        return None
    rows = [t.transpose(1, 2).contiguous().requires_grad_() for t in (query, key, value)]
    grad = grad_out.transpose(1, 2).contiguous()
    try:
        with torch.enable_grad():
            out = module.flash_attn_func(*rows, **options)[0]
            torch.autograd.grad(out, rows, grad, retain_graph=True)
    except Exception as error:
        bench.peers.notes.append(f"FlashAttention-4 refused the backward of {list(query.shape)}: {error}"[:200])
        return None
    return lambda: torch.autograd.grad(out, rows, grad, retain_graph=True)


ERRORS: tuple[tuple[str, tuple[int, int, int, int, int], dict[str, Any]], ...] = (
    ("full", (2, 4, 4, 777, 777), {}),
    ("causal", (2, 4, 4, 1024, 1024), {"is_causal": True}),
    ("causal, group of 4", (2, 8, 2, 1000, 1000), {"is_causal": True}),
    ("fewer queries, bottom right", (1, 6, 2, 333, 700), {"causal": "bottom_right"}),
    ("more queries, bottom right", (1, 2, 2, 700, 333), {"causal": "bottom_right"}),
    ("window 100", (1, 4, 2, 900, 900), {"is_causal": True, "window": (100, 0)}),
    ("window both sides", (1, 2, 2, 513, 600), {"window": (64, 30)}),
    ("softcap 5", (1, 2, 2, 500, 500), {"is_causal": True, "softcap": 5.0}),
    ("short", (2, 4, 4, 65, 65), {"is_causal": True}),
    ("one key", (2, 4, 4, 65, 1), {}),
    ("diagonal", (1, 2, 2, 300, 300), {"is_causal": True, "diagonal": 7}),
)


DIMS = ((64, 64), (128, 128), (256, 256), (96, 96), (192, 128), (32, 32))


def error_row(dtype: torch.dtype, dims: tuple[int, int], place: int) -> list[str]:
    """Of one call of `ERRORS`: the largest errors of 5 launches on the same data, and launches whose dK or dV moved."""
    name, (batch, heads, heads_kv, len_q, len_k), given = ERRORS[place]
    chip = open_device()[2]
    torch.manual_seed(time.time_ns() % (1 << 31))
    query = normal(batch, heads, len_q, dims[0]).to(dtype)
    key, value = (normal(batch, heads_kv, len_k, dim).to(dtype) for dim in dims)
    grad_out = normal(batch, heads, len_q, dims[1]).to(dtype)
    want = exact_gradients(query, key, value, grad_out, given)
    call = own_backward(chip, query, key, value, grad_out, **given)
    first, worst, moved = call(), [0.0, 0.0, 0.0], 0
    for grads in (first, *(call() for _ in range(4))):
        found = [relative_error(got, right) for got, right in zip(grads[:3], want, strict=True)]
        worst = [max(a, b) if b == b else math.nan for a, b in zip(worst, found, strict=True)]
        moved += not (torch.equal(first[1], grads[1]) and torch.equal(first[2], grads[2]))
    return [str(dtype)[6:], f"{dims[0]}/{dims[1]}", name, *(f"{e:.2e}" for e in worst), str(moved)]


def error(bench: Bench, options: Any) -> None:
    """Errors against float64. Kernels are compiled in several processes at once."""
    every = [(dims, place) for dims in DIMS if dims[0] in options.dims for place in range(len(ERRORS))]
    cells = [(torch.bfloat16, *cell) for cell in every]
    cells += [(torch.float16, dims, place) for dims, place in every if max(dims) <= 128 and place < 2]
    rows = []
    with ProcessPoolExecutor(14, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(error_row, *zip(*cells, strict=True)):
            rows.append(row)
            print(f"\r{len(rows)} of {len(cells)} calls", end="", file=sys.stderr)
    bound = {"bfloat16": 1e-2, "float16": 2e-3}
    bad = [row for row in rows if not all(float(e) <= bound[row[0]] for e in row[3:6]) or row[6] != "0"]
    notes = [f"{len(bad)} of {len(rows)} calls beyond 1e-2 (bfloat16) or 2e-3 (float16), or with dK, dV that moved."]
    columns = ("dtype", "head_dim", "call", "dQ", "dK", "dV", "moved of 5")
    notes += conditions(bench)
    publish(options, "cuda_gradients", "Errors", columns, bad if options.brief else rows, notes, "Errors")


def accuracy(bench: Bench, options: Any) -> None:
    """Root mean square over seeds of each gradient's error against float64, beside the peers'."""
    rows, worst = [], 0.0
    shapes = [(dim, length, causal, 4) for dim in (64, 128, 256) for length in (1000, 2048) for causal in (False, True)]
    shapes += [(64, 2048, True, 1), (128, 2048, True, 1)]
    for dim, length, causal, heads_kv in [shape for shape in shapes if shape[0] in options.dims]:
        squares: dict[str, list[float]] = {}
        for _ in range(SEEDS):
            query, grad_out = (normal(2, 4, length, dim) for _ in range(2))
            key, value = (normal(2, heads_kv, length, dim) for _ in range(2))
            given = (query, key, value, grad_out)
            want = exact_gradients(*given, {"is_causal": causal})
            calls = {"own": own_backward(bench.chip, *given, is_causal=causal)}
            calls["cuDNN"] = torch_backward(SDPBackend.CUDNN_ATTENTION, *given, causal)
            calls["FA2"] = torch_backward(SDPBackend.FLASH_ATTENTION, *given, causal)
            for name, call in calls.items():
                errors = [relative_error(got, right) for got, right in zip(call()[:3], want, strict=True)]
                squares[name] = [old + new * new for old, new in zip(squares.get(name, [0.0] * 3), errors, strict=True)]
        found = {name: [math.sqrt(total / SEEDS) for total in each] for name, each in squares.items()}
        ratios = [found["own"][i] / min(found["cuDNN"][i], found["FA2"][i]) for i in range(3)]
        worst = max(worst, *ratios)
        shown = [" ".join(f"{e:.2e}" for e in found[name]) for name in ("own", "cuDNN", "FA2")]
        form = f"{'causal' if causal else 'full'}, 4 heads on {heads_kv}"
        rows.append([str(dim), str(length), form, *shown, f"{max(ratios):.3f}"])
    columns = ("head_dim", "tokens", "mask", "own: dQ dK dV", "cuDNN", "FA2", "own / best peer")
    notes = [f"bf16, {SEEDS} seeds, root mean square. Worst {worst:.3f} of the best peer.", *conditions(bench)]
    publish(options, "cuda_gradients", "Accuracy", columns, rows, notes, "Accuracy")


def deterministic(bench: Bench, options: Any) -> None:
    """Gradients that are the same to the bit in every run, beside the fastest."""
    rows = []
    for dim in (64, 128):
        for length in (2048, 8192):
            for causal in (True, False):
                shape = (max(16384 // length, 1), heads_of(dim), length, dim)
                given = [normal(*shape) for _ in range(4)]
                fastest = own_backward(bench.chip, *given, is_causal=causal)
                repeats = repeating(fastest)
                first, moved = repeats(), 0
                for _ in range(20):
                    moved += not all(torch.equal(a, b) for a, b in zip(first[:3], repeats()[:3], strict=True))
                times = bench.times({"repeats": repeats, "fastest": fastest})
                flops = 10.0 * shape[0] * shape[1] * length * length * dim / (2 if causal else 1)
                rates = [f"{flops / times[name] / 1e9:.0f}" for name in ("repeats", "fastest")]
                rows.append([str(dim), str(length), "causal" if causal else "full", *rates, str(moved)])
    columns = ("head_dim", "tokens", "mask", "deterministic, TFLOP/s", "fastest", "launches of 20 that moved")
    publish(options, "cuda_gradients", "Deterministic", columns, rows, conditions(bench), "Deterministic")


def repeating(call: Any) -> Any:
    """A call of `own_backward` with deterministic gradients, on the same tensors."""
    from hal_cuda.kernels.gradients import OwnBackward

    session: Any = hal.session(DEVICE)
    request = replace(call.func._portable.request, deterministic=True)
    path = "hopper" if call.func._hopper is not None else "portable"
    return partial(OwnBackward(path, request, session._context), *call.args)


def backward(bench: Bench, options: Any) -> None:
    """The gradients alone, against the best peer."""
    rows, ratios = [], []
    for dim in (dim for dim in (64, 128, 256) if dim in options.dims):
        for length in (512, 1024, 2048, 8192, 16384):
            for causal in (False, True):
                shape = (max(16384 // length, 1), heads_of(dim), length, dim)
                given = [normal(*shape) for _ in range(4)]
                calls = {"own": own_backward(bench.chip, *given, is_causal=causal)}
                calls["cuDNN"] = torch_backward(SDPBackend.CUDNN_ATTENTION, *given, causal)
                calls["FA2"] = torch_backward(SDPBackend.FLASH_ATTENTION, *given, causal)
                if (fa4 := fa4_backward(bench, *given, causal=causal)) is not None:
                    calls["FA4"] = fa4
                times = bench.times(calls)
                flops = 10.0 * shape[0] * shape[1] * length * length * dim / (2 if causal else 1)
                best = min(times[name] for name in PEERS if name in times) / times["own"]
                rates = [f"{flops / times[n] / 1e9:.0f}" if n in times else "-" for n in ("own", *PEERS)]
                rows.append([str(dim), str(length), "causal" if causal else "full", *rates, f"{best:.3f}"])
                ratios.append((dim, length, best))
    long = [ratio for dim, length, ratio in ratios if dim <= 128 and length >= 2048]
    notes = [
        "TFLOP/s of the whole backward (10 B H S S D operations, half if causal), bf16, 16384 tokens, hidden 2048."
    ]
    if long:
        mean = math.exp(sum(map(math.log, long)) / len(long))
        notes.append(
            f"Head sizes 64 and 128, 2k and more: geometric mean {mean:.3f}, worst {min(long):.3f} of the best peer."
        )
    columns = ("head_dim", "tokens", "mask", "own", *PEERS, "best peer / own")
    publish(options, "cuda_gradients", "Backward", columns, rows, [*notes, *conditions(bench)], "Backward")


def special(bench: Bench, options: Any) -> None:
    """Gradients of what fewer peers take: a value size of its own, and windows."""
    rows = []
    shapes = [(192, 128, 2048, 0), (192, 128, 8192, 0), *WINDOWS]
    for dim, dim_v, length, left in [shape for shape in shapes if shape[0] in options.dims]:
        shape = (max(16384 // length, 1), heads_of(dim), length)
        query, key = normal(*shape, dim), normal(*shape, dim)
        value, grad_out = normal(*shape, dim_v), normal(*shape, dim_v)
        given: dict[str, Any] = {"is_causal": True} | ({"window": (left, 0)} if left else {})
        tensors = (query, key, value, grad_out)
        calls: dict[str, Callable[[], Any]] = {"own": own_backward(bench.chip, *tensors, **given)}
        if left:
            calls["FA2"] = flash_window(*tensors, left)
        else:
            calls["cuDNN"] = torch_backward(SDPBackend.CUDNN_ATTENTION, *tensors, True)
        window = {"window_size": (left, 0)} if left else {"causal": True}
        if (fa4 := fa4_backward(bench, *tensors, **window)) is not None:
            calls["FA4"] = fa4
        times = bench.times(calls)
        best = min(value for name, value in times.items() if name != "own") / times["own"]
        shown = [f"{times[n]:.3f}" if n in times else "-" for n in ("own", *PEERS)]
        rows.append([f"{dim}/{dim_v}", str(length), f"window {left + 1}" if left else "causal", *shown, f"{best:.3f}"])
    columns = ("head_dim", "tokens", "mask", "own, ms", *(f"{name}, ms" for name in PEERS), "best peer / own")
    publish(options, "cuda_gradients", "Special", columns, rows, conditions(bench), "Special")


WINDOWS = ((64, 64, 8192, 1023), (64, 64, 32768, 1023), (256, 256, 8192, 1023), (256, 256, 32768, 1023))


def flash_window(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, left: int) -> Callable[[], Any]:
    """FlashAttention-2's backward of a causal window, as torch ships it."""
    rows = [t.transpose(1, 2).contiguous().requires_grad_() for t in (query, key, value)]
    grad, length = grad_out.transpose(1, 2).contiguous(), query.shape[2]
    flash = torch.ops.aten._flash_attention_forward
    with torch.enable_grad():
        out = flash(*rows, None, None, length, length, 0.0, True, False, window_size_left=left, window_size_right=0)[0]
    return lambda: torch.autograd.grad(out, rows, grad, retain_graph=True)


def models(bench: Bench, options: Any) -> None:
    """Forward and backward of training shapes through `hal.attention`, against SDPA's default on the same tensors."""
    rows, ratios = [], []
    chosen = [shape for shape in SHAPES if options.match in f"{shape.model} {shape.described()}"]
    compile_ahead(chosen)
    for number, shape in enumerate(chosen):
        print(f"{number + 1} of {len(chosen)}: {shape.model}, {shape.described()}", file=sys.stderr, flush=True)
        own, theirs = trained(shape)
        try:
            theirs()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            bench.peers.notes.append(f"SDPA ran out of memory: {shape.model}, {shape.described()}")
            continue
        ratio, times = middle_of_three(bench, own, theirs)
        path = own.path()
        same = path not in OWN and kernel_names(own) == kernel_names(theirs)
        ratio = 1.0 if same else ratio
        ratios.append((ratio, shape))
        shown = [f"{times[name]:.3f}" for name in ("hal", "SDPA")]
        rows.append([shape.model, shape.described(), *shown, f"{ratio:.3f}", path + (", same kernels" if same else "")])
        del own, theirs
    mean = math.exp(sum(math.log(ratio) for ratio, _ in ratios) / len(ratios))
    worst = min(ratios)
    notes = [
        f"{len(rows)} shapes, forward and backward. Geometric mean {mean:.3f}; worst {worst[0]:.3f}, {worst[1].model} "
        f"({worst[1].described()}); {sum(ratio < 0.97 for ratio, _ in ratios)} below 0.97.",
        "Windows reach SDPA as a boolean mask made beforehand. A shape whose kernels are torch's own counts 1.",
    ]
    columns = ("model", "batch x heads x tokens x head_dim", "hal, ms", "SDPA, ms", "SDPA / hal", "path")
    publish(options, "cuda_gradients", "Models", columns, rows, [*notes, *conditions(bench)], "Models")


def compile_ahead(shapes: list[Shape]) -> None:
    """Compile the own kernels of shapes into Triton's disk cache, in several processes at once."""
    with ProcessPoolExecutor(16, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_shape, shapes))


def compile_shape(shape: Shape) -> None:
    """Put the kernels of one training call into Triton's cache."""
    with suppress(torch.OutOfMemoryError):  # beside the other processes; it is compiled when its turn comes
        trained(shape)[0]()


class Trained:
    """One training call: forward, then the gradients of all that wants them."""

    def __init__(self, attend: Callable[..., Tensor], leaves: list[Tensor], grad_out: Tensor, request: Any) -> None:
        self._attend, self._leaves, self._grad, self._request = attend, leaves, grad_out, request

    def __call__(self) -> Any:
        with torch.enable_grad():
            return torch.autograd.grad(self._attend(), self._leaves, self._grad)

    def path(self) -> str:
        """The path of hal_cuda that serves it: that of its lengths' bucket, or cuDNN for its own lengths."""
        session: Any = hal.session(DEVICE)
        path = str(session.path_of(bucketed(self._request)))
        return "cudnn" if path in OWN and session.lent_to_cudnn(self._request) else path


def trained(shape: Shape) -> tuple[Trained, Trained]:
    """The call by hal, and by SDPA."""
    s, dtype = shape, getattr(torch, shape.dtype)
    draw = lambda *size: torch.randn(size, device="cuda").to(dtype).requires_grad_()  # noqa: E731
    query, key = draw(s.batch, s.heads, s.len_q, s.dim), draw(s.batch, s.heads_kv, s.len_k, s.dim)
    value = draw(s.batch, s.heads_kv, s.len_k, s.values)
    grad_out = torch.randn(s.batch, s.heads, s.len_q, s.values, device="cuda").to(dtype)
    leaves, mask = [query, key, value], None
    if s.mask == "padding":
        lengths = torch.randint(s.len_k // 2, s.len_k + 1, (s.batch, 1, 1, 1), device="cuda")
        mask = torch.arange(s.len_k, device="cuda") < lengths
    elif s.mask == "bias":
        mask = draw(1, s.heads, s.len_q, s.len_k)
        leaves.append(mask)
    elif s.mask == "alibi":
        place = torch.arange(s.len_k, device="cuda")
        slopes = 2.0 ** (-8.0 * torch.arange(1, s.heads + 1, device="cuda") / s.heads)
        apart = (place[None, :] - place[:, None]).clamp(max=0)
        mask = (slopes[:, None, None] * apart).masked_fill(place[None, :] > place[:, None], -math.inf)
        mask = mask.to(dtype)[None]
    shared: dict[str, Any] = {"enable_gqa": s.heads != s.heads_kv, "dropout_p": s.dropout}
    given = shared | {"is_causal": s.causal} | ({"window": s.window} if s.window else {})
    request = hal.explain(query, key, value, mask, backend=DEVICE, **given).request
    band = hal.dense_mask(request, s.len_q, s.len_k, device="cuda") if s.window else None
    theirs = shared | ({"attn_mask": band} if s.window else {"attn_mask": mask, "is_causal": s.causal})
    return (
        Trained(lambda: hal.attention(query, key, value, mask, backend=DEVICE, **given), leaves, grad_out, request),
        Trained(lambda: SDPA(query, key, value, **theirs), leaves, grad_out, request),
    )


def middle_of_three(bench: Bench, own: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, dict[str, float]]:
    """The median of three ratios, and its times."""
    found = []
    for _ in range(3):
        times = bench.times({"hal": own, "SDPA": theirs})
        found.append((times["SDPA"] / times["hal"], times))
    return sorted(found, key=lambda item: item[0])[1]


def host(bench: Bench, options: Any) -> None:
    """Time of the host for training calls through `hal.attention`, beside SDPA's; the device is idle before each."""
    chosen = [shape for shape in SHAPES if shape.model in HOSTED and options.match in f"{shape.model}"]
    compile_ahead(chosen)
    rows = []
    for shape in chosen:
        own, theirs = trained(shape)
        times = host_times(own, theirs)
        rows.append([shape.model, shape.described(), *(f"{time:.0f}" for time in times), own.path()])
    notes = ["Microseconds of the host for forward and backward, lower quartile of 80, calls in turn."]
    notes += conditions(bench)
    columns = ("model", "batch x heads x tokens x head_dim", "hal", "SDPA", "path")
    publish(options, "cuda_gradients", "Host time", columns, rows, notes, "Host time")


HOSTED = (
    "Llama 3 8B",
    "GPT-2",
    "BERT base",
    "BERT base, padded",
    "BERT base, dropout",
    "T5 base, encoder",
    "MPT 7B",
    "Swin B",
)


def host_times(*calls: Callable[[], Any]) -> list[float]:
    """Microseconds of each call's launches: the lower quartile of 80, calls in turn, each from an idle device."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(90):
        for times, call in zip(found, calls, strict=True):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
    torch.cuda.synchronize()
    return [sorted(times[10:])[20] * 1e6 for times in found]


def kernel_names(call: Callable[[], Any]) -> list[str]:
    """Names of the kernels that a call launches, sorted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sorted(event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA)


RUN: dict[str, Callable[[Bench, Any], None]] = {
    "error": error,
    "accuracy": accuracy,
    "deterministic": deterministic,
    "backward": backward,
    "special": special,
    "models": models,
    "host": host,
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default=",".join(SECTIONS), help="sections to run")
    options.add_argument("--match", default="", help="model shapes to run: those whose description holds this text")
    options.add_argument(
        "--dims",
        default="",
        help="head sizes of errors, accuracy and backward alone, such as 192,256; nothing is recorded",
    )
    options.add_argument("--brief", action="store_true", help="of the errors, print those that are too large")
    chosen = options.parse_args()
    chosen.record = chosen.record and not chosen.dims
    chosen.dims = {int(dim) for dim in chosen.dims.split(",")} if chosen.dims else {dims[0] for dims in DIMS}
    torch.manual_seed(int(time.time()))
    bench = Bench()
    for section in chosen.only.split(","):
        RUN[section](bench, chosen)


if __name__ == "__main__":
    main()
