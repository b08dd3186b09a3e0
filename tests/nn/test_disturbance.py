"""One disturbed layer at a time, on models whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hal_nn import LayerSensitivity, layer_sensitivity, sensitive_layers
from torch import Tensor, nn

from hal_core import ContractError


class Chain(nn.Module):
    """out = second(first(x)) + 10 x: the first layer reaches the output through the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.unused = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) + 10 * x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.up = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.attention(x, x, x, need_weights=False)[0] + x)


def found_by(model: nn.Module, x: Tensor, **options: Any) -> dict[str, LayerSensitivity]:
    return {each.name: each for each in layer_sensitivity(model, lambda network: network(x), **options)}


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(256, 64)


def test_noise_has_the_effect_that_its_path_to_the_output_gives_it(x: Tensor) -> None:
    model = Chain()
    with torch.no_grad():
        inner, last = model.first(x), model.second(model.first(x))
        through = torch.randn(1000, 64) @ model.second.weight.T
        gain = float(through.square().mean().sqrt() * inner.square().mean().sqrt())
        out = float((last + 10 * x).square().mean().sqrt())
    found = found_by(model, x, noise=0.05, draws=4)
    assert found["second"].error == pytest.approx(0.05 * float(last.square().mean().sqrt()) / out, rel=0.03)
    assert found["first"].error == pytest.approx(0.05 * gain / out, rel=0.1)
    assert found["second"].amplification == pytest.approx(found["second"].error / 0.05)
    assert found["unused"].error == 0
    assert [each.kind for each in found.values()] == ["linear"] * 3
    assert found["second"].parameters == 64 * 64


def test_fewer_bits_hurt_more_and_by_what_rounding_the_layer_gives(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))

    def rounded(tensor: Tensor) -> Tensor:
        step = tensor.abs().max() / 7
        return (tensor / step).round() * step

    with torch.no_grad():
        exact = model(x).double()
        by_hand = rounded(rounded(x) @ rounded(model[0].weight).T).double()
    want = float((by_hand - exact).norm() / exact.norm())
    four, eight = found_by(model, x, bits=4)["0"], found_by(model, x, bits=8)["0"]
    assert four.error == pytest.approx(want, rel=1e-5)
    assert four.error > 10 * eight.error > 0
    assert four.amplification is None


@pytest.mark.parametrize("disturbance", [{"noise": 0.1}, {"bits": 6}], ids=str)
def test_attention_is_one_layer_and_its_projections_are_not_apart(disturbance: dict[str, Any]) -> None:
    model = nn.Sequential(Block(), Block()).eval()
    assert sensitive_layers(model) == {
        "0.attention": "attention",
        "0.attention.out_proj": "linear",
        "0.up": "linear",
        "1.attention": "attention",
        "1.attention.out_proj": "linear",
        "1.up": "linear",
    }
    found = found_by(model, torch.randn(2, 8, 16), **disturbance)
    assert all(each.error > 0 for name, each in found.items() if not name.endswith("out_proj"))


def test_the_model_is_left_as_it_was_and_draws_repeat(x: Tensor) -> None:
    model, before = Chain(), None
    before = [parameter.clone() for parameter in model.parameters()]
    first, second = (found_by(model, x, noise=0.1) for _ in range(2))
    found_by(model, x, bits=3)
    assert first == second
    assert found_by(model, x, noise=0.1, seed=5) != first
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_are_chosen_by_pattern(x: Tensor) -> None:
    assert list(found_by(Chain(), x, noise=0.1, layers=["sec*"])) == ["second"]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, "noise=None and bits=None were given: pass one of them, noise=0.1 for 20 dB"),
        ({"noise": 0.1, "bits": 8}, "noise=0.1 and bits=8 were given: pass one of them"),
        ({"noise": 0.0}, "noise=0.0 was given: pass a number above 0"),
        ({"bits": 1}, "bits=1 was given: pass a whole number from 2 to 24"),
        ({"noise": 0.1, "draws": 0}, "draws=0 was given: pass a whole number, 1 or more"),
        ({"noise": 0.1, "layers": ["sceond"]}, "layer 'sceond' was given: there is none of that name; the closest are"),
    ],
)
def test_what_is_not_possible_is_refused(x: Tensor, options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ContractError, match=wanted.replace(".", r"\.")):
        found_by(Chain(), x, **options)


def test_outputs_that_are_no_finite_tensor_are_refused(x: Tensor) -> None:
    with pytest.raises(ContractError, match="run gave a tuple: return a finite tensor"):
        layer_sensitivity(Chain(), lambda network: (network(x),), noise=0.1)  # type: ignore[arg-type,return-value]
    with pytest.raises(ContractError, match="run gave a tensor that is not finite"):
        layer_sensitivity(Chain(), lambda network: network(x) / 0, noise=0.1)
    with pytest.raises(ContractError, match="GELU was given: it has neither linear layers nor attention"):
        layer_sensitivity(nn.GELU(), lambda network: network(x), noise=0.1)
