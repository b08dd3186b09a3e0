"""hal sweep refuses what is impossible in one sentence, before anything is measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hal_cli import main
from hal_compare import measure, models, texts
from hal_compare.sweep import limits
from hal_compare.sweep.token_texts import TextMaker


@pytest.fixture
def refused(capsys, monkeypatch, encoder, text, tmp_path):
    """The one sentence on standard error, after exit code 2; a measurement fails the test."""

    def run(*arguments: Any, model: Path = encoder) -> str:
        monkeypatch.setattr(measure, "compare", lambda *args, **options: pytest.fail("it measured"))
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        assert main(["sweep", str(model), "--text", str(text), *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1), err
        assert "Traceback" not in err
        return str(err)

    return run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lengths", "4,41"], "--lengths 41 was given: {model} takes texts of 40 tokens at most"),
        (["--lengths", "0"], "--lengths '0' was given: pass whole numbers of 1 or more"),
        (["--lengths", "8,two"], "--lengths 'two' was given"),
        (["--lengths", "8.5"], "--lengths '8.5' was given"),
        (["--lengths", ","], "--lengths was given without a number"),
        (["--lengths", "9" * 30], "was given: pass whole numbers"),
        (["--batches", "0"], "--batches '0' was given: pass whole numbers of 1 or more"),
        (["--batches", "8,-1"], "--batches '-1' was given"),
        (["--devices", "cpx:0"], "did you mean 'cpu'"),
        (["--devices", "cpu:0,cpu:7"], "cpu:7 is not present: cpu has cpu:0"),
        (["--devices", "cpu:0", "--linear", "cpx"], "did you mean 'cpu'"),
        (["--devices", "cpu:0", "--linear", "cpu:0"], "no linear kernel"),
        (["--devices", "cpu:0", "--profiles", "t*"], "cpu simulates from no profile"),
        (["--devices", "profiled", "--profiles", "smal"], "'smal' matches no profile of profiled: did you mean"),
        (["--devices", "profiled", "--profiles", "small,zzz"], "there are large, small, small-fast"),
        (["--devices", "profiled", "--profiles", "none/*.toml"], "'none/*.toml' matches no file"),
        (["--out", "taken"], "--out taken is a file: give a folder"),
        (["--out", "taken/below"], "cannot be written"),
    ],
)
def test_an_impossible_wish(refused, profiled, encoder, tmp_path, arguments, sentence):
    (tmp_path / "taken").write_text("")
    assert sentence.format(model=encoder) in refused(*arguments)


def test_a_folder_without_the_right_to_write(refused, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "cannot be written" in refused("--out", closed / "out")


def test_a_profile_file_that_is_none(refused, profiled, tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text("no number")
    assert "bad.toml: no number" in refused("--devices", profiled, "--profiles", file)


def test_two_profiles_of_one_name(refused, profiled, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.toml").write_text("1e-12")
    assert "two profiles of profiled are called 'mine'" in refused(
        "--devices", profiled, "--profiles", tmp_path / "*" / "mine.toml"
    )


def test_a_model_that_reads_no_text(refused, tmp_path):
    folder = tmp_path / "vision"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    (folder / "model.safetensors").write_bytes(b"")
    assert "reads image, which has no length in tokens" in refused(model=folder)


def test_what_does_not_fit_into_memory_is_refused_without_allocating_it(refused, monkeypatch):
    monkeypatch.setattr(limits, "available_memory", lambda place: 20_000_000)
    message = refused("--devices", "cpu:0", "--lengths", "4,40", "--batches", "1,1000000")
    assert "40 tokens in batches of 1000000 need about" in message
    assert "0.018 GB may be used, and 1 more of the combinations do not fit" in message


def test_the_memory_of_a_workload_holds_its_float64_scores(encoder):
    model = models.load(str(encoder), "float32")
    one, four = (limits.bytes_needed(model, 40, batch, 4) for batch in (1000, 4000))
    scores = 3000 * 4 * 40 * 40 * 8
    assert four - one > scores
    assert one > 2 * sum(p.numel() * p.element_size() for p in model.network.parameters())


def test_positions_behind_the_padding_are_not_counted(tmp_path, save_tokenizer):
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=42,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    transformers.RobertaModel(config).save_pretrained(tmp_path / "roberta")
    save_tokenizer(tmp_path / "roberta")
    model = models.load(str(tmp_path / "roberta"), "float32")
    assert limits.most_tokens(model) == 40
    ids = TextMaker(model, texts.read([])).make(1, 40, "random").ids
    model.network(input_ids=ids)


def test_default_lengths_are_those_that_the_model_takes(encoder, text, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("hal_compare.sweep.run.sweep", lambda plan, *rest, **options: asked.append(plan) or [])
    main(["sweep", str(encoder), "--text", str(text), "--devices", "cpu:0", "--out", str(tmp_path / "out")])
    assert (asked[0].lengths, asked[0].batches) == ([32], [8])


def test_the_memory_that_a_device_says_it_takes_is_added(encoder, device, monkeypatch):
    import attrs

    import hal_core as hal

    name = device("greedy")
    greedy = hal.device(name)
    model = models.load(str(encoder), "float32")
    alone = limits.check_memory(model, [(8, 2)], [4], [])
    backend = limits.registry.backend_of(greedy)
    real = backend.estimate
    monkeypatch.setattr(backend, "estimate", lambda *given: attrs.evolve(real(*given), memory=1 << 20))
    assert limits.check_memory(model, [(8, 2)], [4], [greedy]) == alone + (1 << 20)
