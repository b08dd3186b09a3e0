"""hal sensitivity: which figure or layer moves a result, on devices whose answer is known."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
from hal_cli import main
from hal_compare import models, texts
from hal_compare.measure import batches_of
from hal_compare.sensitivity import model_layers, page, tables, tornado
from hal_compare.sensitivity.trial import Trial

import hal_core as hal
from hal_core import ContractError

from .conftest import FakeDevice


class ProfiledDevice(FakeDevice):
    """A device with figures: noise, seconds and joules a multiply-accumulate, and two that do nothing."""

    FIGURES: ClassVar = {
        "noise.size": 1e-2,
        "cost.seconds": 1e-12,
        "cost.joules": 2e-12,
        "idle.first": 1.0,
        "idle.second": 1.0,
    }

    def __init__(self, name="profiled", **figures):
        self.figures = self.FIGURES | figures
        noise, seconds, joules = (self.figures[key] for key in ("noise.size", "cost.seconds", "cost.joules"))
        super().__init__(name, noise=noise, seconds=seconds, joules=joules, linear_error=1e-3)

    def variations(self, device, default=None):
        share = 0.5 if default is None else default
        found = []
        for key, value in self.figures.items():
            stated = key == "cost.seconds"
            spread = 0.1 if stated else share
            found.append(
                SimpleNamespace(
                    key=key,
                    value=value,
                    unit="",
                    low=value * (1 - spread),
                    high=value * (1 + spread),
                    uncertainty=spread,
                    stated=stated,
                    provenance="assumed",
                    source="a test",
                    meaning="a figure",
                    reason="0, which has no relative uncertainty" if key == "idle.second" else "",
                )
            )
        return found

    def varied(self, device, name, **figures):
        return ProfiledDevice(name, **{key.replace("__", "."): value for key, value in figures.items()})


@pytest.fixture
def profiled():
    hal.register(ProfiledDevice())
    yield hal.device("profiled:0")
    hal.unregister("profiled")


def trial_of(folder, text, *, linear=False, draws=1):
    model = models.load(str(folder), "float32")
    return Trial(model, batches_of(model, texts.read([text]), 4, None), draws=draws, linear=linear)


def test_each_figure_moves_what_it_is_a_factor_of_and_nothing_else(encoder, text, profiled):
    found = tornado.measure(trial_of(encoder, text), profiled)
    swings = {bar.figure.key: {name: bar.swing(name) for name in ("error", "time", "energy")} for bar in found.bars}
    nominal = found.nominal
    assert swings["cost.seconds"]["time"] == pytest.approx(0.2 * nominal.time)
    assert swings["cost.joules"]["energy"] == pytest.approx(1.0 * nominal.energy)
    assert swings["cost.seconds"]["energy"] == swings["cost.seconds"]["error"] == swings["noise.size"]["time"] == 0
    assert swings["noise.size"]["error"] == pytest.approx(nominal.error, rel=0.2), (
        "±50% of the noise: a swing of all of it"
    )
    assert [bar.figure.key for bar in found.ranked("time")] == ["cost.seconds"]
    assert found.fixed == {"idle.second": "0, which has no relative uncertainty"}


def test_the_device_and_what_is_registered_are_left_as_they_were(encoder, text, profiled):
    before = list(hal.devices())
    tornado.measure(trial_of(encoder, text), profiled, patterns=["cost.*"])
    assert list(hal.devices()) == before


def test_a_section_that_moves_nothing_together_is_not_taken_apart(encoder, text, monkeypatch):
    class Idle(ProfiledDevice):
        FIGURES: ClassVar = {**ProfiledDevice.FIGURES, "idle.third": 2.0}

        def varied(self, device, name, **figures):
            runs.append(sorted(figures))
            return super().varied(device, name, **figures)

    runs: list[list[str]] = []
    hal.register(Idle())
    try:
        shown: list[float] = []
        found = tornado.measure(
            trial_of(encoder, text), hal.device("profiled:0"), progress=lambda text, share: shown.append(share)
        )
    finally:
        hal.unregister("profiled")
    assert found.without_effect == ("idle.first", "idle.third")
    assert ["idle__first", "idle__third"] in runs
    assert ["idle__first"] not in runs
    assert shown == sorted(shown)
    assert 0 <= shown[0] < shown[-1] < 1


def test_figures_of_time_and_energy_alone_run_one_draw(encoder, text, profiled, monkeypatch):
    """Their error is the nominal one, which the whole section's run has shown."""
    drawn = []
    error = Trial.error
    monkeypatch.setattr(Trial, "error", lambda self, lane, draw: (drawn.append(draw), error(self, lane, draw))[1])
    found = tornado.measure(trial_of(encoder, text, draws=3), profiled)
    costs = [bar for bar in found.bars if bar.figure.key.startswith("cost.")]
    assert len(costs) == 2
    assert all(outcome.error == found.nominal.error for bar in costs for outcome in (bar.low, bar.high))
    assert costs[0].swing("energy") == costs[1].swing("time") == 0, "a figure moves only what it is a factor of"
    # As it is, two ends of the noise and of the idle figure, the section of costs together: three draws each.
    assert len(drawn) == 6 * 3 + 4, "and one for each of four ends of costs"


