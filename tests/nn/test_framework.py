"""create_attention: every pattern against masked dense attention in float64, caches, rotary embedding, bad input."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import warnings
from dataclasses import replace
from typing import Any

import hal_nn
import pytest
import torch
from hal_nn import (
    AttentionConfig,
    AttentionPatterns,
    KeyValueCache,
    create_attention,
    register_attention,
    unregister_attention,
)
from hal_nn.patterns import PatternAttention, rotate
from torch import Tensor, nn

import hal_core as hal

EMBED, HEADS, LENGTH = 32, 4, 11


def readable(config: AttentionConfig) -> Tensor:
    """What each pattern lets a row read, [length, length], from its definition."""
    row, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    size, causal = config.window_size, config.causal or config.name == "causal"
    left, right = (size - 1, 0) if causal else (size // 2, (size - 1) // 2)
    near = (key >= row - left) & (key <= row + right)
    first = (row < config.global_tokens) | (key < config.global_tokens)
    every = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    local = row // size == key // size
    found = {"sliding_window": near, "local": local, "global": near | first}.get(config.name, every)
    return found & (key <= row) if causal else found


def expected(module: Any, x: Tensor, allowed: Tensor) -> Tensor:
    """Dense attention by its formula, in float64."""
    config = module.config
    q, k, v = (
        layer(x).unflatten(-1, (-1, config.size)).transpose(1, 2).double()
        for layer in (module.q_proj, module.k_proj, module.v_proj)
    )
    if config.rotary:
        q, k = (rotate(t.float(), 0, config.rotary_base).double() for t in (q, k))
    group = config.num_heads // config.kv_heads
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))

    def dense(q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v

    if config.name == "differential":
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        weight = (
            (module.lambda_q1 @ module.lambda_k1).exp()
            - (module.lambda_q2 @ module.lambda_k2).exp()
            + config.lambda_init
        )
        out = dense(q1, k1) - weight.double() * dense(q2, k2)
        out = out / (out.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.norm.weight * (1 - config.lambda_init)
    else:
        out = dense(q, k)
    return module.out_proj(out.float().transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pattern", ["full", "causal", "sliding_window", "local", "global", "differential"])
@pytest.mark.parametrize("more", [{}, {"num_kv_heads": 2, "rotary": True}])
def test_a_pattern_is_masked_dense_attention_forward_and_backward(
    pattern: str, causal: bool, more: dict[str, Any]
) -> None:
    config = AttentionConfig(EMBED, HEADS, pattern=pattern, causal=causal, window_size=4, global_tokens=2, **more)
    module: Any = create_attention(config)
    x = torch.randn(2, LENGTH, EMBED, requires_grad=True)
    found, wanted = module(x), expected(module, x, readable(config))
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5
    outer = torch.randn_like(found)
    leaves = [x, *module.parameters()]
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, outer), torch.autograd.grad(wanted, leaves, outer), strict=True
    ):
        assert float((mine - theirs).norm()) <= 1e-5 * max(float(theirs.norm()), 1.0)
    assert module.last_device_used == "cpu:0"


@pytest.mark.parametrize("pattern", ["causal", "sliding_window", "global", "differential"])
def test_a_cache_gives_what_the_whole_sequence_gives(pattern: str) -> None:
    config = AttentionConfig(
        EMBED, HEADS, pattern=pattern, causal=True, window_size=4, global_tokens=1, num_kv_heads=2, rotary=True
    )
    module, x, cache = create_attention(config).eval(), torch.randn(2, LENGTH, EMBED), KeyValueCache()
    with torch.no_grad():
        parts = [module(part, cache=cache) for part in x.split([5, 1, 1, 4], 1)]
        torch.testing.assert_close(torch.cat(parts, 1), module(x), atol=1e-5, rtol=1e-5)
    assert cache.length == LENGTH


def test_rotary_embedding_keeps_what_positions_apart_see() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8).unbind(0)
    near, far = ((rotate(q, at, 100.0) * rotate(k, at - 3, 100.0)).sum() for at in (3, 40))
    torch.testing.assert_close(near, far, atol=1e-5, rtol=1e-5)


def test_a_padding_mask_hides_keys_of_every_pattern() -> None:
    padding = torch.ones(2, LENGTH, dtype=torch.int64)
    padding[1, 7:] = 0
    for pattern in ("full", "sliding_window", "global", "local"):
        config = AttentionConfig(EMBED, HEADS, pattern=pattern, window_size=4)
        module: Any = create_attention(config)
        x = torch.randn(2, LENGTH, EMBED)
        found = module(x, attention_mask=padding)
        wanted = expected(module, x, readable(config)[None, None] & padding.bool()[:, None, None])
        kept = wanted.isfinite().all(-1)
        torch.testing.assert_close(found[kept], wanted[kept], atol=1e-5, rtol=1e-5)
        assert int(kept.sum()) >= LENGTH + 7


@pytest.mark.skipif(importlib.util.find_spec("hal_nn.sparse") is None, reason="hal_nn.sparse is not here")
@pytest.mark.parametrize("pattern", ["sparse", "dynamic_sparse"])
def test_sparse_patterns_run_through_their_tiling(pattern: str) -> None:
    config = AttentionConfig(EMBED, HEADS, pattern=pattern, causal=True, sparsity_ratio=0.0, block_size=4)
    module: Any = create_attention(config).eval()
    x = torch.randn(2, LENGTH, EMBED)
    with torch.no_grad():
        found, wanted = module(x), expected(module, x, readable(config))
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-5


def test_the_ring_runs_or_names_its_package() -> None:
    config = AttentionConfig(EMBED, HEADS, pattern=AttentionPatterns.RING, causal=True, num_kv_heads=1, softcap=3.0)
    if importlib.util.find_spec("hal_parallel") is None:
        with pytest.raises(hal.HalError, match="pip install hal-parallel"):
            create_attention(config)
    else:
        x, ring = torch.randn(2, 8, EMBED), create_attention(config)
        same = create_attention(replace(config, pattern="causal"))
        same.load_state_dict(ring.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is no process group
            assert torch.allclose(ring(x), same(x), atol=1e-6)
        with pytest.raises(hal.HalError, match="rotary was given with the pattern 'ring'"):
            create_attention(replace(config, rotary=True))


@pytest.mark.parametrize(("name", "package"), hal_nn._PACKAGES.items())
def test_names_of_other_packages_are_reached_or_name_their_package(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(package) is not None:
        assert getattr(hal_nn, name) is getattr(importlib.import_module(package), name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    distribution = package.replace("_", "-")
    with pytest.raises(ImportError, match=f"hal_nn.{name} is {distribution}'s, .* pip install {distribution}"):
        getattr(hal_nn, name)
    with pytest.raises(ImportError, match=f"pip install {distribution}"):
        exec(f"from hal_nn import {name}")


def test_a_registered_pattern_is_built_by_its_factory() -> None:
    @register_attention("mine")
    def build(config: AttentionConfig) -> nn.Module:
        return nn.Linear(config.embed_dim, 3)

    try:
        assert isinstance(create_attention(AttentionConfig(EMBED, HEADS, pattern="mine")), nn.Linear)
        with pytest.raises(hal.ContractError, match="'mine' is registered already"):
            register_attention("mine", build)
        with pytest.raises(hal.ContractError, match="'full' is registered already"):
            register_attention("full", build)
    finally:
        unregister_attention("mine")
    with pytest.raises(hal.ContractError, match="pattern 'mine' was given: use one of full, causal, sliding_window"):
        create_attention(AttentionConfig(EMBED, HEADS, pattern="mine"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"num_heads": 5}, "embed_dim 32 and num_heads 5 were given: num_heads must divide it"),
        ({"num_kv_heads": 3}, "num_heads 4 and num_kv_heads 3 were given"),
        ({"embed_dim": 0}, "embed_dim 0 was given"),
        ({"window_size": 2.5}, "window_size 2.5 was given"),
        ({"sparsity_ratio": 0.96}, "sparsity_ratio 0.96 was given: use 0 to 0.95"),
        ({"sparsity_ratio": -0.1}, "sparsity_ratio -0.1 was given"),
        ({"dropout": 1.5}, "dropout 1.5 was given"),
        ({"global_tokens": -1}, "global_tokens -1 was given"),
        ({"head_dim": 7, "rotary": True}, "a head_dim of 7 was given"),
        ({"pattern": "spiral"}, "pattern 'spiral' was given: use one of"),
    ],
)
def test_a_malformed_configuration_is_one_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(hal.ContractError, match=sentence):
        create_attention(AttentionConfig(**({"embed_dim": EMBED, "num_heads": HEADS} | given)))


def test_bad_calls_are_one_sentence() -> None:
    module = create_attention(AttentionConfig(EMBED, HEADS, pattern="local", window_size=4))
    with pytest.raises(hal.ContractError, match=r"x has shape \[3, 8\]: pass \[batch, length, 32\]"):
        module(torch.randn(3, 8))
    with pytest.raises(hal.ContractError, match="a cache was given to the pattern 'local'"):
        module(torch.randn(1, 3, EMBED), cache=KeyValueCache())
    cache, full = KeyValueCache(), PatternAttention(AttentionConfig(EMBED, HEADS))
    full(torch.randn(1, 3, EMBED), cache=cache)
    with pytest.raises(hal.ContractError, match="a batch of 2 was given to a cache of 1"):
        full(torch.randn(2, 3, EMBED), cache=cache)
