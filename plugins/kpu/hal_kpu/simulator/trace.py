"""A timeline as Chrome trace JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

A process is a chip, a thread is one engine's queue. Times are microseconds of the simulated clock; `args` keeps the
exact cycles, so that the spans of an engine add up to its busy cycles and the last end is the makespan.

Source: "Trace Event Format" (Chromium project), sections "Complete Events" and "Metadata Events".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hal_core.plugin_api import ContractError, write_whole

from ..profiles.profile import Profile
from .timeline import Timeline

#: Events in a file that a browser still opens with ease.
MOST_EVENTS = 200_000


def chrome_trace(
    timelines: Sequence[tuple[str, Timeline]], profile: Profile, *, chip: int = 0, limit: int = MOST_EVENTS
) -> dict[str, Any]:
    """The trace of programs that run one after the other.

    Args:
        timelines: (name of the program, what happened in cycles). profile: whose clock it is. chip: number of the
            process.
        limit: most spans.

    Returns:
        A JSON object: `traceEvents`, and under `otherData` the profile, the clock in Hz, and by program its first
        cycle, makespan and busy cycles by engine.

    Raises:
        ContractError: more spans than `limit`: a smaller shape is wanted, because part of a trace would not add up.
    """
    scale = 1e6 / profile["clock.frequency"]  # µs in a cycle
    count = sum(number for _, timeline in timelines for _, number, _ in timeline.sums().values())
    if count > limit:
        raise ContractError(
            f"the timeline has {count:,} spans, and {limit:,} are the most in a trace: choose a smaller shape"
        )
    engines = sorted({engine for _, timeline in timelines for engine in timeline.engines})
    queue = {engine: number for number, engine in enumerate(engines, start=1)}
    events, about, begin = _names(queue, profile, chip), [], 0
    for name, timeline in timelines:
        for span in sorted(timeline.spans(), key=lambda span: (span.start, queue[span.engine])):
            events.append(
                {
                    "ph": "X",
                    "pid": chip,
                    "tid": queue[span.engine],
                    "name": span.name,
                    "cat": span.kind,
                    "ts": (begin + span.start) * scale,
                    "dur": (span.end - span.start) * scale,
                    "args": {"start": begin + span.start, "cycles": span.end - span.start, "bytes": span.bytes},
                }
            )
        busy = {engine: time.busy for engine, time in timeline.engines.items()}
        about.append({"program": name, "start": begin, "makespan": timeline.makespan, "busy": busy})
        begin += timeline.makespan
    other = {
        "profile": profile.name,
        "fidelity": "simulated",
        "clock_hz": profile["clock.frequency"],
        "cycles": begin,
        "programs": about,
    }
    return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": other}


def _names(queue: dict[str, int], profile: Profile, chip: int) -> list[dict[str, Any]]:
    """Metadata events: what the process and its threads are called, and in which order they stand."""

    def about(event: str, thread: int, **arguments: Any) -> dict[str, Any]:
        return {"ph": "M", "pid": chip, "tid": thread, "name": event, "args": arguments}

    events = [about("process_name", 0, name=f"KPU {profile.name} (simulated)")]
    for engine, number in queue.items():
        events += [about("thread_name", number, name=engine), about("thread_sort_index", number, sort_index=number)]
    return events


def write_trace(path: str | Path, trace: dict[str, Any]) -> Path:
    """Write a trace whole or not at all.

    Raises:
        ContractError: the folder does not exist. OSError: the file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ContractError(f"{path} was given: {path.parent} is no folder, make it or choose another")
    write_whole(path, json.dumps(trace))
    return path
