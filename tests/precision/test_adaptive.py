"""Packing, plans that meet their budgets, and stored models: bytes, values, files, refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from hal_precision import (  # noqa: E402
    AllocationStrategy,
    PackedLinear,
    PrecisionConfig,
    PrecisionFormat,
    QuantizationMode,
    UltraPrecisionModule,
    analyze_precision_opportunities,
    create_ultra_precision_module,
    plan_precision,
)
from hal_precision.adaptive import model_bytes  # noqa: E402
from hal_precision.formats import FORMATS, pack, unpack  # noqa: E402
from torch import nn  # noqa: E402

from hal_core import ContractError, HalError, UnsupportedError  # noqa: E402
from hal_core.testing import relative_error  # noqa: E402

F = PrecisionFormat
#: Relative errors of normal weights, groups of 32: what each format may lose.
LOSSES = {"fp32": 0, "fp16": 3e-4, "bf16": 2e-3, "fp8": 0.03, "int8": 6e-3, "int6": 0.025, "int5": 0.05, "int4": 0.09}
LOSSES |= {"int3": 0.19, "int2": 0.4}


def network(seed: int = 0, columns: int = 64) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(columns, 200), nn.Tanh(), nn.Linear(200, 96, bias=False), nn.Tanh(), nn.Linear(96, 10)
    )


def data(count: int = 32, columns: int = 64) -> Any:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 2, columns)


CONFIG = PrecisionConfig(
    allocation_strategy=AllocationStrategy.FISHER, quantization_mode=QuantizationMode.WEIGHT_ONLY, group_size=8
)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.value)
def test_a_format_takes_its_bytes_and_loses_no_more_than_it_must(form: PrecisionFormat) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    packed = pack(weight, form, 32)
    assert sum(each.nbytes for each in packed) == form.bytes_of(24, 64, 32)
    assert relative_error(unpack(packed, form, 32), weight) <= LOSSES[form.value]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_come_back_from_their_bytes(bits: int) -> None:
    from hal_precision.formats import _pack_codes, _unpack_codes

    codes = torch.randint(2**bits, (5, 72), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    stored = _pack_codes(codes, bits)
    assert stored.shape == (5, 9 * bits)
    assert torch.equal(_unpack_codes(stored, bits), codes)


def test_compensation_lowers_the_error_of_the_output() -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(48, 64, generator=generator)
    inputs = torch.randn(512, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    inputs = inputs + 0.1 * torch.randn(512, 64, generator=generator)
    found = []
    for moment in (None, inputs.T @ inputs):
        rounded = unpack(pack(weight, F.INT3, 32, moment), F.INT3, 32)
        found.append(relative_error(inputs @ rounded.T, inputs @ weight.T))
    assert found[1] < 0.5 * found[0]


def test_a_packed_layer_computes_what_its_unpacked_weight_does() -> None:
    layer = nn.Linear(64, 150)
    forms = [F.INT4, F.FP32, F.INT3, F.INT4, F.BF16, F.FP8, F.INT2, F.INT8, F.FP16, F.INT5]
    packed = PackedLinear.of(layer, forms, block_rows=16, group_size=32)
    x = torch.randn(3, 7, 64, requires_grad=True)
    want = torch.nn.functional.linear(x, packed.weight, layer.bias)
    out = packed(x)
    assert relative_error(out, want) < 1e-6
    assert torch.equal(packed.weight[16:32], layer.weight[16:32]), "rows in fp32 are as they were"
    assert torch.equal(packed.weight[64:80], layer.weight[64:80].bfloat16().float())
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert relative_error(grad, packed.weight.sum(0).expand(3, 7, 64)) < 1e-5


@pytest.mark.parametrize("reduction", [0.4, 0.8])
@pytest.mark.parametrize("strategy", list(AllocationStrategy))
def test_bytes_and_file_are_what_was_asked(reduction: float, strategy: AllocationStrategy, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 384), nn.Tanh(), nn.Linear(384, 128))
    config = PrecisionConfig(target_memory_reduction=reduction, allocation_strategy=strategy)
    calibration = data(16, 128) if strategy.needs_data else None
    small = create_ultra_precision_module(model, config, calibration=calibration)
    stats = small.get_precision_stats()
    assert stats.original_bytes == model_bytes(model) == 4 * sum(each.numel() for each in model.parameters())
    assert stats.stored_bytes == sum(each.nbytes for each in small.state_dict().values()) == small.plan.stored_bytes
    asked = (1 - reduction) * stats.original_bytes
    assert stats.stored_bytes <= asked
    if strategy is not AllocationStrategy.UNIFORM:  # which has the steps of its formats alone
        assert stats.stored_bytes > 0.98 * asked
        assert small.save(tmp_path / "small.safetensors") == pytest.approx(asked, rel=0.02)
        assert stats.optimality_gap <= 1e-3 * stats.predicted_cost


def test_the_model_is_not_changed_and_comes_back() -> None:
    model = network()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    small = create_ultra_precision_module(model, attrs.evolve(CONFIG, target_memory_reduction=0.7), calibration=data())
    assert isinstance(small.module[0], PackedLinear)
    assert small.module[0].bias is model[0].bias, "what is not packed is shared"
    assert small.revert() is model
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    assert all(each.requires_grad for each in model.parameters())
    assert model.training
    del model
    with pytest.raises(HalError, match="keep a reference"):
        small.revert()


def test_a_saved_model_loads_in_a_fresh_process_bit_for_bit(tmp_path: Path) -> None:
    config = attrs.evolve(CONFIG, target_memory_reduction=0.75, quantization_mode=QuantizationMode.STATIC)
    small = create_ultra_precision_module(network().eval(), config, calibration=data())
    small.save(tmp_path / "small.safetensors")
    torch.save({"x": data(5), "out": small(data(5))}, tmp_path / "want.pt")
    code = f"""
