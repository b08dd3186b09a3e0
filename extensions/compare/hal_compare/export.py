"""A comparison as a flat table for spreadsheets: a line a row, with every figure, its interval and its origin."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from .families import family_name, profile
from .result import Comparison, Figure, Row


def to_csv(comparison: Comparison) -> str:
    """One line per row of the comparison, in its order; seconds, joules and multiply-accumulates.

    A figure has the columns name, name_low, name_high, name_basis, name_provenance and name_source. What is not
    available is empty.
    """
    lines = [dict(_line(comparison, row)) for row in comparison.rows]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _line(comparison: Comparison, row: Row) -> Iterator[tuple[str, object]]:
    yield "row", row.name
    yield "family", family_name(row)
    yield "profile", profile(row)
    yield "device", row.device.id if row.device is not None else ""
    yield "model", f"{row.device.vendor} {row.device.model}".strip() if row.device is not None else ""
    yield "kind", row.fidelity
    yield "part", row.scope
    yield "draws", row.repeats
    yield "refusals", "; ".join(row.refusals)
    found, costs = row.accuracy, row.costs
    if found is None or costs is None:
        return
    yield from _columns("error_worst_text", found.worst)
    yield from _columns("error_mean", found.mean)
    yield from _columns("cosine_lowest", found.cosine)
    yield from _columns("cosine_mean", found.cosine_mean)
    yield from _columns("task_kept", found.agreement)
    yield "decisions", found.decisions
    yield from _columns("perplexity", found.perplexity)
    yield from _columns("device_seconds", costs.on_device)
    yield from _columns("device_joules", costs.energy)
    yield from _columns("host_rest_seconds", costs.remainder)
    yield from _columns("run_seconds", costs.wall)
    yield "device_macs", costs.macs
    yield "device_share", comparison.share(row)
    yield "calls", costs.calls


def _columns(name: str, figure: Figure | None) -> Iterator[tuple[str, object]]:
    if figure is None:
        for ending in ("", "_low", "_high", "_basis", "_provenance", "_source"):
            yield name + ending, ""
        return
    yield name, figure.middle
    yield f"{name}_low", figure.low
    yield f"{name}_high", figure.high
    yield f"{name}_basis", str(figure.basis)
    yield f"{name}_provenance", str(figure.provenance)
    yield f"{name}_source", figure.source
