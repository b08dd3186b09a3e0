"""Measuring the processor: read bandwidth, products, host time of a call, and attention on each path."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, BlockPlan, MaskKind

from .cost import Rates, estimate
from .discovery import this_machine
from .paths import compiled_path, native_module, offering, path_of, use_gains
from .session import CpuSession

Progress = Callable[[str, float], None]

_DTYPES = ("float32", "bfloat16", "float16", "float64")
_LEAST_SPREAD, _MOST_SPREAD = 1.3, 8.0
#: The median of a try over the fastest call up to which times count as steady, and the most tries.
_STEADY, _MOST_TRIES = 1.5, 3


def measure(session: CpuSession, progress: Progress) -> dict[str, Any]:
    """Everything `Rates.measured` reads, as plain values.

    Times that scatter because other programs use the processor are measured again, up to `_MOST_TRIES` times; a warning
    says so where they still scatter.

    Returns:
        bandwidth: bytes read per second. products: multiply-accumulates per second of torch's matrix product, by dtype.
        rates: of attention, by "<path> <dtype>". calls: seconds of host time, by path. spread: largest factor between
        an estimate and the measured time over `grid`, a list of [request, seconds].
    """
    progress("read bandwidth", 0.0)
    values: dict[str, Any] = {
        "bandwidth": read_bandwidth(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    progress("matrix products", 0.1)
    values["products"] = {dtype: _product_rate(dtype) for dtype in _DTYPES}
    values["calls"], values["rates"] = {}, {}
    samples = _samples()
    with offering("never"):
        for number, (path, dtype, tiny, large) in enumerate(samples):
            progress(f"attention, {path} in {dtype}", 0.2 + 0.4 * number / len(samples))
            if path not in values["calls"]:
                values["calls"][path] = _attention_seconds(session, tiny, 0.2)
            _keep_rate(values, path, large, _attention_seconds(session, large, 0.5))
    if native_module():
        values["gains"] = _gains(session, lambda part: progress("compiled kernels", 0.6 + 0.1 * part), values)
        use_gains(
            {name: [(work, gain) for work, gain in pairs] for name, pairs in values["gains"].items()}
        )  # the grid is of the paths that will run
    values["grid"], worst = [], _LEAST_SPREAD
    rates = Rates.measured(values | {"spread": 1.0}, this_machine())
    grid = _grid()
    for number, request in enumerate(grid):
        progress(f"attention, {request.describe()}", 0.7 + 0.3 * number / len(grid))
        seconds = _attention_seconds(session, request, 0.4)
        expected = estimate(request, rates, this_machine().cores).time.middle
        worst = max(worst, seconds / expected, expected / seconds)
        values["grid"].append([request.to_dict(), seconds])
    values["spread"] = min(worst, _MOST_SPREAD)
    if worst > _MOST_SPREAD:
        warnings.warn(
            f"estimates miss measured times by a factor of up to {worst:.3g}; {_MOST_SPREAD:g} is stored. "
            "Other programs probably used the processor: calibrate again when the machine is quiet.",
            RuntimeWarning,
            stacklevel=2,
        )
    progress("done", 1.0)
    return values


def _keep_rate(values: dict[str, Any], path: str, request: AttentionRequest, seconds: float) -> None:
    busy = max(seconds - values["calls"][path], 0.1 * seconds)
    values["rates"][f"{path} {request.dtype}"] = request.visible_macs / busy


def _gains(
    session: CpuSession, progress: Callable[[float], None], values: dict[str, Any]
) -> dict[str, list[list[float]]]:
    """Torch's time over that of the compiled kernels, see `paths.Gains`: the lower of two measurements, each the median
    ratio of calls in turn. Adds the compiled paths' rates and host times to `values`.
    """
    found: dict[str, list[list[float]]] = {}  # lists, as JSON gives them back
    pairs = _compiled_samples()
    for number, (name, request) in enumerate(pairs):
        progress(number / len(pairs))
        with offering("always"):
            path = compiled_path(request)
            assert path is not None
            compiled = session.bind(replace(request, lse=True) if request.grads else request)
            if path not in values["calls"]:
                few = replace(request, heads_q=1, heads_kv=1, len_q=min(request.len_q, 32), len_k=32)
                values["calls"][path] = _attention_seconds(session, few, 0.1)
        with offering("never"):
            torchs = session.bind(request)
        if request.grads:
            torchs, compiled = _training(request, torchs), _compiled_training(session, request, compiled)
        ratios, seconds = _in_turn(request, torchs, compiled)
        found.setdefault(name, []).append([float(request.visible_macs), ratios])
        if not request.grads:  # estimates are of the forward pass
            _keep_rate(values, path, request, seconds)
    return found


def _training(request: AttentionRequest, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Forward and backward by a path that torch differentiates."""

    def call(*operands: Any) -> Any:
        leaves = [tensor.detach().requires_grad_() for tensor in operands[:3]]
        out = forward(*leaves, *operands[3:])
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return call


