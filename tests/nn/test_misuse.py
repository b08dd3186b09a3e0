"""What a user may get wrong with each public name: one sentence that says what was given, and what to pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import hal_nn
import pytest
import torch
from hal_nn import AttentionConfig, KeyValueCache, create_attention
from hal_nn.hardware import optimal_batch_size
from hal_nn.sparse import (
    LearnedTiling,
    SparseGate,
    lost_mass,
    sparse_attention,
    tiling_of,
    train_gate,
)
from torch import nn

import hal_core as hal

Q, X = torch.ones(1, 2, 4, 8), torch.ones(1, 3, 8)
TILING = tiling_of("random", 0.5)


def mha() -> nn.Module:
    return nn.MultiheadAttention(8, 2)


def layer(**more: Any) -> Any:
    return hal_nn.PhotonicFlashAttention(8, 2, **more)


def cache() -> KeyValueCache:
    made = KeyValueCache()
    made.append(Q, Q)
    return made


def sparse(query: Any = Q, key: Any = Q, value: Any = Q, tiling: Any = TILING, **more: Any) -> Any:
    return sparse_attention(query, key, value, tiling, **more)


#: What is wrong -> (the call, a part of its sentence).
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    # conversion
    "convert a text": (lambda: hal_nn.convert("x"), "model is a str: pass a torch.nn.Module"),
    "convert nothing": (lambda: hal_nn.convert(None), "model is a NoneType: pass a torch.nn.Module"),
    "convert a class": (
        lambda: hal_nn.convert(nn.MultiheadAttention),
        "model is the class MultiheadAttention: pass an object of it",
    ),
    "convert for a number": (lambda: hal_nn.convert(mha(), device=3), "device 3 was given: use a device or backend"),
    "convert for no devices": (lambda: hal_nn.convert(mha(), device=[]), "an empty list was given for device"),
    "tolerance as text": (lambda: hal_nn.convert(mha(), tolerance="1e-3"), "tolerance '1e-3' was given"),
    "tolerance below 0": (lambda: hal_nn.convert(mha(), tolerance=-1), "tolerance -1 was given"),
    "revert a text": (lambda: hal_nn.revert("x"), "model is a str"),
    "ask a text": (lambda: hal_nn.is_converted("x"), "model is a str"),
    "convert a text for photonics": (lambda: hal_nn.convert_to_photonic("x"), "model is a str"),
    "settings as text": (
        lambda: hal_nn.convert_to_photonic(mha(), "photonic"),
        "config is a str without device, sample, tolerance: pass a mapping",
    ),
    "place a text": (lambda: hal_nn.set_device("x", "cpu"), "model is a str"),
    # attention by configuration
    "create from a text": (lambda: create_attention("full"), "create_attention was given a str: pass an Attention"),
    "create from a mapping": (lambda: create_attention({"embed_dim": 8}), "was given a dict: pass an AttentionConfig"),
    "mistyped pattern": (
        lambda: AttentionConfig(8, 2, pattern="slidng_window"),
        "pattern 'slidng_window' was given (did you mean 'sliding_window'?): use one of full, causal",
    ),
    "pattern in capitals": (lambda: AttentionConfig(8, 2, pattern="CAUSAL"), "(did you mean 'causal'"),
    "pattern as a number": (lambda: AttentionConfig(8, 2, pattern=3), "pattern 3 was given: use one of"),
    "width as text": (lambda: AttentionConfig("8", 2), "embed_dim '8' was given: use a whole number"),
    "dropout as text": (lambda: AttentionConfig(8, 2, dropout="a"), "dropout 'a' was given: use 0 to 1"),
    "sparsity as text": (lambda: AttentionConfig(8, 2, sparsity_ratio="a"), "sparsity_ratio 'a' was given"),
    "dtype as text": (lambda: AttentionConfig(8, 2, dtype="float32"), "dtype 'float32' was given"),
    "dtype of integers": (lambda: AttentionConfig(8, 2, dtype=torch.int32), "dtype torch.int32 was given"),
    "device as a number": (lambda: AttentionConfig(8, 2, device=3), "device 3 was given"),
    "lambda as text": (lambda: AttentionConfig(8, 2, lambda_init="a"), "lambda_init 'a' was given"),
    "rotary base of 0": (lambda: AttentionConfig(8, 2, rotary_base=0), "rotary_base 0 was given"),
    "unknown device": (lambda: create_attention(AttentionConfig(8, 2, device="nope")), "unknown backend 'nope'"),
    "register a number": (lambda: hal_nn.register_attention("mine", 3), "factory is a int: pass a function"),
    "register without a name": (lambda: hal_nn.register_attention(3, nn.Identity), "the pattern name 3 was given"),
    "x as text": (lambda: create_attention(AttentionConfig(8, 2))("x"), "x is a str: pass a tensor"),
    "cache as text": (lambda: create_attention(AttentionConfig(8, 2))(X, cache="x"), "cache is a str: pass a Key"),
    "cache of other heads": (lambda: cache().append(Q[:, :1], Q[:, :1]), "was given to a cache of [1, 2, 4, 8]"),
    "cache of another dtype": (lambda: cache().append(Q.double(), Q.double()), "torch.float64 on cpu was given to a"),
    "cache of two lengths": (lambda: KeyValueCache().append(Q, Q[:, :, :2]), "key and value [1, 2, 4, 8] and [1, 2, 2"),
    "cache of texts": (lambda: KeyValueCache().append("a", "b"), "key and value 'a' and 'b' were given"),
    "cache of three sizes": (lambda: KeyValueCache().append(X, X), "pass two tensors [batch, kv_heads, length"),
    # modules
    "dropout above 1": (lambda: layer(dropout=3), "dropout 3 was given: use 0 to 1"),
    "a layer's dtype as text": (lambda: layer(dtype="float32"), "dtype 'float32' was given"),
    "query as text": (lambda: layer()("x"), "query is a str: pass a tensor [batch, length, 8]"),
    "value as text": (lambda: layer()(X, X, "x"), "value is a str"),
    "devices as a number": (lambda: hal_nn.HybridFlashAttention(8, 2, devices=3), "devices 3 was given: pass a list"),
    "heads of AttentionLayer": (lambda: hal_nn.AttentionLayer(9, 2), "embed_dim 9 and num_heads 2 were given"),
    "dropout of AttentionLayer": (lambda: hal_nn.AttentionLayer(8, 2, dropout=1.5), "dropout 1.5 was given"),
    "sizes of OptimizedLinear": (lambda: hal_nn.OptimizedLinear("8", 2), "in_features '8' was given"),
    "width of OptimizedLinear": (
        lambda: hal_nn.OptimizedLinear(8, 2)(torch.ones(4, 4)),
        "input [4, 4] torch.float32 was given: pass floats [..., 8]",
    ),
    "integers to OptimizedLinear": (lambda: hal_nn.OptimizedLinear(8, 2)(X.long()), "torch.int64 was given: pass flo"),
    "text to OptimizedLinear": (lambda: hal_nn.OptimizedLinear(8, 2)("x"), "input is a str"),
    "text to FusedGELU": (lambda: hal_nn.FusedGELU()("x"), "x is a str: pass a tensor of floats"),
    "integers to FusedGELU": (lambda: hal_nn.FusedGELU()(X.long()), "x is torch.int64: cast it"),
    # sparse attention
    "three sizes": (
        lambda: sparse(X, X, X),
        "query [1, 3, 8] torch.float32 was given: pass floats [batch, heads, length, head_dim]",
    ),
    "a query as text": (lambda: sparse("x"), "query is a str"),
    "integers": (lambda: sparse(Q.long(), Q.long(), Q.long()), "query [1, 2, 4, 8] torch.int64 was given"),
    "heads that do not divide": (
        lambda: sparse(key=torch.ones(1, 3, 4, 8), value=torch.ones(1, 3, 4, 8)),
        "use one ba",
    ),
    "head_dim of the key": (lambda: sparse(key=torch.ones(1, 2, 4, 9)), "one head_dim of query and key"),
    "a tiling's name": (lambda: sparse(tiling="random"), "tiling is a str: pass hal_nn.sparse.tiling_of("),
    "causal of True": (lambda: sparse(causal=True), "causal True was given: use one of 'none', 'top_left'"),
    "a mask": (lambda: sparse(attn_mask=torch.ones(4, 4) > 0), "attn_mask was given to sparse_attention"),
    "a window": (lambda: sparse(window=(1, 1)), "window was given to sparse_attention, whose plan does not know it"),
    "return_lse": (lambda: sparse(return_lse=True), "return_lse was given to sparse_attention"),
    "max_lost as text": (lambda: sparse(max_lost="a", judge="exact"), "max_lost 'a' and judge 'exact' were given"),
    "option of another pattern": (
        lambda: tiling_of("random", 0.5, p=0.9),
        "p was given to pattern 'random': it takes se",
    ),
    "seed as text": (lambda: tiling_of("random", 0.5, seed="a"), "seed 'a' was given"),
    "p as text": (lambda: tiling_of("dynamic_threshold", p="a"), "p 'a' was given"),
    "gate as text": (lambda: tiling_of("learned", gate="x"), "gate is a str: pass a SparseGate"),
    "sparsity of True": (lambda: tiling_of("random", True), "sparsity True was given"),
    "heads of a gate": (lambda: SparseGate("3", 8), "num_heads '3' was given"),
    "head_dim of a gate": (lambda: SparseGate(2, 0), "head_dim 0 was given"),
    "a gate of other heads": (
        lambda: sparse(tiling=LearnedTiling(SparseGate(3, 8))),
        "query [1, 2, 4, 8] was given to a gate of 3 heads, 3 key heads and head_dim 8: pass [batch, 3, length, 8]",
    ),
    "a sample that is no pair": (lambda: train_gate(SparseGate(2, 8), [Q]), "a sample is a Tensor: pass pairs"),
    "no gate": (lambda: train_gate("gate", [(Q, Q)]), "gate is a str"),
    "lost mass of a text": (lambda: lost_mass("a", Q), "lse_plan is a str"),
    "a module's width as a float": (lambda: hal_nn.DynamicSparseAttention(8.0, 2), "d_model 8.0 was given"),
    "a module's judge": (lambda: hal_nn.DynamicSparseAttention(8, 2, judge="x"), "judge 'x' was given"),
    "a module's lost mass": (lambda: hal_nn.create_sparse_attention(8, 2, max_lost_mass=3), "max_lost_mass 3 was"),
    "a module's backend": (lambda: hal_nn.DynamicSparseAttention(8, 2, backend="nope"), "unknown backend 'nope'"),
    "a module's option": (lambda: hal_nn.DynamicSparseAttention(8, 2, foo=1), "foo was given to pattern 'dynamic_thre"),
    "two sizes": (lambda: hal_nn.DynamicSparseAttention(8, 2)(X[0]), "x has shape [3, 8]: pass [batch, length, 8]"),
    "samples without a batch": (
        lambda: hal_nn.DynamicSparseAttention(8, 2, pattern="learned").distill(X),
        "each sample has shape [3, 8]: pass [batch, length, 8]",
    ),
    # validation and benchmarks
    "validate on a hal device": (lambda: hal_nn.ComponentValidator("vulkan:0x"), "device 'vulkan:0x' was given"),
    "validate a text": (
        lambda: hal_nn.ComponentValidator().validate_attention_component("x", 8, 2),
        "layer is a str: pass a torch.nn.Module",
    ),
    "validate heads as text": (
        lambda: hal_nn.ComponentValidator().validate_attention_component(layer(), 8, "2"),
        "num_heads '2' was given",
    ),
    "validate a linear text": (
        lambda: hal_nn.ComponentValidator().validate_linear_component("x", 8, 2),
        "layer is a str",
    ),
    "benchmark a text": (lambda: hal_nn.benchmark_attention_performance("x", (1, 3, 8)), "model is a str"),
    "benchmark a peer": (lambda: hal_nn.benchmark_attention_performance(layer(), (1, 3, 8), peer="x"), "peer is a str"),
    "benchmark one size": (lambda: hal_nn.benchmark_attention_performance(layer(), 3), "input_shape 3 was given"),
    "benchmark sizes as text": (
        lambda: hal_nn.benchmark_attention_performance(layer(), ("1", 3, 8)),
        "input_shape ('1', 3, 8) was given: use (batch, length, d_model)",
    ),
    "benchmark warmup": (
        lambda: hal_nn.benchmark_attention_performance(layer(), (1, 3, 8), 2, warmup=-1),
        "warmup -1 was given",
    ),
    # the hardware layer
    "devices as text": (lambda: hal_nn.HardwareAbstractionLayer("cpu"), "target_devices 'cpu' was given: pass a list"),
    "unknown kind of device": (lambda: hal_nn.HardwareAbstractionLayer(["nope"]), "device 'nope' was given"),
    "optimise a text": (lambda: hal_nn.HardwareAbstractionLayer(["cpu"]).optimize_for_hardware("x"), "model is a str"),
    "optimise to integers": (
        lambda: hal_nn.HardwareAbstractionLayer(["cpu"]).optimize_for_hardware(mha(), dtype=torch.int32),
        "dtype torch.int32 was given",
    ),
    "estimate a text": (lambda: hal_nn.HardwareAbstractionLayer(["cpu"]).estimate_memory_usage("x"), "model is a str"),
    "batch of a text": (lambda: optimal_batch_size("x"), "model is a str"),
    "memory as text": (lambda: optimal_batch_size(nn.Linear(2, 2), available="8GB"), "available '8GB' was given"),
    "at most 0": (lambda: optimal_batch_size(nn.Linear(2, 2), most=0), "most 0 was given"),
    "a probe's name": (lambda: optimal_batch_size(nn.Linear(2, 2), probe="x"), "probe 'x' was given"),
    "a limit as text": (lambda: hal_nn.UnifiedMemoryManager("16"), "a memory limit of '16' GB was given"),
    "no limit": (lambda: hal_nn.UnifiedMemoryManager(float("inf")), "a memory limit of inf GB was given"),
    "a pool as text": (lambda: hal_nn.UnifiedMemoryManager(1, "a"), "pool_size_mb 'a' was given"),
    "a threshold as text": (lambda: hal_nn.UnifiedMemoryManager(1, 1, "a"), "gc_threshold 'a' was given"),
    "a size": (lambda: hal_nn.UnifiedMemoryManager().allocate(3), "shape 3 was given: use a sequence"),
    "a shape as text": (lambda: hal_nn.UnifiedMemoryManager().allocate("ab"), "shape 'ab' was given"),
    "an unknown dtype": (lambda: hal_nn.UnifiedMemoryManager().allocate((2,), "float99"), "dtype 'float99' was given"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_misuse_is_one_sentence(wrong: str) -> None:
    call, part = WRONG[wrong]
    with pytest.raises(hal.HalError, match=re.escape(part)) as caught:
        call()
    assert "\n" not in str(caught.value).strip()


def test_a_factory_that_gives_no_module_is_refused() -> None:
    hal_nn.register_attention("nothing", lambda config: None)
    try:
        with pytest.raises(hal.ContractError, match="the factory of pattern 'nothing' gave a NoneType"):
            create_attention(AttentionConfig(8, 2, pattern="nothing"))
    finally:
        hal_nn.unregister_attention("nothing")


def test_a_configuration_that_was_changed_is_checked_again() -> None:
    config = AttentionConfig(8, 2)
    config.num_heads = 3
    with pytest.raises(hal.ContractError, match="embed_dim 8 and num_heads 3 were given"):
        create_attention(config)


@pytest.mark.parametrize("given", [torch.zeros(3, 40), {"input_ids": torch.zeros(2, 90)}], ids=["tensor", "dictionary"])
def test_an_argument_with_many_numbers_is_named_in_one_sentence(given: Any) -> None:
    from hal_nn.arguments import need_whole

    with pytest.raises(hal.ContractError, match=r"^batch_size a (tensor \[3, 40\]|dict) was given: use a whole number"):
        need_whole("batch_size", given)
