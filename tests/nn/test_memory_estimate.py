"""Estimated memory of a step beside what torch's CPU allocator reports, for twelve kinds of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hal_nn.hardware import estimate_memory, sample_of  # noqa: E402
from hal_nn.hardware.simulated_memory import training_step  # noqa: E402

from hal_core import ContractError  # noqa: E402
from hal_core.testing import allocator_peak  # noqa: E402

BATCH, LENGTH = 3, 96
PLAIN: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = PLAIN | {"num_key_value_heads": 2}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
SMALL_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 500}
#: (class, config, arguments of the config, kinds of layers).
MODELS: dict[str, tuple[str, str, dict[str, Any], set[str]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 500}, {"full"}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, {"full"}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 16}, {"sliding"}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GROUPED | {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        {"sliding", "full"},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 4}, {"full + experts"}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        GROUPED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        {"full + experts"},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        PLAIN
        | LATENT
        | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 64, "first_k_dense_replace": 1},
        {"latent", "latent + experts"},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        GROUPED
        | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        | {"shared_expert_intermediate_size": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
        | {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
        {"linear + experts", "full + experts"},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", PLAIN, {"full"}),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {k: v for k, v in PLAIN.items() if "id" not in k or "hidden" in k} | {"image_size": 64, "patch_size": 8},
        {"full"},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", SMALL_T5 | {"decoder_start_token_id": 0}, {"full"}),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 500}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_source_positions": 100}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
        {"full"},
    ),
}
QUICK = {"gemma3", "mixtral"}


def build(name: str) -> Any:
    kind, config, arguments, _ = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**arguments))


def filled(shapes: Any, model: Any) -> dict[str, Any]:
    """Inputs of the shapes, batch BATCH, on the CPU."""
    found = {}
    for name, tensor in shapes.items():
        shape = (BATCH, *tensor.shape[1:])
        found[name] = torch.randn(shape) if tensor.is_floating_point() else torch.randint(0, 2, shape)
    return found


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_a_training_step_and_a_forward_pass_take_what_was_estimated(name: str) -> None:
    model = build(name)
    estimate = estimate_memory(model, BATCH, sequence_length=LENGTH)
    assert {layer.kind for layer in estimate.layers} - {"other"} == MODELS[name][3]
    inputs = filled(sample_of(model, LENGTH), model)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters())
    model(**inputs).loss.backward()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimiser.zero_grad(set_to_none=True)
    training_step(lambda: model(**inputs), optimiser)
    peak = allocator_peak(lambda: training_step(lambda: model(**inputs), optimiser))
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    states = sum(t.nbytes for state in optimiser.state.values() for t in state.values())
    for got, want in ((estimate.weights, weights), (estimate.gradients, gradients), (estimate.optimiser, states)):
        assert abs(got / want - 1) <= 0.01
    step = float(estimate) - estimate.weights - estimate.optimiser - estimate.inputs
    assert abs(step / peak - 1) <= 0.10, f"{peak:,} bytes at the step's peak, {step:,.0f} estimated"
    assert sum(layer.weights for layer in estimate.layers) == sum(p.nbytes for p in model.parameters())

    forward = estimate_memory(model, BATCH, sequence_length=LENGTH, training=False)
    inputs = filled(sample_of(model, LENGTH, training=False), model)
    model.eval()
    with torch.no_grad():
        peak = allocator_peak(lambda: model(**inputs))
    assert abs((float(forward) - forward.weights - forward.inputs) / peak - 1) <= 0.10


def test_a_model_on_the_meta_device_is_estimated_without_memory() -> None:
    """A 7-billion-parameter Llama: weights, gradients and two float32 states, by hand."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=2))
    parameters = sum(p.numel() for p in model.parameters())
    estimate = estimate_memory(model, 1, sequence_length=128)
    assert estimate.gradients == 4 * parameters
    assert abs(estimate.optimiser / (8 * parameters) - 1) < 0.01
    assert float(estimate) > 16 * parameters
    assert estimate.low < float(estimate) < estimate.high
    assert "2 x full" in str(estimate)
    assert all(p.is_meta for p in model.parameters())


def test_the_cache_is_that_of_the_layers() -> None:
    model = build("gemma3")
    rows = {layer.kind: layer for layer in estimate_memory(model, 2, sequence_length=64, training=False).layers}
    one = 2 * 2 * 2 * 64 * 16 * 4  # key and value, entries, key heads, tokens, head size, bytes
    assert rows["full"].kv_cache == one
    assert 0 < rows["sliding"].kv_cache <= 2 * one + 64  # and two counters
    assert (rows["full"].layers, rows["sliding"].layers) == (1, 2)


@pytest.mark.slow
def test_gradient_checkpointing_and_another_optimiser_are_seen() -> None:
    model = build("llama")
    plain = estimate_memory(model, 8, sequence_length=96)
    assert estimate_memory(model, 8, sequence_length=96, optimiser=lambda p: torch.optim.SGD(p)).optimiser == 0
    model.gradient_checkpointing_enable()
    assert estimate_memory(model, 8, sequence_length=96).activations < 0.7 * plain.activations


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: estimate_memory(torch.nn.Linear(4, 4), 0), "batch_size 0 was given"),
        (lambda: estimate_memory(torch.nn.Conv2d(3, 4, 3)), "none can be made up for Conv2d: pass sample="),
    ],
)
def test_what_cannot_be_estimated_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(ContractError) as caught:
        call()
    assert said in str(caught.value)


def test_a_sample_of_any_batch_size_serves() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    one, four = (estimate_memory(model, n, sample=torch.randn(2, 3, 8, 8)) for n in (1, 4))
    assert four.inputs == 4 * one.inputs == 4 * 3 * 64 * 4