def test_a_figure_that_puts_the_device_out_of_service_is_named_and_the_others_are_measured(
    encoder, text, profiled, monkeypatch
):
    run = ProfiledDevice.run

    def cold(self, *given):
        if self.figures["noise.size"] < 0.9e-2:
            raise hal.DeviceUnavailableError(f"{self.name}:0 does not serve: it is cold")
        return run(self, *given)

    monkeypatch.setattr(ProfiledDevice, "run", cold)
    found = tornado.measure(trial_of(encoder, text), profiled)
    assert found.fixed["noise.size"] == "at one end of 0.005 to 0.015 the device does not serve: it is cold"
    assert {bar.figure.key for bar in found.bars} == {"cost.seconds", "cost.joules", "idle.first"}


def test_a_measurement_that_was_stopped_goes_on_from_its_folder(encoder, text, profiled, capsys, tmp_path, monkeypatch):
    command = [str(word) for word in ("sensitivity", encoder, "--text", text, "--device", profiled.id, "--json")]
    kept = ["--out", str(tmp_path / "kept")]
    assert main(command) == 0
    whole = json.loads(capsys.readouterr().out)
    run, left = Trial.run, [4]

    def stopping(self, *given):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return run(self, *given)

    monkeypatch.setattr(Trial, "run", stopping)
    assert main([*command, *kept]) == 130
    assert f"kept in {tmp_path / 'kept'}" in capsys.readouterr().err
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == 4
    files[0].write_text(files[0].read_text()[:-20])
    ran = []
    monkeypatch.setattr(Trial, "run", lambda self, *given: (ran.append(given), run(self, *given))[1])
    assert main([*command, *kept]) == 0
    assert json.loads(capsys.readouterr().out) == whole
    assert len(ran) == 10 - 3, "three records are whole"
    assert main([*command, *kept, "--draws", "1"]) == 0
    assert len(ran) == 7 + 10, "other draws are other results"


