"""Every argument a model may pass to attention: computed, known to change nothing, or refused by name."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import hal_nn
import pytest
import torch
import transformers
from hal_nn.huggingface import IGNORED_ARGUMENTS, REFUSED_ARGUMENTS, attention_forward, attention_mask
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import hal_core as hal
from hal_core import HalError


@pytest.fixture
def tensors(seed):
    """query [2, 4, 6, 8], key and value [2, 2, 6, 8]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, 6, 8, generator=generator) for heads in (4, 2, 2)]


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with hal.use("cpu:0"):
        yield


def layer(**attributes):
    module = torch.nn.Module()
    module.is_causal = False
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def attend(tensors, mask=None, module=None, **arguments):
    return attention_forward(module or layer(), *tensors, mask, **arguments)[0]


def dense(query, key, value, scores_to_weights, scale=None):
    """Attention in float64 with the weights left to the test, [batch, len_q, heads, dim]."""
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), *(t.double().repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return (scores_to_weights(scores) @ value).transpose(1, 2)


def test_importing_the_bridge_registers_attention_and_mask_together():
    hal_nn.register_huggingface()  # the second time, after the import
    assert AttentionInterface._global_mapping["hal"] is attention_forward
    assert AttentionMaskInterface._global_mapping["hal"] is attention_mask


@pytest.mark.parametrize("name", sorted(IGNORED_ARGUMENTS))
def test_an_ignored_argument_changes_nothing(tensors, name):
    assert torch.equal(attend(tensors, **{name: torch.ones(2, 6)}), attend(tensors))


def test_the_ignored_list_is_this_one():
    """A new name needs a reason why attention may ignore it; write it beside the list."""
    assert sorted(IGNORED_ARGUMENTS) == [
        "cache_position",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "input_ids",
        "inputs_embeds",
        "layer_idx",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    ]


@pytest.mark.parametrize("name", sorted(REFUSED_ARGUMENTS))
def test_a_refused_argument_is_named(tensors, name):
    with pytest.raises(HalError, match=name):
        attend(tensors, **{name: torch.ones(1)})
    attend(tensors, **{name: None})


def test_an_unknown_argument_is_refused_by_name(tensors):
    with pytest.raises(HalError, match="'temperature_of_the_day'"):
        attend(tensors, temperature_of_the_day=0.0)
    attend(tensors, temperature_of_the_day=None)


def test_output_attentions_is_refused(tensors):
    with pytest.raises(HalError, match="output_attentions"):
        attend(tensors, output_attentions=True)
    attend(tensors, output_attentions=False)


def test_output_attentions_is_refused_from_a_models_call(pair):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=10
    )
    _, ours = pair(transformers.BertModel, config)
    with pytest.raises(HalError, match="output_attentions"):
        ours(torch.ones(1, 3, dtype=torch.long), output_attentions=True)


def test_every_argument_that_a_model_of_transformers_passes_is_known():
    """Read out of the installed models' sources: a name is a parameter, ignored, or refused with advice of its own."""
    known = {*inspect.signature(attention_forward).parameters, *IGNORED_ARGUMENTS, *REFUSED_ARGUMENTS}
    unknown: dict[str, str] = {}
    for source in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        text = source.read_text(encoding="utf-8")
        if "attention_interface(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attention_interface":
                unknown |= {k.arg: source.stem for k in node.keywords if k.arg and k.arg not in known}
    assert not unknown


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
def test_softcap_comes_before_the_mask(tensors, error, mask):
    allowed = torch.ones(6, 6, dtype=torch.bool).tril() if mask != "none" else torch.ones(6, 6, dtype=torch.bool)
    given = {"boolean": allowed, "additive": torch.zeros(6, 6).masked_fill(~allowed, float("-inf"))}.get(mask)
    got = attend(tensors, given, layer(is_causal=mask == "causal"), softcap=0.7, scaling=1.3)

    def weights(scores):
        return (0.7 * torch.tanh(scores / 0.7)).masked_fill(~allowed, float("-inf")).softmax(-1)

    assert error(got, dense(*tensors, weights, scale=1.3)) <= 1e-5


@pytest.mark.parametrize("name", ["s_aux", "sinks"])
def test_sinks_take_weight_and_give_gradients(tensors, error, seed, name):
    sink = torch.randn(4, generator=torch.Generator().manual_seed(seed)) * 2
    if name == "sinks":
        sink = sink.view(1, 4, 1, 1) * torch.linspace(0.5, 1.5, 6).view(1, 1, 6, 1).expand(2, 4, 6, 1)
    mine, theirs = sink.clone().requires_grad_(), sink.double().requires_grad_()
    got = attend(tensors, module=layer(is_causal=True), **{name: mine})

    def weights(scores):
        causal = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), float("-inf"))
        column = theirs.view(1, 4, 1, 1).expand(2, 4, 6, 1) if name == "s_aux" else theirs
        return torch.cat([causal, column], -1).softmax(-1)[..., :-1]

    want = dense(*tensors, weights)
    assert error(got, want) <= 1e-5
    (got.double() ** 2).sum().backward()
    (want**2).sum().backward()
    assert error(mine.grad, theirs.grad) <= 1e-5


