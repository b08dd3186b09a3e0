"""What a device takes for a call, for copies and for work in each dtype: measured by `hal calibrate`, read by
estimates.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from hal_core.plugin_api import AttentionRequest

_SHORT = 16  # tokens of a call without work
_FIRST_GRADIENTS = 128  # tokens of the first long call of gradients, at most: they are far slower
_MOST = 8192  # tokens of a long call, at most
_ENOUGH, _PLENTY = 5e-4, 0.1  # seconds of the device that a long call takes at least, and that need not be more
_PATIENCE = 0.2  # seconds of equal calls
_BETTER = 0.8  # of the seconds for each multiply-accumulate, where twice the length keeps more of the device busy


def call_from(kind: str) -> str:
    """The name of the seconds of a call without work whose tensors lie on a torch device of this kind."""
    return "call" if kind == "cpu" else f"call from {kind}"


def mac_in(dtype: str, gradients: bool = False) -> str:
    """The name of the seconds that a forward pass takes for each of its multiply-accumulates, or its gradients take."""
    return ("gradient mac" if gradients else "mac") + ("" if dtype == "float32" else f" in {dtype}")


def seconds(values: Mapping[str, float], request: AttentionRequest) -> float | None:
    """What a call takes by a calibration; None where that holds nothing of its dtype or of where its tensors lie.

    A calibration of before this version has float32 alone, with the copies in its work and without gradients.
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
    """Everything that `seconds` reads, at 8 heads of 64.

    A call from elsewhere than the host is measured by itself: it orders the work of two interfaces. Work is timed by
    the device's clock where it has one, in long calls from `length` tokens on.

    Args:
        session: a `ComputeSession`. reads: torch devices whose tensors it takes. progress: told a text and the share
            done.
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
    """Seconds until a call's results can be read, and of its programs by the device's clock (None without one)."""

    whole: float
    device: float | None


def _long(session: Any, length: int, dtype: str, gradients: bool) -> tuple[AttentionRequest, _Took]:
    """A call that is long enough for this device, and what it took."""
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
    """Medians of `repeats` calls of a request, or of its gradients alone where it asks for them, after one that
    compiles.

    Three calls have to do where they take long.
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
