"""The cost of the call that ran, as its session states it: skipped tiles and passes, in meter, compare and report."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hal_cli import main  # noqa: E402
from hal_compare import lanes, layers, measure, models, report, texts  # noqa: E402
from hal_compare.figures import joules, seconds  # noqa: E402

import hal_core as hal  # noqa: E402
from hal_core import BlockPlan, HalError  # noqa: E402
from hal_core.plugin_api import DenseTiling  # noqa: E402

from .conftest import WORDS, build  # noqa: E402

LENGTH, BLOCK = 512, 32


class EveryOtherBlock(DenseTiling):
    """Skips every other block of keys."""

    name, needs_content = f"every other of {BLOCK}", False

    def plan(self, request, limits, *, query=None, key=None):
        rows, columns = (-(-length // BLOCK) for length in (request.len_q, request.len_k))
        listed = torch.arange(0, columns, 2, dtype=torch.int32).expand(1, 1, rows, -1)
        return BlockPlan(
            BLOCK, BLOCK, listed.contiguous(), torch.full((1, 1, rows), len(listed[0, 0, 0]), dtype=torch.int32)
        )


@pytest.fixture
def long_encoder(tmp_path, seed, save_tokenizer):
    """A BERT of two blocks for texts of 512 tokens."""
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=LENGTH,
    )
    build(transformers.BertModel, config, seed).save_pretrained(tmp_path / "long")
    save_tokenizer(tmp_path / "long")
    return tmp_path / "long"


@pytest.fixture
def long_text(tmp_path):
    file = tmp_path / "long.txt"
    words = [" ".join(order * (LENGTH // len(WORDS))) for order in (WORDS, WORDS[::-1])]
    file.write_text("\n\n".join(words), encoding="utf-8")
    return file


def compared(folder, file, device):
    """A comparison with layers, and the meter's record of the same pass."""
    model, files = models.load(str(folder), "float32"), texts.read([file])
    rows, tokens = lanes.rows_for([device]), measure.batches_of(model, files, 1, None)
    result = measure.compare(model, files, rows, repeats=1, batch_size=1, max_length=None, command="")
    result = layers.with_layers(result, model, rows, tokens, layers.layer_names(model.network))
    with torch.no_grad(), hal.meter() as meter:
        for batch in tokens.batches:
            rows[-1].forward(batch)
    return result, next(row for row in result.rows if row.name == device), meter.records[device]


def test_half_the_tiles_cost_half_the_cycles_in_meter_comparison_and_report(long_encoder, long_text):
    pytest.importorskip("hal_kpu")
    _, whole, whole_record = compared(long_encoder, long_text, "kpu:0")
    with hal.use(tiling=EveryOtherBlock()):
        result, skipping, record = compared(long_encoder, long_text, "kpu:0")
    assert record.macs == whole_record.macs / 2, "what the plan hides is no work of the device"
    assert 0.5 <= skipping.costs.on_device.middle / whole.costs.on_device.middle <= 0.55
    assert 0.5 <= skipping.costs.energy.middle / whole.costs.energy.middle <= 0.55
    for row, metered in ((skipping, record), (whole, whole_record)):
        assert row.costs.on_device.middle == pytest.approx(metered.time.middle, rel=1e-12)
        assert row.costs.energy.middle == pytest.approx(metered.energy.middle, rel=1e-12)
        times = [layer.time.middle for layer in row.layers if layer.time is not None]
        assert sum(times) == pytest.approx(metered.time.middle, rel=1e-12)
    page = report.render(result)
    assert seconds(record.time.middle) in page
    assert joules(record.energy.middle) in page
    assert seconds(whole_record.time.middle) not in page


def test_passes_multiply_the_time_of_attention_and_of_linear_layers(encoder, text, device, capsys):
    fake = device("fake", linear_error=1e-3, joules=1e-12, most_passes=8)

    def times(*options):
        arguments = ["compare", encoder, "--text", text, "--devices", f"cpu:0,{fake}", "--linear", fake, "--repeats", 1]
        assert main([*map(str, [*arguments, *options]), "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        return {row["name"]: row["costs"]["on_device"]["middle"] for row in data["rows"]}, data["options"]

    (once, none), (four, options) = times(), times("--option", "passes=4")
    for name in (fake, f"{fake} +linear"):
        assert four[name] == pytest.approx(4 * once[name])
    assert none == {}
    assert options == {fake: {"passes": 4}, f"{fake} +linear": {"passes": 4}}


def test_passes_of_the_optics_are_in_the_comparison_as_in_the_meter(encoder, text):
    pytest.importorskip("hal_photonics")
    parts = {}
    for passes in (1, 4):
        model, files = models.load(str(encoder), "float32"), texts.read([text])
        rows, tokens = lanes.rows_for(["photonic:0"], ["photonic:0"]), measure.batches_of(model, files, 12, None)
        for lane in rows[1:]:
            lane.options["passes"] = passes
        result = measure.compare(model, files, rows, repeats=1, batch_size=12, max_length=None, command="")
        for lane, row in zip(rows[1:], result.rows[1:], strict=True):
            with torch.no_grad(), hal.meter() as meter:
                lane.forward(tokens.batches[0])
            record = meter.records["photonic:0"]
            assert row.costs.on_device.middle == pytest.approx(record.time.middle, rel=1e-12)
            assert row.costs.energy.middle == pytest.approx(record.energy.middle, rel=1e-12)
            parts[row.name, passes] = record
    for name in ("photonic:0", "photonic:0 +linear"):
        once, four = parts[name, 1], parts[name, 4]
        assert once.energy.middle < four.energy.middle < 4 * once.energy.middle, "the optics alone run four times"
        assert once.time.middle < four.time.middle < 4 * once.time.middle


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ("passes=0", "--option passes=0 was given: fake:0 takes passes of 1 to 8"),
        ("passes=1.5", "--option passes=1.5 was given: fake:0 takes passes of 1 to 8"),
        ("passes=many", "--option passes=many was given: fake:0 takes passes of 1 to 8"),
        ("gain=2", "--option gain=2 was given: use one of passes (fake:0)"),
        ("passes", "--option 'passes' was given: pass NAME=VALUE, for example passes=4"),
    ],
)
def test_options_that_no_device_takes_are_refused_before_anything_runs(encoder, text, device, capsys, option, wanted):
    fake = device("fake", most_passes=8)
    arguments = ["compare", encoder, "--text", text, "--devices", fake, "--option", option]
    assert main([*map(str, arguments)]) == 2
    assert wanted in capsys.readouterr().err


def test_an_option_where_no_device_has_any_is_refused(device):
    from hal_compare.device_options import set_options

    with pytest.raises(HalError, match="no device of this comparison has options: leave it out"):
        set_options(lanes.rows_for([device("fake")]), ["passes=2"])
