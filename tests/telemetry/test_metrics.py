"""What is counted, how it is scraped, and that nothing is paid or lost."""

from __future__ import annotations

import json
import math
import os
import threading
import urllib.error
import urllib.request
from typing import Any

import hal_telemetry
import pytest
import torch
from fakes import FakeSession, quantity
from hal_telemetry import recorder as recording
from hal_telemetry.recorder import BATCH, SECONDS, recorder
from prometheus_client.parser import text_string_to_metric_families

import hal_core as hal
from hal_core.registry import registry


def sample(name: str, **labels: str) -> float:
    """The value of a metric in the text that Prometheus reads; 0 where it is not there."""
    for family in text_string_to_metric_families(hal_telemetry.metrics_text()):
        for each in family.samples:
            if each.name == name and labels.items() <= each.labels.items():
                return float(each.value)
    return 0.0


def test_a_call_of_a_real_device_is_scraped_as_text(qkv: list[torch.Tensor]) -> None:
    port = hal_telemetry.enable(0)
    with hal.caller("chat"):
        hal.attention(*qkv, backend="cpu:0")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'hal_call_seconds_count{caller="chat",device="cpu:0"} 1.0' in text
    assert f'hal_info{{version="{hal.__version__}"}} 1.0' in text
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/secrets", timeout=10)


