"""Programs that call torch's scaled_dot_product_attention run on hal, and torch is as it was afterwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hal_nn import override_sdpa
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import hal_core as hal

ORIGINAL: Any = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _torch_is_as_it_was() -> Any:
    yield
    assert F.scaled_dot_product_attention is ORIGINAL
    assert torch.backends.mha.get_fastpath_enabled()


class Mine(Tensor):
    pass


def test_it_counts_and_reverts() -> None:
    query = torch.randn(2, 4, 5, 8)
    with override_sdpa() as counted:
        found = F.scaled_dot_product_attention(query, query, query, is_causal=True)
        assert (counted.calls, counted.active) == (1, True)
    torch.testing.assert_close(found, ORIGINAL(query, query, query, is_causal=True))
    F.scaled_dot_product_attention(query, query, query)
    assert (counted.calls, counted.active) == (1, False)
    counted.revert()


def test_hal_attention_itself_may_take_the_place_without_recursion(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(2, 4, 5, 8, requires_grad=True)
    wanted = ORIGINAL(query, query, query, dropout_p=0.0)
    monkeypatch.setattr(F, "scaled_dot_product_attention", hal.attention)
    torch.testing.assert_close(F.scaled_dot_product_attention(query, query, query, None, 0.0, False), wanted)
    for options in ({"window": (3, 0)}, {"return_lse": True}, {"softcap": 3.0}):
        hal.attention(query, query, query, **options)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    layer(torch.randn(2, 5, 16)).sum().backward()
    compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="eager")
    torch.testing.assert_close(compiled(query), wanted)
    monkeypatch.undo()


def test_it_follows_the_selection_and_refuses_what_the_device_cannot() -> None:
    query = torch.randn(1, 2, 4, 8)
    with override_sdpa() as counted, hal.use("kpu:0"), hal.watch() as seen:
        F.scaled_dot_product_attention(query, query, query)
        with pytest.raises(hal.UnsupportedError, match="kpu:0 cannot run"):
            F.scaled_dot_product_attention(query.double(), query.double(), query.double())
    assert seen.decision is not None
    assert seen.decision.chosen == "kpu:0"
    assert (counted.calls, counted.fallbacks) == (1, {})


def test_a_fallback_is_counted_by_its_reason() -> None:
    query = torch.randn(1, 2, 4, 8)
    with override_sdpa(fallback=True) as counted:
        out = F.scaled_dot_product_attention(query.as_subclass(Mine), query, query)
    assert isinstance(out, Mine)
    assert counted.calls == 0
    (reason,) = counted.fallbacks
    assert "Mine, a tensor subclass" in reason
    with override_sdpa(), pytest.raises(hal.ContractError, match="Mine, a tensor subclass"):
        F.scaled_dot_product_attention(query.as_subclass(Mine), query, query)


def test_a_mask_and_causal_are_refused_as_torch_refuses_them() -> None:
    query, mask = torch.randn(1, 2, 4, 8), torch.ones(4, 4, dtype=torch.bool)
    with override_sdpa(), pytest.raises(RuntimeError, match="Explicit attn_mask should not be set when is_causal=True"):
        F.scaled_dot_product_attention(query, query, query, mask, is_causal=True)


@pytest.mark.parametrize("device", ["cpu:0", "kpu:0", "vulkan:0", "photonic:0"])
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_a_causal_bias_is_causal_on_every_device(bias: Any, device: str) -> None:
    if device not in {found.id for found in hal.devices()}:
        pytest.skip(f"{device} is not here")
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 6, 8)
    wanted = ORIGINAL(query, key, key, bias(4, 6))
    with override_sdpa(), hal.use(device):
        found = F.scaled_dot_product_attention(query, key, key, bias(4, 6))
    bound = max(hal.capabilities(device).numerics["float32"].relative * 2, 1e-5)
    assert float((found - wanted).norm() / wanted.norm()) <= bound


@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_a_causal_bias_stays_in_the_compiled_graph(bias: Any) -> None:
    torch.compiler.reset()
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 9, 8)
    with override_sdpa():
        compiled = torch.compile(F.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
        found = compiled(query, key, key, bias(6, 9))
    torch.testing.assert_close(found, ORIGINAL(query, key, key, bias(6, 9)))


@pytest.mark.parametrize("device", ["cpu:0", "kpu:0", "vulkan:0", "opencl:0", "photonic:0"])
@pytest.mark.parametrize(
    ("query", "key", "options"),
    [
        ((5, 8), (6, 8), {}),
        ((3, 5, 8), (3, 6, 8), {"is_causal": True}),
        ((2, 3, 4, 5, 8), (3, 1, 6, 8), {}),
        ((2, 4, 5, 8), (1, 4, 6, 8), {}),
        ((2, 8, 5, 8), (2, 2, 6, 8), {"enable_gqa": True}),
    ],
)
def test_every_device_runs_what_torch_takes(query: Any, key: Any, options: Any, device: str) -> None:
    if device not in {found.id for found in hal.devices()}:
        pytest.skip(f"{device} is not here")
    given, other = torch.randn(query), torch.randn(key)
    wanted = ORIGINAL(given, other, other, **options)
    with override_sdpa(), hal.use(device):
        found = F.scaled_dot_product_attention(given, other, other, **options)
    assert found.shape == wanted.shape
    bound = max(hal.capabilities(device).numerics["float32"].relative * 3, 1e-5)
    assert float((found - wanted).norm() / wanted.norm()) <= bound


@pytest.mark.parametrize("fused", [False, True])
def test_torch_s_modules_reach_it_in_inference(fused: bool) -> None:
    layer, x = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        wanted = layer(x)
        with override_sdpa(fused_inference=fused) as counted:
            found = layer(x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert counted.calls == (0 if fused else 1)


def test_two_end_in_the_reverse_order() -> None:
    outer = override_sdpa()
    inner = override_sdpa()
    with pytest.raises(hal.HalError, match="replaced again after override_sdpa"):
        outer.revert()
    inner.revert()
    outer.revert()


def test_calls_of_eight_threads_are_all_counted() -> None:
    query = torch.randn(1, 2, 4, 8)
    with override_sdpa() as counted, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [F.scaled_dot_product_attention(query, query, query) for _ in range(100)], range(8)))
    assert counted.calls == 800


@pytest.mark.parametrize("shape", [(0, 4, 10, 8), (2, 4, 0, 8), (2, 4, 10, 0), (0, 0, 0, 0), (2, 0, 10, 8)])
def test_sizes_of_zero_give_what_torch_gives(shape: tuple[int, ...]) -> None:
    def call() -> tuple[Any, ...]:
        query, key, value = torch.zeros(shape), torch.zeros(shape), torch.arange(32.0).expand(*shape[:3], 32).clone()
        for tensor in (query, key, value):
            tensor.requires_grad_()
        out = F.scaled_dot_product_attention(query, key, value)
        return (out, *torch.autograd.grad(out.sum(), (query, key, value)))

    wanted = call()
    with override_sdpa() as counted:
        found = call()
        assert counted.calls == (shape[1] > 0)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.shape == theirs.shape
        assert torch.allclose(mine, theirs)
