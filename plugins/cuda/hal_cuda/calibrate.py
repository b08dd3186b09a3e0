"""`hal calibrate cuda:0`: what this GPU reaches, on random data, by device events, with a flushed second-level
cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hal_core.plugin_api import AttentionRequest, BlockPlan, Causal, Device, DeviceUnavailableError, MaskKind

from . import paths
from .cost import FORMS, FORWARD_FORMS, GRADIENT_FLOPS, OWN, Rates
from .discovery import Chip
from .runtime import nvml
from .session import CudaSession

TOKENS, HIDDEN = 16384, 2048
LENGTHS = (512, 1000, 1500, 2048, 3000, 8192, 16384)  # some fill their tiles, some do not
DIMS = (64, 96, 128, 192, 256)
#: Of forward and backward together. Short ones lie on both sides of whole tiles, whose number rules there.
GRADIENT_LENGTHS = (128, 197, 256, 257, 384, 448, 512, 1000, 2048, 8192, 16384)
FORM_DIMS, FORM_LENGTHS = (64, 128), (128, 256, 512, 2048)  # gradients of each of `cost.FORMS`
FORWARD_DIMS, FORWARD_LENGTHS = (64, 128, 256), (512, 2048, 8192)  # forwards of each of `cost.FORWARD_FORMS`
PLAN_BLOCKS = {"block plan": 128, "small block plan": 64}  # tokens of a block
PLAN_LISTED = 0.5  # share of the key blocks that a row of a block plan lists
_RNG = (7, 11)
#: Largest range of the middle half of a measurement's times, as a share of their median; how often one is tried.
MOST_SPREAD, ATTEMPTS = 0.5, 3


class Cell(NamedTuple):
    """A request whose paths are measured: see `Rates.grid`."""

    dim: int
    length: int
    causal: bool
    grads: bool
    form: str = ""


def cells() -> list[Cell]:
    """What a calibration measures."""
    found = [
        Cell(dim, length, causal, grads)
        for grads, lengths in ((False, LENGTHS), (True, GRADIENT_LENGTHS))
        for dim in DIMS
        for length in lengths
        for causal in (False, True)
    ]
    for form in FORWARD_FORMS:
        found += [Cell(dim, n, False, False, form) for dim in FORWARD_DIMS for n in FORWARD_LENGTHS]
    for form in FORMS:
        diagonals = (False, True) if form == "deterministic" else (False,)
        lengths = (*FORM_LENGTHS, 8192) if form == "deterministic" else FORM_LENGTHS
        found += [Cell(dim, n, causal, True, form) for dim in FORM_DIMS for n in lengths for causal in diagonals]
    return found


def measure(device: Device, chip: Chip, gpu: nvml.Gpu | None, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Everything `Rates.of` reads, and the conditions it was measured under.

    Two or three minutes on a large GPU, and some more where no kernel has been compiled yet.
    """
    with torch.cuda.device(chip.index), torch.no_grad():
        flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        values: dict[str, Any] = {
            "device": device.model,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "driver": device.driver,
            "torch": torch.__version__,
            "tokens": TOKENS,
            "hidden": HIDDEN,
        }
        progress("read bandwidth", 0.0)
        values["bandwidth"] = read_bandwidth(flush)
        progress("matrix rate", 0.03)
        values["matrix"] = matrix_rate(flush)
        rates = Rates.assumed(chip.capability, chip.multiprocessors, None)
        values["launch"], values["decode_share"] = _decode(device, chip, rates, values["bandwidth"], flush)
        values["grid"] = []
        measured = cells()
        for place, cell in enumerate(measured):
            what = "gradients" if cell.grads else "attention"
            progress(f"{what}, head_dim {cell.dim}, {cell.length} tokens", 0.1 + 0.8 * place / len(measured))
            values["grid"] += measure_cell(device, chip, rates, cell, flush)
        progress("energy", 0.92)
        values |= _energy(device, chip, rates, gpu)
        progress("done", 1.0)
    return values


def timed(call: Callable[[], Any], flush: Tensor | None, repeats: int = 9) -> float:
    """Median seconds of a call on the device, after two warm-up calls; measured anew where its times vary much.

    Raises:
        DeviceUnavailableError: the times vary much each time: other work uses the GPU or the host.
    """
    for _ in range(2):
        call()
    return steady(lambda: _times(call, flush, repeats))