def test_a_row_that_reads_no_key_is_zero_with_and_without_sinks(tensors):
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[0, :, 2] = False
    for options in ({}, {"s_aux": torch.zeros(4)}):
        out = attend(tensors, mask, **options)
        assert torch.equal(out[0, 2], torch.zeros_like(out[0, 2]))
        assert out.isfinite().all()


@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
@pytest.mark.parametrize("causal", [False, True])
def test_position_bias_is_added_and_gets_its_gradient(tensors, error, seed, mask, causal):
    bias = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
    mine, theirs = bias.clone().requires_grad_(), bias.double().requires_grad_()
    allowed = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    allowed[0, ..., 4:] = mask == "none"
    given = {"boolean": allowed, "additive": torch.zeros(2, 1, 6, 6).masked_fill(~allowed, float("-inf"))}.get(mask)
    got = attend(tensors, given, layer(is_causal=causal), position_bias=mine)
    if causal and mask == "none":  # with a mask, causality is in the mask, as in transformers
        allowed = allowed & torch.ones(6, 6, dtype=torch.bool).tril()
    want = dense(*tensors, lambda scores: (scores + theirs).masked_fill(~allowed, float("-inf")).softmax(-1))
    assert error(got, want) <= 1e-5
    (got.double() ** 2).sum().backward()
    (want**2).sum().backward()
    assert error(mine.grad, theirs.grad) <= 1e-5


@pytest.mark.parametrize("len_q", [6, 1])
def test_a_sliding_window_without_a_mask_is_applied(tensors, error, len_q):
    query, key, value = tensors
    got = attend([query[:, :, -len_q:], key, value], module=layer(is_causal=True), sliding_window=3)
    i, j = torch.arange(6 - len_q, 6)[:, None], torch.arange(6)
    allowed = (j <= i) & (j > i - 3)
    want = dense(query[:, :, -len_q:], key, value, lambda s: s.masked_fill(~allowed, float("-inf")).softmax(-1))
    assert error(got, want) <= 1e-5


def test_a_sliding_window_with_a_mask_is_the_masks(tensors):
    mask = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)
    with_window = attend(tensors, mask, layer(is_causal=True), sliding_window=3)
    assert torch.equal(with_window, attend(tensors, mask, layer(is_causal=True)))


def test_a_window_around_each_row_without_a_mask_is_refused(tensors):
    with pytest.raises(HalError, match="sliding_window 3"):
        attend(tensors, sliding_window=3)
    assert torch.equal(attend(tensors, sliding_window=6), attend(tensors)), (
        "a window that holds all keys changes nothing"
    )


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_do_not_see_each_other(error, seed, causal):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    ends = torch.tensor([0, 2, 3, 9])
    options = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    got = attend([query, key, value], module=layer(is_causal=causal), **options)
    sized = attend([query, key, value], module=layer(is_causal=causal), **options, max_length_q=6, max_length_k=6)
    owner = torch.bucketize(torch.arange(9), ends[1:], right=True)
    allowed = owner[:, None] == owner
    if causal:
        allowed = allowed.tril()
    want = dense(query, key, value, lambda s: s.masked_fill(~allowed, float("-inf")).softmax(-1))
    assert error(got, want) <= 1e-5
    assert torch.equal(got, sized)


def test_packed_sequences_with_a_mask_or_by_halves_are_refused(tensors):
    ends = torch.tensor([0, 6])
    with pytest.raises(HalError, match="pass both"):
        attend(tensors, cu_seq_lens_q=ends)
    with pytest.raises(HalError, match="attention_mask"):
        attend(tensors, torch.ones(6, 6, dtype=torch.bool), cu_seq_lens_q=ends, cu_seq_lens_k=ends)


def test_packed_position_ids_do_not_leak_between_sequences(pair, error):
    """transformers turns them into a mask, which is marked with their limits."""
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=32,
        vocab_size=20,
        initializer_range=0.3,
    )
    eager, ours = pair(transformers.LlamaForCausalLM, config)
    ids, positions = torch.arange(1, 9)[None], torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        got = ours(ids, position_ids=positions, use_cache=False).logits
        alone = ours(ids[:, 3:], use_cache=False).logits
        assert error(got, eager(ids, position_ids=positions, use_cache=False).logits) <= 1e-5
    assert error(got[:, 3:], alone) <= 1e-5


@pytest.mark.parametrize("mask", ["none", "causal", "boolean", "additive"])
def test_indices_leave_each_row_the_keys_that_the_mask_allows_too(tensors, error, seed, mask):
    indices = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :3]
    indices[..., 0] = 0  # a key for every row
    allowed = torch.ones(6, 6, dtype=torch.bool)
    allowed = allowed if mask == "none" else allowed.tril()
    given = {"boolean": allowed, "additive": torch.zeros(6, 6).masked_fill(~allowed, float("-inf"))}.get(mask)
    got = attend(tensors, given, layer(is_causal=mask == "causal"), indices=indices)
    chosen = torch.zeros(2, 1, 6, 6, dtype=torch.bool).scatter(-1, indices[:, None], True) & allowed
    want = dense(*tensors, lambda scores: scores.masked_fill(~chosen, float("-inf")).softmax(-1))
    assert error(got, want) <= 1e-5


