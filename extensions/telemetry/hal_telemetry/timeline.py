"""The recorded calls as a timeline: Chrome's trace event JSON, which ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from hal_core.plugin_api import write_whole

from .recorder import Call, recorder


def events(since: float = 0.0) -> dict[str, Any]:
    """The timeline as plain data: a process for each device, a thread for each thread that called.

    Args:
        since: `time.perf_counter()` before which calls are left out.
    """
    recorder.drain()
    with recorder._lock:
        calls = [Call(*fields) for fields in recorder.calls if fields[2] - fields[1] >= since]
        clock, dropped = recorder.clock, recorder.dropped
    processes: dict[str, int] = {}
    # Perfetto reads thread numbers of 32 bits, and Python's identifiers are addresses: threads are numbered here.
    threads: dict[int, int] = {}
    names, shown = {each.ident: each.name for each in threading.enumerate()}, set[tuple[int, int]]()
    found: list[dict[str, Any]] = []
    for decision, seconds, end, thread in calls:
        device, request = decision.winner.device, decision.request
        if device.id not in processes:
            processes[device.id] = len(processes) + 1
            name = {"name": f"{device.id} ({device.model}, {device.fidelity})"}
            found.append({"ph": "M", "name": "process_name", "pid": processes[device.id], "tid": 0, "args": name})
        pid, tid = processes[device.id], threads.setdefault(thread, len(threads) + 1)
        if (pid, tid) not in shown:
            shown.add((pid, tid))
            name = {"name": names.get(thread, f"thread {tid}")}
            found.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": name})
        facts = {"request": request.describe(), "origin": decision.origin, "reason": decision.reason}
        found.append(
            {
                "ph": "X",
                "name": f"attention {request.len_q} x {request.len_k}",
                "cat": "attention",
                "ts": (end - seconds - clock) * 1e6,
                "dur": seconds * 1e6,
                "pid": pid,
                "tid": tid,
                "args": facts | {"caller": decision.policy.caller or ""},
            }
        )
    return {"traceEvents": found, "displayTimeUnit": "ms", "otherData": {"calls left out before": dropped}}


def export_trace(path: str | Path, since: float = 0.0) -> int:
    """Write the recorded calls as a timeline, whole or not at all.

    Args:
        path: of the file. since: `time.perf_counter()` before which calls are left out.

    Returns:
        How many calls it holds, at most the newest 65,536. Lengths are those of a decision's bucket.

    Raises:
        OSError: the file cannot be written.
    """
    data = events(since)
    write_whole(Path(path), json.dumps(data))
    return sum(event["ph"] == "X" for event in data["traceEvents"])
