"""`hal bench`: what it measures, the files it writes, and what it checks before it measures."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackend
from hal_cli import bench
from hal_cli.bench_picture import draw

import hal_core as hal
from hal_core.plugin_api import BenchSetup, Ceilings

Fake = Callable[..., FakeBackend]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.4)


def test_bench(run: Run, fake: Fake, tmp_path: Path) -> None:
    fake("toy")
    arguments = ("bench", "toy", "--lengths", "4,8", "--shape", "1,2,8", "--causal", "--csv", str(tmp_path / "b.csv"))
    code, out, _ = run(*arguments)
    assert code == 0
    assert "toy:0 (hardware)" in out
    rows = list(csv.DictReader((tmp_path / "b.csv").open()))
    assert [row["length"] for row in rows] == ["4", "8"]
    assert all(float(row["hal_p50_ms"]) > 0 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["b.csv"]
    code, out, _ = run("bench", "toy", "--lengths", "4", "--shape", "1,2,8", "--json")
    assert [record["device"] for record in json.loads(out)] == ["toy:0"]


class Benched(FakeBackend):
    """A backend with columns of its own in `hal bench`; the peer runs on the shorter length alone."""

    flushed = 0

    def benchmark(self, device: hal.Device) -> BenchSetup:
        def calls(request: Any, query: Any, key: Any, value: Any) -> dict[str, Any]:
            assert request.len_q == query.shape[2]
            return {"own": lambda: query @ key.mT, **({"peer": lambda: query + 1} if request.len_q == 4 else {})}

        def flush() -> None:
            self.flushed += 1

        ceilings = Ceilings(1e12, 1e11, "measured here")
        return BenchSetup(
            calls, lambda: {"MHz": 1980, "W": 571}, lambda: ["other-peer is not installed"], flush, ceilings
        )


def test_bench_shows_what_a_backend_adds(run: Run, tmp_path: Path) -> None:
    backend = Benched("toy")
    hal.register(backend, name="toy")
    arguments = ("bench", "toy", "--lengths", "4,8", "--shape", "1,2,8", "--csv", str(tmp_path / "b.csv"))
    try:
        _, out, _ = run(*arguments)
        _, text, _ = run(*arguments, "--json")
    finally:
        hal.unregister("toy")
    head = next(line for line in out.splitlines() if "tokens" in line)
    assert [name for name in ("torch", "hal", "bound", "own", "peer") if f"{name} ms" in head] == head.replace(
        "tokens", ""
    ).replace("torch / hal", "").replace("calls", "").replace(" ms", "").split()
    assert "other-peer is not installed" in out
    assert "4 tokens: MHz 1980, W 571" in out
    rows = list(csv.DictReader((tmp_path / "b.csv").open()))
    assert [row["W"] for row in rows] == ["571", "571"]
    assert float(rows[0]["peer_p50_ms"]) > 0
    assert rows[1]["peer_p50_ms"] == ""
    records = json.loads(text)
    assert [record["operations"] for record in records] == [2 * 2 * 4 * 4 * 16, 2 * 2 * 8 * 8 * 16]
    assert backend.flushed > sum(record["own_calls"] for record in records)


def test_bench_draws_curves_and_a_roofline(run: Run, fake: Fake, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fake("toy")
    picture = tmp_path / "b.png"
    assert run("bench", "toy", "--lengths", "4,8", "--shape", "1,2,8", "--plot", str(picture))[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert run("bench", "toy", "--lengths", "4", "--shape", "1,2,8", "--plot", "/no/such/folder/b.png")[0] == 2


@pytest.mark.parametrize(
    ("option", "file", "wanted"),
    [
        ("--plot", "x.foo", "ends in .foo: use one of"),
        ("--plot", "picture", "has no ending: use one of"),
        ("--plot", "no/where/x.png", "cannot be written"),
        ("--csv", "no/where", "cannot be written"),
        ("--csv", "", "is a folder"),
    ],
)
def test_files_that_cannot_be_written_are_said_before_anything_is_measured(
    run: Run, fake: Fake, tmp_path: Path, option: str, file: str, wanted: str
) -> None:
    pytest.importorskip("matplotlib")
    backend = fake("toy")
    code, out, err = run("bench", "toy", "--lengths", "4", "--shape", "1,2,8", option, str(tmp_path / file))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert wanted in err
    assert option in err
    assert not backend.ran, "it was measured first"


def test_a_picture_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(hal.HalError, match="pip install matplotlib"):
        draw(tmp_path / "b.png", {}, {}, None)


def test_the_roofline_lies_under_its_ceilings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The roof rises with the bandwidth to the knee, 10 operations a byte, and is flat behind it."""
    axes = pytest.importorskip("matplotlib.axes")
    drawn: list[Any] = []
    monkeypatch.setattr(
        axes.Axes, "plot", lambda self, x, y, *rest, **named: drawn.append((named["label"], list(x), list(y)))
    )
    monkeypatch.setattr(axes.Axes, "legend", lambda self, **named: None)
    draw(tmp_path / "b.png", {}, {"own": [(4.0, 2e11), (400.0, 8e11)]}, Ceilings(1e12, 1e11, "measured here"))
    label, x, y = drawn[0]
    assert label == "ceilings, measured here"
    assert x == [1.0, 10.0, 1600.0]
    assert y == [0.1, 1.0, 1.0]
    assert drawn[1] == ("own", [4.0, 400.0], [0.2, 0.8])
