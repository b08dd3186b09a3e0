"""`hal_nn.convert`: which layers go to hal, what is said of the others, the proof, and the way back to the bit."""

from __future__ import annotations

import copy
import math

import hal_nn
import pytest
import torch
from hal_nn import reroute
from torch import nn

import hal_core as hal
from hal_core import HalError


class Eager(nn.Module):
    """Attention as textbooks write it; `how` names a variant of its middle."""

    def __init__(self, how="plain", heads=4, width=32):
        super().__init__()
        self.how, self.heads = how, heads
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gain = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(1, heads, 9, 9))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, mask=None):
        batch, length, width = x.shape
        q, k, v = self.project(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = getattr(self, f"_{self.how}")(q, k, mask)
        out = torch.einsum("bhij,bhjd->bihd", weights, v) if self.how == "einsum" else (weights @ v).transpose(1, 2)
        return self.out(out.reshape(batch, length, width))

    def _plain(self, q, k, mask):
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return self.dropout(scores.softmax(-1))

    def _flat(self, q, k, mask):
        """Batch and heads in one dimension, as torch.bmm takes them; a lower bound; back and forth."""
        scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        scores = scores.view(*q.shape[:3], -1) * q.shape[-1] ** -0.5 + self.bias
        if mask is not None:
            scores = scores + torch.where(mask, 0.0, torch.finfo(scores.dtype).min)
        scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min)).view(-1, *scores.shape[2:])
        weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return weights.view(*q.shape[:3], -1)

    def _added(self, q, k, mask):
        """torch.baddbmm, as Bloom has it, then a replaced value that is not the lowest."""
        bias = self.bias.expand(q.shape[0], -1, -1, -1).flatten(0, 1)
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=0.5, alpha=0.3)
        scores = scores.view(*q.shape[:3], -1)
        return (scores if mask is None else torch.where(mask, scores, -1e4)).softmax(-1)

    def _einsum(self, q, k, mask):
        """Scores with the letters in another order, a gain for each head, in place."""
        scores = torch.einsum("bhid,bhjd->bhij", q, k)
        scores *= self.gain
        scores -= 0.25
        if mask is not None:
            scores.masked_fill_(~mask, -1e9)
        return torch.softmax(scores, dim=3)

    def _zeroed(self, q, k, mask):
        """Products with 0 beside a low number, as the first GPT has it, and a factor for each head."""
        allowed = torch.ones(q.shape[-2], k.shape[-2]).tril()
        scores = (q @ k.mT) * allowed + -1e4 * (1 - allowed)
        return scores.softmax(-1) * self.gain

    def _two_products(self, q, k, mask):
        """A second product that is added: it is computed, the first is not."""
        return (q @ k.mT * 0.3 + torch.matmul(q.flip(-1), k.mT)).softmax(dim=-1)

    def _read(self, q, k, mask):
        weights = (q @ k.mT).softmax(-1)
        return weights / weights.sum(-1, keepdim=True)

    def _columns(self, q, k, mask):
        return (q @ k.mT).softmax(-2)

    def _capped(self, q, k, mask):
        return (5 * torch.tanh(q @ k.mT / 5)).softmax(-1)

    def _topk(self, q, k, mask):
        """A mask of the scores themselves, which are computed for it; attention is not."""
        scores = q @ k.mT
        return scores.masked_fill(scores < scores.topk(2).values[..., -1:], float("-inf")).softmax(-1)


class Sdpa(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x):
        q, k, v = self.project(x).view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)
        return (
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 9, 32)
        )


class Pair(nn.Module):
    def __init__(self, *hows):
        super().__init__()
        self.layers = nn.ModuleList(Eager(how) for how in hows)
        self.norm = nn.LayerNorm(32)

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = x + layer(self.norm(x), mask)
        return x


MASK = torch.ones(9, 9, dtype=torch.bool).tril()
RECORDED = ["plain", "flat", "added", "einsum", "zeroed", "two_products", "topk"]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(7)


def error(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("how", RECORDED)
@pytest.mark.parametrize("masked", [False, True])
def test_eager_attention_runs_on_hal_and_is_the_same(how, masked):
    model, x = Eager(how).eval(), torch.randn(2, 9, 32, requires_grad=True)
    mask = MASK if masked else None
    want = model(x, mask)
    gradients = torch.autograd.grad(want.square().sum(), [x, *model.parameters()], allow_unused=True)
    hal_nn.convert(model, (x, mask))
    with hal.meter() as meter:
        got = model(x, mask)
    assert meter.records["cpu:0"].calls == 1
    assert error(got, want) <= 1e-5
    ours = torch.autograd.grad(got.square().sum(), [x, *model.parameters()], allow_unused=True)
    for mine, theirs in zip(ours, gradients, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or error(mine, theirs) <= 1e-4


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("read", "sum reads its attention weights"),
        ("columns", "not over the keys"),
        ("capped", "tanh reads its scores"),
    ],
)
def test_what_attention_cannot_say_stays_and_is_named(how, why):
    model, x = Pair("plain", how).eval(), torch.randn(2, 9, 32)
    want = model(x)
    _, report = hal_nn.convert(model, x)
    assert [layer.name for layer in report.converted] == ["layers.0"]
    (left,) = report.skipped
    assert left.name == "layers.1"
    assert why in left.reason
    assert why in str(report)
    assert error(model(x), want) <= 1e-5


