"""Models of transformers converted: forward, generation and gradients as before, and the way back to the bit."""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from pathlib import Path

import hal_nn
import pytest
import torch
import transformers
from hal_nn.model_check import CallWarning

import hal_core as hal
from hal_core import HalError

sys.path.insert(0, str(Path(__file__).parent))

import survey
import tiny_inputs

#: Types of each family, most of them without transformers' attention interface.
DECODERS = [
    "bloom",
    "codegen",
    "cpmant",
    "falcon",
    "gpt_neo",
    "gpt_neox_japanese",
    "gptj",
    "imagegpt",
    "llama",
    "mistral",
]
DECODERS += ["megatron-bert", "mpt", "openai-gpt", "rembert", "trocr", "xglm", "xlnet"]
ENCODERS = ["bert", "bros", "canine", "convbert", "deberta", "deberta-v2", "fastspeech2_conformer", "funnel", "ibert"]
ENCODERS += ["lilt", "luke", "lxmert", "mpnet", "nystromformer", "roformer", "squeezebert", "tapas", "visual_bert"]
ENCODER_DECODERS = ["fsmt", "longt5", "mvp", "speecht5", "t5"]
VISION = [
    "blip_vision_model",
    "data2vec-vision",
    "donut-swin",
    "git",
    "glpn",
    "groupvit_text_model",
    "mgp-str",
    "pvt_v2",
]
VISION += ["bridgetower", "pvt", "sam_vision_model", "swinv2", "vilt", "vit", "vitdet"]
TYPES = [*DECODERS, *ENCODERS, *ENCODER_DECODERS, *VISION]
FAMILIES = ["bloom", "deberta", "longt5", "data2vec-vision"]
#: Layers that stay on torch, by type.
STAY = {"longt5": {"LongT5LocalAttention"}}


@pytest.fixture(autouse=True)
def _quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(before)


def built(model_type):
    """(eager model, inputs)."""
    model, _, unrun = survey._first(model_type, 0)
    assert not unrun
    return model, tiny_inputs.inputs(model, 0)


def check(model_type):
    eager, given = built(model_type)
    ours = copy.deepcopy(eager)
    _, report = hal_nn.convert(ours, given)
    assert {layer.kind for layer in report.skipped} == STAY.get(model_type, set()), str(report)
    assert report.converted
    assert report.error <= 1e-5
    assert report.devices == ("cpu:0",)
    survey._agree("forward", eager, ours, given, 0)
    if "attention_mask" in given:
        plain = {name: one for name, one in given.items() if name != "attention_mask"}
        with contextlib.suppress(survey._EagerNeedsItError):
            survey._agree("forward without padding", eager, ours, plain, 0)
    if eager.can_generate() and "input_ids" in given:
        survey._generated(eager, ours, 0)
    assert survey._trained(eager, ours, given, 0), "eager has no gradients"
    eager, given = built(model_type)  # the checks above cast and train
    _taken_back(eager, given)


def _taken_back(model, given):
    def everything():
        configs = [getattr(module, "config", None) for module in model.modules()]
        return (
            [type(module) for module in model.modules()],
            [set(module.__dict__) for module in model.modules()],
            [getattr(config, "_attn_implementation", None) for config in configs],
        )

    state = {name: one.clone() for name, one in model.state_dict().items()}
    want, before = survey._run(model, given, 0), everything()
    hal_nn.convert(model, given)
    assert list(model.state_dict()) == list(state)
    hal_nn.revert(model)
    assert everything() == before
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    for got, same in zip(
        survey.tensors(survey._run(model, given, 0)).values(), survey.tensors(want).values(), strict=True
    ):
        assert torch.equal(got.nan_to_num(), same.nan_to_num())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_of_each_family_is_the_same_on_hal_and_goes_back(model_type):
    check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [one for one in TYPES if one not in FAMILIES])
def test_a_converted_model_is_the_same_on_hal_and_goes_back(model_type):
    check(model_type)


def test_forty_types_are_converted():
    assert len(set(TYPES)) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("device", ["vulkan", "opencl", "kpu"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_one_of_each_family_on_other_devices(model_type, device):
    try:
        hal.session(device)
    except HalError as absent:
        pytest.skip(str(absent))
    eager, given = built(model_type)
    want = survey._run(eager, given, 0)
    _, report = hal_nn.convert(eager, given, device=device)
    assert [name.partition(":")[0] for name in report.devices] == [device]
    assert report.error <= 1e-4
    assert survey.difference(survey._run(eager, given, 0), want, given.get("attention_mask")) <= 1e-4


def test_layers_that_read_one_config_keep_the_masks_that_it_gives():
    """GIT's own attention adds the mask: layers beside it, which ask the interface, may not change what it is given."""
    model, given = built("git")
    _, report = hal_nn.convert(model, given)
    assert model.config._attn_implementation == "eager"
    assert {layer.kind: layer.way for layer in report.layers} == {
        "GitSelfAttention": "rerouted",
        "GitVisionAttention": "rerouted",
    }


def test_layers_of_the_interface_alone_are_asked_there():
    model, given = built("llama")
    _, report = hal_nn.convert(model, given)
    assert {layer.way for layer in report.layers} == {"interface"}
    assert model.config._attn_implementation == "hal"
    hal_nn.revert(model)
    assert model.config._attn_implementation == "eager"


def test_a_converted_model_that_would_be_refused_runs_under_use_without_a_warning():
    model, given = built("bloom")
    hal_nn.convert(model, given)
    with warnings.catch_warnings(), hal.use("cpu:0"), torch.no_grad():
        warnings.simplefilter("error")
        model(**given)
    other, _ = built("bloom")
    with hal.use("cpu:0"), torch.no_grad(), pytest.warns(CallWarning):
        other(**given)


def test_token_ids_are_the_sample_of_a_language_model():
    model, _ = built("bloom")
    _, report = hal_nn.convert(model)
    assert report.error is not None
    assert str(report).startswith(
        "BloomForCausalLM: 2 of 2 attention layers converted (2 rerouted)\nproved on a sample"
    )


@pytest.mark.parametrize("model_type", ["bloom", "gptj", "bert"])
def test_asking_a_converted_model_for_its_weights_is_refused_by_the_call(model_type):
    """The call itself raises, before code of the model can read weights that are not there; calls without it run."""
    model, given = built(model_type)
    want = model(**given)[0]
    hal_nn.convert(model, given)
    with torch.no_grad():
        with pytest.raises(HalError, match=r"output_attentions=True was given.* never holds the weights"):
            model(**given, output_attentions=True)
        model(**given, output_attentions=False)
        before = model.config.output_attentions
        if model_type != "bert":
            model.config.output_attentions = True
            with pytest.raises(HalError, match="output_attentions=True was given"):
                model(**given)
            model.config.output_attentions = before
        assert torch.allclose(model(**given)[0], want, atol=1e-4)
        hal_nn.revert(model)
        assert not any(part._forward_pre_hooks for part in model.modules())
        if model_type == "bloom":  # the others keep an implementation without weights, as they were built
            assert model(**given, output_attentions=True).attentions[0].shape[-1] == given["input_ids"].shape[-1]
