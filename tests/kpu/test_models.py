"""Models for reports: every named configuration runs, folders load from disk, and what is no model is refused in a
sentence.
"""

from __future__ import annotations

import pytest
import torch
from hal_kpu.frontend.models import CONFIGURATIONS, load_model

from hal_core.errors import HalError

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_named_configuration_runs(name):
    model = load_model(name, length=9, batch=2)
    with torch.no_grad():
        first = model.network(**model.inputs)[0]
    assert first.shape[0] == 2
    assert bool(first.isfinite().all())
    assert not model.network.training


def test_the_same_seed_gives_the_same_weights_and_inputs():
    one, two, other = load_model("llama"), load_model("llama"), load_model("llama", seed=1)
    for a, b in zip(one.network.parameters(), two.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.inputs["input_ids"], two.inputs["input_ids"])
    assert not torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])


def test_a_folder_is_loaded_with_its_own_weights(tmp_path):
    kept = load_model("gpt2", seed=3)
    kept.network.save_pretrained(tmp_path)
    found = load_model(str(tmp_path), length=5)
    assert type(found.network) is type(kept.network)
    assert torch.equal(found.network.transformer.wte.weight, kept.network.transformer.wte.weight)
    assert found.inputs["input_ids"].shape == (1, 5)


def test_what_is_no_model_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(HalError, match="no model 'berd': give a folder"):
        load_model("berd")
    with pytest.raises(HalError, match="holds no model"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(HalError, match="repair or replace"):
        load_model(str(tmp_path))
    with pytest.raises(HalError, match="use 1 or more"):
        load_model("bert", length=0)
