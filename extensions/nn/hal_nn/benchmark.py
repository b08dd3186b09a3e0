"""`benchmark_attention_performance`: the latency of an attention layer, beside a peer's in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hal_core import ContractError

from .arguments import need_module, need_whole, shown

WARMUP = 10


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given. The host's own work is done when a call returns."""
    module = getattr(torch, device.type, None)
    if device.type != "cpu" and module is not None:
        module.synchronize(device)


def benchmark_attention_performance(
    model: nn.Module,
    input_shape: Sequence[int],
    num_trials: int = 100,
    *,
    peer: nn.Module | None = None,
    warmup: int = WARMUP,
    wait: Callable[[torch.device], None] = synchronize,
) -> dict[str, Any]:
    """Time forward passes of a layer on random input, each between two synchronisations, without gradients.

    Args:
        model: takes [batch, length, d_model], on any device, in evaluation or training mode as it is; an
            nn.MultiheadAttention is given it as query, key and value, without weights being asked for.
        input_shape: (batch, length, d_model). num_trials: timed calls, after `warmup` calls.
        peer: another layer of the same input, timed in turn with it; None: nn.MultiheadAttention of the same size
            where the model says its `num_heads`.
        wait: waits for a device. A device that torch does not know needs its own.

    Returns:
        Milliseconds: "avg_latency", "median_latency", "p95_latency", "min_latency", "std_latency"; "throughput",
        tokens a second by the median; "peer": the same of the peer and its "name", None without one; "speedup": the
        peer's median over the model's; "trials"; "device".

    Raises:
        ContractError: no module, fewer than one trial, a shape without three sizes, a model without weights' data, or
            `wait` is no function.
    """
    need_module("model", model)
    if peer is not None:
        need_module("peer", peer)
    need_whole("num_trials", num_trials)
    need_whole("warmup", warmup, 0)
    shaped = isinstance(input_shape, Sequence) and len(input_shape) == 3
    if not shaped or not all(type(size) is int and size >= 1 for size in input_shape):
        raise ContractError(f"input_shape {shown(input_shape)} was given: use (batch, length, d_model)")
    if not callable(wait):
        raise ContractError(f"wait {shown(wait)} was given: use a function of a torch device")
    first = next(model.parameters(), None)
    if first is not None and first.is_meta:
        raise ContractError(f"{type(model).__name__} is on the meta device, where nothing runs: give it weights")
    device = torch.device("cpu") if first is None else first.device
    dtype = torch.float32 if first is None else first.dtype
    x = torch.randn(tuple(input_shape), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    calls: dict[str, Callable[[], Any]] = {"model": _call_of(model, x)}
    other = peer if peer is not None else _usual_peer(model, input_shape[-1])
    if other is not None:
        other = other.to(device, dtype)
        calls["peer"] = _call_of(other, x)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for number in range(warmup + num_trials):
            for name, call in calls.items():
                wait(device)
                start = time.perf_counter()
                call()
                wait(device)
                if number >= warmup:
                    times[name].append((time.perf_counter() - start) * 1e3)
    found: dict[str, Any] = _summary(times["model"], input_shape)
    found |= {"peer": None, "speedup": None, "trials": num_trials, "device": str(device)}
    if other is not None:
        found["peer"] = {"name": type(other).__name__, **_summary(times["peer"], input_shape)}
        found["speedup"] = found["peer"]["median_latency"] / found["median_latency"]
    return found


def _summary(times: list[float], shape: Sequence[int]) -> dict[str, float]:
    ordered, median = sorted(times), statistics.median(times)
    return {
        "avg_latency": statistics.fmean(times),
        "median_latency": median,
        "p95_latency": ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)],
        "min_latency": ordered[0],
        "std_latency": statistics.pstdev(times),
        "throughput": shape[0] * shape[1] / median * 1e3 if median else float("inf"),
    }


def _usual_peer(model: nn.Module, d_model: int) -> nn.Module | None:
    heads = getattr(model, "num_heads", None)
    if not isinstance(heads, int) or d_model % heads:
        return None
    return nn.MultiheadAttention(d_model, heads, batch_first=True).eval()


def _call_of(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    if isinstance(layer, nn.MultiheadAttention):
        given = x if layer.batch_first else x.transpose(0, 1)
        return lambda: layer(given, given, given, need_weights=False)
    return lambda: layer(x)
