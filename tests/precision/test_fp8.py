"""FP8 layers against products of rounded operands, and training steps: overflow, accumulation, resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hal_precision import (  # noqa: E402
    FP8Config,
    FP8Format,
    FP8LinearLayer,
    FP8TrainingEngine,
    convert_model_to_fp8,
    create_fp8_trainer,
    revert_from_fp8,
)
from torch import nn  # noqa: E402

from hal_core import ContractError, UnsupportedError  # noqa: E402
from hal_core.testing import relative_error  # noqa: E402


def network(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 16))


def data(seed: int = 1, rows: int = 24) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 32, generator=generator), torch.randint(16, (rows,), generator=generator)


def rounded(values: Any, form: FP8Format, dim: int | None) -> Any:
    """Values as FP8 holds them under a scale that fills the format."""
    largest = values.abs().amax() if dim is None else values.abs().amax(dim, keepdim=True)
    scale = largest / form.largest
    return (values / scale).to(form.dtype).to(values.dtype) * scale


@pytest.mark.parametrize("granularity", ["rowwise", "tensorwise"])
def test_all_three_products_are_those_of_rounded_operands(granularity: str) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(40, 32, requires_grad=True), torch.randn(40, 48)
    layer = FP8LinearLayer(32, 48, config=FP8Config(granularity=granularity))
    out = layer(x)
    out.backward(grad)
    e4, e5, row = FP8Format.E4M3, FP8Format.E5M2, granularity == "rowwise"
    weight, given = layer.weight.detach(), x.detach()
    last, first = (1, 0) if row else (None, None)
    want = rounded(given, e4, last) @ rounded(weight, e4, last).T + layer.bias.detach()
    assert relative_error(out, want) < 1e-6
    assert relative_error(x.grad, rounded(grad, e5, last) @ rounded(weight, e4, first)) < 1e-6
    assert relative_error(layer.weight.grad, rounded(grad, e5, first).T @ rounded(given, e4, first)) < 1e-6
    assert relative_error(layer.bias.grad, grad.sum(0)) < 1e-6


@pytest.mark.parametrize("granularity", ["rowwise", "tensorwise"])
def test_torchs_scaled_product_gives_the_emulated_values(granularity: str) -> None:
    """The call of the hardware path runs on the CPU too."""
    from hal_precision.fp8 import _product

    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(n, 64, generator=generator).to(torch.float8_e4m3fn) for n in (32, 48))
    rows = granularity == "rowwise"
    scales = [torch.rand(n if rows else 1, 1, generator=generator) + 0.5 for n in (32, 48)]
    found = [_product(left, scales[0], right, scales[1], torch.float32, emulate, False) for emulate in (True, False)]
    assert relative_error(found[1], found[0]) < (4e-3 if rows else 1e-6)  # rowwise leaves as bfloat16


def test_conversion_keeps_parameters_and_reverting_is_exact() -> None:
    model = network()
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    assert convert_model_to_fp8(model) is model
    assert sum(isinstance(each, FP8LinearLayer) for each in model) == 3
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(before)
    revert_from_fp8(model)
    assert all(type(each) is not FP8LinearLayer for each in model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_a_copy_is_converted_where_asked() -> None:
    model = network()
    found = convert_model_to_fp8(model, inplace=False)
    assert type(model[0]) is nn.Linear
    assert isinstance(found[0], FP8LinearLayer)


def test_the_example_of_the_requirements_trains() -> None:
    model, (inputs, targets) = network(), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = create_fp8_trainer(model, forward_format=FP8Format.E4M3)
    losses = []
    with trainer:
        for _ in range(30):
            losses.append(float(trainer.training_step(inputs, targets)))
            assert trainer.optimizer_step(optimizer)
    stats = trainer.get_training_statistics()
    assert losses[-1] < 0.3 * losses[0]
    assert stats["steps"] == 30
    assert stats["emulated"] is not torch.cuda.is_available() or stats["emulated"]
    assert set(stats["scales"]["0"]) == {"input", "weight", "gradient"}
    assert type(model[0]) is nn.Linear, "outside of the context the model is as it was"


@pytest.mark.parametrize("config", [FP8Config(), FP8Config(granularity="tensorwise", scaling="delayed", history=4)])
def test_training_follows_full_precision(config: FP8Config) -> None:
    curves = []
    for fp8 in (False, True):
        model, batches = network(), [data(seed) for seed in range(2)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        curve = []
        with FP8TrainingEngine(model, config) as trainer:
            if not fp8:
                revert_from_fp8(model)
            for step in range(40):
                curve.append(float(trainer.training_step(*batches[step % 2])))
                trainer.optimizer_step(optimizer)
        curves.append(curve)
    assert sum(curves[1]) == pytest.approx(sum(curves[0]), rel=0.03)
    assert curves[0][-1] < 0.5 * curves[0][0]


def test_delayed_scaling_counts_what_saturates_and_recovers() -> None:
    layer = FP8LinearLayer(32, 48, config=FP8Config(granularity="tensorwise", scaling="delayed", history=2))
    x = torch.ones(16, 32)
    layer(x)
    assert layer.counts.tolist()[0] == 0
    layer(100 * x)
    assert layer.counts.tolist()[0] == 16 * 32, "every input is beyond the largest one seen"
    found = layer(100 * x)
    assert layer.counts.tolist()[0] == 16 * 32, "the history has it now"
    want = torch.nn.functional.linear(100 * x, layer.weight, layer.bias)
    assert relative_error(found, want) < 0.05


def test_an_injected_overflow_skips_the_step_and_is_counted() -> None:
    model, (inputs, targets) = network(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = FP8Config(granularity="tensorwise", scaling="delayed", history=4)
    with FP8TrainingEngine(model, config) as trainer:
        trainer.training_step(inputs, targets)
        assert trainer.optimizer_step(optimizer)
        before = copy.deepcopy(model.state_dict())
        broken = inputs.clone()
        broken[3, 5] = float("inf")
        trainer.training_step(broken, targets)
        assert not trainer.optimizer_step(optimizer)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        counted = trainer.get_training_statistics()
        assert counted["skipped_steps"] == 1
        assert counted["overflows"] >= 2, "the value, and the step"
        first = float(trainer.training_step(inputs, targets))
        assert trainer.optimizer_step(optimizer)
        assert float(trainer.training_step(inputs, targets)) < first


def test_accumulated_steps_are_one_step_of_the_mean_loss() -> None:
    halves = [network(), network()]
    inputs, targets = data(rows=32)
    whole = FP8TrainingEngine(halves[0])
    parts = FP8TrainingEngine(halves[1], accumulate=2)
    for trainer, cuts in ((whole, 1), (parts, 2)):
        optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
        with trainer:
            for n, (x, y) in enumerate(zip(inputs.chunk(cuts), targets.chunk(cuts), strict=True)):
                trainer.training_step(x, y)
                assert trainer.optimizer_step(optimizer) is (n == cuts - 1)
    for a, b in zip(halves[0].parameters(), halves[1].parameters(), strict=True):
        assert relative_error(a, b) < 0.02  # other rows, other column scales


def test_clipping_bounds_the_step() -> None:
    model, (inputs, targets) = network(), data()
    before = [each.detach().clone() for each in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with FP8TrainingEngine(model, clip_norm=0.01) as trainer:
        trainer.training_step(inputs, targets)
        trainer.optimizer_step(optimizer)
    moved = sum(float((a - b.detach()).square().sum()) for a, b in zip(before, model.parameters(), strict=True)) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_a_resumed_training_is_equal_bit_for_bit(tmp_path: Path) -> None:
    config = FP8Config(granularity="tensorwise", scaling="delayed", history=3)

    def start() -> Any:
        model = nn.Sequential(network(), nn.Dropout(0.1))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2), FP8TrainingEngine(model, config)

    def steps(trainer: Any, optimizer: Any, first: int) -> list[float]:
        found = []
        for step in range(first, first + 4):
            found.append(float(trainer.training_step(*data(step))))
            trainer.optimizer_step(optimizer)
        return found

    model, optimizer, trainer = start()
    torch.manual_seed(5)
    with trainer:
        steps(trainer, optimizer, 0)
        trainer.save_checkpoint(tmp_path / "at.safetensors", optimizer)
        want = steps(trainer, optimizer, 4)
    again, optimizer, trainer = start()
    torch.manual_seed(6)
    with trainer:
        trainer.load_checkpoint(tmp_path / "at.safetensors", optimizer)
        assert steps(trainer, optimizer, 4) == want
        assert trainer.get_training_statistics()["steps"] == 8
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_layers_stay_by_name_size_and_measured_error() -> None:
    from hal_precision.fp8 import layer_errors, select_layers

    model = network()
    names, left = select_layers(model, FP8Config(skip=("2",), min_features=32))
    assert names == ["0"]
    assert "skip" in left["2"]
    assert "min_features" in left["4"]
    with torch.no_grad():
        model[2].weight[0, 0] = 1e4  # one value that takes the whole range of a tensor's scale
    config = FP8Config(granularity="tensorwise", max_error=0.1)
    errors = layer_errors(model, ["0", "2"], config, [data()[0]])
    assert errors["0"] < 0.06
    sample = [torch.zeros(4, 32)]
    assert layer_errors(model, ["0"], config, sample) == {"0": pytest.approx(0.0)}
    strict = FP8Config(max_error=1e-6)
    with pytest.raises(ContractError, match=r"0 its relative error .* above max_error 1e-06"):
        convert_model_to_fp8(model, strict, sample=[data()[0]])
    with pytest.raises(ContractError, match="give sample="):
        convert_model_to_fp8(model, strict)


def test_sizes_that_no_fp8_product_takes_stay_with_a_reason() -> None:
    model = nn.Sequential(nn.Linear(32, 20), nn.Linear(20, 32), nn.Linear(32, 32))
    convert_model_to_fp8(model)
    assert [isinstance(each, FP8LinearLayer) for each in model] == [False, False, True]


def test_what_cannot_be_is_refused_with_every_reason() -> None:
    with pytest.raises(ContractError, match=r"granularity is 'x'.*scaling is 'y'.*history is 0"):
        FP8Config(granularity="x", scaling="y", history=0)
    with pytest.raises(ContractError, match="E5M2 by E5M2"):
        create_fp8_trainer(network(), FP8Format.E5M2)
    with pytest.raises(ContractError, match=r"0 32 -> 8 features are no multiples of 16"):
        convert_model_to_fp8(nn.Sequential(nn.Linear(32, 8)))
    model = network()
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="cpu does not multiply FP8; it has float32, bfloat16"):
            convert_model_to_fp8(model, FP8Config(emulate=False))
    assert type(model[0]) is nn.Linear
    trainer = FP8TrainingEngine(model)
    with pytest.raises(ContractError, match="inside the context"):
        trainer.training_step(*data())
    with trainer:
        trainer.training_step(*data())
        with pytest.raises(ContractError, match=r"lacks 6 of 6 parameters of the model: 0.weight"):
            trainer.optimizer_step(torch.optim.SGD(network().parameters(), lr=0.1))


@pytest.mark.parametrize("granularity", ["rowwise", "tensorwise"])
def test_the_hardwares_path_gives_the_emulated_gradients(granularity: str) -> None:
    """torch runs its scaled product on the CPU too; 24 tokens are no multiple of 16, so the last product is padded."""
    torch.manual_seed(0)
    layer, found = FP8LinearLayer(32, 48, config=FP8Config(granularity=granularity)), []
    for emulated in (True, False):
        layer.emulated = emulated
        x = torch.randn(24, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = layer(x)
        grads = torch.autograd.grad(out.square().sum(), (x, layer.weight))
        found.append((out, *grads))
    for have, want in zip(found[1], found[0], strict=True):
        assert relative_error(have.detach(), want.detach()) < 2e-2  # rowwise products leave as bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("emulated", [True, False])
def test_compiled_gradients_are_the_eager_ones(dtype: torch.dtype, emulated: bool) -> None:
    """torch 2.11 gave gradients of 0 where the product's last operation was a conversion to the dtype that it had."""
    torch.manual_seed(0)
    config = FP8Config(granularity="tensorwise", statistics=False)  # counting hides the fault
    layer = FP8LinearLayer(32, 48, bias=False, dtype=dtype, config=config)
    layer.emulated, found = emulated, []
    for call in (layer, torch.compile(layer, backend="aot_eager")):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        found.append(torch.autograd.grad(call(x).float().square().sum(), (x, layer.weight)))
    for have, want in zip(found[1], found[0], strict=True):
        assert want.norm() > 0
        assert relative_error(have.detach(), want.detach()) < 1e-2
