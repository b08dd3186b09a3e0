"""A model's layers on the optics: passes, gains, outliers, layers that stay digital, straight-through gradients."""

from __future__ import annotations

import copy
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hal_photonics import (
    DeviceProduct,
    OpticalLinear,
    Settings,
    keep_outliers_digital,
    optical_layers,
    register_profile,
    to_optics,
    tune_gains,
    with_settings,
)
from hal_photonics.backend import BUNDLED
from torch import Tensor, nn

import hal_core as hal
from hal_core import ContractError

DEVICE = "photonic:0"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 5)
    ).eval()


def images() -> Tensor:
    return torch.randn(40, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def exactly(x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    return x @ weight.T


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).detach().norm() / exact.detach().norm())


def test_converted_layers_compute_what_the_layers_compute() -> None:
    plain, x = model(), images()
    optical = to_optics(plain, exactly)
    torch.testing.assert_close(optical(x), plain(x))
    assert [name for name, _ in optical_layers(optical)] == ["0", "3", "5"]
    assert list(optical.state_dict()) == list(plain.state_dict())
    strided = nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2))
    y = torch.randn(2, 3, 9, 11)
    torch.testing.assert_close(to_optics(strided, exactly)(y), strided(y))


def test_the_model_runs_on_the_chip_and_is_left_as_it_was() -> None:
    plain, x = model(), images()
    before = copy.deepcopy(plain.state_dict())
    with hal.meter() as meter, torch.no_grad():
        found = to_optics(plain, DEVICE)(x)
    assert 0 < error(found, plain(x)) < 0.5
    assert not any(isinstance(module, OpticalLinear) for module in plain.modules())
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())
    assert meter.records[DEVICE].calls == 3
    assert meter.records[DEVICE].macs == 40 * (16 * 6 * 18 + 96 * 32 + 32 * 5)


def test_layers_stay_digital_by_name_and_by_pattern() -> None:
    assert [name for name, _ in optical_layers(to_optics(model(), DEVICE, digital=["0", "5"]))] == ["3"]
    assert [name for name, _ in optical_layers(to_optics(model(), DEVICE, digital=["[35]"]))] == ["0"]
    named = nn.ModuleDict({"encoder": nn.Linear(8, 8), "classifier": nn.Linear(8, 2)})
    with pytest.raises(
        ContractError, match="'clasifier' was given: there is none of that name; the closest are classifier"
    ):
        to_optics(named, DEVICE, digital=["clasifier"])


def test_a_layer_under_two_names_runs_on_the_optics_under_both() -> None:
    shared = nn.Linear(8, 8)
    plain = nn.ModuleDict({"first": shared, "second": shared, "third": nn.Linear(8, 8)})
    optical = to_optics(plain, exactly)
    assert isinstance(optical["second"], OpticalLinear)
    assert optical["first"] is optical["second"]
    assert [name for name, _ in optical_layers(to_optics(plain, exactly, digital=["second"]))] == ["third"]