import torch
from torch import nn
from hal_precision import UltraPrecisionModule
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 96, bias=False), nn.Tanh(), nn.Linear(96, 10))
small = UltraPrecisionModule.load(model, {str(tmp_path / "small.safetensors")!r})
want = torch.load({str(tmp_path / "want.pt")!r})
assert torch.equal(small(want["x"]), want["out"])
assert small.get_precision_stats().memory_savings_ratio > 0.74
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(ContractError, match="another model"):
        UltraPrecisionModule.load(nn.Sequential(nn.Linear(64, 8)), tmp_path / "small.safetensors")


def test_a_state_dict_goes_into_a_module_of_another_plan() -> None:
    first = create_ultra_precision_module(
        network(), attrs.evolve(CONFIG, target_memory_reduction=0.75), calibration=data()
    )
    other = create_ultra_precision_module(
        network(9), attrs.evolve(CONFIG, target_memory_reduction=0.6), calibration=data()
    )
    other.load_state_dict(first.state_dict())
    assert torch.equal(other(data(4)), first(data(4)))


def test_fisher_predicts_the_rise_of_the_loss() -> None:
    """Half the squared distance of the outputs, for one format everywhere and rounding to nearest."""
    model, x = network().eval(), data(256)
    config = attrs.evolve(CONFIG, compensate=False, formats=(F.INT5,), target_memory_reduction=0.5)
    plan = plan_precision(model, config, x)
    small = create_ultra_precision_module(model, plan=plan)
    rise = 0.5 * float((small(x) - model(x)).detach().square().sum(-1).mean())
    assert plan.cost == pytest.approx(rise, rel=0.4)


def test_fisher_beats_entropy_and_one_format_at_equal_bytes() -> None:
    model, x = network().eval(), data(256)
    with torch.no_grad():
        model[0].weight[:100] *= 0.05  # rows that matter little
    errors = {}
    uniform = attrs.evolve(CONFIG, allocation_strategy=AllocationStrategy.UNIFORM, formats=(F.INT3,))
    size = plan_precision(model, attrs.evolve(uniform, target_memory_reduction=0.1)).stored_bytes
    for strategy in (AllocationStrategy.UNIFORM, AllocationStrategy.ENTROPY_BASED, AllocationStrategy.FISHER):
        config = attrs.evolve(CONFIG, allocation_strategy=strategy, compensate=False)
        plan = plan_precision(model, config, x if strategy.needs_data else None, budget_bytes=size)
        assert plan.stored_bytes <= size
        errors[strategy] = float((create_ultra_precision_module(model, plan=plan)(x) - model(x)).square().mean())
    assert errors[AllocationStrategy.FISHER] < 0.8 * min(
        errors[AllocationStrategy.UNIFORM], errors[AllocationStrategy.ENTROPY_BASED]
    )


