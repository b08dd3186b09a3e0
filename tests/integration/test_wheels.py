"""The wheels alone, without the repository: installed into a new environment, they run the main job."""

from __future__ import annotations

import json
import os
import subprocess

import distributions as tree
import pytest

pytestmark = pytest.mark.xdist_group("wheels")  # one worker builds and installs them

MODEL = """
import sys, transformers
from tokenizers import Tokenizer, models, pre_tokenizers
config = transformers.BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                                 vocab_size=128, max_position_embeddings=64)
transformers.BertModel(config).save_pretrained(sys.argv[1])
words = ["[UNK]", "[PAD]", "one", "attention", "over", "every", "accelerator"]
tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(
    sys.argv[1])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """run(*arguments): Python of an environment that has this repository's wheels and nothing else of it."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("wheels")
    every = tree.distributions()
    wheels = tree.build_wheels([tree.copy(distribution, folder / "source") for distribution in every], folder / "dist")
    python, packages = tree.fresh_environment(folder / "fresh", *wheels)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HAL_PLUGINS")}
    environment["HAL_CACHE"] = str(folder / "cache")

    def run(*arguments: str) -> str:
        command = [str(python), *arguments]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    modules = ", ".join(distribution.package for distribution in every)
    files = run("-c", f"import {modules}; print(*(m.__file__ for m in ({modules})), sep=chr(10))").split()
    assert len(files) == len(every)
    assert all(file.startswith(str(packages)) for file in files), files
    return run


@pytest.mark.slow
def test_devices_of_the_wheels_are_found(installed):
    ids = {device["id"] for device in json.loads(installed("-m", "hal_core", "devices", "--json"))}
    assert {"cpu:0", "kpu:0", "photonic:0"} <= ids


@pytest.mark.slow
def test_compare_runs_a_model_on_the_devices(installed, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one attention over every accelerator\n\nattention over one accelerator\n", encoding="utf-8")
    installed("-c", MODEL, str(tmp_path / "model"))
    command = (
        "compare",
        str(tmp_path / "model"),
        "--text",
        str(text),
        "--devices",
        "cpu,kpu,photonic",
        "--repeats",
        "1",
    )
    shown = installed("-m", "hal_core", *command)
    for device in ("cpu:0", "kpu:0", "photonic:0"):
        assert device in shown
