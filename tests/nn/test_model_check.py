"""A model whose attention hal does not run is refused when it is built, or named when it is called for a device."""

from __future__ import annotations

import copy
import warnings

import hal_nn
import pytest
import torch
import transformers
from hal_nn import model_check
from hal_nn.model_check import CallWarning, PartWarning
from transformers import PreTrainedModel

import hal_core as hal
from hal_core import HalError

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 20}
LLAMA = transformers.LlamaConfig(**SMALL)
IDS = torch.arange(3, 9)[None]

REFUSED = [
    (transformers.BloomForCausalLM, transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=20)),
    (transformers.MptForCausalLM, transformers.MptConfig(d_model=32, n_layers=1, n_heads=4, vocab_size=20)),
    (transformers.RoFormerModel, transformers.RoFormerConfig(**SMALL)),
    (transformers.LongformerModel, transformers.LongformerConfig(**SMALL, attention_window=[4])),
    (transformers.BlipTextModel, transformers.BlipTextConfig(**SMALL)),
    (transformers.GPTJModel, transformers.GPTJConfig(n_embd=32, n_layer=1, n_head=4, rotary_dim=4, vocab_size=20)),
    (transformers.FalconModel, transformers.FalconConfig(**SMALL)),
]


def build(kind, config, attention):
    """A model with random weights and a config of its own."""
    torch.manual_seed(0)
    own = copy.deepcopy(config)
    own._attn_implementation = attention
    return kind(own).eval()


@pytest.fixture(autouse=True)
def _registered():
    yield
    hal.configure()
    hal_nn.register_huggingface()


def call(model, *arguments, **options):
    """The CallWarnings of a model's call."""
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always", CallWarning)
        model(*arguments, **options)
    return [str(one.message) for one in said if one.category is CallWarning]


@pytest.mark.parametrize(("kind", "config"), REFUSED)
def test_a_model_without_the_interface_is_refused_when_it_is_built(kind, config):
    with pytest.raises(HalError, match=r"cannot run on hal: its code computes attention itself") as caught:
        build(kind, config, "hal")
    assert "attn_implementation='" in str(caught.value)
    build(kind, config, "eager")


def test_a_table_of_attention_classes_refuses_in_a_sentence():
    """transformers alone raises KeyError: 'hal'."""
    config = transformers.GitConfig(**SMALL)
    with pytest.raises(HalError, match=r"GitModel.* picks its attention class from GIT_SELF_ATTENTION_CLASSES"):
        build(transformers.GitModel, config, "hal")
    build(transformers.GitModel, config, "eager")


def test_a_layer_that_computes_attention_itself_is_named():
    config = transformers.LongT5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=20)
    with pytest.raises(HalError, match="LongT5Stack cannot run on hal: LongT5LocalAttention in it computes"):
        build(transformers.LongT5Model, config, "hal")


def test_setting_the_implementation_later_is_checked_too():
    config = transformers.LongT5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=20)
    model = build(transformers.LongT5Model, config, "eager")
    with pytest.raises(HalError, match="LongT5LocalAttention"):
        model.set_attn_implementation("hal")
    llama = build(transformers.LlamaModel, LLAMA, "eager")
    llama.set_attn_implementation("hal")
    with hal.use("cpu:0"):
        assert not call(llama, IDS)


def test_a_part_keeps_torchs_attention_by_its_own_setting():
    """As the message of a refusal says."""
    text = {**SMALL, "projection_dim": 16}
    audio = {"patch_embeds_hidden_size": 16, "depths": [1], "num_attention_heads": [2], "hidden_size": 16}
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    for setting in ("hal", {"text_config": "hal", "audio_config": "hal"}):
        with pytest.raises(HalError, match=r"ClapAudioModel.*'text_config': 'hal'"):
            build(transformers.ClapModel, config, setting)
    model = build(transformers.ClapModel, config, {"text_config": "hal", "audio_config": "eager"})
    assert model.text_model.config._attn_implementation == "hal"


