"""hal sweep: what it measures, what it keeps, and that an interrupted sweep goes on to the same results."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hal_cli import main
from hal_compare import lanes, measure, models, texts
from hal_compare.reference_runs import ReferenceRuns
from hal_compare.sweep.cells import Cell, Key
from hal_compare.sweep.records import Records
from hal_compare.sweep.run import duration
from hal_compare.sweep.token_texts import TextMaker

import hal_core as hal
from hal_core import MaskKind

from .chromium import VARIABLE, Chromium, program

#: Figures that are not read off a clock.
EXACT = ("error", "mean_error", "kept", "energy", "decisions", "macs", "draws", "length", "batch", "label", "source")


def sweep(*arguments: Any) -> int:
    return main(["sweep", *map(str, arguments)])


def data_of(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    """What --json prints."""
    capsys.readouterr()
    assert sweep(*arguments, "--json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def exact(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells without what a clock says: the time of a simulated device is not of a clock."""
    kept = [{name: cell[name] for name in EXACT} for cell in data["cells"]]
    for cell, plain in zip(data["cells"], kept, strict=True):
        plain["time"] = cell["time"] if cell["fidelity"] == "simulated" else None
    return kept


@pytest.fixture
def grid(encoder, text, device, tmp_path) -> list[Any]:
    """Arguments of a small sweep: three devices, two lengths, two batch sizes."""
    noisy = device("noisy", noise=1e-2, joules=1e-12)
    still = device("still", seconds=2e-12, joules=2e-12)
    names = f"cpu:0,{noisy},{still}"
    return [encoder, "--text", text, "--devices", names, "--lengths", "4,8", "--batches", "1,2", "--texts", 4]


def test_every_cell_has_error_time_and_energy_with_their_origins(grid, capsys, tmp_path):
    data = data_of(capsys, *grid, "--repeats", 2, "--out", tmp_path / "out")
    assert len(data["cells"]) == 2 * 2 * 4
    assert [(c["length"], c["batch"]) for c in data["cells"]] == sorted(
        (c["length"], c["batch"]) for c in data["cells"]
    )
    by_label = {(c["label"], c["length"], c["batch"]): c for c in data["cells"]}
    cpu, noisy, still = (by_label[label, 8, 2] for label in ("cpu:0", "noisy:0", "still:0"))
    assert cpu["error"]["middle"] < 5e-6 < 1e-5 < noisy["error"]["middle"]
    assert (cpu["time"]["basis"], cpu["energy"]) == ("measured", None)
    assert (still["time"]["basis"], still["time"]["provenance"]) == ("modelled", "paper-projection")
    # 4 heads of 8, 2 layers: 2 products of 8 x 8 x 8 for each of 2 texts and 4 heads
    macs = 2 * 2 * 4 * 2 * 8 * 8 * 8
    assert still["macs"] == macs
    assert still["time"]["middle"] == pytest.approx(macs * 2e-12)
    assert still["energy"]["middle"] == pytest.approx(macs * 2e-12)
    assert (noisy["draws"], still["draws"]) == (2, 1)
    assert noisy["error"]["low"] < noisy["error"]["high"], "two draws of the noise"
    assert still["front"] == ["time", "energy"]


