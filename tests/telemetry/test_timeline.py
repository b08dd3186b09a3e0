"""Calls as a timeline for Perfetto, and as OpenTelemetry spans."""

from __future__ import annotations

import json
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import hal_telemetry
import pytest
import torch

import hal_core as hal


def test_a_run_is_exported_with_a_process_per_device_and_the_threads_that_called(
    fake: Any, qkv: list[torch.Tensor], tmp_path: Path
) -> None:
    fake("left")
    fake("right")
    hal_telemetry.enable()
    hal.attention(*qkv, backend="left")  # before the run: not in it
    with hal_telemetry.trace(tmp_path / "run.json"):
        for name in ("left", "right", "right"):
            hal.attention(*qkv, backend=name)
        thread = threading.Thread(target=lambda: hal.attention(*qkv, backend="left"))
        thread.start()
        thread.join()
    data = json.loads((tmp_path / "run.json").read_text())
    names = {e["pid"]: e["args"]["name"] for e in data["traceEvents"] if e["name"] == "process_name"}
    calls = [e for e in data["traceEvents"] if e["ph"] == "X"]
    assert [names[call["pid"]].split()[0] for call in calls] == ["left:0", "right:0", "right:0", "left:0"]
    assert len({call["tid"] for call in calls}) == 2
    assert all(call["dur"] > 0 for call in calls)
    # Calls of one thread do not overlap: Perfetto would drop what is not nested. Times are microseconds.
    ends = [call["ts"] + call["dur"] for call in calls]
    assert all(end <= later["ts"] + 1 for end, later in zip(ends[:2], calls[1:3], strict=True))
    assert calls[0]["args"]["request"].startswith("batch 1, heads 2")
    assert hal_telemetry.enabled()


def test_a_timeline_keeps_to_the_trace_event_format_as_perfetto_reads_it(fake: Any, qkv: list[torch.Tensor]) -> None:
    """Perfetto takes pid and tid of 32 bits only, draws one thread's events nested, and needs names as metadata."""
    from hal_telemetry.timeline import events

    fake("drawn")
    hal_telemetry.enable()
    both = threading.Barrier(3)

    def work() -> None:
        both.wait()  # at once, so that their calls overlap and are told apart by their threads alone
        for _ in range(5):
            hal.attention(*qkv, backend="drawn")

    threads = [threading.Thread(target=work, name=f"worker {n}") for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = json.loads(json.dumps(events()))
    assert data["displayTimeUnit"] in ("ms", "ns")
    named, tracks = set(), dict[tuple[int, int], list[tuple[float, float]]]()
    for event in data["traceEvents"]:
        assert all(type(event[key]) is int and 0 <= event[key] < 2**32 for key in ("pid", "tid"))
        assert isinstance(event["name"], str)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert set(event["args"]) == {"name"}
            named.add((event["name"], event["pid"], event["tid"]))
            continue
        assert event["ph"] == "X"
        assert all(type(event[key]) in (int, float) and event[key] >= 0 for key in ("ts", "dur"))
        assert ("process_name", event["pid"], 0) in named
        assert ("thread_name", event["pid"], event["tid"]) in named
        tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert sorted(map(len, tracks.values())) == [5, 5, 5]
    for track in tracks.values():
        assert all(end <= later + 1 for (_, end), (later, _) in pairwise(track))


def test_a_trace_of_its_own_switches_recording_off_again(qkv: list[torch.Tensor], tmp_path: Path) -> None:
    with hal_telemetry.trace(tmp_path / "run.json"):
        hal.attention(*qkv, backend="cpu:0")
    assert not hal_telemetry.enabled()
    assert '"ph": "X"' in (tmp_path / "run.json").read_text()
    (tmp_path / "folder").write_text("")
    with pytest.raises(OSError, match="folder"), hal_telemetry.trace(tmp_path / "folder" / "run.json"):
        pass
    assert not hal_telemetry.enabled()


def test_a_call_is_a_span_inside_the_current_one(fake: Any, qkv: list[torch.Tensor]) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    fake("spanned")
    kept, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    hal_telemetry.trace_calls(provider)
    told: list[float] = []
    from hal_telemetry.recorder import recorder

    with provider.get_tracer("test").start_as_current_span("generate"), hal.caller("chat"):
        hal.attention(*qkv, backend="spanned")
        hal.attention(*qkv, backend="spanned")
    recorder.drain()
    told = [fields[1] for fields in recorder.calls]
    first, second, outer = kept.get_finished_spans()
    assert first.name == second.name == "hal.attention"
    assert first.parent.span_id == outer.context.span_id
    assert dict(first.attributes) == {
        "hal.device": "spanned:0",
        "hal.fidelity": "hardware",
        "hal.origin": "argument",
        "hal.request": hal.explain(*qkv, backend="spanned").request.describe(),
        "hal.caller": "chat",
    }
    assert [span.end_time - span.start_time for span in (first, second)] == [round(s * 1e9) for s in told]
    hal_telemetry.disable()
    hal.attention(*qkv, backend="spanned")
    assert len(kept.get_finished_spans()) == 3


def test_spans_without_opentelemetry_are_refused_in_a_sentence(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(hal.ContractError, match="pip install 'hal-telemetry"):
        hal_telemetry.trace_calls()
    assert not hal_telemetry.enabled()
