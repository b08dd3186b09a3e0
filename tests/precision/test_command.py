"""`hal precision`: a plan from a folder, and every input that cannot be."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hal_cli.command_line import main  # noqa: E402
from hal_precision import PrecisionPlan, create_ultra_precision_module  # noqa: E402

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "precision_plan.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    path: Path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_a_plan_without_text_is_json_that_stores_the_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    assert main(["precision", str(folder), "--save", "0.6", "--json", "--out", str(out)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["memory_reduction"] >= 0.6
    assert data["strategy"] == "entropy"
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    stored = create_ultra_precision_module(model, plan=PrecisionPlan.from_json(out.read_text(encoding="utf-8")))
    assert stored.get_precision_stats().stored_bytes == pytest.approx(data["stored_bytes"], rel=0.02)


def test_with_text_the_table_names_the_most_sensitive_layers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)) * 4)
    given = ["precision", str(folder), "--text", str(text), "--length", "32", "--top", "2", "--formats", "int8,int4"]
    assert main([*given, "--save", "0.55"]) == 0
    shown = capsys.readouterr().out
    assert "Strategy fisher" in shown
    assert "Most sensitive layers" in shown
    assert "int4" in shown
    assert "int3" not in shown
    assert main([*given, "--save", "0.55", "--json"]) == 0
    rises = [row["rise"] for row in json.loads(capsys.readouterr().out)["sensitivity"]]
    assert len(rises) == 8, "four of attention, three of the MLP, and the output layer"
    assert all(rise > 0 for rise in rises)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--strategy", "best"], "--strategy has 'best': give entropy, gradient, fisher"),
        (["--strategy", "fisher"], "--strategy fisher reads calibration data: give --text FILE"),
        (["--formats", "int8,int1"], "--formats has 'int1': give fp32, fp16"),
        (["--save", "1.5"], "target_memory_reduction is 1.5: give a share between 0 and 1"),
        (["--save", "0.99"], "the nearest that can be met is"),
        (["--text", "absent.txt"], "--text absent.txt cannot be read"),
        (["--text", "SHORT"], "--text has 100 tokens: calibration takes at least 256"),
        (["--length", "1"], "--length is 1: give 2 or more"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence_and_nothing_is_written(
    given: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, out = tmp_path / "short.txt", tmp_path / "plan.json"
    short.write_bytes(b"x" * 100)
    given = [str(short) if each == "SHORT" else each for each in given]
    assert main(["precision", str(folder), *given, "--out", str(out)]) != 0
    assert said in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["precision", str(tmp_path)]) != 0
    assert "has no model: give a folder with config.json" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert main(["precision", str(tmp_path)]) != 0
    assert "cannot be read as a model" in " ".join(capsys.readouterr().err.split())


def test_the_help_of_hal_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "precision" in capsys.readouterr().out


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec: Any = importlib.util.spec_from_file_location("precision_plan_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(sys, "argv", ["precision_plan.py", "--out", str(tmp_path), "--steps", "3"])
    assert example.main() == 0
    shown = capsys.readouterr().out
    assert "nats a byte of other text: float32" in shown
    assert (tmp_path / "small.safetensors").stat().st_size < 0.3 * (tmp_path / "model/model.safetensors").stat().st_size