def test_it_equals_a_comparison_on_the_same_texts(encoder, text, capsys, tmp_path, device):
    """The figures are those of `hal_compare.measure`, noise included, divided by the batches."""
    names = [device("still", joules=2e-12), device("noisy", noise=1e-2)]
    arguments = ["--devices", ",".join(names), "--lengths", 6, "--batches", 2, "--texts", 4, "--out", tmp_path / "out"]
    data = data_of(capsys, encoder, "--text", text, *arguments)
    model = models.load(str(encoder), "float32")
    maker = TextMaker(model, texts.read([text]))
    made = maker.make(4, 6, maker.source(4, 6))
    found = measure.compare(
        model,
        made.described(6),
        lanes.rows_for(names),
        repeats=3,
        batch_size=2,
        max_length=6,
        command="",
        reference_runs=ReferenceRuns(model, made.tokens(2, None)),
    )
    for cell, row in zip(data["cells"], found.rows, strict=True):
        if row.name in names:
            worst = row.accuracy.worst
            assert [cell["error"][name] for name in ("low", "middle", "high")] == [worst.low, worst.middle, worst.high]
            assert cell["time"]["middle"] * 2 == pytest.approx(row.costs.on_device.middle)
            assert (cell["energy"] is None) == (row.costs.energy is None)
    assert data["cells"][1]["energy"]["middle"] * 2 == pytest.approx(found.rows[1].costs.energy.middle)


def test_files_table_and_page_have_the_same_numbers(grid, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    assert sweep(*grid, "--repeats", 2, "--out", "out") == 0
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    assert printed.splitlines()[-3:] == ["html: out/sweep.html", "csv: out/sweep.csv", "json: out/sweep.json"]
    data = json.loads(Path("out/sweep.json").read_text())
    lines = list(csv.DictReader(Path("out/sweep.csv").read_text().splitlines()))
    page = Path("out/sweep.html").read_text()
    assert len(lines) == len(data["cells"]) == page.count('<tr role="row">') - 1
    from hal_compare.figures import joules, ratio

    for line, cell in zip(lines, data["cells"], strict=True):
        assert (line["label"], int(line["length"])) == (cell["label"], cell["length"])
        assert float(line["error"]) == cell["error"]["middle"]
        assert line["time_s_origin"] in ("measured", "modelled, paper-projection")
        shown = ratio(cell["error"]["middle"])
        assert shown in printed
        assert f">{shown}</span>" in page
        if cell["energy"]:
            assert float(line["energy_j"]) == cell["energy"]["middle"]
            assert f">{joules(cell['energy']['middle'])}</span>" in page
        else:
            assert line["energy_j"] == ""
    for outside in ("http:", "https:", "src=", "<link", "url("):
        assert outside not in page, "the page asks for something"
    for title, count in (("Error against time", 4), ("Error against energy", 4), ("Energy over the length", 2)):
        assert page.count(f"<h3>{title}</h3>") == count, "one for each of four workloads; one for each batch size"


@pytest.mark.skipif(program() is None, reason=f"no Chromium is on PATH, and {VARIABLE} does not name one")
@pytest.mark.xdist_group("browser")
def test_the_page_fits_narrow_and_wide_windows(profiled, encoder, text, capsys, tmp_path):
    out = tmp_path / "out"
    arguments = [encoder, "--text", text, "--devices", f"cpu:0,{profiled}", "--profiles", "*", "--lengths", "4,8,12"]
    assert sweep(*arguments, "--out", out) == 0
    inside = """[...document.querySelectorAll('svg')].filter(svg => svg.getClientRects().length).every(svg =>
        [...svg.querySelectorAll('text')].every(text => {
            const outer = svg.getBoundingClientRect(), inner = text.getBoundingClientRect();
            return inner.left >= outer.left - 1 && inner.right <= outer.right + 1 && inner.bottom <= outer.bottom + 1
                && inner.height >= 8;
        }))"""
    with Chromium() as browser:
        for width in (400, 800, 1400):
            browser.open(out / "sweep.html", width, dark=width == 800)
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run(inside), f"a text leaves its chart, or is too small, at {width} px"
        assert browser.messages == []


def test_it_goes_on_from_what_is_there_and_ends_with_the_same(grid, capsys, tmp_path, monkeypatch):
    whole = data_of(capsys, *grid, "--out", tmp_path / "whole")
    real, runs = measure.compare, []

    def interrupted(*args: Any, **options: Any) -> Any:
        runs.append(args)
        if len(runs) == 7:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(measure, "compare", interrupted)
    assert sweep(*grid, "--out", tmp_path / "part") == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"stopped: results are kept in .*part, and the same command goes on from there", said)
    assert len(list((tmp_path / "part" / "cells").glob("*.json"))) == 6
    resumed = data_of(capsys, *grid, "--out", tmp_path / "part")
    assert len(runs) == 7 + 10, "six were there"
    assert exact(resumed) == exact(whole)
    again = data_of(capsys, *grid, "--out", tmp_path / "part")
    assert len(runs) == 17
    assert [cell["time"] for cell in again["cells"]] == [cell["time"] for cell in resumed["cells"]]
    assert sweep(*grid, "--out", tmp_path / "part", "--no-resume") == 0
    assert len(runs) == 17 + 16


