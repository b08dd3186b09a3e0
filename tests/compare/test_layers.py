"""Layer by layer: errors at a layer's output, and times and energies that add up to those of the whole."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from hal_cli import main
from hal_compare import lanes, layers, layers_report, measure, models, report, texts
from hal_compare.figures import joules, percent, ratio, seconds
from hal_compare.strips import Mark, Strip, axis_of, draw
from torch import nn

from hal_core import ContractError, HalError


def compared(folder, text, devices, patterns=(), *, repeats=2, **options):
    """A comparison with layers."""
    model, files = models.load(str(folder), "float32"), texts.read([text])
    rows = lanes.rows_for(devices, **options)
    names = layers.chosen(model.network, patterns)
    settings = {"batch_size": 4, "max_length": None}
    result = measure.compare(model, files, rows, repeats=repeats, command="", **settings)
    return layers.with_layers(result, model, rows, measure.batches_of(model, files, 4, None), names)


def row(result, name):
    return next(row for row in result.rows if row.name == name)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_layers_are_the_blocks_and_the_linear_layers_outside_of_them(kind, request):
    network = models.load(str(request.getfixturevalue(kind)), "float32").network
    blocks, last = {"encoder": ("encoder.layer", "pooler.dense"), "decoder": ("model.layers", "lm_head")}[kind]
    assert layers.layer_names(network) == [f"{blocks}.0", f"{blocks}.1", last]


def test_the_error_of_a_block_is_that_of_the_hidden_states_behind_it(encoder, text, device):
    noisy = device("noisy", noise=1e-2)
    result = compared(encoder, text, ["cpu:0", noisy])
    for name in ("torch sdpa", "cpu:0", noisy):
        found = row(result, name)
        blocks = [layer for layer in found.layers if layer.name.startswith("encoder")]
        draws = len(blocks)
        assert draws == 2
        for block, behind in zip(blocks, found.accuracy.layers[1:], strict=True):
            if name == noisy:  # accuracy holds the first draw of two
                assert block.error.low <= behind * (1 + 1e-9)
                assert behind * (1 - 1e-9) <= block.error.high
                assert block.error.high > block.error.low
            else:
                assert block.error.middle == pytest.approx(behind, rel=1e-9)
    assert row(result, noisy).layers[0].error.basis == "modelled"
    assert row(result, "cpu:0").layers[0].error.basis == "measured"


def test_stated_times_and_energies_add_up_to_those_of_the_whole(encoder, text, device):
    fake = device("fake", joules=2e-12, linear_error=1e-3)
    result = compared(encoder, text, [fake], linear=[fake])
    for name in (fake, f"{fake} +linear"):
        found = row(result, name)
        times = [layer.time for layer in found.layers if layer.time is not None]
        assert sum(time.middle for time in times) == pytest.approx(found.costs.on_device.middle, rel=1e-9)
        assert sum(layer.time_share or 0 for layer in found.layers) == pytest.approx(1)
        assert sum(layer.macs for layer in found.layers) == found.costs.macs
        assert {str(time.basis) for time in times} == {"modelled"}
    attention = row(result, fake)
    assert sum(layer.energy.middle for layer in attention.layers[:2]) == pytest.approx(attention.costs.energy.middle)
    assert attention.layers[2].name == "pooler.dense"
    assert attention.layers[2].time is None, "nothing of it runs on the device"
    wide = row(result, f"{fake} +linear")
    assert wide.layers[2].time is not None
    assert all(layer.energy is None for layer in wide.layers), "its linear kernel states no energy"


def test_parts_are_named_and_each_has_what_ran_in_it(encoder, text, device):
    fake = device("fake", linear_error=1e-3)
    found = row(
        compared(encoder, text, [fake], ["*.0.attention.self", "*.0.*query", "*.0"], linear=[fake]), f"{fake} +linear"
    )
    by_name = {layer.name: layer for layer in found.layers}
    block, inside, query = (f"encoder.layer.0{end}" for end in ("", ".attention.self", ".attention.self.query"))
    assert list(by_name) == [block, inside, query]
    assert by_name[query].macs < by_name[inside].macs < by_name[block].macs < found.costs.macs
    assert by_name[query].time.middle == pytest.approx(by_name[query].macs * 1e-12)
    assert by_name[query].error.middle == pytest.approx(1e-3, rel=0.05), "its input is exact"


def test_measured_layers_have_a_spread_over_the_repeats(encoder, text):
    found = row(compared(encoder, text, ["cpu:0"], repeats=3), "cpu:0")
    block = found.layers[0]
    assert block.time.basis == "measured"
    assert 0 < block.time.low < block.time.high
    assert block.energy is None
    assert 0 < block.time_share < 1


def test_measured_layers_are_shares_of_their_own_pass_and_the_table_says_so(encoder, text):
    result = compared(encoder, text, ["cpu:0"], repeats=1)
    found = row(result, "cpu:0")
    assert sum(layer.time_share or 0 for layer in found.layers) == pytest.approx(1)
    said = " ".join(layers_report.tables(result)[-1].notes)
    assert "measured times are of a pass of their own" in said


def test_a_compiled_model_has_no_layers_and_says_so(encoder, text, device):
    fake = device("fake", compiles="hal_compare_test_layers")
    result = compared(encoder, text, [fake], compiled=[fake])
    assert row(result, f"{fake} compiled").ran
    assert row(result, f"{fake} compiled").layers == ()
    notes = layers_report.tables(result)[-1].notes
    assert f"{fake} compiled has no layers here: its layers are one program of torch.compile" in notes[-1]


def test_every_number_is_equal_in_table_json_and_report(encoder, text, device, capsys, tmp_path):
    fake, page = device("fake", noise=1e-2, joules=2e-12), tmp_path / "report.html"
    arguments = ["compare", encoder, "--text", text, "--devices", fake, "--repeats", 2, "--layers", "--report", page]
    assert main([*map(str, arguments), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    found = next(row for row in data["rows"] if row["name"] == fake)
    html = page.read_text(encoding="utf-8")
    assert main([*map(str, arguments)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Layers of {fake} (modelled, paper-projection)" in printed
    for layer in found["layers"][:2]:
        cells = [ratio(layer["error"]["middle"]), seconds(layer["time"]["middle"]), percent(layer["time_share"])]
        cells += [joules(layer["energy"]["middle"]), percent(layer["energy_share"])]
        assert " ".join([layer["name"], *cells]) in printed
        for text_ in (cells[0], f"{cells[1]} · {cells[2]}", f"{cells[3]} · {cells[4]}"):
            assert f"</span>{text_}</td>" in html
    assert found["layers"][2]["time"] is None
    with (tmp_path / "report.layers.csv").open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["row"] == fake]
    for line, layer in zip(lines, found["layers"], strict=True):
        assert (line["layer"], int(line["device_macs"])) == (layer["name"], layer["macs"])
        for column, name in (("error", "error"), ("device_seconds", "time"), ("device_joules", "energy")):
            assert line[column] == ("" if layer[name] is None else repr(layer[name]["middle"]))


def test_without_layers_the_report_has_no_such_part(encoder, text, device):
    model, fake = models.load(str(encoder), "float32"), device("fake")
    result = measure.compare(
        model, texts.read([text]), lanes.rows_for([fake]), repeats=1, batch_size=4, max_length=None, command=""
    )
    assert "Layer by layer" not in report.render(result)
    assert layers_report.tables(result) == []


def test_an_unknown_layer_is_refused_with_the_closest_before_anything_runs(encoder, text, capsys):
    assert main(["compare", str(encoder), "--text", str(text), "--devices", "cpu:0", "--layer", "encoder.layer.7"]) == 2
    error = capsys.readouterr().err
    assert "layer 'encoder.layer.7' was given: there is none of that name; the closest are encoder.layer." in error
    with pytest.raises(ContractError, match=r"the closest are encoder\.layer\.\d"):
        layers.chosen(models.load(str(encoder), "float32").network, ["encoder.layr.0"])
    with pytest.raises(HalError, match="GELU has neither lists of modules nor linear layers: leave --layers out"):
        layers.chosen(nn.GELU(), [])


def test_hooks_and_meters_leave_nothing_behind(encoder, text, device):
    model, files = models.load(str(encoder), "float32"), texts.read([text])
    rows = lanes.rows_for([device("fake", linear_error=1e-3)])
    result = measure.compare(model, files, rows, repeats=1, batch_size=4, max_length=None, command="")
    names = layers.layer_names(model.network)

    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for row in rows for m in row.network.modules()]

    before = hooks()  # transformers has some of its own
    layers.with_layers(result, model, rows, measure.batches_of(model, files, 4, None), names)
    assert hooks() == before


def test_a_layer_whose_texts_lie_in_one_row_is_judged_as_a_whole():
    exact, mask = torch.ones(6, 4, dtype=torch.float64), torch.ones(2, 3, dtype=torch.int64)
    assert layers._errors(exact * 1.5, exact, mask) == [0.5]
    by_text = layers._errors(
        torch.ones(2, 3, 4) * torch.tensor([1.0, 2.0])[:, None, None], torch.ones(2, 3, 4).double(), mask
    )
    assert by_text == [0.0, 1.0]


def test_pictures_draw_zero_infinity_and_nothing():
    marks = [Mark(None, value, "x", "tip <b>") for value in (0.0, 1e-3, float("inf"), float("nan"))]
    strip = Strip(title="error", marks=[*marks, None], log=True)
    assert axis_of([strip]) == (1e-3, 1e-2)
    picture = draw(["a", "b", "c", "d", "<script>"], [strip], name="test", first="layer")
    assert "<script>" not in picture
    assert picture.count('class="dot"') == 4
    assert picture.count("left:100%") == 2, "what is not finite lies at the end"
    assert "nan" not in picture
    assert "inf" not in picture