def test_the_command_says_what_is_stated_and_what_is_assumed(encoder, text, profiled, capsys, tmp_path):
    file = tmp_path / "page.html"
    arguments = ["sensitivity", encoder, "--text", text, "--device", "profiled:0", "--attention", "--draws", 1]
    assert main([*map(str, [*arguments, "--report", file])]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "cost.seconds 1e-12 ±10% stated" in printed
    assert "cost.joules 2e-12 ±50% assumed" in printed
    assert "Not varied, 0, which has no relative uncertainty: idle.second." in printed
    html = file.read_text(encoding="utf-8")
    assert html.count("<figure>") == 3
    assert "noise.size" in html
    assert main([*map(str, [*arguments, "--uncertainty", 0.25, "--json", "--figures", "cost.*"])]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {each["figure"]: each["uncertainty"] for each in data["figures"]} == {
        "cost.seconds": 0.1,
        "cost.joules": 0.25,
    }
    seconds = next(each for each in data["figures"] if each["figure"] == "cost.seconds")
    assert seconds["uncertainty_from"] == "stated"
    assert seconds["at_high"]["time"] == pytest.approx(1.1 * data["nominal"]["time"])
    assert data["linear"] is False


def test_numbers_of_the_page_are_those_of_the_table(encoder, text, profiled):
    found = tornado.measure(trial_of(encoder, text), profiled, patterns=["cost.seconds"])
    shown = tables.of_figures(found, 10)
    html = page.render("a model", "hal sensitivity", found, shown)
    assert f'data-label="time">{shown[0].rows[0][3]}</td>' in html
    assert f"</span>{shown[0].rows[0][3]}</td>" in html
    assert "<script" not in page.render("<script>", "x", found, shown)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["--device", "cpu:0"],
            "cpu:0 is not simulated from a profile, so it has no figures to change: use a device that is",
        ),
        (
            ["--device", "profiled:0", "--figures", "cost.secnds"],
            "figure 'cost.secnds' was given: there is none of that name; the closest are cost.seconds",
        ),
        ([], "neither --device nor --layers was given"),
        (
            ["--layers", "--layer", "encoder.layer.9.*"],
            "layer 'encoder.layer.9.*' was given: there is none of that name",
        ),
        (["--layers", "--device", "cpu:0"], "cpu:0 has no linear kernel, so no linear layer runs on it"),
        (["--layers", "--noise", "0.1", "--bits", "4"], "--noise and --bits were given: pass one of them"),
        (["--layers", "--bits", "1"], "--bits 1 was given: pass 2 to 24"),
        (["--device", "profiled:0", "--noise", "0.1"], "--noise is about the model's layers: pass --layers too"),
        (["--layers", "--device", "profiled:0", "--bits", "8"], "--bits and --device were given"),
        (["--layers", "--figures", "cost.*"], "--figures and --uncertainty are about a profile's figures"),
        (["--layers", "--out", "kept"], "--out keeps the results of a profile's figures"),
        (["--layers", "--attention", "--device", "profiled:0"], "--attention leaves no linear layer on the device"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_runs(
    encoder, text, profiled, capsys, monkeypatch, arguments, wanted
):
    monkeypatch.setattr(Trial, "run", lambda *given: pytest.fail("it was measured"))
    capsys.readouterr()
    assert main(["sensitivity", str(encoder), "--text", str(text), *arguments]) == 2
    out, err = capsys.readouterr()
    assert wanted in err
    assert out == ""


def test_a_layer_alone_on_the_device_has_its_error_and_no_other_has_any(encoder, text, device):
    trial, patterns = trial_of(encoder, text, linear=True), ["encoder.layer.1.*", "pooler.dense"]
    large, small = (
        model_layers.on_device(
            trial, hal.device(device(name, noise=0.1, linear_error=error)), patterns, lambda *_: None
        )
        for name, error in (("large", 1e-1), ("small", 1e-2))
    )
    by_name, other = ({layer.name: layer for layer in found.layers} for found in (large, small))
    found = large
    assert len(by_name) == 7
    assert by_name["pooler.dense"].error < 1e-5, "the hidden states do not depend on it, and attention is exact"
    last = "encoder.layer.1.output.dense"
    assert by_name[last].error == pytest.approx(10 * other[last].error, rel=0.05)
    assert found.ranked()[0].error == max(layer.error for layer in found.layers)
    tokens = sum(batch.ids.numel() for batch in trial.tokens.batches)
    assert by_name["encoder.layer.1.output.dense"].macs == tokens * 48 * 32


def test_layers_with_noise_or_fewer_bits_need_no_device(encoder, text, capsys):
    arguments = ["sensitivity", str(encoder), "--text", str(text), "--draws", "1", "--json"]
    assert main([*arguments, "--layers", "--noise", "0.1"]) == 0
    noisy = json.loads(capsys.readouterr().out)
    assert noisy["device"] is None
    assert {layer["kind"] for layer in noisy["layers"]} == {"linear", "attention"}
    assert noisy["cause"] == "noise of 0.1 of its output"
    errors = {}
    for bits in ("4", "8"):
        assert main([*arguments, "--layer", "encoder.layer.0.*", "--bits", bits]) == 0
        errors[bits] = {layer["name"]: layer["error"] for layer in json.loads(capsys.readouterr().out)["layers"]}
    assert all(errors["4"][name] > errors["8"][name] > 0 for name in errors["4"])


def test_names_of_layers_are_checked_with_the_closest(encoder):
    network = models.load(str(encoder), "float32").network
    with pytest.raises(ContractError, match=r"the closest are encoder\.layer"):
        model_layers.check(network, ["encoder.layer.0.output.dens"], None)


@pytest.mark.parametrize(("device", "figure"), [("kpu:0", "clock.frequency"), ("photonic:0", "time.clock")])
def test_real_devices_vary_one_figure_of_their_profile(encoder, text, device, figure):
    if device not in [found.id for found in hal.devices()]:
        pytest.skip(f"{device} is not installed")
    found = tornado.measure(trial_of(encoder, text), tornado.simulated_device(device), patterns=[figure])
    bar = found.bars[0]
    assert bar.low.time > found.nominal.time > bar.high.time, "a slower clock takes longer"
    assert bar.low.error == found.nominal.error == bar.high.error