def steady(measure: Callable[[], list[float]]) -> float:
    """The median of a measurement whose middle half lies within `MOST_SPREAD` of it; seconds.

    Raises:
        DeviceUnavailableError: no attempt gave one.
    """
    for _ in range(ATTEMPTS):
        times = sorted(measure())
        median, low, high = statistics.median(times), times[len(times) // 4], times[-1 - len(times) // 4]
        if high - low <= MOST_SPREAD * median:
            return median
    raise DeviceUnavailableError(
        f"equal calls took between {times[0] * 1e3:.3g} and {times[-1] * 1e3:.3g} ms, {ATTEMPTS} times over, so other "
        "work uses the GPU or the host: run hal calibrate again when both are idle; nothing was stored"
    )


def _times(call: Callable[[], Any], flush: Tensor | None, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls on the device."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        if flush is not None:
            # Writes more than the cache holds, and keeps the device busy while the call is prepared.
            flush.random_(0, 7)
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def read_bandwidth(flush: Tensor) -> float:
    """Bytes a second of reading 4 GiB once (a sum over bytes seen as whole numbers)."""
    big = torch.empty(1 << 29, dtype=torch.int64, device="cuda").random_()
    return big.numel() * 8 / timed(lambda: torch.sum(big), flush)


def matrix_rate(flush: Tensor) -> float:
    """Operations a second of an 8192-cubed bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / timed(lambda: a @ b, flush)


def request_for(
    batch: int, heads: int, heads_kv: int, len_q: int, len_k: int, dim: int, causal: bool
) -> AttentionRequest:
    return AttentionRequest(
        batch=batch,
        heads_q=heads,
        heads_kv=heads_kv,
        len_q=len_q,
        len_k=len_k,
        dim_qk=dim,
        dim_v=dim,
        dtype="bfloat16",
        device="cuda",
        causal=Causal.TOP_LEFT if causal else Causal.NONE,
    )


def tensors(request: AttentionRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value of a request."""
    r = request
    query = torch.randn(r.batch, r.heads_q, r.len_q, r.dim_qk, device="cuda", dtype=torch.bfloat16)
    key, value = (
        torch.randn(r.batch, r.heads_kv, r.len_k, r.dim_qk, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    return query, key, value


def on_path(device: Device, chip: Chip, rates: Rates, path: str, request: AttentionRequest) -> Callable[..., Any]:
    """A request bound to one path."""
    return CudaSession(device, chip, lambda: rates, paths=frozenset({path})).bind(request)


def gradients_on_path(
    device: Device, chip: Chip, rates: Rates, path: str, request: AttentionRequest
) -> Callable[..., Any]:
    """Forward and backward of a request on one path: (query, key, value, the output's gradient, mask) -> gradients."""
    session = CudaSession(device, chip, lambda: rates, paths=frozenset({path}))
    if session.autograd(request) == "native":
        attend = session.bind(request)

        def by_torch(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, mask: Tensor | None = None) -> Any:
            leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
            with torch.enable_grad():
                return torch.autograd.grad(attend(*leaves, mask), leaves, grad_out)

        return by_torch
    request = replace(request, lse=True)
    forward, rng = session.bind(request), _RNG if request.dropout else None

    def by_own(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, mask: Tensor | None = None) -> Any:
        out, lse = forward(query, key, value, mask, None, None, rng)
        prepared = session.prepare_attention(query, key, value, request=request)
        return session.compute_attention_backward(prepared, out, lse, grad_out, mask, rng=rng)

    return by_own


def measure_cell(device: Device, chip: Chip, rates: Rates, cell: Cell, flush: Tensor) -> list[dict[str, Any]]:
    """Rates of every path; with `grads` of forward and backward, in operations of both."""
    dim, length, causal, grads, form = cell
    heads = HIDDEN // dim
    request = request_for(max(TOKENS // length, 1), heads, heads, length, length, dim, causal)
    given: tuple[Tensor, ...] = tensors(request)
    if grads:
        request, given = replace(request, grads=frozenset("qkv")), (*given, torch.randn_like(given[0]))
    request, mask = formed(request, form)
    request, plan = planned(request, PLAN_BLOCKS[form]) if form in PLAN_BLOCKS else (request, None)
    if form == "float32":
        given = tuple(tensor.float() for tensor in given)
    bound, times = (gradients_on_path, GRADIENT_FLOPS) if grads else (on_path, 1.0)
    rows = []
    for path in paths.candidates(request, chip):
        call = bound(device, chip, rates, path, request)
        arguments = (*given, mask) if grads else (*given, mask, plan)
        seconds = timed(lambda call=call, given=arguments: call(*given), flush, 5 if grads else 9)  # type: ignore[misc]
        rate = 2.0 * request.visible_macs * times / seconds
        row = {"path": path, "dim": dim, "length": length, "causal": causal, "rate": rate}
        rows.append(row | ({"grads": True} if grads else {}) | ({"form": form} if form else {}))
    return rows


def formed(request: AttentionRequest, form: str) -> tuple[AttentionRequest, Tensor | None]:
    """The request in one of `cost.FORMS`, and its mask: over rows and keys, and where it is added also over heads."""
    if form == "float32":
        return replace(request, dtype="float32"), None
    if form == "dropout":
        return replace(request, dropout=0.1), None
    if form == "deterministic":
        return replace(request, deterministic=True), None
    if form == "mask":
        visible = torch.rand(1, 1, request.len_q, request.len_k, device="cuda") < 0.5
        return replace(request, mask=MaskKind.BOOLEAN), visible
    if form and form not in PLAN_BLOCKS:
        bias = torch.randn(1, request.heads_q, request.len_q, request.len_k, device="cuda", dtype=torch.bfloat16)
        wanted = request.grads | ({"mask"} if form == "bias gradient" else set())
        return replace(request, mask=MaskKind.ADDITIVE, mask_heads=request.heads_q, grads=wanted), bias
    return request, None


def planned(request: AttentionRequest, block: int) -> tuple[AttentionRequest, BlockPlan]:
    """The request with a block plan of `block` tokens a block, every head its own random blocks."""
    rows, blocks = -(-request.len_q // block), -(-request.len_k // block)
    listed = max(int(blocks * PLAN_LISTED), 1)
    drawn = torch.rand(1, request.heads_q, rows, blocks, device="cuda").argsort(-1)[..., :listed].sort(-1).values
    counts = torch.full((1, request.heads_q, rows), listed, device="cuda", dtype=torch.int32)
    plan = BlockPlan(block, block, drawn.to(torch.int32), counts)
    return replace(request, block_plan=(block, block, listed)), plan


def _decode(device: Device, chip: Chip, rates: Rates, bandwidth: float, flush: Tensor) -> tuple[float, float]:
    """Seconds of the shortest call, and the share of the bandwidth of a long one."""
    short = request_for(1, 32, 8, 1, 128, 128, False)
    long = request_for(32, 32, 8, 1, 8192, 128, False)
    given, more = tensors(short), tensors(long)
    call, longer = (on_path(device, chip, rates, "portable", r) for r in (short, long))
    launch = timed(lambda: call(*given), flush)
    return launch, min(long.bytes_moved / (timed(lambda: longer(*more), flush) - launch) / bandwidth, 1.0)


def _energy(device: Device, chip: Chip, rates: Rates, gpu: nvml.Gpu | None) -> dict[str, Any]:
    """Joules a flop and a byte, from the board's counter over half a second of each; nothing where the counter is
    missing.
    """
    if gpu is None:
        return {}
    compute, reading = request_for(2, 16, 16, 8192, 8192, 128, False), request_for(32, 32, 8, 1, 8192, 128, False)
    names = [next(p for p in paths.candidates(r, chip) if p in OWN) for r in (compute, reading)]
    try:
        spent = []
        for request, path in zip((compute, reading), names, strict=True):
            given, call = tensors(request), on_path(device, chip, rates, path, request)
            spent.append(_joules(gpu, lambda call=call, given=given: call(*given)))  # type: ignore[misc]
    except nvml.NvmlError as error:
        return {"energy": f"not measured: {error}"}
    return {
        "joules_per_flop": spent[0] / (2.0 * compute.visible_macs),
        "joules_per_byte": spent[1] / reading.bytes_moved,
        "clock_mhz": gpu.clock("sm"),
        "watts": gpu.power(),
    }


def _joules(gpu: nvml.Gpu, call: Callable[[], Any]) -> float:
    call()
    torch.cuda.synchronize()
    count, before, start = 0, gpu.energy(), time.perf_counter()
    while time.perf_counter() - start < 0.6:
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        count += 10
    return (gpu.energy() - before) / count
