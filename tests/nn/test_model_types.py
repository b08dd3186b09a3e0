"""Every model type of transformers that a tiny config can build: equal to eager, or refused by name; none in silence.

`model_types.json` is the table, written by `python tests/nn/survey.py`.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parent))

import survey
import tiny_inputs
import tiny_models

WRITTEN = json.loads(survey.TABLE.read_text(encoding="utf-8"))
TYPES = WRITTEN["types"]
SAME_VERSION = WRITTEN["transformers"] == transformers.__version__
PARTS = 20

#: One of each way to attention, and of each that needed care.
FAMILIES = [
    "llama",  # a decoder
    "bert",  # an encoder
    "t5",  # position bias, cross attention
    "gemma3n_text",  # windows
    "gpt_oss",  # sinks
    "whisper",  # audio
    "clip",  # text and vision
    "deepseek_v32",  # sparse attention by key indices
    "deepseek_v4",  # compressed keys behind the mask
    "nllb-moe",  # decoder layers that say they are not causal
    "clap_text_model",  # encoder layers that do not say
    "phi4_multimodal_vision",  # encoder layers that say they are causal; a pooling head on torch
    "maskformer",  # a backbone on torch
    "mamba",  # no attention
    "bloom",  # no attention interface
    "git",  # a table of attention classes
    "longt5",  # layers of its own beside the interface
]


@pytest.fixture(autouse=True)
def _quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(before)


def test_the_table_has_every_type_and_none_differs():
    counts = Counter(row["result"] for row in TYPES.values())
    assert counts == {"equal": 458, "refused": 132, "cannot be built": 214}
    assert sum(1 for row in TYPES.values() if row.get("generate")) == 214
    assert sum(1 for row in TYPES.values() if row.get("backward")) == 458
    assert all(row["reason"] for row in TYPES.values() if row["result"] != "equal")
    if SAME_VERSION:
        assert sorted(TYPES) == tiny_models.model_types()


def test_what_is_refused_is_converted_or_the_table_says_why():
    made = Counter(row["converted"].partition(":")[0] for row in TYPES.values() if row["result"] == "refused")
    assert made == {"equal": 89, "partly": 7, "nothing": 10, "refused": 1, "not tried": 25}
    assert all(row["result"] == "refused" for row in TYPES.values() if "converted" in row)
    assert all(
        row["converted"].partition(": ")[2] for row in TYPES.values() if row.get("converted", "equal") != "equal"
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_is_as_the_table_says(model_type):
    assert survey.check(model_type) == TYPES[model_type]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_type_is_as_the_table_says(part):
    if not SAME_VERSION:
        pytest.skip(f"the table is of transformers {WRITTEN['transformers']}: write it anew")
    wrong = {}
    for model_type in tiny_models.model_types()[part::PARTS]:
        found, written = survey.check(model_type), TYPES[model_type]
        built = written["result"] != "cannot be built"  # another machine may have a library that this type needs
        if found["result"] == "different" or (built and found != written):
            wrong[model_type] = (found, written)
    assert not wrong


def test_the_survey_sees_a_wrong_result(monkeypatch):
    """Attention without its mask, in a decoder and an encoder: the walk must not call that equal."""
    from hal_nn import huggingface
    from transformers import AttentionInterface

    def without_mask(module, query, key, value, attention_mask, **arguments):
        return huggingface.attention_forward(module, query, key, value, None, **arguments)

    monkeypatch.setattr(survey.hal_nn, "register_huggingface", lambda: None)
    monkeypatch.setitem(AttentionInterface._global_mapping, "hal", without_mask)
    for model_type in ("llama", "bert"):
        row = survey.check(model_type)
        assert row["result"] == "different"
        assert row["reason"].startswith("forward")


def test_the_survey_sees_attention_on_torch_in_silence(monkeypatch):
    from hal_nn import model_check

    monkeypatch.setattr(model_check, "_computes_attention", lambda kind: False)
    monkeypatch.setattr(model_check, "_warn", lambda *_: None)
    row = survey.check("longt5")
    assert row["reason"] == "in silence on torch: LongT5LocalAttention"


def _failing_on_hal(monkeypatch, error):
    build = tiny_models.build

    def failing(model_type, attention, seed, choice):
        if attention == "hal":
            raise error
        return build(model_type, attention, seed, choice)

    monkeypatch.setattr(tiny_models, "build", failing)


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize(
    ("error", "result"),
    [
        (TimeoutError("over 60 s"), "not finished"),
        (MemoryError("out of memory"), "not finished"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "not finished"),
        (KeyError("hal"), "different"),
    ],
)
def test_a_failure_of_hals_model_is_not_said_of_eager(monkeypatch, runs, error, result):
    """Whether or not eager runs on inputs that are known here, as long as it can be built."""
    if not runs:
        monkeypatch.setattr(tiny_inputs, "inputs", lambda *_: {})
    _failing_on_hal(monkeypatch, error)
    row = survey.check("bert")
    assert (row["result"], row["class"]) == (result, "BertLMHeadModel")
    assert row["reason"].startswith(type(error).__name__)


def test_a_refused_type_that_eager_does_not_run_says_why(monkeypatch):
    def unknown(*_):
        raise tiny_models.CannotBuildError("no inputs known for ['anything']")

    monkeypatch.setattr(tiny_inputs, "inputs", unknown)
    row = survey.check("bloom")
    assert (row["result"], row["converted"]) == ("refused", "not tried: no inputs known for ['anything']")


def test_a_conversion_over_the_limits_is_not_called_different(monkeypatch):
    def slow(*_):
        raise TimeoutError("over 60 s")

    monkeypatch.setattr(survey.hal_nn, "convert", slow)
    assert survey.check("bloom")["converted"] == "not finished: TimeoutError: over 60 s"