def test_a_quality_budget_takes_the_fewest_bytes_that_keep_it() -> None:
    model, sizes = network(), []
    for budget in (1e-4, 1e-2):
        config = attrs.evolve(CONFIG, max_loss_increase=budget)
        plan = plan_precision(model, config, data())
        assert plan.cost <= budget
        sizes.append(plan.stored_bytes)
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("mode", list(QuantizationMode))
def test_inputs_are_rounded_as_the_mode_says(mode: QuantizationMode) -> None:
    model, x = network().eval(), data()
    config = attrs.evolve(CONFIG, quantization_mode=mode, formats=(F.FP32, F.FP16), target_memory_reduction=0.3)
    error = relative_error(create_ultra_precision_module(model, config, calibration=x)(x), model(x))
    assert (error < 1e-3) if mode is QuantizationMode.WEIGHT_ONLY else (1e-3 < error < 0.05)


def test_the_analysis_says_what_could_be_saved_and_changes_nothing() -> None:
    model = network()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    found = analyze_precision_opportunities(
        model, data(), config=attrs.evolve(CONFIG, target_memory_reduction=0.7, skip=("4",))
    )
    assert found["potential_savings"] == pytest.approx(0.7, abs=0.02)
    assert len(found["recommendations"]) >= 3
    assert [row["name"] for row in found["layers"]] == ["0", "2"]
    assert found["left"] == {"4": "is named by skip"}
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_the_examples_of_the_requirements_run() -> None:
    base_model, input_data = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), torch.randn(2, 9, 64)
    config = PrecisionConfig(
        allocation_strategy=AllocationStrategy.ENTROPY_BASED, target_memory_reduction=0.4, entropy_threshold=1.5
    )
    with pytest.raises(ContractError, match="the nearest that can be met"):
        create_ultra_precision_module(model=base_model, config=attrs.evolve(config, target_memory_reduction=0.9))
    adaptive_model = create_ultra_precision_module(model=base_model, config=config)
    assert adaptive_model(input_data).shape == input_data.shape
    assert f"{adaptive_model.get_precision_stats().memory_savings_ratio:.0%}" in ("40%", "41%")
    opportunities = analyze_precision_opportunities(model=base_model, sample_input=input_data)
    assert opportunities["potential_savings"] > 0.39
    assert len(opportunities["recommendations"])


def test_bad_input_is_refused_with_the_place_and_the_way_out() -> None:
    model = network()
    with pytest.raises(ContractError, match=r"target_memory_reduction is 1.5.*group_size is 12.*block_rows is 0"):
        PrecisionConfig(target_memory_reduction=1.5, group_size=12, block_rows=0)
    with pytest.raises(ContractError, match=r"do not divide by group_size 32: 2 \(200\)"):
        plan_precision(model, attrs.evolve(CONFIG, group_size=32), data())
    with pytest.raises(ContractError, match="has 1 sample"):
        plan_precision(model, CONFIG, data(1))
    broken = data()
    broken[3, 7] = float("nan")
    with pytest.raises(ContractError, match=r"Batch 1 of the calibration data has 1 values .* first at \[3, 7\]"):
        plan_precision(model, CONFIG, [data(), broken])
    with pytest.raises(ContractError, match="needs calibration data"):
        plan_precision(model, CONFIG)
    with pytest.raises(ContractError, match=r"nearest that can be met is [\d,]+ bytes, a reduction of \d+.\d%"):
        plan_precision(model, attrs.evolve(CONFIG, target_memory_reduction=0.99), data())
    with pytest.raises(ContractError, match=r"nearest that can be met is 0\.0"):
        plan_precision(model, attrs.evolve(CONFIG, formats=(F.INT2,), max_loss_increase=1e-9), data())
    with pytest.raises(ContractError, match="no linear layers"):
        plan_precision(nn.Sequential(nn.Tanh()), CONFIG, data())


def test_formats_that_the_device_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from hal_precision import adaptive

    monkeypatch.setattr(adaptive, "offered", lambda device: (F.FP32, F.INT8))
    with pytest.raises(UnsupportedError, match="cpu lacks fp8; it has fp32, int8"):
        plan_precision(network(), attrs.evolve(CONFIG, formats=(F.FP8, F.INT8)), data())