def test_a_killed_process_leaves_whole_records_and_the_same_command_goes_on(encoder, text, tmp_path):
    command = [sys.executable, "-m", "hal_core", "sweep", str(encoder), "--text", str(text), "--devices", "cpu:0"]
    command += ["--lengths", "3,4,5,6", "--batches", "1,2", "--texts", "4", "--json"]
    command += ["--out", str(tmp_path / "out")]
    environment = os.environ | {"HAL_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    cells = tmp_path / "out" / "cells"
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while len(list(cells.glob("*.json"))) < 1:
        assert first.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    there = {path: path.read_bytes() for path in cells.glob("*.json")}
    assert 1 <= len(there) < 16
    assert not (tmp_path / "out" / "sweep.json").exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["cells"]) == 16
    assert {path: path.read_bytes() for path in there} == there, "what was there was not measured again"


def test_another_version_and_a_damaged_record_are_said_once_and_measured_anew(grid, capsys, tmp_path):
    folder = tmp_path / "out"
    assert sweep(*grid, "--out", folder) == 0
    cells = sorted((folder / "cells").glob("*.json"))
    for path in cells[:3]:
        record = json.loads(path.read_text())
        record["key"]["version"] = "hal-core 0.0.1"
        from hal_compare.sweep.records import _digest

        record["sha256"] = _digest(record["key"], record["cell"])
        path.write_text(json.dumps(record))
    cells[3].write_text(cells[3].read_text()[:-40])
    changed = json.loads(cells[4].read_text())
    changed["cell"]["error"]["middle"] = 0.5
    cells[4].write_text(json.dumps(changed))
    before = {path: path.stat().st_mtime_ns for path in cells}
    capsys.readouterr()
    assert sweep(*grid, "--out", folder) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("measured anew") == 2
    assert "3 records of another version: measured anew." in printed
    assert re.search(r"2 records that cannot be read \(.*\): measured anew\.", printed)
    assert "11 of 16 results were in" in printed
    assert {path for path in cells if path.stat().st_mtime_ns != before[path]} == set(cells[:5])
    assert sweep(*grid, "--out", folder) == 0
    assert "anew" not in capsys.readouterr().out


def test_what_a_key_holds_decides():
    key = Key(
        model="m",
        weights="w",
        device="d",
        profile="",
        fingerprint="f",
        scope="attention",
        dtype="float32",
        length=8,
        batch=1,
        texts=8,
        text="t",
        draws=3,
        version="1",
        machine="host",
    )
    for field in attrs.fields(Key):
        other = attrs.evolve(key, **{field.name: 9 if field.type == "int" else "other"})
        assert key.differs(attrs.asdict(other)) == [field.name]
        assert (other.name != key.name) == (field.name in Key.ASKED)


def test_a_cell_is_read_as_it_was_written(tmp_path, grid, capsys):
    data_of(capsys, *grid, "--out", tmp_path / "out")
    for path in (tmp_path / "out" / "cells").glob("*.json"):
        record = json.loads(path.read_text())
        assert json.loads(json.dumps(Cell.from_dict(record["cell"]).to_dict())) == record["cell"]
        assert Records(tmp_path / "out").read(Key(**record["key"])) == Cell.from_dict(record["cell"])


