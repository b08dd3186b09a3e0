"""Models on attn_implementation="hal" against their own eager attention: logits, generated tokens, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import hal_core as hal

LAYERS = 2
#: Weights are drawn wide, so that attention has a large part in the logits: with the usual 0.02 a wrong mask would
#: pass.
WIDE = 0.3
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
    "initializer_range": WIDE,
}
GREEDY = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": None}
BERT = transformers.BertConfig(**SMALL, max_position_embeddings=64)
LLAMA = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
GPT2 = transformers.GPT2Config(
    n_embd=64,
    n_layer=LAYERS,
    n_head=4,
    vocab_size=128,
    n_positions=64,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=WIDE,
)
T5 = transformers.T5Config(
    d_model=64,
    d_kv=16,
    num_layers=LAYERS,
    num_heads=4,
    d_ff=96,
    vocab_size=128,
    decoder_start_token_id=0,
)
CAUSAL = [(transformers.LlamaForCausalLM, LLAMA), (transformers.GPT2LMHeadModel, GPT2)]


def draw(seed: int, padding: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [3, 11] and their mask, two rows padded on one side."""
    ids = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :5] = mask[2, :2] = 0
    if padding == "right":
        mask[0, -5:] = mask[2, -2:] = 0
    return ids, mask


def calls(meter: hal.context.Meter) -> int:
    """Attention calls, all of them on the CPU device."""
    assert set(meter.records) == {"cpu:0"}
    return meter.records["cpu:0"].calls


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_bert_agrees_with_eager(pair, error, seed, padding):
    eager, ours = pair(transformers.BertModel, BERT)
    ids, mask = draw(seed, padding)
    with torch.no_grad(), hal.use("cpu:0"), hal.meter() as meter:
        got = ours(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        assert calls(meter) == LAYERS
        want = eager(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert calls(meter) == LAYERS, "the eager model ran hal's attention: the two share a config"
    assert 0 < error(got, want) <= 1e-5


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(("kind", "config"), CAUSAL)
def test_decoders_agree_with_eager(pair, error, seed, kind, config, padding):
    eager, ours = pair(kind, config)
    ids, mask = draw(seed, padding)
    with torch.no_grad(), hal.use("cpu:0"), hal.meter() as meter:
        got, want = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (ours, eager))
    assert calls(meter) == LAYERS
    assert error(got, want) <= 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(("kind", "config"), CAUSAL)
def test_generate_gives_equal_tokens(pair, seed, kind, config, padding, cache):
    eager, ours = pair(kind, config)
    ids, mask = draw(seed, padding)
    options = {**GREEDY, "attention_mask": mask, "cache_implementation": None if cache == "dynamic" else cache}
    with hal.use("cpu:0"), hal.meter() as meter:
        got = ours.generate(ids, **options)
    assert calls(meter) == LAYERS * GREEDY["max_new_tokens"]
    assert got.tolist() == eager.generate(ids, **options).tolist()


@pytest.mark.parametrize("padding", [None, "left"])
def test_beams_and_continued_caches_give_equal_tokens(pair, seed, padding):
    eager, ours = pair(transformers.LlamaForCausalLM, LLAMA)
    ids, mask = draw(seed, padding)
    with hal.use("cpu:0"):
        got = ours.generate(ids, attention_mask=mask, num_beams=3, **GREEDY)
    assert got.tolist() == eager.generate(ids, attention_mask=mask, num_beams=3, **GREEDY).tolist()


def test_a_prompt_in_two_parts_equals_the_whole(pair, error, seed):
    """The second part has more keys than queries: causal attention must not start from the top left."""
    _, ours = pair(transformers.LlamaForCausalLM, LLAMA)
    ids, mask = draw(seed, None)
    with torch.no_grad(), hal.use("cpu:0"):
        first = ours(ids[:, :6], use_cache=True)
        second = ours(ids[:, 6:], past_key_values=first.past_key_values, attention_mask=mask).logits
        whole = ours(ids).logits
    assert error(second, whole[:, 6:]) <= 1e-5


def test_t5_agrees_with_eager_in_encoder_decoder_and_cross_attention(pair, error, seed):
    eager, ours = pair(transformers.T5ForConditionalGeneration, T5)
    ids, mask = draw(seed, "right")
    target = torch.randint(3, 128, (3, 7), generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad(), hal.use("cpu:0"), hal.meter() as meter:
        got, want = (m(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits for m in (ours, eager))
    assert calls(meter) == 3 * LAYERS
    assert error(got, want) <= 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_t5_generates_equal_tokens(pair, seed, cache):
    eager, ours = pair(transformers.T5ForConditionalGeneration, T5)
    ids, mask = draw(seed, "right")
    options = {**GREEDY, "attention_mask": mask, "cache_implementation": None if cache == "dynamic" else cache}
    with hal.use("cpu:0"), hal.meter() as meter:
        got = ours.generate(ids, **options)
    assert calls(meter) == LAYERS + 2 * LAYERS * GREEDY["max_new_tokens"]
    assert got.tolist() == eager.generate(ids, **options).tolist()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (transformers.BertForMaskedLM, BERT),
        *CAUSAL,
        (transformers.T5ForConditionalGeneration, T5),
    ],
)
def test_training_gives_eager_gradients(pair, error, seed, kind, config):
    """Every parameter, T5's relative position bias included, which reaches attention as an additive mask."""
    config = copy.deepcopy(config)
    for name in vars(config):
        if "dropout" in name or name.endswith("pdrop"):
            setattr(config, name, 0.0)
    eager, ours = (model.train() for model in pair(kind, config))
    ids, mask = draw(seed, "right")
    labels = ids.masked_fill(mask == 0, -100)
    with hal.use("cpu:0"), hal.meter() as meter:
        for model in (ours, eager):
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    assert calls(meter) >= LAYERS
    compared = 0
    for (name, mine), theirs in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None and float(theirs.grad.norm()) > 1e-6:
            assert error(mine.grad, theirs.grad) <= 2e-5, name
            compared += 1
    assert compared > 10


def test_dropout_in_training_is_applied_and_repeatable(seed, pair):
    config = transformers.BertConfig(**SMALL, attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0)
    _, ours = pair(transformers.BertModel, config)
    ids, _ = draw(seed, None)
    ours.train()
    outputs = []
    with torch.no_grad(), hal.use("cpu:0"):
        for number in (0, 0, 1):
            torch.manual_seed(number)
            outputs.append(ours(ids).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


MISTRAL = transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5, bos_token_id=1, eos_token_id=2)
GEMMA2 = transformers.Gemma2Config(
    **SMALL,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=5,
    attn_logit_softcapping=2.0,
    query_pre_attn_scalar=16,
    bos_token_id=1,
    eos_token_id=2,
)
GPT_OSS = transformers.GptOssConfig(
    **SMALL,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=5,
    num_local_experts=2,
    num_experts_per_tok=1,
    bos_token_id=1,
    eos_token_id=2,
)
SPECIAL = [
    (transformers.MistralForCausalLM, MISTRAL),  # a sliding window
    (transformers.Gemma2ForCausalLM, GEMMA2),  # softcap, and a window in every second layer
    (transformers.GptOssForCausalLM, GPT_OSS),  # attention sinks
]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(("kind", "config"), SPECIAL)
def test_windows_softcaps_and_sinks_agree_with_eager(pair, error, seed, kind, config, padding):
    eager, ours = pair(kind, config)
    with torch.no_grad():
        for model in (eager, ours):
            for name, parameter in model.named_parameters():
                if "sinks" in name:
                    parameter.copy_(torch.linspace(-1, 2, len(parameter)))
                if "q_proj" in name and parameter.ndim == 2:
                    parameter.mul_(30)  # scores large enough for the softcap to bite
    ids, mask = draw(seed, padding)
    with torch.no_grad(), hal.use("cpu:0"), hal.meter() as meter:
        got, want = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (ours, eager))
    assert calls(meter) == LAYERS
    assert error(got, want) <= 1e-5
    with hal.use("cpu:0"):
        tokens = ours.generate(ids, attention_mask=mask, **GREEDY)
    assert tokens.tolist() == eager.generate(ids, attention_mask=mask, **GREEDY).tolist()


def test_autocast_gives_bfloat16_attention_as_sdpa_does(pair, error, seed):
    eager, ours = pair(transformers.LlamaForCausalLM, LLAMA)
    ids, mask = draw(seed, "left")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), hal.use("cpu:0"):
        got, want = (model(ids, attention_mask=mask).logits[mask.bool()] for model in (ours, eager))
    assert got.dtype == torch.bfloat16
    assert error(got, want) <= 3e-2
