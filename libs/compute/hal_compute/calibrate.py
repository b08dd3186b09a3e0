"""Seconds of a call, of copies and of work in each dtype: `hal calibrate` measures them, estimates read them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from hal_core.plugin_api import AttentionRequest

_SHORT = 16  # tokens of a call whose work takes no time
_FIRST_GRADIENTS = 128  # at most, tokens of the first long call of gradients, which are far slower
_MOST = 8192  # at most, tokens of a long call
_ENOUGH, _PLENTY = 5e-4, 0.1  # device time of a long call: at least, and long enough in any case
_PATIENCE = 0.2  # seconds for repeating one call
_BETTER = 0.8  # share of the seconds per multiply-accumulate below which twice the length is tried


def call_from(kind: str) -> str:
    """Name of the value: seconds of a call without work whose tensors lie on a torch device of this kind."""
    return "call" if kind == "cpu" else f"call from {kind}"


def mac_in(dtype: str, gradients: bool = False) -> str:
    """Name of the value: seconds per multiply-accumulate of the forward pass, or of the gradients."""
    return ("gradient mac" if gradients else "mac") + ("" if dtype == "float32" else f" in {dtype}")


def seconds(values: Mapping[str, float], request: AttentionRequest) -> float | None:
    """Seconds of a call by a calibration; None where the calibration lacks its dtype or the device of its tensors.

    A calibration of an earlier version has float32 alone, includes copies in the work, and has no gradients.
    """
    kind = request.device.partition(":")[0]
    call, mac = values.get(call_from(kind)), values.get(mac_in(request.dtype))
    if call is None or mac is None:
        return None
    copies = request.bytes_moved * values.get("copied byte", 0.0) if kind == "cpu" else 0.0
    gradient = values.get(mac_in(request.dtype, gradients=True), 3 * mac) if request.grads else 0.0
    return call + copies + request.visible_macs * (mac + gradient)


def measure(
    session: Any, reads: Iterable[str], dtypes: Iterable[str], length: int, progress: Callable[[str, float], None]
) -> dict[str, float]:
    """Measure every value that `seconds` reads, with 8 heads of 64.

    A call whose tensors lie on another interface of the card is measured separately, since it orders the work of both.
    Work is timed by the device's clock where there is one, in long calls of `length` tokens or more.

    Args:
        session: a `ComputeSession`. reads: torch devices whose tensors it takes.
        progress: called with a text and the share that is done.
    """
    import torch

    values: dict[str, float] = {}
    for place in reads:
        if place == "cpu" or torch.cuda.is_available():
            progress(f"short calls from {place}", 0.0)
            values[call_from(place.partition(":")[0])] = _timed(session, _request(_SHORT, "float32", place), 50).whole
    kinds = [(dtype, gradients) for dtype in sorted(dtypes) for gradients in (False, True)]
    for n, (dtype, gradients) in enumerate(kinds):
        progress(f"{'gradients' if gradients else 'long calls'} in {dtype}", 0.1 + 0.9 * n / len(kinds))
        request, took = _long(session, min(length, _FIRST_GRADIENTS) if gradients else length, dtype, gradients)
        work = max(took.whole - values["call"], 1e-9) if took.device is None else took.device
        values[mac_in(dtype, gradients)] = work / request.visible_macs
        if (dtype, gradients) == ("float32", False):
            values["copied byte"] = max(took.whole - values["call"] - work, 0.0) / request.bytes_moved
    progress("done", 1.0)
    return values


class _Took(NamedTuple):
    """Seconds until a call's results can be read, and device time of its programs (None without a clock)."""

    whole: float
    device: float | None


def _long(session: Any, length: int, dtype: str, gradients: bool) -> tuple[AttentionRequest, _Took]:
    """A call that is long enough to measure this device, and its times."""
    before = math.inf
    while True:
        request = _request(length, dtype, "cpu", gradients)
        took = _timed(session, request, 9)
        work = took.whole if took.device is None else took.device
        rate = work / request.visible_macs
        settled = work >= _ENOUGH and rate > _BETTER * before
        if settled or work >= _PLENTY or length >= _MOST:
            return request, took
        before, length = rate, 2 * length


def _request(length: int, dtype: str, place: str, gradients: bool = False) -> AttentionRequest:
    return AttentionRequest(
        batch=1,
        heads_q=8,
        heads_kv=8,
        len_q=length,
        len_k=length,
        dim_qk=64,
        dim_v=64,
        dtype=dtype,
        device=place,
        lse=gradients,
        grads=frozenset("qkv" if gradients else ""),
    )


def _timed(session: Any, request: AttentionRequest, repeats: int) -> _Took:
    """Median times of up to `repeats` calls of a request, or of its gradients where it asks for them.

    One call before them compiles. Slow calls are repeated three times.
    """
    import torch

    shape, dtype = (1, request.heads_q, request.len_q, request.dim_qk), getattr(torch, request.dtype)
    query, key, value, grad = (torch.randn(shape, device=request.device).to(dtype) for _ in range(4))
    run = session.bind(request)
    if request.grads:
        (out, lse), prepared = run(query, key, value), session.prepare_attention(query, key, value, request=request)

        def call() -> None:
            session.compute_attention_backward(prepared, out, lse, grad)
    else:

        def call() -> None:
            run(query, key, value)

    call()
    whole, device = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        if query.is_cuda:
            torch.cuda.synchronize(query.device)
        whole.append(time.perf_counter() - start)
        device.append(session.device_seconds)
        if len(whole) >= 3 and sum(whole) > _PATIENCE:
            break
    known = [taken for taken in device if taken is not None]
    return _Took(statistics.median(whole), statistics.median(known) if known else None)