def test_a_device_that_breaks_is_tried_again_and_one_that_refuses_is_not(encoder, text, device, capsys, tmp_path):
    broken = device("broken", fails=True)
    bare = device("bare", masks=frozenset({MaskKind.NONE}))
    arguments = [encoder, "--text", text, "--devices", f"{broken},{bare}", "--lengths", 4, "--out", tmp_path / "out"]
    assert sweep(*arguments) == 0, "texts of one length need no mask"
    printed = " ".join(capsys.readouterr().out.split())
    assert "broken:0 did not run (tokens x batch: 4 x 8): it failed with RuntimeError: the fake device broke" in printed
    assert [path.name.partition("-4x8")[0] for path in sorted((tmp_path / "out" / "cells").iterdir())] == [
        "bare-0",
        "torch-sdpa",
    ]


def test_exit_code_1_where_no_device_ran(encoder, text, device, tmp_path):
    broken = device("broken", fails=True)
    assert sweep(encoder, "--text", text, "--devices", broken, "--lengths", 4, "--out", tmp_path / "out") == 1


def test_progress_says_what_is_done_and_how_long_the_rest_takes(grid, capsys, tmp_path, monkeypatch):
    from hal_cli import progress

    monkeypatch.setattr(progress.Progress.__init__, "__defaults__", (0.0,))
    assert sweep(*grid, "--out", tmp_path / "out") == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(re.match(r"hal sweep: +\d+%  0 of 16 done, torch sdpa, 4 tokens, batch 1$", line) for line in lines)
    assert any(
        re.match(r"hal sweep: +\d+%  9 of 16 done, cpu:0, 8 tokens, batch 1, about \d+ s left$", line) for line in lines
    )
    shares = [int(re.search(r"(\d+)%", line)[1]) for line in lines]
    assert max(shares) <= 100


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.2, "1 s"), (40, "40 s"), (100, "2 min"), (3000, "50 min"), (7800, "2 h 10 min")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize("source", ["files", "random"])
def test_texts_have_the_length_asked_for_and_are_the_first_of_more(encoder, text, source):
    model = models.load(str(encoder), "float32")
    maker = TextMaker(model, texts.read([text]), always_random=source == "random")
    assert maker.source(4, 6) == source
    few, many = maker.make(4, 6, source), maker.make(9, 6, source)
    assert few.ids.shape == (4, 6)
    assert torch.equal(few.ids, many.ids[:4])
    stream = [token for one in texts.read([text])[0].texts for token in model.tokenizer(one)["input_ids"]]
    assert set(few.ids.flatten().tolist()) <= set(stream)
    if source == "files":
        assert few.ids.flatten().tolist() == stream[:24]
    for batch in few.tokens(3, None).batches:
        assert bool(batch.mask.all())
    assert maker.source(4, 1000) == "random", "the file has fewer tokens"


