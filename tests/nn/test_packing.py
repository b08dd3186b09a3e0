"""Sequences packed into one row, as `DataCollatorWithFlattening` gives them: each as if it were alone."""

from __future__ import annotations

import pytest
import torch
import transformers

import hal_core as hal
from hal_core import HalError

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 30,
    "initializer_range": 0.3,
}
MODELS = [
    (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SMALL)),
    (transformers.MistralForCausalLM, transformers.MistralConfig(**SMALL, sliding_window=3)),
]
TEXTS = [list(range(3, 9)), list(range(11, 13)), list(range(15, 24))]


def packed(**options):
    collator = transformers.DataCollatorWithFlattening(return_tensors="pt", **options)
    return dict(collator([{"input_ids": text} for text in TEXTS]))


@pytest.fixture
def calls(monkeypatch):
    """The options of every call of hal.attention."""
    seen, real = [], hal.attention
    monkeypatch.setattr(hal, "attention", lambda *args, **options: seen.append(options) or real(*args, **options))
    return seen


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(("kind", "config"), MODELS)
def test_packed_sequences_are_each_as_if_alone(pair, error, calls, kind, config, flash, use_cache):
    """With a cache, which is a model's default, eager lets them read each other."""
    eager, ours = pair(kind, config)
    options = {} if use_cache is None else {"use_cache": use_cache}
    with torch.no_grad(), hal.use("cpu:0"):
        got = ours(**packed(return_flash_attn_kwargs=flash), **options).logits
    assert [len(one["cu_seqlens_q"]) for one in calls] == [len(TEXTS) + 1] * SMALL["num_hidden_layers"]
    start = 0
    for text in TEXTS:
        with torch.no_grad():
            want = eager(torch.tensor([text])).logits
        assert error(got[:, start : start + len(text)], want) <= 1e-5
        start += len(text)


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(("kind", "config"), MODELS)
def test_training_on_packed_sequences_gives_eager_gradients(pair, error, kind, config, flash):
    eager, ours = (model.train() for model in pair(kind, config))
    batch = packed(return_flash_attn_kwargs=flash)
    with hal.use("cpu:0"):
        ours(**batch).loss.backward()
    eager(**packed(), use_cache=False).loss.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert error(mine.grad, theirs.grad) <= 2e-5, name


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize(("kind", "config"), MODELS)
def test_a_device_without_packed_sequences_gets_the_mask(pair, error, device, kind, config, use_cache):
    features = frozenset({"grouped_heads", "lse", "backward"})
    name = device("dense", features=features)
    _, ours = pair(kind, config)
    options = {} if use_cache is None else {"use_cache": use_cache}
    with torch.no_grad():
        with hal.use("cpu:0"):
            want = ours(**packed(), **options).logits
        with hal.use(name), hal.meter() as meter:
            got = ours(**packed(), **options).logits
    assert meter.records[name].calls == SMALL["num_hidden_layers"]
    assert error(got, want) <= 1e-5


def test_limits_that_contradict_the_positions_are_refused(pair):
    _, ours = pair(*MODELS[0])
    batch = packed(return_flash_attn_kwargs=True)
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.tensor([0, 7, 17], dtype=torch.int32)
    with pytest.raises(
        HalError, match=r"cu_seq_lens_q \[0, 7, 17\] and position_ids, which start again at \[0, 6, 8, 17\]"
    ):
        ours(**batch, use_cache=False)


def test_positions_that_do_not_start_again_change_nothing(pair, calls):
    _, ours = pair(*MODELS[0])
    with torch.no_grad(), hal.use("cpu:0"):
        ours(torch.tensor([TEXTS[0]]), position_ids=torch.arange(4, 10)[None])
    assert all("cu_seqlens_q" not in one and one["is_causal"] for one in calls)


def test_positions_that_are_written_to_are_read_again(pair, error):
    _, ours = pair(*MODELS[0])
    ids, positions = torch.tensor([TEXTS[0]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad(), hal.use("cpu:0"):
        apart = ours(ids, position_ids=positions).logits
        positions.copy_(torch.arange(6)[None])
        together = ours(ids, position_ids=positions).logits
        assert error(together, ours(ids).logits) <= 1e-5
        assert error(apart[:, 3:], ours(ids[:, 3:]).logits) <= 1e-5