def test_without_a_sample_a_layer_that_cannot_run_on_hal_refuses_its_call():
    model = Eager("read").eval()
    _, report = hal_nn.convert(model)
    assert report.error is None
    assert "not proved" in str(report)
    with pytest.raises(HalError, match=r"Eager \(Eager\) was converted .* sum reads its attention weights"):
        model(torch.randn(2, 9, 32))


def test_calls_of_torchs_attention_are_converted():
    model, x = Sdpa().eval(), torch.randn(2, 9, 32)
    want = model(x)
    _, report = hal_nn.convert(model, x)
    assert [layer.way for layer in report.layers] == ["rerouted"]
    assert report.devices == ("cpu:0",)
    assert error(model(x), want) <= 1e-5


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_transformers_of_torch_are_converted(batch_first, padded):
    encoder = nn.TransformerEncoderLayer(32, 4, 48, batch_first=batch_first)
    decoder = nn.TransformerDecoderLayer(32, 4, 48, batch_first=batch_first)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
            self.decoder = nn.TransformerDecoder(decoder, 1)

        def forward(self, x, hidden=None):
            memory = self.encoder(x, src_key_padding_mask=hidden)
            return self.decoder(x, memory, memory_key_padding_mask=hidden)

    model, x = Both().eval(), torch.randn(*((2, 9) if batch_first else (9, 2)), 32)
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    hidden[0, 6:] = True
    given = (x, hidden if padded else None)
    with torch.no_grad():  # torch's fused inference path would leave the converted layers out
        want, state = model(*given), model.state_dict()
        _, report = hal_nn.convert(model, given)
        with hal.meter() as meter:
            got = model(*given)
    assert [layer.way for layer in report.layers] == ["replaced"] * 4
    assert meter.records["cpu:0"].calls == 4
    assert error(got, want) <= 1e-5
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    hal_nn.revert(model)
    assert {type(module) for module in model.modules() if "Attention" in type(module).__name__} == {
        nn.MultiheadAttention
    }
    with torch.no_grad():
        assert torch.equal(model(*given), want)


def test_hooks_of_a_replaced_module_hold_before_between_and_after():
    model, seen = nn.ModuleList([nn.MultiheadAttention(32, 4)]), []
    x = torch.randn(9, 2, 32)
    first = model[0].register_forward_hook(lambda *_: seen.append("first"))
    hal_nn.convert(model)
    model[0].register_forward_hook(lambda *_: seen.append("second"))
    model[0](x, x, x)
    assert seen == ["first", "second"]
    hal_nn.revert(model)
    first.remove()
    model[0](x, x, x)
    assert seen == ["first", "second", "second"]


def test_a_conversion_is_taken_back_to_the_bit():
    model, x = Pair("plain", "read", "flat").eval(), torch.randn(2, 9, 32)
    hal_nn.set_device(model.layers[0], "cpu:0")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    kinds = [type(module) for module in model.modules()]
    state = {name: one.clone() for name, one in model.state_dict().items()}
    want = model(x)
    hal_nn.convert(model, x, device="cpu")
    assert list(model.state_dict()) == list(state)
    assert hal_nn.revert(model) is model
    assert [type(module) for module in model.modules()] == kinds
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert all(torch.equal(one, state[name]) for name, one in model.state_dict().items())
    assert torch.equal(model(x), want)


def test_weights_trained_in_between_stay_trained():
    model, x = Pair("plain").train(), torch.randn(2, 9, 32)
    parameters = list(model.parameters())
    hal_nn.convert(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    trained = model.layers[0].project.weight.clone()
    hal_nn.revert(model)
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model.layers[0].project.weight, trained)