def test_special_tokens_are_kept_around_a_piece():
    class Model:
        @staticmethod
        def tokenizer(text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
            ids = [int(word) for word in text.split()]
            return {"input_ids": [101, *ids, 102] if add_special_tokens else ids}

    maker = TextMaker(Model, [texts.TextFile("a", ("1 2 3 4", "5", "6 7"), "")])
    assert maker.shortest == 3
    assert maker.make(2, 5, "files").ids.tolist() == [[101, 1, 2, 3, 102], [101, 4, 5, 6, 102]]
    assert maker.source(2, 5) == "files"
    assert maker.source(3, 5) == "random", "nine tokens are needed, and there are seven"


def test_a_length_that_no_text_has_is_random_and_said(encoder, text, capsys, tmp_path):
    arguments = [encoder, "--text", text, "--devices", "cpu:0", "--lengths", "4,40", "--out", tmp_path / "out"]
    data = data_of(capsys, *arguments)
    assert data["texts"] == {"4": "files", "40": "random"}
    assert {(cell["length"], cell["source"]) for cell in data["cells"]} == {(4, "files"), (40, "random")}
    assert sweep(*arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Texts of 4 tokens: consecutive pieces of the text in the files." in printed
    assert "Texts of 40 tokens: tokens drawn independently of each other" in printed


def test_a_causal_model_and_linear_layers(decoder, text, device, capsys, tmp_path):
    fake = device("fake", linear_error=1e-2, joules=1e-12)
    data = data_of(
        capsys,
        decoder,
        "--text",
        text,
        "--devices",
        f"cpu:0,{fake}",
        "--linear",
        "all",
        "--lengths",
        8,
        "--batches",
        4,
        "--out",
        tmp_path / "out",
    )
    by_label = {cell["label"]: cell for cell in data["cells"]}
    assert list(by_label) == ["torch sdpa", "cpu:0", fake, f"{fake} +linear"]
    assert by_label[f"{fake} +linear"]["error"]["middle"] > 10 * by_label[fake]["error"]["middle"]
    assert by_label["cpu:0"]["decisions"] == 8 * 8


def test_profiles_are_rows_of_their_own_and_leave_no_device_behind(profiled, encoder, text, capsys, tmp_path):
    before = [device.id for device in hal.devices()]
    mine = tmp_path / "mine.toml"
    mine.write_text("5e-12")
    data = data_of(
        capsys,
        encoder,
        "--text",
        text,
        "--devices",
        f"cpu:0,{profiled}",
        "--profiles",
        f"SMALL*,{mine}",
        "--lengths",
        "4,8",
        "--batches",
        2,
        "--out",
        tmp_path / "out",
    )
    labels = ["torch sdpa", "cpu:0", "profiled small", "profiled small-fast", "profiled mine"]
    assert list(dict.fromkeys(cell["label"] for cell in data["cells"])) == labels
    cells = {cell["profile"]: cell for cell in data["cells"] if cell["length"] == 8}
    assert cells["small-fast"]["energy"]["middle"] == 2 * cells["small"]["energy"]["middle"]
    assert cells["mine"]["energy"]["middle"] == 5 * cells["small"]["energy"]["middle"]
    assert cells["mine"]["family"] == "profiled"
    assert [device.id for device in hal.devices()] == before
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert re.search(r'<text class="name"[^>]*>small-fast</text>', page), "profiles by name, families by colour"


def test_an_option_is_given_to_the_devices_that_have_it_and_named_in_their_rows(
    encoder, text, device, capsys, tmp_path
):
    """Four passes take four times as long; a row says so, and results without them are not mixed up with it."""
    able = device("able", seconds=2e-12, joules=2e-12, most_passes=8, linear_error=1e-3)
    bare = device("bare", seconds=2e-12, joules=2e-12)
    words = [encoder, "--text", text, "--devices", f"{able},{bare}", "--linear", able, "--lengths", "8"]
    words += ["--batches", 2, "--texts", 2, "--out", tmp_path / "out"]
    once = {cell["label"]: cell for cell in data_of(capsys, *words)["cells"]}
    four = {cell["label"]: cell for cell in data_of(capsys, *words, "--option", "passes=4")["cells"]}
    assert set(four) == {"torch sdpa", "able:0 passes=4", "able:0 +linear passes=4", "bare:0"}
    for label in ("able:0", "able:0 +linear"):
        ratio = four[f"{label} passes=4"]["time"]["middle"] / once[label]["time"]["middle"]
        assert ratio == pytest.approx(4, rel=1e-9)
    assert four["bare:0"]["time"] == once["bare:0"]["time"]
    assert data_of(capsys, *words)["cells"] == list(once.values()), "the records of both lie beside each other"
    for wrong, wanted in (("pases=4", "use one of passes (able:0)"), ("passes=9", "able:0 takes passes of")):
        assert sweep(*words, "--option", wrong) == 2
        assert wanted in capsys.readouterr().err