def test_a_pooling_head_on_torch_is_named():
    config = transformers.SiglipVisionConfig(**{**SMALL, "image_size": 8, "patch_size": 4})
    with pytest.warns(PartWarning, match=r"SiglipVisionModel pools .* SiglipMultiheadAttentionPoolingHead"):
        model = build(transformers.SiglipVisionModel, config, "hal")
    with hal.use("cpu:0"):
        assert not call(model, torch.randn(1, 3, 8, 8))


def test_a_model_on_another_implementation_is_named_once_when_a_device_is_asked_for():
    model = build(transformers.LlamaForCausalLM, LLAMA, "sdpa")
    assert not call(model, IDS)
    with hal.use("cpu:0"):
        (said,) = call(model, IDS)
        assert not call(model, IDS)
    assert said.startswith("LlamaForCausalLM was called under hal's use('cpu:0'), and no attention of it ran on hal")
    assert "its attention implementation is 'sdpa': build it with attn_implementation='hal'" in said
    other = build(transformers.LlamaForCausalLM, LLAMA, "sdpa")
    hal.configure("cpu:0")
    assert "configure('cpu:0')" in call(other, IDS)[0]


def test_a_model_without_attention_is_named():
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4)
    model = build(transformers.MambaModel, config, "hal")
    with hal.use("cpu:0"):
        assert "MambaModel" in (said := call(model, IDS)[0])
    assert "no attention layer" in said


def test_a_model_on_hal_is_not_named():
    model = build(transformers.LlamaForCausalLM, LLAMA, "hal")
    assert not call(model, IDS)
    with hal.use("cpu:0"):
        assert not call(model, IDS)
        assert not call(model, IDS)


def test_a_compiled_model_runs_without_a_graph_break_and_is_not_named():
    model = build(transformers.LlamaModel, LLAMA, "hal")
    want = model(IDS, use_cache=False).last_hidden_state
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(IDS, use_cache=False).last_hidden_state, want, atol=1e-5)
    model.layers[0].compile(backend="eager")
    with hal.use("cpu:0"):
        assert not call(model, IDS, use_cache=False)


def test_a_copy_and_a_pickled_model_are_checked_when_they_are_called():
    config = transformers.LongT5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=20)
    model = copy.deepcopy(build(transformers.LongT5EncoderModel, config, "eager"))
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.config._attn_implementation_internal = "hal"
    with pytest.raises(HalError, match="LongT5LocalAttention"):
        model(IDS)


def test_unregister_gives_transformers_back():
    from transformers.models.git import modeling_git

    names = ("get_correct_attn_implementation", "post_init", "__call__")
    hal_nn.unregister_huggingface()
    before = {name: PreTrainedModel.__dict__.get(name) for name in names}
    assert before["__call__"] is None
    assert all(getattr(one, "__module__", "transformers").startswith("transformers") for one in before.values() if one)
    hal_nn.register_huggingface()
    hal_nn.register_huggingface()
    assert PreTrainedModel.__dict__["__call__"] is not None
    with pytest.raises(HalError):
        build(transformers.GitModel, transformers.GitConfig(**SMALL), "hal")
    assert "hal" in modeling_git.GIT_SELF_ATTENTION_CLASSES
    hal_nn.unregister_huggingface()
    hal_nn.unregister_huggingface()
    assert {name: PreTrainedModel.__dict__.get(name) for name in names} == before
    assert "hal" not in modeling_git.GIT_SELF_ATTENTION_CLASSES
    with pytest.raises(ValueError, match="hal"):
        build(transformers.LlamaModel, LLAMA, "hal")


def test_other_operations_that_are_called_attention_are_not_refused():
    class SomeDeformableAttention(torch.nn.Module):
        def forward(self, weights):
            return weights.softmax(-1)

    class SomeAttention(SomeDeformableAttention):
        pass

    assert not model_check._computes_attention(SomeDeformableAttention)
    assert model_check._computes_attention(SomeAttention)
