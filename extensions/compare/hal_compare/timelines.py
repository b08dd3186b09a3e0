"""Timelines of simulated devices, for Perfetto: one call of the model's attention on each device that draws one."""

from __future__ import annotations

from typing import Any, NamedTuple

import hal_core as hal
from hal_core import AttentionRequest, Causal, HalError

from .result import Comparison, Row


class Timeline(NamedTuple):
    """One device's timeline.

    Attributes:
        device: its id. what: the call, for people. trace: Chrome trace JSON (Trace Event Format), which Perfetto opens;
            None where the device refused, with the reason in `refusal`.
    """

    device: str
    what: str
    trace: dict[str, Any] | None
    refusal: str = ""


def timelines(comparison: Comparison) -> list[Timeline]:
    """One for each device that ran and whose session has `trace(request)`: attention of one layer."""
    found: dict[str, Timeline] = {}
    for row in comparison.rows:
        if row.ran and row.device is not None and row.device.id not in found and (made := _of(comparison, row)):
            found[row.device.id] = made
    return list(found.values())


def _of(comparison: Comparison, row: Row) -> Timeline | None:
    assert row.device is not None
    try:
        trace = getattr(hal.session(row.device.id), "trace", None)  # optional, of a session
    except HalError:
        return None
    if trace is None:
        return None
    model, length = comparison.model, max(group.longest for group in comparison.groups)
    if model.get("modality", "text") != "text" or not (model["heads"] and model["head_dim"]):
        return None
    request = AttentionRequest(
        1,
        model["heads"],
        model["key_value_heads"],
        length,
        length,
        model["head_dim"],
        model["head_dim"],
        model["dtype"],
        causal=Causal.BOTTOM_RIGHT if model["kind"] == "causal" else Causal.NONE,
    )
    what = f"attention of one layer over {length:,} tokens"
    try:
        return Timeline(row.device.id, what, trace(request))
    except HalError as error:
        return Timeline(row.device.id, what, None, str(error))