def test_every_call_of_many_threads_is_counted_once(fake: Any, qkv: list[torch.Tensor]) -> None:
    fake("many")
    hal_telemetry.enable()
    each, threads = 3 * BATCH + 7, 4

    def work() -> None:
        for _ in range(each):
            hal.attention(*qkv, backend="many")

    started = [threading.Thread(target=work) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    assert sample("hal_call_seconds_count", device="many:0") == each * threads
    assert sample("hal_call_seconds_bucket", device="many:0", le="+Inf") == each * threads


def test_buckets_sums_and_quantiles_are_those_of_the_durations(fake: Any, qkv: list[torch.Tensor]) -> None:
    fake("timed", time=quantity(0.02))
    hal_telemetry.enable()
    decision = hal.explain(*qkv, backend="timed")
    durations = [1e-5, 1.1e-5, 0.004, 0.04, 100.0]
    for seconds in durations:
        recorder.observe(decision, seconds)
    [row] = [row for row in hal_telemetry.snapshot()["series"] if row["device"] == "timed:0"]
    assert math.isclose(sample("hal_call_seconds_sum", device="timed:0"), sum(durations))
    assert sample("hal_call_seconds_bucket", device="timed:0", le="1e-05") == 1
    assert sample("hal_call_seconds_bucket", device="timed:0", le="0.05") == 4
    assert sample("hal_call_seconds_bucket", device="timed:0", le="50.0") == 4
    assert row["p50"] == 0.005
    assert row["p99"] == math.inf
    ratios = [seconds / 0.02 for seconds in durations]
    assert math.isclose(row["ratio"], sum(ratios) / 5)
    assert sample("hal_estimate_ratio_bucket", device="timed:0", le="0.25") == 3
    assert math.isclose(
        sample("hal_estimate_error_seconds_total", device="timed:0"), sum(abs(s - 0.02) for s in durations)
    )
    assert sorted(SECONDS) == list(SECONDS)


def test_a_simulator_s_estimate_is_not_compared_with_the_host_s_time(fake: Any, qkv: list[torch.Tensor]) -> None:
    fake("toy", fidelity="simulated")
    hal_telemetry.enable()
    hal.attention(*qkv, backend="toy")
    assert "hal_call_seconds_count" in hal_telemetry.metrics_text()
    assert sample("hal_estimate_ratio_count", device="toy:0") == 0


def test_refusals_errors_and_memory_are_reported(fake: Any, qkv: list[torch.Tensor]) -> None:
    class Failing(FakeSession):
        def compute_attention(self, *given: Any, **more: Any) -> Any:
            raise OSError("the link is down")

    fake("broken", open=Failing)
    hal_telemetry.enable()
    with pytest.raises(hal.UnsupportedError):
        hal.attention(*qkv, backend="cpu:0", max_error=1e-30)
    with pytest.raises(OSError, match="link"):
        hal.attention(*qkv, backend="broken")
    assert sample("hal_refusals_total", device="cpu:0", code="max_error") >= 1
    assert sample("hal_decisions_total", device="none") >= 1
    assert sample("hal_errors_total", device="broken:0", type="OSError") == 1
    buffer = hal.memory("cpu:0").allocate((1000,), "float32")
    assert sample("hal_memory_bytes", device="cpu:0", kind="in_use") >= 4000
    hal.memory("cpu:0").free(buffer)


def test_a_lost_device_does_not_hide_the_other_figures(fake: Any, qkv: list[torch.Tensor], monkeypatch: Any) -> None:
    fake("lost")
    hal_telemetry.enable()
    hal.attention(*qkv, backend="lost")

    def stats() -> Any:
        raise RuntimeError("device lost")

    monkeypatch.setattr(hal.memory("lost"), "stats", stats)
    assert sample("hal_call_seconds_count", device="lost:0") == 1
    assert "device lost" in recording.failures["lost:0"]


def test_many_callers_do_not_make_endless_series(fake: Any, qkv: list[torch.Tensor], monkeypatch: Any) -> None:
    fake("few")
    monkeypatch.setattr(recording, "MOST_SERIES", 3)
    hal_telemetry.enable()
    for name in range(8):
        with hal.caller(f"caller {name}"):
            hal.attention(*qkv, backend="few")
    assert len(hal_telemetry.snapshot()["series"]) == 4
    assert sample("hal_call_seconds_count", caller="other") == 5


def test_the_ring_keeps_the_newest_calls_and_says_what_it_lost(fake: Any, qkv: list[torch.Tensor]) -> None:
    fake("long")
    hal_telemetry.enable()
    decision = hal.explain(*qkv, backend="long")
    for n in range(recording.MOST_CALLS + 5):
        recorder.observe(decision, float(n))
    found = hal_telemetry.snapshot(newest=2)
    assert [call["seconds"] for call in found["calls"]] == [recording.MOST_CALLS + 4, recording.MOST_CALLS + 3]
    assert found["dropped"] == 5


def test_nothing_is_recorded_and_nothing_observed_until_it_is_asked_for(qkv: list[torch.Tensor]) -> None:
    hal.attention(*qkv, backend="cpu:0")
    assert registry.plugins.implementations("hal_call") == []
    hal_telemetry.enable()
    assert [each.plugin_name for each in registry.plugins.implementations("hal_call")] == ["telemetry"]
    hal_telemetry.disable()
    hal.attention(*qkv, backend="cpu:0")
    assert registry.plugins.implementations("hal_call") == []
    assert hal_telemetry.snapshot()["series"] == []


def test_a_port_in_use_is_refused_in_a_sentence(site: Any) -> None:
    port = hal_telemetry.enable(0)
    from hal_telemetry.server import serve

    with pytest.raises(hal.ContractError, match="pass another port"):
        serve("127.0.0.1", int(port or 0))
    code = "import json, hal_core as hal; hal.devices(); print(json.dumps(1))"
    done = site.python("-c", code, HAL_METRICS=str(port))
    assert done.returncode == 0
    assert "no metrics are served" in done.stderr
    assert "Address already in use" in done.stderr
    assert "use a port" in site.python("-c", code, HAL_METRICS="http").stderr


def test_the_environment_switches_it_on_before_the_first_call(site: Any) -> None:
    site.add("good")
    code = """
    import json, urllib.request, hal_core as hal
    from hal_core.plugin_api import decide, merged_policy
    decide(hal.AttentionRequest(1, 1, 1, 4, 4, 4, 4, "float32", "cpu"), merged_policy("good"))
    from hal_telemetry.control import state
    with urllib.request.urlopen(f"http://127.0.0.1:{state.server.server_port}/calls") as answer:
        print(json.dumps(json.load(answer)["decisions"]))
    """
    assert site.run(code, HAL_METRICS="127.0.0.1:0") == [{"device": "good:0", "origin": "argument", "count": 1}]
    implements = """
    import json
    from hal_core.plugin_api import registry
    registry.discover()
    hooks = ("hal_call", "hal_decision", "hal_error")
    print(json.dumps([len(registry.plugins.implementations(hook)) for hook in hooks]))
    """
    assert site.run(implements, HAL_METRICS="127.0.0.1:0") == [1, 1, 1]
    assert site.run(implements) == [0, 0, 0]


def test_a_child_process_counts_its_own_calls_and_leaves_the_port_to_its_parent(
    fake: Any, qkv: list[torch.Tensor]
) -> None:
    from hal_telemetry.control import state

    fake("forked")
    port = hal_telemetry.enable(0)
    decision = hal.explain(*qkv, backend="forked")

    def calls() -> int:
        return sum(int(row["calls"]) for row in hal_telemetry.snapshot()["series"])

    for _ in range(3):
        recorder.observe(decision, 0.1)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            before = calls()
            recorder.observe(decision, 0.1)
            os.write(write, json.dumps([before, calls(), state.server]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert json.loads(os.read(read, 100)) == [0, 1, None]
    assert calls() == 3
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/calls", timeout=10) as answer:
        assert json.load(answer)["series"][0]["calls"] == 3


def test_a_switched_off_plugin_is_refused_in_a_sentence(site: Any) -> None:
    code = "import hal_telemetry; hal_telemetry.enable()"
    done = site.python("-c", code, HAL_PLUGINS="none")
    assert "the plugin telemetry switched off by HAL_PLUGINS" in done.stderr


def test_breakers_and_queues_of_a_router_are_metrics(monkeypatch: Any) -> None:
    import sys
    from types import SimpleNamespace

    said = {
        "breakers": {"a:0": {"state": "open"}, "b:0": {"state": "half-open"}},
        "pools": [{"queued": {"a:0": 3}}, {"queued": {"a:0": 2, "b:0": 1}}],
    }
    monkeypatch.setitem(sys.modules, "hal_router", SimpleNamespace(state=lambda: said))
    assert sample("hal_breaker_state", device="a:0") == 2
    assert sample("hal_breaker_state", device="b:0") == 1
    assert sample("hal_queue_length", device="a:0") == 5
    assert json.dumps(hal_telemetry.snapshot()["breakers"]) == '{"a:0": "open", "b:0": "half-open"}'
