"""Every expression of the dashboard and of the alerts, executed by a real Prometheus that scrapes a running program."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hal_telemetry
import pytest

yaml = pytest.importorskip("yaml")

pytestmark = pytest.mark.xdist_group("prometheus")  # one worker starts the server

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(hal_telemetry.__file__).parent
DASHBOARD = json.loads((PACKAGE / "grafana" / "dashboard.json").read_text())
ALERTS = yaml.safe_load((PACKAGE / "prometheus" / "alerts.yml").read_text())
#: `make prometheus` unpacks Debian's package there.
FETCHED = ROOT / "out" / "prometheus" / "usr" / "bin"


def program(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([str(FETCHED), os.environ.get("PATH", "")]))
    if found is None:
        pytest.skip(f"{name} is not here: run `make prometheus`, or install Debian's package prometheus")
    return found


def expressions() -> list[tuple[str, str]]:
    """(where, expression) of every panel, variable and alert, variables replaced as Grafana does for "All"."""
    found = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
    found = [
        (where, expr.replace("$device", ".*").replace("$__rate_interval", "20s").replace('"$datasource"', ""))
        for where, expr in found
    ]
    rules = [rule for group in ALERTS["groups"] for rule in group["rules"]]
    return found + [(rule["alert"], rule["expr"]) for rule in rules]


def test_the_dashboard_holds_nothing_that_grafanas_schema_does_not() -> None:
    """Read by Grafana's own types and written again, every field is there with its value."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")

    def read(dashboard: Any) -> Any:
        return json.loads(encoder.JSONEncoder().encode(models.Dashboard.from_json(dashboard)))

    def lost(given: Any, kept: Any, place: str = "") -> list[str]:
        if isinstance(given, dict):
            here = [f"{place}/{key}" for key in given if key not in kept]
            return here + [x for key in given if key in kept for x in lost(given[key], kept[key], f"{place}/{key}")]
        if isinstance(given, list):
            return [x for n, each in enumerate(given) for x in lost(each, kept[n], f"{place}/{n}")]
        return [] if given == kept else [place]

    assert lost(DASHBOARD, read(DASHBOARD)) == []
    wrong = DASHBOARD | {"panels": [DASHBOARD["panels"][0] | {"gridpos": {}}]}
    assert lost(wrong, read(wrong)) == ["/panels/0/gridpos"]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server that has scraped a running program several times; a function (path, **query) -> data of its API."""
    server, folder = program("prometheus"), tmp_path_factory.mktemp("prometheus")
    policy = folder / "access.toml"
    policy.write_text(
        '[default]\ndevices = ["cpu:*", "broken:*"]\n[callers.admin]\nregister = true\ndevices = ["broken:*"]\n'
        '[callers.chat]\ndevices = ["cpu:*"]\n'
    )
    policy.chmod(0o600)
    script = Path(__file__).with_name("watched.py")
    watched = subprocess.Popen(
        [sys.executable, str(script), str(folder / "audit")],
        env=os.environ | {"HAL_ACCESS": str(policy)},
        stdout=subprocess.PIPE,
        text=True,
    )
    started = [watched]
    try:
        assert watched.stdout is not None
        target = f"127.0.0.1:{int(watched.stdout.readline())}"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shutil.copy(PACKAGE / "prometheus" / "alerts.yml", folder)
        settings = {
            "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
            "rule_files": ["alerts.yml"],
            "scrape_configs": [{"job_name": "hal", "static_configs": [{"targets": [target]}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        options += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
        started.append(subprocess.Popen([server, *options]))

        def ask(path: str, **query: str) -> Any:
            url = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]

        def scrapes() -> int:
            try:
                result = ask("query", query="count_over_time(hal_errors_total[5m])")["result"]
            except OSError:  # it has not started yet
                return 0
            return min((int(each["value"][1]) for each in result), default=0)

        end = time.monotonic() + 120
        while scrapes() < 4:
            assert time.monotonic() < end, "Prometheus scraped nothing in two minutes"
            assert all(process.poll() is None for process in started)
            time.sleep(0.2)
        yield ask
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.parametrize(("where", "expression"), expressions(), ids=lambda text: re.sub(r"\W+", "-", text)[:40])
def test_every_expression_answers(prometheus: Any, where: str, expression: str) -> None:
    """An alert's condition need not hold now: what it compares must be there."""
    compared = re.fullmatch(r"(.*?)\s(>|>=|==)\s[\d.]+", expression, re.DOTALL)
    data = prometheus("query", query=compared[1] if compared else expression)
    assert data["resultType"] == "vector"
    assert data["result"], f"{where}: {expression}"
    prometheus("query", query=expression)


def test_prometheus_evaluates_every_alert_and_an_open_breaker_is_pending(prometheus: Any) -> None:
    rules = [rule for group in prometheus("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {rule["alert"] for g in ALERTS["groups"] for rule in g["rules"]}
    end = time.monotonic() + 60
    while any(rule["health"] == "unknown" for rule in rules) and time.monotonic() < end:
        time.sleep(0.2)
        rules = [rule for group in prometheus("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert next(rule["state"] for rule in rules if rule["name"] == "HalBreakerOpen") in ("pending", "firing")


def test_the_device_variable_lists_the_devices(prometheus: Any) -> None:
    [query] = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()  # type: ignore[union-attr]
    assert prometheus(f"label/{label}/values", **{"match[]": metric}) == ["cpu:0"]


def test_promtool_finds_nothing_wrong_with_the_metrics(fake: Any, qkv: list[Any]) -> None:
    import hal_core as hal

    fake("shown")
    hal_telemetry.enable()
    hal.attention(*qkv, backend="shown")
    checked = subprocess.run(
        [program("promtool"), "check", "metrics"], input=hal_telemetry.metrics_text(), capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_promtool_passes_the_alerts_and_each_fires_when_it_should(tmp_path: Path) -> None:
    shutil.copy(PACKAGE / "prometheus" / "alerts.yml", tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_test.yml"), tmp_path)
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([program("promtool"), *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    """Grafana's rules, since no Grafana is run: a short uid, ids of their own, 24 columns, no import inputs."""
    assert len(DASHBOARD["uid"]) <= 40
    assert "__inputs" not in DASHBOARD
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken
        taken |= cells
        assert {d["uid"] for d in (panel["datasource"], *(t["datasource"] for t in panel["targets"]))} == {
            "${datasource}"
        }
    assert DASHBOARD["templating"]["list"][0]["type"] == "datasource"


def test_every_metric_is_shown_or_watched() -> None:
    text = " ".join(expression for _, expression in expressions())
    names = set(re.findall(r"^# TYPE (hal_\w+) ", hal_telemetry.metrics_text(), re.MULTILINE))
    unseen = {name for name in names if name.removesuffix("_total") not in text}
    assert unseen == {"hal_estimate_error_seconds_total", "hal_calls_dropped_total"}
