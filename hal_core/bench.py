"""`hal bench`: attention on a device beside torch's own and what its backend adds, as records, and as curves and a
roofline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

from .device_info import Device
from .errors import ContractError, HalError
from .frontend.api import attention, bind
from .registry import registry
from .request import DTYPE_BYTES, AttentionRequest

if TYPE_CHECKING:
    from torch import Tensor

Call = Callable[[], Any]
SECONDS = 20.0  # for the calls of one length, all columns together


class Ceilings(NamedTuple):
    """What a device reaches at most: operations a second, bytes a second, and where both come from."""

    operations: float
    bandwidth: float
    source: str


class BenchSetup(NamedTuple):
    """What a backend adds to `hal bench` on one device.

    Attributes:
        calls: (request, query, key, value) -> callables by column name: the device's own kernels, and peers that are
            installed.
        conditions: () -> facts that times depend on, such as clocks and power; read after each length and kept with it.
        notes: () -> sentences below the table, such as which peers are not installed.
        flush: called before each timed call, to empty a cache. ceilings: for the roofline. None for neither.
    """

    calls: Callable[[AttentionRequest, Tensor, Tensor, Tensor], Mapping[str, Call]]
    conditions: Callable[[], Mapping[str, Any]] = dict
    notes: Callable[[], Sequence[str]] = tuple
    flush: Call | None = None
    ceilings: Ceilings | None = None


@runtime_checkable
class Benchmarked(Protocol):
    """Optional, of a backend: own columns, conditions and ceilings for `hal bench`."""

    def benchmark(self, device: Device) -> BenchSetup: ...


class BenchRun(NamedTuple):
    """Records, one dict per length; the columns timed, in order; the notes of the backend; the device's ceilings."""

    records: list[dict[str, Any]]
    columns: tuple[str, ...]
    notes: tuple[str, ...]
    ceilings: Ceilings | None


def bench(
    device: str,
    lengths: Sequence[int],
    shape: tuple[int, int, int],
    dtype: str,
    causal: bool,
    report: Callable[[str, float], None],
) -> BenchRun:
    """Time `hal.attention` and a bound call on a device beside torch's scaled_dot_product_attention, on the same
    tensors.

    Args:
        device: device id or backend name. lengths: tokens, queries and keys alike. shape: (batch, heads, head_dim).
        dtype, causal: the call. report: called with a text and the share done.

    Returns:
        Records hold the device, its fidelity, the call's operations and bytes, for each column the median and 95th
        percentile in milliseconds and the calls timed, and the conditions after the length was timed. Columns: "torch"
        is torch's scaled_dot_product_attention, "hal" hal.attention, "bound" a bound call, then the backend's.

    Raises:
        ContractError: an unknown dtype. UnsupportedError: the device cannot run the call.
    """
    import torch

    from .testing import BenchmarkRunner

    if dtype not in DTYPE_BYTES:
        raise ContractError(f"dtype {dtype!r} was given: use one of {', '.join(DTYPE_BYTES)}")
    found, sdpa, records = registry.find(device)[0], cast(Any, torch.nn.functional.scaled_dot_product_attention), []
    synchronize = getattr(registry.session(found.id), "synchronize", None)
    backend = registry.backend_of(found)
    setup = backend.benchmark(found) if isinstance(backend, Benchmarked) else BenchSetup(lambda *given: {})
    columns: dict[str, None] = {}
    for i, length in enumerate(lengths):
        report(f"{length} tokens", i / len(lengths))
        size = (*shape[:2], length, shape[2])
        tensors: list[Any] = [torch.randn(size, device=found.reads[0]).to(getattr(torch, dtype)) for _ in range(3)]
        named: dict[str, Any] = {"is_causal": causal, "backend": found.id}
        with torch.no_grad():
            bound = bind(*tensors, **named)
            request = bound.decision.request
            calls: dict[str, Call] = {
                "torch": partial(sdpa, *tensors, is_causal=causal),
                "hal": partial(attention, *tensors, **named),
                "bound": partial(bound, *tensors),
                **setup.calls(request, *tensors),
            }
            runner = BenchmarkRunner(
                device=found.reads[0], synchronize=synchronize, flush=setup.flush, budget=SECONDS / len(calls)
            )
            timed = runner.compare(calls).results
        record: dict[str, Any] = {
            "device": found.id,
            "fidelity": str(found.fidelity),
            "length": length,
            "operations": 2 * request.visible_macs,
            "bytes": request.bytes_moved,
        }
        for name, r in timed.items():
            record |= {f"{name}_p50_ms": r.p50, f"{name}_p95_ms": r.p95, f"{name}_calls": r.n_timed}
        records.append(record | {"conditions": dict(setup.conditions())})
        columns |= dict.fromkeys(timed)
    return BenchRun(records, tuple(columns), tuple(setup.notes()), setup.ceilings)


def rate(record: Mapping[str, Any], column: str) -> float | None:
    """Operations a second of a column in a record; None where it did not run."""
    time = record.get(f"{column}_p50_ms")
    return record["operations"] / time * 1e3 if time else None


def draw(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Iterable[tuple[float, float]]]],
    roofline: Mapping[str, Iterable[tuple[float, float]]],
    ceilings: Ceilings | None,
) -> None:
    """A picture of rates: curves over lengths, and a roofline on its right.

    Args:
        path: PNG, SVG or PDF by its ending.
        panels: by title, then by label: (tokens, operations a second).
        roofline: by label: (operations a byte, operations a second). ceilings: drawn where they are known.

    Raises:
        HalError: matplotlib is not installed. OSError, ValueError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HalError("a picture needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(5 * (len(panels) + 1), 4.5), layout="constrained")
    *axes, last = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for label, points in curves.items():
            axis.plot(*zip(*((x, y / 1e12) for x, y in points), strict=True), ".-", label=label)
        axis.set(title=title, xlabel="tokens", ylabel="TFLOP/s", xscale="log", ylim=(0, None))
        axis.legend(fontsize=7)
    every = [point for points in roofline.values() for point in points]
    if ceilings is not None and every:
        low, high = min(x for x, _ in every) / 4, max(x for x, _ in every) * 4
        knee = ceilings.operations / ceilings.bandwidth
        reach = sorted({low, min(max(knee, low), high), high})
        roof = [min(ceilings.operations, x * ceilings.bandwidth) / 1e12 for x in reach]
        last.plot(reach, roof, color="black", label=f"ceilings, {ceilings.source}")
    for label, points in roofline.items():
        last.plot(*zip(*((x, y / 1e12) for x, y in points), strict=True), ".", label=label)
    last.set(title="roofline", xlabel="operations a byte", ylabel="TFLOP/s", xscale="log", yscale="log")
    last.legend(fontsize=7)
    figure.savefig(path, dpi=80)


def draw_run(path: str | Path, title: str, run: BenchRun) -> None:
    """A picture of one `hal bench` run: every column's rates, and all of them under the device's ceilings."""
    curves, dots = {}, {}
    for column in run.columns:
        points = [(record, found) for record in run.records if (found := rate(record, column)) is not None]
        if points:
            curves[column] = [(record["length"], found) for record, found in points]
            dots[column] = [(record["operations"] / record["bytes"], found) for record, found in points]
    draw(path, {title: curves}, dots, run.ceilings)
