"""The validator passes right layers and fails each mutation; the benchmark waits for the device."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from hal_nn import ComponentValidator, benchmark_attention_performance, create_sparse_attention
from torch import Tensor, nn

from hal_core import ContractError, DeviceUnavailableError

SDPA = nn.functional.scaled_dot_product_attention


class Attention(nn.Module):
    """A right layer, with mutations by name."""

    def __init__(self, wrong: str = "", d_model: int = 32, heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.wrong, self.num_heads, self.causal, self.kept = wrong, heads, causal, None
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        query, key, value = (
            each(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.wrong == "stale keys":
            self.kept = key if self.kept is None or self.kept.shape != key.shape else self.kept
            key = self.kept
        if self.wrong == "swapped heads":
            value = value.flip(1)
        if self.wrong == "mixed batch":
            key = key.roll(1, 0)
        if self.wrong == "detached":
            key = key.detach()
        if self.wrong == "dropped mask":
            attention_mask = None
        if self.causal and self.wrong != "not causal":
            seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            attention_mask = seen if attention_mask is None else attention_mask & seen
        scale = 1 / query.shape[-1] if self.wrong == "wrong scale" else None
        out = SDPA(query, key, value, attn_mask=attention_mask, scale=scale)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def failing(found: dict[str, Any]) -> set[str]:
    return {name for name, check in found["checks"].items() if not check["passed"]}


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Attention(),
        lambda: Attention(causal=True),
        lambda: nn.MultiheadAttention(32, 4, batch_first=True),
        lambda: nn.MultiheadAttention(32, 4, bias=False),
        lambda: create_sparse_attention(32, 4, 0.0, causal=True),
    ],
)
def test_right_layers_pass(layer: Any) -> None:
    found = ComponentValidator("cpu").validate_attention_component(layer(), 32, 4)
    assert found["passed"], found
    assert {"output", "second call", "batch", "input gradient", "weight gradients"} <= set(found["checks"])


@pytest.mark.parametrize(
    ("wrong", "fails"),
    [
        ("wrong scale", {"output", "input gradient"}),
        ("swapped heads", {"output"}),
        ("stale keys", {"second call"}),
        ("dropped mask", {"mask"}),
        ("mixed batch", {"output"}),
        ("detached", {"input gradient", "weight gradients"}),
        ("not causal", {"output", "second call"}),
    ],
)
def test_each_mutation_fails_its_check(wrong: str, fails: set[str]) -> None:
    found = ComponentValidator().validate_attention_component(Attention(wrong, causal=wrong == "not causal"), 32, 4)
    assert not found["passed"]
    assert fails <= failing(found)
    if wrong in ("dropped mask", "stale keys"):
        assert "output" not in failing(found), "only what the mutation breaks is blamed"


def test_sparse_attention_is_not_passed_off_as_dense() -> None:
    layer = create_sparse_attention(32, 4, 0.9, block_size=8)
    assert "output" in failing(ComponentValidator().validate_attention_component(layer, 32, 4, sequence_length=96))


def test_bfloat16_is_held_to_its_own_limit() -> None:
    found = ComponentValidator().validate_attention_component(Attention().bfloat16(), 32, 4)
    assert found["passed"], found
    assert found["limit"] == 2e-2
    assert not ComponentValidator().validate_attention_component(Attention("wrong scale").bfloat16(), 32, 4)["passed"]


def test_linear_layers_pass_and_mutations_fail() -> None:
    class Wrong(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)  # the bias is lost

    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.bfloat16().float())

    validator = ComponentValidator()
    assert validator.validate_linear_component(nn.Linear(20, 30), 20, 30)["passed"]
    assert failing(validator.validate_linear_component(Wrong(20, 30), 20, 30)) == {"output"}
    assert "output" in failing(validator.validate_linear_component(Rounded(20, 30), 20, 30))


def test_layers_that_cannot_be_validated_are_refused() -> None:
    validator = ComponentValidator()
    with pytest.raises(ContractError, match="no query, key, value and output projections were found in Identity"):
        validator.validate_attention_component(nn.Identity(), 32, 4)
    with pytest.raises(ContractError, match="use heads that divide"):
        validator.validate_attention_component(Attention(), 32, 5)
    with pytest.raises(ContractError, match=r"pass a layer with \[30, 20\]"):
        validator.validate_linear_component(nn.Linear(30, 20), 20, 30)


class Asynchronous(nn.Module):
    """Returns at once; its work ends 20 ms later."""

    def __init__(self) -> None:
        super().__init__()
        self.running: threading.Thread | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.running = threading.Thread(target=time.sleep, args=(0.02,))
        self.running.start()
        return x

    def wait(self, device: torch.device) -> None:
        if self.running is not None:
            self.running.join()


def test_the_benchmark_waits_for_the_work_it_times() -> None:
    model = Asynchronous()
    found = benchmark_attention_performance(model, (1, 4, 8), 3, warmup=1, wait=model.wait)
    assert found["avg_latency"] >= 19
    assert benchmark_attention_performance(model, (1, 4, 8), 3, warmup=1, wait=lambda d: None)["median_latency"] < 19
    assert found["peer"] is None


def test_the_benchmark_gives_a_peer_in_the_same_run() -> None:
    class Slow(Attention):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            time.sleep(0.01)
            return super().forward(x, attention_mask)

    found = benchmark_attention_performance(model=Slow(), input_shape=(1, 8, 32), num_trials=5)
    assert found["min_latency"] <= found["median_latency"] <= found["p95_latency"]
    assert found["peer"]["name"] == "MultiheadAttention"
    assert found["speedup"] < 1
    assert found["trials"] == 5
    assert benchmark_attention_performance(Attention(), (1, 8, 32), 2, peer=Slow())["speedup"] > 1


@pytest.mark.parametrize("arguments", [((1, 8), 5), ((1, 8, 32), 0)])
def test_the_benchmark_refuses_bad_arguments(arguments: Any) -> None:
    with pytest.raises(ContractError, match="was given: use"):
        benchmark_attention_performance(Attention(), *arguments)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (lambda: nn.MultiheadAttention(32, 4, add_bias_kv=True), "MultiheadAttention with add_bias_kv was given"),
        (lambda: nn.MultiheadAttention(32, 4, kdim=16, vdim=16), "MultiheadAttention with kdim or vdim was given"),
        (lambda: nn.TransformerEncoderLayer(32, 4), r"pass its attention, layer\.self_attn"),
        (lambda: nn.MultiheadAttention(32, 4, device="meta"), "is on the meta device, where nothing runs"),
    ],
)
def test_a_right_layer_that_the_reference_is_not_for_is_refused_instead_of_failed(layer, said):
    with pytest.raises(ContractError, match=said):
        ComponentValidator().validate_attention_component(layer(), 32, 4)


def test_wrong_arguments_of_the_validator_are_refused():
    with pytest.raises(ContractError, match="seed 'a' was given"):
        ComponentValidator(seed="a")
    with pytest.raises(ContractError, match="causal 'yes' was given"):
        ComponentValidator().validate_attention_component(Attention(), 32, 4, causal="yes")
    with pytest.raises(ContractError, match="in_features '8' was given"):
        ComponentValidator().validate_linear_component(nn.Linear(8, 4), "8", 4)
    with pytest.raises(ContractError, match="Attention has no weight: pass a layer with"):
        ComponentValidator().validate_linear_component(Attention(), 32, 32)
    if not torch.cuda.is_available():
        with pytest.raises(DeviceUnavailableError, match="cuda is not present: use one of"):
            ComponentValidator("cuda")


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_attention_is_timed_on_the_shape_that_was_given(batch_first):
    seen = []
    layer = nn.MultiheadAttention(32, 4, batch_first=batch_first)
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    found = benchmark_attention_performance(layer, (2, 16, 32), 2, warmup=0)
    assert found["avg_latency"] > 0
    assert set(seen) == {(2, 16, 32) if batch_first else (16, 2, 32)}


def test_wrong_arguments_of_the_benchmark_are_named_by_what_they_are():
    with pytest.raises(ContractError, match=r"input_shape a tensor \[100, 100\] was given"):
        benchmark_attention_performance(Attention(), torch.zeros(100, 100))
    with pytest.raises(ContractError, match="wait 3 was given: use a function"):
        benchmark_attention_performance(Attention(), (2, 16, 32), 2, wait=3)
    with pytest.raises(ContractError, match="is on the meta device, where nothing runs"):
        benchmark_attention_performance(nn.MultiheadAttention(32, 4, device="meta"), (2, 16, 32), 2)
