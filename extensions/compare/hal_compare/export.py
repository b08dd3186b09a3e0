"""A comparison as flat tables for spreadsheets: a line a row, or a layer of it, with every figure and its origin."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from .families import family_name, profile
from .result import Comparison, Figure, Row


def to_csv(comparison: Comparison) -> str:
    """One line per row of the comparison, in its order; seconds, joules and multiply-accumulates.

    A figure has the columns name, name_low, name_high, name_basis, name_provenance and name_source. What is not
    available is empty.
    """
    return _written([dict(_line(comparison, row)) for row in comparison.rows])


def layers_to_csv(comparison: Comparison) -> str:
    """One line per row and layer, with the same columns of each figure; "" where no layers were looked at."""
    lines = []
    for row in comparison.rows:
        for layer in row.layers:
            line: dict[str, object] = {"row": row.name, "layer": layer.name}
            for name, figure in (
                ("error", layer.error),
                ("device_seconds", layer.time),
                ("device_joules", layer.energy),
            ):
                line |= dict(columns_of(name, figure))
            shares = {"seconds_share": layer.time_share, "joules_share": layer.energy_share}
            lines.append(line | {name: "" if share is None else share for name, share in shares.items()})
            lines[-1]["device_macs"] = layer.macs
    return _written(lines) if lines else ""


def _written(lines: Sequence[dict[str, object]]) -> str:
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
    yield from columns_of("error_worst_text", found.worst)
    yield from columns_of("error_mean", found.mean)
    yield from columns_of("cosine_lowest", found.cosine)
    yield from columns_of("cosine_mean", found.cosine_mean)
    yield from columns_of("task_kept", found.agreement)
    yield "decisions", found.decisions
    yield from columns_of("perplexity", found.perplexity)
    yield from columns_of("device_seconds", costs.on_device)
    yield from columns_of("device_joules", costs.energy)
    yield from columns_of("host_rest_seconds", costs.remainder)
    yield from columns_of("run_seconds", costs.wall)
    yield "device_macs", costs.macs
    yield "device_share", comparison.share(row)
    yield "calls", costs.calls


def columns_of(name: str, figure: Figure | None) -> Iterator[tuple[str, object]]:
    """The columns of one figure, by name."""
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