@pytest.mark.parametrize("padded", [False, True])
def test_layers_of_torchs_encoder_run_on_the_optics_in_evaluation_too(padded: bool) -> None:
    """Its fast path multiplies by the weights of its layers without calling them."""
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2).eval()
    ran = []

    def product(x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
        ran.append(weight.shape)
        return exactly(x, weight, settings)

    optical, x = copy.deepcopy(to_optics(plain, product)), torch.randn(2, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    with torch.no_grad():
        found, wanted = optical(x, src_key_padding_mask=mask), plain(x, src_key_padding_mask=mask)
    keep = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    torch.testing.assert_close(found[keep], wanted[keep], rtol=1e-4, atol=1e-5)
    assert ran == [(64, 32), (32, 64)] * 2
    # Attention multiplies by its output projection's weight itself, so that layer is none that can run on the optics.
    assert [name.rpartition(".")[2] for name, _ in optical_layers(optical)] == ["linear1", "linear2"] * 2


@pytest.mark.parametrize("passes", [0, -1, 1025, 1.5, True])
def test_passes_that_no_chip_has_are_refused(passes: object) -> None:
    linear = hal.kernel("linear", backend=DEVICE)
    with pytest.raises(ContractError, match=f"passes {passes!r} was given: use a whole number from 1 to 1024"):
        to_optics(model(), DEVICE, passes=passes)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match=f"passes {passes!r} was given"):
        linear(torch.randn(2, 8), torch.randn(4, 8), passes=passes)


@pytest.mark.parametrize("name", ["linear", "matmul"])
def test_a_mistyped_option_of_a_kernel_is_refused_with_the_options_there_are(name: str) -> None:
    kernel, operands = hal.kernel(name, backend=DEVICE), (torch.randn(8, 8), torch.randn(8, 8))
    for ask in (kernel, kernel.estimate):
        with pytest.raises(ContractError, match=f"option 'pases' was given to {name}: did you mean 'passes'[?]"):
            ask(*operands, pases=4)
        with pytest.raises(ContractError, match="passes 0 was given: use a whole number from 1 to 1024"):
            ask(*operands, passes=0)
    with pytest.raises(ContractError, match="gain True was given"):
        kernel(*operands, gain=True)


@pytest.mark.parametrize(
    ("convert", "said"),
    [
        (lambda: to_optics("m", DEVICE), "model 'm' was given: pass a torch.nn.Module"),
        (lambda: to_optics(model(), 5), "device 5 was given: pass the id of a photonic device, or a product of your"),
        (lambda: to_optics(model(), DEVICE, digital=[3]), "layer 3 was given: pass names of layers as text"),
        (lambda: to_optics(model(), DEVICE, digital=None), "digital None was given: pass a list of layer names"),
        (lambda: list(optical_layers("m")), "model 'm' was given: pass a torch.nn.Module"),
        (lambda: tune_gains("m", print), "model 'm' was given: pass a torch.nn.Module"),
        (lambda: tune_gains(to_optics(model(), exactly), 5), "run 5 was given: pass a function of the model"),
        (lambda: tune_gains(to_optics(model(), DEVICE), lambda m: m(images()), ratios=()), r"ratios \(\) was given"),
        (lambda: keep_outliers_digital(to_optics(model(), exactly), print, "a"), "share 'a' was given"),
        (lambda: keep_outliers_digital(to_optics(model(), exactly), lambda m: None, 0.1), "ran no optical layer"),
        (lambda: with_settings(to_optics(model(), exactly), lambda s: None), "change gave None: return Settings"),
        (
            lambda: with_settings(to_optics(model(), exactly), lambda s: s._replace(digital_inputs=(2,))),
            r"digital_inputs \(2,\) of layer '0' were given: use input channels from 0 to 1",
        ),
        (
            lambda: with_settings(to_optics(model(), exactly), lambda s: s._replace(passes=0)),
            "passes 0 was given: use a whole number from 1 to 1024",
        ),
    ],
)
def test_other_mistakes_are_refused_with_what_is_wanted(convert: Any, said: str) -> None:
    with pytest.raises(ContractError, match=said):
        convert()


def test_averaged_products_have_less_noise_and_cost_so_many_products() -> None:
    linear, x, w = hal.kernel("linear", backend=DEVICE), torch.randn(64, 64), torch.randn(64, 64)
    spread = {
        passes: float(torch.stack([linear(x, w, rng=(1, draw), passes=passes) for draw in range(16)]).std(0).mean())
        for passes in (1, 4)
    }
    assert spread[4] == pytest.approx(spread[1] / 2, rel=0.1)
    once, nine = linear.estimate(x, w), linear.estimate(x, w, passes=9)
    for part in ("weights", "stream"):
        assert nine.parts[part] == pytest.approx(9 * once.parts[part])
    assert nine.parts["host"] == once.parts["host"]
    optics = [e.energy.middle - hal.session(DEVICE).profile["power.host"] * e.parts["host"] for e in (once, nine)]
    assert optics[1] == pytest.approx(9 * optics[0])


def test_gradients_are_those_of_the_exact_layer_at_the_chips_inputs() -> None:
    layer, x = nn.Linear(32, 8), torch.randn(16, 32, requires_grad=True)
    optical, grad = to_optics(layer, DEVICE), torch.randn(16, 8)
    found = optical(x)
    assert 0 < error(found, layer(x)) < 0.5
    found.backward(grad)
    torch.testing.assert_close(optical.weight.grad, grad.T @ x.detach())
    torch.testing.assert_close(x.grad, grad @ layer.weight.detach())
    torch.testing.assert_close(optical.bias.grad, grad.sum(0))


def test_an_outlier_channel_is_found_and_kept_digital() -> None:
    layer, x = nn.Linear(64, 32, bias=False), torch.randn(128, 64)
    x[:, 17] *= 100
    plain = to_optics(layer, DEVICE)
    kept = to_optics(layer, DEVICE)
    assert keep_outliers_digital(kept, lambda m: m(x), 0.02) == {"": (17,)}
    quiet = x.clone()
    quiet[:, 17] = 0
    small = layer(quiet).norm()
    with torch.no_grad():
        assert (kept(x) - layer(x)).norm() / small < 0.3 < (plain(x) - layer(x)).norm() / small
    with pytest.raises(ContractError, match=r"share 1\.5 was given"):
        keep_outliers_digital(kept, lambda m: m(x), 1.5)


def test_the_gain_is_chosen_where_the_converter_is_the_limit_and_kept_where_it_is_not(tmp_path: Path) -> None:
    text = (BUNDLED / "generic.toml").read_text()
    for key in ("readout_noise", "common_noise", "column_offset", "core_offset", "core_column_offset"):
        text = re.sub(rf"(?m)^{key} = {{ value = [\d.]+", f"{key} = {{ value = 0", text)
    coarse = text.replace("adc_bits = { value = 10", "adc_bits = { value = 7")
    (tmp_path / "coarse.toml").write_text(coarse)
    device = register_profile(tmp_path / "coarse.toml", "coarse")
    try:
        layer, x = nn.Linear(64, 32), torch.randn(256, 64)
        tuned = to_optics(layer, device.id)
        base = tuned.multiply.gain
        with torch.no_grad():
            before = error(tuned(x), layer(x))
            assert tune_gains(tuned, lambda m: m(x))[""] > base
            assert error(tuned(x), layer(x)) < 0.7 * before
    finally:
        hal.unregister("coarse")
    # The noise of the silicon profile is in front of the gain, so a larger one gains nothing.
    silicon = pytest.importorskip(
        "hal_photonic_lightmatter.backend", reason="hal-photonic-lightmatter is not installed"
    )
    assert silicon is not None
    kept = to_optics(nn.Linear(64, 32), "lightmatter:0")
    assert tune_gains(kept, lambda m: m(torch.randn(256, 64)))[""] <= 1.86


def test_settings_are_changed_in_place_and_a_product_of_ones_own_has_no_gain() -> None:
    optical = with_settings(to_optics(model(), exactly), lambda settings: settings._replace(passes=3))
    assert {layer.settings.passes for _, layer in optical_layers(optical)} == {3}
    with pytest.raises(ContractError, match="a product of your own"):
        tune_gains(optical, lambda m: m(images()))
    with pytest.raises(ContractError, match="no optical layer: convert it with to_optics first"):
        tune_gains(model(), lambda m: m(images()))
    with pytest.raises(ContractError, match=r"use a number from 0\.01 to 1024"):
        hal.kernel("linear", backend=DEVICE)(torch.randn(2, 8), torch.randn(4, 8), gain=0)
    with pytest.raises(ContractError, match="name one that is made of a photonic profile"):
        DeviceProduct("cpu:0")


def test_the_example_recovers_accuracy_by_training_with_the_chips_noise() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    found = runpy.run_path(str(EXAMPLES / "photonics_fine_tuning.py"))["main"]()
    assert found["on the chip"] < found["float32"] - 0.03
    assert found["fine-tuned"] > found["on the chip"] + 0.02
    assert found["fine-tuned"] > 0.98 * found["float32"]