def test_deterministic_reaches_the_request(tensors, monkeypatch):
    seen, real = [], hal.attention
    monkeypatch.setattr(hal, "attention", lambda *args, **options: seen.append(options) or real(*args, **options))
    attend(tensors, deterministic=True)
    attend(tensors, deterministic=False)
    assert [options.get("deterministic") for options in seen] == [True, None]


def masks_of(config, ids, mask, cache=None):
    embeds = torch.zeros(*ids.shape, 8)
    return masking_utils.create_causal_mask(config, embeds, mask, cache)


def test_masks_are_made_only_where_they_say_something():
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=20
    )
    config._attn_implementation = "hal"
    ids = torch.ones(2, 5, dtype=torch.long)
    padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert masks_of(config, ids, None) is None
    assert masks_of(config, ids, torch.ones_like(ids)) is None
    assert masks_of(config, ids, padded).shape == (2, 1, 5, 5)
    cache = transformers.DynamicCache()
    cache.update(torch.zeros(2, 4, 4, 8), torch.zeros(2, 4, 4, 8), 0)
    step = masks_of(config, ids[:, :1], padded, cache)
    assert step.dtype == torch.bool
    assert step.shape == (2, 1, 1, 5)
    assert step[:, 0, 0].tolist() == padded.bool().tolist()
    assert masks_of(config, ids[:, :1], torch.ones_like(ids), cache) is None


def test_an_encoders_padding_mask_has_one_row():
    config = SimpleNamespace(_attn_implementation="hal")
    padded = torch.tensor([[1, 1, 0], [1, 1, 1]])
    mask = masking_utils.create_bidirectional_mask(config, torch.zeros(2, 3, 8), padded)
    assert mask.tolist() == padded.bool()[:, None, None].tolist()
    assert masking_utils.create_bidirectional_mask(config, torch.zeros(2, 3, 8), torch.ones_like(padded)) is None


def test_heads_are_not_repeated_for_a_grouped_decoding_step(tensors):
    query, key, value = tensors
    with hal.meter() as meter:
        attend([query[:, :, :1], key, value], torch.ones(2, 1, 1, 6, dtype=torch.bool))
    assert meter.records["cpu:0"].calls == 1
    decision = hal.explain(query[:, :, :1], key, value, torch.ones(2, 1, 1, 6, dtype=torch.bool), enable_gqa=True)
    assert (decision.request.heads_q, decision.request.heads_kv) == (4, 2)


def test_set_device_sends_a_part_of_a_model_elsewhere_and_back(pair, device, tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, vocab_size=20
    )
    _, ours = pair(transformers.LlamaForCausalLM, config)
    other = device("elsewhere")
    ids = torch.arange(1, 7)[None]

    def where():
        with torch.no_grad(), hal.meter() as meter:
            ours(ids)
        return {name: record.calls for name, record in meter.records.items()}

    assert where() == {"cpu:0": 3}
    assert hal_nn.set_device(ours.model.layers[1], other) is ours.model.layers[1]
    assert where() == {"cpu:0": 2, other: 1}
    hal_nn.set_device(ours, None)
    assert where() == {"cpu:0": 3}
    with pytest.raises(HalError, match="nowhere"):
        hal_nn.set_device(ours, "nowhere:0")
    assert where() == {"cpu:0": 3}


def test_a_device_that_cannot_is_refused_and_nothing_else_runs(pair, device):
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=20
    )
    _, ours = pair(transformers.BertModel, config)
    bare = device("bare", masks=frozenset({hal.MaskKind.NONE}))
    with hal.use(bare), hal.meter() as meter, pytest.raises(hal.UnsupportedError, match="boolean"):
        ours(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 1, 0]]))
    assert not meter.records


def test_both_sinks_are_refused(tensors):
    with pytest.raises(HalError, match="s_aux and sinks"):
        attend(tensors, s_aux=torch.zeros(4), sinks=torch.zeros(2, 4, 6, 1))


def test_an_empty_static_cache_is_not_read(tensors, monkeypatch):
    """The prompt's attention: causal, without a mask, with more keys than queries because the cache is longer."""
    query, key, value = tensors
    want = attend([query[:, :, :4], key[:, :, :4], value[:, :, :4]], module=layer(is_causal=True))
    lengths, real = [], hal.attention

    def spy(query, key, value, *arguments, **options):
        lengths.append((key.shape[2], value.shape[2]))
        return real(query, key, value, *arguments, **options)

    monkeypatch.setattr(hal, "attention", spy)
    assert torch.equal(attend([query[:, :, :4], key, value], module=layer(is_causal=True)), want)
    assert lengths == [(4, 4)]
