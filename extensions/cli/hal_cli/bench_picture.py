"""Pictures of `hal bench`: rates over lengths, and a roofline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hal_core.plugin_api import Ceilings, HalError

if TYPE_CHECKING:
    from .bench_run import BenchRun


def check_format(path: str | Path) -> None:
    """Raise HalError where matplotlib is missing or has no format of that ending."""
    offered = sorted(_figure_class()().canvas.get_supported_filetypes())
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in offered:
        given = f"ends in .{ending}" if ending else "has no ending"
        raise HalError(f"--plot {path} {given}: use one of .{', .'.join(offered)}")


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HalError("a picture needs matplotlib: pip install matplotlib") from None
    return Figure


def rate(record: Mapping[str, Any], column: str) -> float | None:
    """Operations per second of a column in a record; None where it did not run."""
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
        panels: by title, then by label: (tokens, operations per second).
        roofline: by label: (operations per byte, operations per second). ceilings: drawn where they are known.

    Raises:
        HalError: matplotlib is not installed. OSError, ValueError: the file cannot be written.
    """
    figure = _figure_class()(figsize=(5 * (len(panels) + 1), 4.5), layout="constrained")
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
    last.set(title="roofline", xlabel="operations per byte", ylabel="TFLOP/s", xscale="log", yscale="log")
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
