"""What `hal bench` measured."""

from __future__ import annotations

from typing import Any, NamedTuple

from hal_core.plugin_api import Ceilings


class BenchRun(NamedTuple):
    """Records, one dict per length; the columns timed, in order; the notes of the backend; the device's ceilings."""

    records: list[dict[str, Any]]
    columns: tuple[str, ...]
    notes: tuple[str, ...]
    ceilings: Ceilings | None
