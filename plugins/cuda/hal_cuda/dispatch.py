"""Which path runs a request, and what each candidate would take: decided from the request and the rates, never by
trying.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hal_core.plugin_api import DTYPE_BYTES, AttentionRequest, Estimate, Quantity

from . import composed, hopper, native
from .chip import Chip
from .rates import Rates
from .tiles import packs

OWN = frozenset({"hopper", "portable"})


class Choice(NamedTuple):
    """The chosen path and every candidate's seconds, fastest first."""

    path: str
    seconds: tuple[tuple[str, float], ...]


def candidates(request: AttentionRequest, chip: Chip) -> list[str]:
    """Every path that is right for a request."""
    if request.grads:
        return [*native.names(request, chip), "composed"]
    if request.dtype == "float64":
        return ["composed"]
    own = ["hopper", "portable"] if hopper.takes(request, chip) else ["portable"]
    return [*own, *native.names(request, chip)]


def choose(
    request: AttentionRequest, chip: Chip, rates: Rates, allowed: Callable[[str], bool] = lambda path: True
) -> Choice:
    """The fastest path. `allowed` narrows the candidates, for measurements of some of them alone."""
    timed = [(path, seconds(path, request, rates)) for path in candidates(request, chip) if allowed(path)]
    timed.sort(key=lambda item: item[1])
    if len(timed) > 1 and timed[0][0] == "composed":  # memory of all scores: only where nothing else is right
        timed = [*timed[1:], timed[0]]
    return Choice(timed[0][0], tuple(timed))


def seconds(path: str, request: AttentionRequest, rates: Rates) -> float:
    """Middle of a path's time."""
    flops = 2.0 * request.visible_macs
    if request.grads:
        flops *= 3.5  # forward, and five products for the forward's two
    if path == "composed":
        flops = 2.0 * request.macs * (3.5 if request.grads else 1.0)
    decoding = packs(request, request.len_q)
    share = rates.decode_share if path == "portable" else 0.8 * rates.decode_share
    reading = request.bytes_moved / (rates.bandwidth * share)
    if decoding and path != "composed":
        return rates.launch * (1.0 if path == "portable" else 1.2) + reading
    slower = 8.0 if request.dtype in ("float32", "float64") else 1.0
    launch = rates.launch * (1.0 if path in OWN else 1.3)  # what no length hides: equal rates go to the own kernels
    return launch + max(flops * slower / rates.rate(path, request).flops, reading)


def estimate(request: AttentionRequest, chip: Chip, rates: Rates) -> Estimate:
    """Time of the path that will run; the others' times are named in the figure's source."""
    choice = choose(request, chip, rates)
    middle = choice.seconds[0][1]
    spread = 1.3 if packs(request, request.len_q) else rates.rate(choice.path, request).spread
    others = ", ".join(f"{label(path)} {value * 1e3:.4g} ms" for path, value in choice.seconds)
    source = f"{'gradients by ' if request.grads else ''}{others} ({rates.source})"
    time = Quantity(middle / spread, middle * (2 - 1 / spread), rates.basis, rates.provenance, source)
    energy = None
    if rates.joules_per_flop is not None and rates.joules_per_byte is not None and choice.path in OWN:
        joules = 2.0 * request.visible_macs * rates.joules_per_flop + request.bytes_moved * rates.joules_per_byte
        energy = Quantity(
            joules / 1.3, joules * 1.3, rates.basis, rates.provenance, f"board energy by NVML ({rates.source})"
        )
    return Estimate(time=time, energy=energy, memory=_memory(request, choice.path))


def label(path: str) -> str:
    """A path's name for people."""
    return {
        "hopper": "own Hopper kernel",
        "portable": "own Triton kernel",
        "cudnn": "torch cuDNN",
        "flash": "torch FlashAttention",
        "composed": "torch operations",
    }[path]


def _memory(request: AttentionRequest, path: str) -> int:
    size = DTYPE_BYTES[request.dtype]
    out = request.batch * request.heads_q * request.len_q * request.dim_v * size
    extra = composed.scratch(request) if path == "composed" else 0
    if path == "portable" and packs(request, request.len_q):
        extra = (
            request.batch * request.heads_q * request.len_q * 128 * (request.dim_v + 1) * 4
        )  # partial results, at most 128
    return out + request.batch * request.heads_q * request.len_q * 4 * request.lse + extra
