"""`hal bench`: attention on a device beside torch's own attention and what the device's backend adds."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import hal_core as hal
from hal_core.plugin_api import (
    DTYPE_BYTES,
    BenchSetup,
    Call,
    CommandResult,
    ContractError,
    Device,
    Table,
    find_devices,
    registry,
    write_whole,
)

from . import bench_picture
from .bench_run import BenchRun
from .files import check_writable
from .parser import whole_numbers

#: Seconds for the calls of one length, all columns together.
SECONDS = 20.0


def run(options: argparse.Namespace) -> CommandResult:
    """Check the options and the files, measure, and write the files."""
    lengths = whole_numbers(options.lengths, 0, "--lengths", "one or more lengths")
    batch, heads, dim = whole_numbers(options.shape, 3, "--shape", "batch,heads,head_dim")
    if options.csv:
        check_writable(Path(options.csv), "--csv")
    if options.plot:
        check_writable(Path(options.plot), "--plot")
        bench_picture.check_format(options.plot)
    measured = bench(options.device, lengths, (batch, heads, dim), options.dtype, options.causal, options.progress)
    records = measured.records
    if options.csv:
        write_whole(Path(options.csv), as_csv(records))
    first = records[0]
    title = f"{first['device']} ({first['fidelity']}), batch {batch}, {heads} heads, head_dim {dim}, {options.dtype}"
    if options.plot:
        bench_picture.draw_run(options.plot, title, measured)
    return CommandResult(records, [_table(title, measured)])


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
    if dtype not in DTYPE_BYTES:
        raise ContractError(f"dtype {dtype!r} was given: use one of {', '.join(DTYPE_BYTES)}")
    found = find_devices(device)[0]
    benchmark = getattr(registry.backend_of(found), "benchmark", None)  # optional, of a backend
    setup: BenchSetup = BenchSetup(lambda *given: {}) if benchmark is None else benchmark(found)
    records: list[dict[str, Any]] = []
    columns: dict[str, None] = {}
    for place, length in enumerate(lengths):
        report(f"{length} tokens", place / len(lengths))
        record, timed = _timed(found, setup, (*shape[:2], length, shape[2]), dtype, causal)
        records.append(record | {"conditions": dict(setup.conditions())})
        columns |= dict.fromkeys(timed)
    return BenchRun(records, tuple(columns), tuple(setup.notes()), setup.ceilings)


def _timed(
    device: Device, setup: BenchSetup, size: tuple[int, ...], dtype: str, causal: bool
) -> tuple[dict[str, Any], list[str]]:
    """One length: its record, and the names of the columns that ran."""
    import torch

    sdpa = cast(Any, torch._C._nn.scaled_dot_product_attention)  # torch's, whatever took its place
    tensors: list[Any] = [torch.randn(size, device=device.reads[0]).to(getattr(torch, dtype)) for _ in range(3)]
    named: dict[str, Any] = {"is_causal": causal, "backend": device.id}
    with torch.no_grad():
        bound = hal.bind(*tensors, **named)
        request = bound.decision.request
        calls: dict[str, Call] = {
            "torch": partial(sdpa, *tensors, is_causal=causal),
            "hal": partial(hal.attention, *tensors, **named),
            "bound": partial(bound, *tensors),
            **setup.calls(request, *tensors),
        }
        runner = hal.testing.BenchmarkRunner(
            device=device.reads[0],
            synchronize=getattr(hal.session(device.id), "synchronize", None),
            flush=setup.flush,
            budget=SECONDS / len(calls),
        )
        timed = runner.compare(calls).results
    record: dict[str, Any] = {
        "device": device.id,
        "fidelity": str(device.fidelity),
        "length": size[2],
        "operations": 2 * request.visible_macs,
        "bytes": request.bytes_moved,
    }
    for name, r in timed.items():
        record |= {f"{name}_p50_ms": r.p50, f"{name}_p95_ms": r.p95, f"{name}_calls": r.n_timed}
    return record, list(timed)


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as CSV, a line for each length; the conditions are columns of their own."""
    text = io.StringIO(newline="")
    flat = [{name: r[name] for name in r if name != "conditions"} | r["conditions"] for r in records]
    writer = csv.DictWriter(text, list(dict.fromkeys(field for row in flat for field in row)))
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _table(title: str, measured: BenchRun) -> Table:
    rows = [
        [
            str(r["length"]),
            *(f"{r[f'{n}_p50_ms']:.4g}" if f"{n}_p50_ms" in r else "-" for n in measured.columns),
            f"{r['torch_p50_ms'] / r['hal_p50_ms']:.2f}x",
            str(r["hal_calls"]),
        ]
        for r in measured.records
    ]
    facts = [
        f"{r['length']} tokens: {', '.join(f'{name} {value}' for name, value in r['conditions'].items())}"
        for r in measured.records
        if r["conditions"]
    ]
    columns = ["tokens", *(f"{name} ms" for name in measured.columns), "torch / hal", "calls"]
    return Table(title, columns, rows, ["medians, interleaved; bound: a call of hal.bind", *facts, *measured.notes])
