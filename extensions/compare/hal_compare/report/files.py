"""Writing a report: the page with its CSV, JSON and timelines beside it, all of them whole or none at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hal_core import HalError

from ..export import layers_to_csv, to_csv
from ..result import Comparison
from ..timelines import Timeline
from .page import Beside, render

#: How the files beside a page begin, by which an earlier report's are told from the user's own.
_STARTS = {".csv": b"row,family,", ".json": b'{\n "format": '}


def check_target(path: Path) -> None:
    """Make the report's folder, and raise HalError where the report or a file beside it could not be written, before
    anything long runs.
    """
    if path.suffix.lower() in (".csv", ".json"):
        raise HalError(
            f"the report {path} was given: CSV and JSON are written beside the page, so give the page's name, for "
            f"example {path.with_suffix('.html')}"
        )
    if path.is_dir():
        raise HalError(f"the report {path} is a folder: give a file name, for example {path / 'report.html'}")
    for suffix, start in _STARTS.items():
        beside = path.with_suffix(suffix)
        if beside.is_dir():
            raise HalError(f"the report writes {beside} beside the page, and that is a folder: give another name")
        if beside.is_file() and not _begins(beside, start):
            raise HalError(f"the report writes {beside} beside the page, and that is no report's: give another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise HalError(f"the report {path} cannot be written ({error.strerror}): give another place") from error


def _begins(path: Path, start: bytes) -> bool:
    """Whether a file starts as a report's does, so that it may be replaced; an unreadable one does not."""
    try:
        with path.open("rb") as file:
            return file.read(len(start)) == start
    except OSError:
        return False


def write(
    comparison: Comparison,
    path: Path,
    data: Mapping[str, Any] | None = None,
    timelines: Sequence[Timeline] = (),
) -> list[Path]:
    """Write the page, and beside it x.csv, x.json and a trace for each timeline. A reader never sees half a file: all
    are written beside their places and then renamed, the page last.

    Args:
        path: of the page. data: what the JSON file holds; None for `comparison.to_dict()`. timelines: of its devices.

    Returns:
        The paths, the page first.
    """
    beside = [
        Beside(path.with_suffix(".csv").name, "every figure as a table, for spreadsheets (CSV)"),
        Beside(path.with_suffix(".json").name, "everything as data (JSON)"),
    ]
    texts = {
        path.with_suffix(".csv"): to_csv(comparison),
        path.with_suffix(".json"): json.dumps(
            comparison.to_dict() if data is None else data, indent=1, allow_nan=False
        ),
    }
    if layers := layers_to_csv(comparison):
        beside.append(Beside(f"{path.stem}.layers.csv", "every layer of every row as a table (CSV)"))
        texts[path.with_name(beside[-1].name)] = layers
    for timeline in timelines:
        name = f"{path.stem}.{timeline.device.replace(':', '-')}.trace.json"
        if timeline.trace is None:
            beside.append(Beside("", f"no timeline of {timeline.device}: {timeline.refusal}"))
            continue
        beside.append(Beside(name, f"timeline of {timeline.what} on {timeline.device}, for ui.perfetto.dev"))
        texts[path.with_name(name)] = json.dumps(timeline.trace, allow_nan=False)
    texts[path] = render(comparison, beside)
    replace_whole(texts)
    return [path, *(written for written in texts if written != path)]


def replace_whole(texts: Mapping[Path, str]) -> None:
    """Write files, the last one last: all are written beside their places and then renamed."""
    partial: dict[str, Path] = {}
    try:
        for path, text in texts.items():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            partial[name] = path
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
                file.write(text)
            os.chmod(name, 0o644)
        for name, path in partial.items():
            os.replace(name, path)
    finally:
        for name in partial:
            Path(name).unlink(missing_ok=True)
