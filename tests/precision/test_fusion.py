"""Fused blocks: values, kernels by the profiler, and back."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hal_precision import (  # noqa: E402
    FusionConfig,
    FusionStrategy,
    OptimizationLevel,
    benchmark_fusion_performance,
    create_unified_attention_fusion,
)
from hal_precision.fusion import count_kernels, find_modules  # noqa: E402
from hal_precision.merging import merge_projections  # noqa: E402
from torch import nn  # noqa: E402

from hal_core import ContractError  # noqa: E402
from hal_core.testing import relative_error  # noqa: E402


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.slow
def test_a_llama_block_is_one_graph_with_fewer_kernels_and_comes_back() -> None:
    model = llama()
    plain, tokens = copy.deepcopy(model), torch.arange(16)[None]
    want = plain(tokens).logits.detach()
    fused = create_unified_attention_fusion(model)
    assert fused.fused == ["model.layers.0"]
    assert model.config._attn_implementation == "hal"
    stats = benchmark_fusion_performance(plain, fused, {"input_ids": tokens, "use_cache": False}, num_runs=2)
    assert stats.relative_error < 1e-5
    assert stats.kernel_reduction > 0.25
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen, torch.no_grad():
        fused(tokens, use_cache=False)
    assert any(each.name.startswith("hal") for each in seen.events()), "hal's operator is in the graph"
    assert any("fused" in name for name in stats.kernels)
    assert fused.revert() is model
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(tokens).logits, want)


def test_the_example_of_the_requirements_runs() -> None:
    torch.manual_seed(0)
    transformer = nn.TransformerEncoderLayer(d_model=32, nhead=4, dim_feedforward=64, dropout=0.0).eval()
    plain, input_sequence = copy.deepcopy(transformer), torch.randn(7, 2, 32)
    fused_transformer = create_unified_attention_fusion(
        transformer, fusion_strategy=FusionStrategy.FULL_BLOCK, optimization_level=OptimizationLevel.AGGRESSIVE
    )
    assert fused_transformer.fused == [""]
    assert relative_error(fused_transformer(input_sequence), plain(input_sequence)) < 1e-5


@pytest.mark.slow
def test_gradients_pass_a_fused_mlp() -> None:
    model = llama()
    plain, tokens = copy.deepcopy(model).train(), torch.arange(16)[None]
    fused = create_unified_attention_fusion(
        model, config=FusionConfig(strategy=FusionStrategy.MLP, hal_attention=False)
    ).train()
    for each in (plain, fused):
        each(tokens, labels=tokens).loss.backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert relative_error(b.grad, a.grad) < 1e-4


def test_strategies_find_their_modules() -> None:
    model = llama()
    layer = "model.layers.0"
    assert find_modules(model, FusionStrategy.ATTENTION) == [f"{layer}.self_attn"]
    assert find_modules(model, FusionStrategy.MLP) == [f"{layer}.mlp"]
    assert find_modules(model, FusionStrategy.MODEL) == [""]
    norms = find_modules(model, FusionStrategy.NORM)
    assert norms == [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"]


def test_kernels_are_counted_and_views_are_not() -> None:
    a = torch.randn(4, 4)
    kernels, launches = count_kernels(lambda: (a @ a).transpose(0, 1).unsqueeze(0).add(1))
    assert kernels == {"aten::mm": 1, "aten::add": 1}
    assert launches == 0


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(ContractError, match="no module for full_block: its modules are Linear, Sequential"):
        create_unified_attention_fusion(nn.Sequential(nn.Linear(4, 4)))
    model = nn.Sequential(nn.Linear(4, 4))
    fused = create_unified_attention_fusion(model, FusionStrategy.MODEL)
    with pytest.raises(ContractError, match=r"Compiled already: the model. Call revert\(\) first"):
        create_unified_attention_fusion(model, FusionStrategy.MODEL)
    with pytest.raises(ContractError, match=r"copy.deepcopy\(model\)"):
        benchmark_fusion_performance(model, fused, torch.randn(2, 4))
    fused.revert()


def test_merged_projections_are_one_product_and_come_back_bit_for_bit() -> None:
    model = llama()
    plain, tokens = copy.deepcopy(model), torch.arange(16)[None]
    merged = merge_projections(model)
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert [each.layers for each in merged] == [
        [attention.q_proj, attention.k_proj, attention.v_proj],
        [mlp.gate_proj, mlp.up_proj],
    ]
    with torch.no_grad():
        counts = [count_kernels(lambda each=each: each(tokens, use_cache=False))[0] for each in (plain, model)]
        assert [count["aten::mm"] for count in counts] == [8, 5]
        assert relative_error(model(tokens).logits, plain(tokens).logits) < 1e-6
        other = torch.randn(2, 64)
        assert torch.equal(attention.k_proj(other), torch.nn.functional.linear(other, attention.k_proj.weight)), (
            "another input than the first layer's"
        )
    for each in (plain, model):
        each(tokens, labels=tokens).loss.backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert relative_error(b.grad, a.grad) < 1e-5
    with torch.no_grad():
        attention.v_proj.weight.mul_(2.0)
        plain.model.layers[0].self_attn.v_proj.weight.mul_(2.0)
        assert relative_error(model(tokens).logits, plain(tokens).logits) < 1e-6, "an optimizer's step is seen"
    for each in merged:
        each.revert()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert layer.self_attn.q_proj.weight.untyped_storage().nbytes() == layer.self_attn.q_proj.weight.nbytes


def test_projections_that_differ_or_share_weights_are_not_merged() -> None:
    model = llama()
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    model.model.layers[0].self_attn.k_proj.double()
    assert merge_projections(model) == []
