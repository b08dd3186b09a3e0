"""Models whose layers have a sliding window: the device gets the window, not a mask of every pair."""

from __future__ import annotations

import pytest
import torch
import transformers

import hal_core as hal

SMALL = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 30,
    "initializer_range": 0.3,
    "sliding_window": 5,
}
MODELS = [
    (transformers.MistralForCausalLM, transformers.MistralConfig(**SMALL, num_hidden_layers=2), 2),
    (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**SMALL, num_hidden_layers=6, head_dim=8), 5),
]
LENGTH = 12


@pytest.fixture
def calls(monkeypatch):
    """The mask and the options of every call of hal.attention."""
    seen, real = [], hal.attention

    def attention(query, key, value, mask=None, *args, **options):
        seen.append((mask, options))
        return real(query, key, value, mask, *args, **options)

    monkeypatch.setattr(hal, "attention", attention)
    return seen


def windows(calls):
    return [options.get("window") for mask, options in calls if mask is None and options.get("window")]


def tokens():
    return torch.randint(0, SMALL["vocab_size"], (2, LENGTH))


@pytest.mark.parametrize("mask", ["none", "ones"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("kind", "config", "layers"), MODELS)
def test_a_window_takes_the_place_of_its_mask_in_training(pair, error, calls, kind, config, layers, use_cache, mask):
    eager, ours = (model.train() for model in pair(kind, config))
    ids = tokens()
    batch = {"input_ids": ids, "labels": ids} | ({"attention_mask": torch.ones_like(ids)} if mask == "ones" else {})
    with hal.use("cpu:0"):
        ours(**batch, use_cache=use_cache).loss.backward()
    assert windows(calls) == [(SMALL["sliding_window"] - 1, 0)] * layers
    assert all(mask is None for mask, _ in calls)
    eager(**batch, use_cache=use_cache).loss.backward()
    for (name, mine), theirs in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert error(mine.grad, theirs.grad) <= 2e-5, name


@pytest.mark.parametrize(("kind", "config", "layers"), MODELS)
def test_padding_keeps_the_mask(pair, error, calls, kind, config, layers):
    eager, ours = pair(kind, config)
    ids, padding = tokens(), torch.ones(2, LENGTH, dtype=torch.long)
    padding[1, :3] = 0
    with torch.no_grad():
        with hal.use("cpu:0"):
            got = ours(ids, attention_mask=padding).logits
        want = eager(ids, attention_mask=padding).logits
    assert windows(calls) == []
    assert error(got[padding == 1], want[padding == 1]) <= 1e-5


@pytest.mark.parametrize(("kind", "config", "layers"), MODELS)
def test_tokens_after_a_long_prompt_read_their_window(pair, error, kind, config, layers):
    eager, ours = pair(kind, config)
    ids = tokens()
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with hal.use("cpu:0"):
        got = ours.generate(ids, **options)
    want = eager.generate(ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert error(torch.stack(got.logits), torch.stack(want.logits)) <= 1e-5


@pytest.mark.parametrize(("kind", "config", "layers"), MODELS)
def test_a_device_without_windows_gets_the_mask(pair, error, device, kind, config, layers):
    name = device("dense", features=frozenset({"grouped_heads", "lse", "backward"}))
    eager, ours = pair(kind, config)
    ids = tokens()
    with torch.no_grad():
        want = eager(ids).logits
        with hal.use(name):
            got = ours(ids).logits
    assert error(got, want) <= 1e-5


def test_a_mask_that_was_written_to_is_applied_as_it_is(calls):
    import hal_nn.huggingface as bridge

    config = MODELS[0][1]
    config._attn_implementation = "hal"
    hidden = torch.zeros(1, LENGTH, 32)
    mask = transformers.masking_utils.create_sliding_window_causal_mask(
        config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None, position_ids=None
    )
    query = torch.randn(1, 4, LENGTH, 8)
    bridge.attention_forward(torch.nn.Module(), query, query, query, mask)
    assert windows(calls) == [(SMALL["sliding_window"] - 1, 0)]
    mask[..., 0] = False
    bridge.attention_forward(torch.nn.Module(), query, query, query, mask)
    assert len(windows(calls)) == 1
    assert calls[-1][0] is mask