def _compiled_training(
    session: CpuSession, request: AttentionRequest, forward: Callable[..., Any]
) -> Callable[..., Any]:
    """The same by the compiled kernels, whose forward pass is bound with its log-sum-exp."""

    def call(*operands: Any) -> Any:
        out, lse = forward(*operands)
        prepared = session.prepare_attention(*operands[:3], request=request)
        return session.compute_attention_backward(prepared, out, lse, torch.ones_like(out))

    return call


def _compiled_samples() -> list[tuple[str, AttentionRequest]]:
    """(name of the gain, request), the work of each name growing."""
    samples = []
    for dtype in ("float32", "bfloat16", "float16"):
        for length in (256, 1024):
            request = AttentionRequest(1, 8, 8, length, length, 64, 64, dtype)
            samples.append((f"compiled blocks {dtype}", replace(request, block_plan=(64, 64, length // 256))))
        for heads, length in ((8, 64), (8, 256), (8, 1024)):
            plain = AttentionRequest(1, heads, heads, length, length, 64, 64, dtype)
            samples.append((f"compiled {dtype}", plain))
            samples.append((f"compiled additive {dtype}", replace(plain, mask=MaskKind.ADDITIVE)))
        for length in (256, 1024):
            trained = AttentionRequest(1, 4, 4, length, length, 64, 64, dtype, grads=frozenset("qkv"))
            samples.append((f"compiled backward {dtype}", trained))
        for length in (512, 4096):
            samples.append((f"streamed {dtype}", AttentionRequest(1, 16, 16, 1, length, 64, 64, dtype)))
            samples.append((f"streamed shared {dtype}", AttentionRequest(1, 16, 4, 1, length, 64, 64, dtype)))
    with offering("always"):
        return [
            (name, request) for name, request in samples if (path := compiled_path(request)) and name.startswith(path)
        ]


def _in_turn(
    request: AttentionRequest, torchs: Callable[..., Any], compiled: Callable[..., Any]
) -> tuple[float, float]:
    """(torch's time over the compiled kernel's, the compiled kernel's seconds). The path is chosen when a call
    runs, so each is called under the offer that it was bound under.
    """
    operands, plan, mask = _draw(request), _plan(request), _mask(request)

    def timed(call: Callable[..., Any], offer: Any) -> float:
        with offering(offer):
            start = time.perf_counter()
            call(*operands, mask, plan, None, None)
            return time.perf_counter() - start

    ratios, fastest = [], float("inf")
    for _ in range(2):
        pairs: list[tuple[float, float]] = []
        timed(torchs, "never")  # warms up, as the next line does
        timed(compiled, "always")
        begun = time.perf_counter()
        while len(pairs) < 3 or (len(pairs) < 15 and time.perf_counter() - begun < 0.15):
            pairs.append((timed(torchs, "never"), timed(compiled, "always")))
        ratios.append(statistics.median(a / b for a, b in pairs))
        fastest = min(fastest, *(b for _, b in pairs))
    return min(ratios), fastest


def read_bandwidth() -> float:
    """Bytes per second at which all threads together read memory that no cache holds; the best of nine."""
    memory = this_machine().memory or 1 << 32
    numbers = torch.ones(min(max(4 * this_machine().l3, 256 << 20), memory // 8) // 4)
    return numbers.nbytes / min(_times(lambda: numbers.sum(), 2.0, 9))


def _product_rate(dtype: str) -> float:
    size = 512
    left = torch.randn(4, size, size).to(getattr(torch, dtype))
    return float(4 * size**3 / min(_times(lambda: torch.bmm(left, left), 0.3, 5)))


def _samples() -> list[tuple[str, str, AttentionRequest, AttentionRequest]]:
    """(path, dtype, a tiny request, a large request that the path's rate is read from)."""
    found = []
    for dtype in _DTYPES:
        large = AttentionRequest(1, 8, 8, 1024, 1024, 64, 64, dtype)
        tiny = AttentionRequest(1, 1, 1, 8, 8, 16, 16, dtype)
        cached = replace(large, heads_q=16, heads_kv=4, len_q=1, len_k=4096)
        tiny_cached = replace(tiny, heads_q=2, len_q=1)
        found += [
            ("native", dtype, tiny, large),
            ("fused", dtype, replace(tiny, lse=True), replace(large, lse=True)),
            ("tiled", dtype, replace(tiny, softcap=30.0, len_q=64), replace(large, softcap=30.0)),
            ("packed", dtype, replace(tiny_cached, mask=MaskKind.NONE), cached),
            ("decode", dtype, replace(tiny_cached, softcap=30.0), replace(cached, softcap=30.0)),
        ]
    return [sample for sample in found if path_of(sample[2]) == path_of(sample[3]) == sample[0]]


def _grid() -> list[AttentionRequest]:
    """Requests between those that the rates were read from: what estimates are judged by."""
    plain = [
        AttentionRequest(batch, 8, 8, length, length, dim, dim, dtype)
        for batch, length in ((4, 128), (1, 512), (1, 2048))
        for dim in (32, 128)
        for dtype in ("float32", "bfloat16")
    ]
    one = AttentionRequest(1, 32, 8, 1, 2048, 128, 128, "bfloat16")
    return [*plain, one, replace(one, dtype="float32"), replace(one, softcap=30.0, len_k=1024)]


def _attention_seconds(session: CpuSession, request: AttentionRequest, budget: float) -> float:
    """The fastest of a few calls, within a budget of seconds: what others do on the machine only adds.

    Measured again while the calls scatter; see `_STEADY`.
    """
    attend, operands = session.bind(request), _draw(request)
    return _steady(lambda: attend(*operands, None, None, None, None), budget, request.describe())


def _draw(request: AttentionRequest) -> tuple[Tensor, Tensor, Tensor]:
    dtype = getattr(torch, request.dtype)

    def draw(heads: int, length: int, dim: int) -> Tensor:
        return torch.randn(request.batch, heads, length, dim).to(dtype)

    return (
        draw(request.heads_q, request.len_q, request.dim_qk),
        draw(request.heads_kv, request.len_k, request.dim_qk),
        draw(request.heads_kv, request.len_k, request.dim_v),
    )


def _mask(request: AttentionRequest) -> Tensor | None:
    """Random numbers for every query and key, in common to all heads; None where the request has no additive mask."""
    if request.mask is not MaskKind.ADDITIVE:
        return None
    return torch.randn(1, 1, request.len_q, request.len_k).to(getattr(torch, request.dtype))


def _plan(request: AttentionRequest) -> BlockPlan | None:
    """As many random blocks for each query block and head as the request states; None where it has no plan."""
    if request.block_plan is None:
        return None
    block_q, block_k, most = request.block_plan
    rows, columns = -(-request.len_q // block_q), -(-request.len_k // block_k)
    indices = torch.rand(1, request.heads_q, rows, columns).topk(most).indices.int()
    return BlockPlan(block_q, block_k, indices, torch.full(indices.shape[:3], most, dtype=torch.int32))


def _steady(call: Callable[[], Any], budget: float, what: str) -> float:
    """The fastest call of the tries, which end once a try's median is within `_STEADY` of the fastest."""
    times: list[float] = []
    for _ in range(_MOST_TRIES):
        tried = _times(call, budget, 15)
        times += tried
        if statistics.median(tried) <= _STEADY * min(times):
            return min(times)
    fastest, slowest = min(times) * 1e3, max(times) * 1e3
    warnings.warn(
        f"calls of {what} took {fastest:.3g} to {slowest:.3g} ms: other programs use the processor, so estimates from "
        "this calibration are uncertain. Calibrate again when the machine is quiet.",
        RuntimeWarning,
        stacklevel=2,
    )
    return min(times)


def _times(call: Callable[[], Any], budget: float, most: int) -> list[float]:
    """Seconds of up to `most` calls after one warm-up, at least three, no longer started than `budget` allows."""
    call()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or (len(times) < most and time.perf_counter() - begun < budget):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times