def test_a_copy_of_a_converted_model_is_converted_and_goes_back_alone():
    model, x = Pair("plain", "flat").eval(), torch.randn(2, 9, 32)
    want = model(x)
    hal_nn.convert(model, x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layers[0].out.weight.zero_()
    assert error(model(x), want) <= 1e-5, "the copy shares the original's layers"
    hal_nn.revert(twin)
    assert hal_nn.is_converted(model)
    assert not hal_nn.is_converted(twin)
    assert not any(reroute.is_rerouted(module) for module in twin.modules())


def test_dropout_in_training_drops_on_the_device():
    model, x = Eager().train(), torch.randn(2, 9, 32)
    hal_nn.convert(model, x)
    with hal.meter() as meter:
        first, second = model(x), model(x)
    assert meter.records["cpu:0"].calls == 2
    assert not torch.equal(first, second)


def test_the_mode_of_each_module_is_kept():
    model = Pair("plain", "plain").train()
    model.layers[0].eval()
    hal_nn.convert(model, torch.randn(2, 9, 32))
    assert [module.training for module in (model, model.layers[0], model.layers[1])] == [True, False, True]


def test_a_wrong_result_is_refused_and_the_model_is_as_it_was(monkeypatch):
    model, x = Pair("plain").eval(), torch.randn(2, 9, 32)
    want = model(x)
    right = hal.attention
    monkeypatch.setattr(reroute.hal, "attention", lambda *given, **named: right(*given, **named) * 1.01)
    with pytest.raises(
        HalError, match=r"gives another result after its conversion, relative error .* as it was before"
    ):
        hal_nn.convert(model, x)
    assert not hal_nn.is_converted(model)
    assert torch.equal(model(x), want)


def test_weights_that_leave_a_layer_are_refused_when_they_are_read():
    class Returns(Eager):
        def forward(self, x):
            q, k, v = self.project(x).view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4)
            weights = (q @ k.mT).softmax(-1)
            return (weights @ v).sum(), weights

    model = Returns().eval()
    hal_nn.convert(model, torch.randn(2, 9, 32))
    _, weights = model(torch.randn(2, 9, 32))
    assert weights.shape == (2, 4, 9, 9)
    with pytest.raises(HalError, match="mean reads its attention weights"):
        weights.mean()


def test_a_tensor_changed_before_its_product_is_used_is_an_error():
    class Changes(Eager):
        def forward(self, x):
            q, k, v = self.project(x).view(2, 9, 3, 4, 8).permute(2, 0, 3, 1, 4).contiguous()
            scores = q @ k.mT
            q.zero_()
            return scores.softmax(-1) @ v

    model = Changes().eval()
    hal_nn.convert(model)
    with torch.no_grad(), pytest.raises(HalError, match="changed in place before its result was used"):
        model(torch.randn(2, 9, 32))


def test_a_converted_layer_runs_inside_compiled_code():
    model, x = Pair("plain").eval(), torch.randn(2, 9, 32)
    want = model(x)
    hal_nn.convert(model, x)
    with hal.meter() as meter:
        got = torch.compile(model, backend="eager")(x)
    assert meter.records["cpu:0"].calls == 1
    assert error(got, want) <= 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("device", ["vulkan", pytest.param("opencl", marks=pytest.mark.slow), "kpu"])
def test_a_device_runs_what_is_converted_for_it(device):
    try:
        hal.session(device)
    except HalError as absent:
        pytest.skip(str(absent))
    model, x = Pair("plain", "flat").eval(), torch.randn(2, 9, 32)
    want = model(x, MASK)
    _, report = hal_nn.convert(model, (x, MASK), device=device)
    assert [name.partition(":")[0] for name in report.devices] == [device]
    assert report.error <= 1e-4
    with torch.no_grad():
        assert error(model(x, MASK), want) <= 1e-4


def test_a_photonic_device_is_found(device):
    with pytest.raises(HalError, match=r"colour was given in config: it takes device, sample, tolerance"):
        hal_nn.convert_to_photonic(Pair("plain"), {"colour": 1})
    model, x = Pair("plain").eval(), torch.randn(2, 9, 32)
    same, report = hal_nn.convert_to_photonic(model, {"device": device("light"), "sample": x})
    assert same is model
    assert report.devices == ("light:0",)
    hal_nn.revert(model)
    _, report = hal_nn.convert_to_photonic(model)
    assert report.converted
    with torch.no_grad(), hal.meter() as meter:
        model(x)
    (ran,) = meter.records
    assert hal.device(ran).family == "photonic"


def test_a_model_with_nothing_to_convert():
    with pytest.raises(
        HalError, match=r"Sequential has nothing to convert \(no layer of it computes attention\): pass"
    ):
        hal_nn.convert(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(
        HalError, match=r"Eager has nothing to convert \(Eager \(Eager\): not converted, .*not over the keys"
    ):
        hal_nn.convert(Eager("columns"), torch.randn(2, 9, 32))


def test_a_list_of_devices_takes_the_first_that_is_there():
    model, x = Pair("plain").eval(), torch.randn(2, 9, 32)
    _, report = hal_nn.convert(model, x, device=["nowhere", "cpu:0"])
    assert report.devices == ("cpu:0",)
    hal_nn.revert(model)
    with pytest.raises(
        HalError, match=r"'nowhere', 'cpu:77' was given for device, and none of it is available .*cpu:0"
    ):
        hal_nn.convert(model, x, device=["nowhere", "cpu:77"])
    with pytest.raises(HalError, match="an empty list was given for device"):
        hal_nn.convert(model, x, device=[])
    assert not hal_nn.is_converted(model)


def test_other_bad_input():
    model = Pair("plain")
    with pytest.raises(HalError, match=r"Pair is not converted: pass the model that hal_nn\.convert was given"):
        hal_nn.revert(model)
    with pytest.raises(HalError, match="Pair does not run on the sample"):
        hal_nn.convert(model, torch.randn(2, 9, 31))
    hal_nn.convert(model)
    with pytest.raises(HalError, match="Pair is converted already: take it back first"):
        hal_nn.convert(model)
