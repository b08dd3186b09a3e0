"""Chrome traces: what an engine's spans add up to is what the counters say, and the file is what Perfetto reads."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hal_kpu.profiles.profile import load
from hal_kpu.simulator.attention.program import fused
from hal_kpu.simulator.trace import chrome_trace, write_trace
from hal_kpu.simulator.transactional import run_transactional

import hal_core as hal
from hal_core import AttentionRequest, ContractError

_PROFILE = load("t64")


@pytest.fixture(scope="module")
def timelines():
    requests = [AttentionRequest(1, 9, 9, 100, length, 32, 32, "float32") for length in (100, 40)]
    return [(f"keys {r.len_k}", run_transactional(fused(_PROFILE, r), _PROFILE).timeline) for r in requests]


def test_spans_add_up_to_busy_cycles_and_the_last_one_ends_at_the_makespan(timelines):
    trace = chrome_trace(timelines, _PROFILE)
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    busy, clock = defaultdict(int), trace["otherData"]["clock_hz"]
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for event in spans:
        busy[names[event["tid"]]] += event["args"]["cycles"]
        assert event["dur"] * clock / 1e6 == pytest.approx(event["args"]["cycles"])
        assert event["ts"] * clock / 1e6 == pytest.approx(event["args"]["start"])
    want = defaultdict(int)
    for _, timeline in timelines:
        for engine, time in timeline.engines.items():
            want[engine] += time.busy
    assert busy == want
    makespan = sum(timeline.makespan for _, timeline in timelines)
    assert max(event["args"]["start"] + event["args"]["cycles"] for event in spans) == makespan
    assert trace["otherData"]["cycles"] == makespan


def test_spans_of_one_engine_do_not_overlap(timelines):
    end = defaultdict(int)
    for event in chrome_trace(timelines, _PROFILE)["traceEvents"]:
        if event["ph"] == "X":
            assert event["args"]["start"] >= end[event["tid"]]
            end[event["tid"]] = event["args"]["start"] + event["args"]["cycles"]


def test_a_chip_is_a_process_and_says_that_it_is_simulated(timelines):
    trace = chrome_trace(timelines, _PROFILE, chip=3)
    assert {event["pid"] for event in trace["traceEvents"]} == {3}
    process = next(e for e in trace["traceEvents"] if e["name"] == "process_name")
    assert process["args"]["name"] == "KPU t64 (simulated)"
    assert trace["otherData"]["fidelity"] == "simulated"


def test_the_file_is_whole_json(timelines, tmp_path):
    trace = chrome_trace(timelines, _PROFILE)
    path = write_trace(tmp_path / "a.json", trace)
    assert json.loads(path.read_text()) == trace
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ContractError, match="nowhere is no folder"):
        write_trace(tmp_path / "nowhere" / "a.json", {})


def test_too_many_spans_are_refused_rather_than_cut(timelines):
    with pytest.raises(ContractError, match="10 are the most"):
        chrome_trace(timelines, _PROFILE, limit=10)


def test_a_session_draws_the_timeline_of_a_call():
    request = AttentionRequest(1, 2, 2, 64, 64, 32, 32, "float32")
    session = hal.session("kpu:0")
    trace = session.trace(request)
    assert {event["ph"] for event in trace["traceEvents"]} == {"M", "X"}
    (program,) = trace["otherData"]["programs"]
    assert "64" in program["program"]
    assert program["makespan"] == run_transactional(fused(session.profile, request), session.profile).cycles
