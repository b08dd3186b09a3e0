"""The KPU's examples run, and do what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import hal_kpu
import numpy as np
import pytest

from .programs import quick_first

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, tmp_path: Path, *options: str) -> str:
    environment = {**os.environ, "HAL_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


_LEAST = {1: {"CNN": 80, "MLP": 60}, 6: {"CNN": 96, "MLP": 85}}  # per cent right, by epochs


@pytest.mark.parametrize("epochs", quick_first(1, _LEAST))
def test_a_cnn_trained_on_the_kpu_reads_digits_as_eager_does(epochs, tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn holds the digits")
    lines = run("kpu_digits.py", tmp_path, "--epochs", str(epochs))
    found = dict(re.findall(r"(MLP|CNN): ([\d.]+)% right on the KPU; predictions equal to eager's: True", lines))
    assert all(float(found[name]) >= accuracy for name, accuracy in _LEAST[epochs].items())
    for on_kpu, whole in re.findall(r"(\d+) of (\d+) operators", lines):
        assert on_kpu == whole


def test_a_cnn_and_a_transformer_compile(tmp_path):
    lines = run("kpu_torch_compile.py", tmp_path)
    errors = re.findall(r"(?:by|differs by) ([\d.e+-]+)$", lines, re.MULTILINE)
    assert len(errors) == 4
    assert max(map(float, errors)) <= 1e-5
    assert lines.count("on the host: nothing") == 2


def test_mnist_is_taken_from_a_folder_in_the_shape_the_models_want(monkeypatch):
    """Of MNIST's own files only the reading is tested elsewhere: here its arrays are random."""
    asked = []

    def load(split, limit, root):
        asked.append((split, root))
        return np.random.default_rng(0).random((limit, 28, 28)).astype(np.float32), np.zeros(limit, np.int64)

    monkeypatch.setattr(hal_kpu, "load_mnist", load, raising=False)
    example = runpy.run_path(str(EXAMPLES / "kpu_digits.py"))
    images, labels, test, _ = example["mnist"]("folder", limit=3)
    assert asked == [("train", "folder"), ("test", "folder")]
    assert images.shape == test.shape == (3, 1, 28, 28)
    assert example["cnn"](28)(images).shape == (3, 10)
    assert labels.tolist() == [0, 0, 0]
