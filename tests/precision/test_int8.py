"""Int8 layers with scales from calibration data, in torch and on the simulated KPU."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hal_precision import Int8Linear, calibrate_int8  # noqa: E402
from torch import nn  # noqa: E402

from hal_core import ContractError  # noqa: E402
from hal_core.testing import relative_error  # noqa: E402


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 24, bias=False), nn.Tanh(), nn.Linear(24, 8))


def data(rows: int = 64) -> Any:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))


def test_calibrated_layers_multiply_int8_and_stay_near_float() -> None:
    model, x = network(), data()
    small, found = calibrate_int8(model, [data(), 2 * data(3)])
    assert set(found.scales) == {"0", "2", "4"}
    assert small[0].weight.dtype == torch.int8
    assert 1e-4 < relative_error(small(x), model(x)) < 0.03
    assert type(model[0]) is nn.Linear, "the model is not changed"
    codes = (x / small[0].input_scale).round().clamp(-127, 127).double()
    want = codes @ small[0].weight.double().T * (small[0].weight_scale * small[0].input_scale).double()
    assert relative_error(small[0](x), want + model[0].bias.detach().double()) < 1e-6
    assert small[0](x.view(2, 32, 32)).shape == (2, 32, 48)


def test_scales_clip_the_outliers_that_cost_more_than_they_give() -> None:
    x = data(2000)
    x[0, 0] = 200.0
    layer = Int8Linear(network()[0], 1.0)
    small, _ = calibrate_int8(network(), x, max_error=1.0)
    assert float(small[0].input_scale) < 200.0 / 127 * 0.95
    assert layer.weight.abs().amax() == 127


def test_layers_that_eight_bits_hurt_stay_with_their_error() -> None:
    model, x = network(), data()
    with torch.no_grad():
        model[2].weight[0, 0] = 1e3  # one weight that takes the whole range of the layer
    small, found = calibrate_int8(model, x, max_error=0.2, skip=("4",))
    assert found.left["4"] == "is named by skip"
    assert "above max_error 0.2" in found.left["2"]
    assert found.errors["2"] > 0.2 >= found.errors["0"]
    assert [isinstance(small[place], Int8Linear) for place in (0, 2, 4)] == [True, False, False]


@pytest.mark.slow
def test_the_simulated_kpu_multiplies_int8() -> None:
    pytest.importorskip("hal_kpu")
    small, _ = calibrate_int8(network(), data())
    x = data(16)
    with torch.no_grad():
        assert relative_error(torch.compile(small, backend="kpu")(x), small(x)) < 1e-5


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(ContractError, match=r"No layer .* int8: 0 its relative error .* above max_error 1e-09"):
        calibrate_int8(network(), data(), max_error=1e-9)
    with pytest.raises(ContractError, match="has 1 sample"):
        calibrate_int8(network(), data(1))
    broken = data()
    broken[3, 7] = float("nan")
    with pytest.raises(ContractError, match=r"first at \[3, 7\]"):
        calibrate_int8(network(), broken)
