"""hal compare's numbers, on small models with random weights and devices whose error and costs are known."""

from __future__ import annotations

import importlib.metadata
import json
import math

import pytest
import torch
import transformers
from hal_compare import lanes, measure, metrics, models, report, tables, texts
from hal_compare.batches import tokenize
from hal_compare.result import Figure
from safetensors.torch import load_file, save_file

import hal_core as hal
from hal_core import Basis, Fidelity, HalError, MaskKind, Provenance
from hal_core.plugin_api import registry

ATTENTION_CALLS = 2  # layers of the small models


def comparison(folder, text, devices, **options):
    settings = {"repeats": 2, "batch_size": 4, "max_length": None, "command": "hal compare", **options}
    dtype = settings.pop("dtype", "float32")
    wide = [settings.pop(name, []) for name in ("linear", "compiled")]
    files = texts.read([text])
    return measure.compare(models.load(str(folder), dtype), files, lanes.rows_for(devices, *wide), **settings)


def row(result, name):
    return next(row for row in result.rows if row.name == name)


@pytest.mark.parametrize("folder", ["encoder", "decoder"])
def test_the_cpu_device_is_as_near_to_float64_as_torch(folder, text, request):
    result = comparison(request.getfixturevalue(folder), text, ["cpu:0"])
    ours, torchs = row(result, "cpu:0"), row(result, "torch sdpa")
    for found in (ours, torchs):
        assert 1e-9 < found.accuracy.worst.middle <= 1e-5
        assert found.accuracy.mean.middle <= found.accuracy.worst.middle
        assert found.accuracy.worst.basis == Basis.MEASURED
        assert found.accuracy.agreement.middle == 1
        assert found.accuracy.cosine.low >= 1 - 1e-9
        assert found.costs.calls == ATTENTION_CALLS * result.batches
    assert ours.fidelity == "hardware"
    assert torchs.baseline
    assert not ours.baseline


def test_a_known_noise_is_found_and_varies_between_repeats(encoder, text, device):
    """Attention with a relative error e, added to a residual stream: the hidden states' error grows with e."""
    small, large = device("small", noise=1e-3), device("large", noise=1e-2)
    result = comparison(encoder, text, [small, large], repeats=4)
    low, high = (row(result, name).accuracy for name in (small, large))
    assert 5 <= high.mean.middle / low.mean.middle <= 20
    assert low.worst.high > low.worst.low, "the noise is the same in every repeat"
    assert low.worst.basis == Basis.MODELLED
    assert low.worst.provenance == Provenance.PAPER_PROJECTION
    assert low.layers[0] < 1e-6, "the embeddings come before any attention"
    assert low.layers[0] < low.layers[1]
    again = row(comparison(encoder, text, [small, large], repeats=4), small).accuracy
    assert again.worst.low == low.worst.low, "the same command gives the same noise"


def test_errors_by_layer_are_the_same_statistic_as_the_mean_error(encoder, text, device):
    noisy = device("noisy", noise=1e-2)
    result = measure.compare(
        models.load(str(encoder), "float32"),
        texts.read([text]),
        lanes.rows_for(["cpu:0", noisy]),
        repeats=3,
        batch_size=4,
        max_length=None,
        command="",
    )
    for row in result.rows:
        assert row.accuracy.layers[-1] == row.accuracy.mean.middle, "the median over draws, not the first draw"


def test_one_layers_error_is_what_the_noise_makes_of_it(tmp_path, text, device, save_tokenizer, seed):
    """A model whose only layer hands attention's output on: the error of the hidden states is the device's own."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=8,
        max_position_embeddings=40,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.mul_(1e-4)  # the residual stream next to nothing beside attention's output
        model.model.layers[0].self_attn.o_proj.weight.copy_(torch.eye(32) * 1e4)
    model.save_pretrained(tmp_path / "one")
    save_tokenizer(tmp_path / "one")
    noisy = device("noisy", noise=1e-2)
    found = row(comparison(tmp_path / "one", text, [noisy], batch_size=1), noisy).accuracy
    assert 0.7e-2 <= found.mean.middle <= 1.3e-2


def test_work_and_shares_add_up_to_what_counting_by_hand_gives(encoder, text, device):
    fake = device("fake", seconds=1e-12, joules=1e-14)
    result = comparison(encoder, text, ["cpu:0", fake])
    files = texts.read([text])
    batches = tokenize(files, models.load(str(encoder), "float32").tokenizer, 4, 40).batches
    hidden, heads_dim, wide, layers = 32, 32, 48, 2
    attention = sum(layers * 2 * len(b.texts) * b.ids.shape[1] ** 2 * heads_dim for b in batches)
    tokens = sum(len(b.texts) * b.ids.shape[1] for b in batches)
    dense = layers * tokens * (4 * hidden * hidden + 2 * hidden * wide)
    pooler = len(result.groups) and sum(len(b.texts) for b in batches) * hidden * hidden
    assert result.macs == attention + dense + pooler
    for name in ("torch sdpa", "cpu:0", fake):
        found = row(result, name)
        assert found.costs.macs == attention
        assert result.share(found) == pytest.approx(attention / result.macs)
    assert sum(group.attention_macs for group in result.groups) == attention


def test_totals_are_the_sum_of_their_parts(encoder, text, device):
    fake = device("fake", seconds=1e-9, joules=2e-12)
    result = comparison(encoder, text, ["cpu:0", fake], repeats=3)
    modelled, measured = row(result, fake).costs, row(result, "cpu:0").costs
    assert modelled.on_device.middle == pytest.approx(modelled.macs * 1e-9)
    assert modelled.energy.middle == pytest.approx(modelled.macs * 2e-12)
    assert modelled.on_device.basis == modelled.energy.basis == modelled.total.basis == Basis.MODELLED
    assert modelled.total.middle == pytest.approx(modelled.remainder.middle + modelled.on_device.middle)
    assert modelled.wall.low <= modelled.wall.middle <= modelled.wall.high
    assert modelled.remainder.low > 0
    assert measured.total == measured.wall
    assert measured.on_device == measured.inside
    assert 0 < measured.inside.middle < measured.wall.middle
    assert measured.energy is None, "nobody metered the CPU"
    assert measured.remainder.basis == Basis.MEASURED
    for found in (modelled, measured):
        by_group = result.rows[1].groups
        assert set(by_group) == {str(text)}
        assert found.calls == ATTENTION_CALLS * result.batches


def test_costs_of_several_files_add_up(encoder, text, tmp_path, device):
    other = tmp_path / "other.txt"
    other.write_text("the lazy dog\nthe quick fox runs\nhounds\n", encoding="utf-8")
    fake = device("fake", joules=1e-12)
    files = texts.read([text, other])
    model = models.load(str(encoder), "float32")
    result = measure.compare(
        model, files, lanes.rows_for([fake]), repeats=2, batch_size=4, max_length=None, command="hal compare"
    )
    found = row(result, fake)
    parts = [found.groups[str(file)] for file in (text, other)]
    assert found.costs.macs == sum(part.macs for part in parts) == sum(group.attention_macs for group in result.groups)
    assert found.costs.energy.middle == pytest.approx(sum(part.energy.middle for part in parts))
    assert [group.texts for group in result.groups] == [12, 3]


def test_linear_layers_on_a_device_are_its_work_its_error_and_its_time(encoder, text, device):
    """A linear kernel with a known relative error in a row of its own, beside the row with attention alone."""
    fake = device("fake", seconds=1e-9, linear_error=1e-2)
    result = comparison(encoder, text, [fake, "cpu:0"], linear=["all"])
    assert [each.name for each in result.rows] == ["torch sdpa", "fake:0", "fake:0 +linear", "cpu:0"]
    alone, wide = row(result, "fake:0"), row(result, "fake:0 +linear")
    assert wide.costs.macs == result.macs, "a BERT has no products but attention's and linear layers'"
    assert alone.costs.macs == sum(group.attention_macs for group in result.groups) < wide.costs.macs
    assert alone.accuracy.worst.middle < 1e-5 < 1e-4 < wide.accuracy.worst.middle < 1e-2
    assert wide.costs.on_device.middle == pytest.approx(result.macs * 1e-9)
    assert wide.costs.calls == alone.costs.calls
    assert {alone.scope, wide.scope} == {"attention", "attention and linear layers"}


def test_a_named_device_without_the_kernel_or_the_compiler_is_refused_before_anything_runs(device):
    device("plain")
    device("able", linear_error=1e-3, compiles="hal_compare_test_able")
    with pytest.raises(HalError, match=r"plain:0 has no linear kernel.*--linear takes able:0"):
        lanes.rows_for(["plain"], linear=["plain"])
    with pytest.raises(HalError, match=r"plain:0 has no torch.compile backend.*--compiled takes able:0"):
        lanes.rows_for(["plain"], compiled=["plain"])
    assert [lane.name for lane in lanes.rows_for(["plain", "able"], linear=["all"])] == [
        "torch sdpa",
        "plain:0",
        "able:0",
        "able:0 +linear",
    ]


def test_a_compiled_models_part_is_what_the_compiler_put_on_the_device(encoder, text, device):
    fake = device("fake", compiles="hal_nn_test_compiler")
    result = comparison(encoder, text, [fake], compiled=["all"])
    found = row(result, "fake:0 compiled")
    assert found.scope == "the whole model, by torch.compile"
    assert found.accuracy.worst.middle < 1e-5
    assert found.costs.macs == 1000 * result.batches, "what the compiler said of each graph"
    assert found.costs.on_device.middle == pytest.approx(0.25 * result.batches)
    assert 0 < found.costs.inside.middle < found.costs.wall.middle


def test_a_row_over_its_budget_is_timed_once_and_complete(encoder, text, device):
    fake = device("fake", seconds=1e-9)
    result = comparison(encoder, text, [fake], repeats=3, budget=1e-9)
    found, whole = row(result, fake), row(comparison(encoder, text, [fake]), fake)
    assert found.repeats == row(result, "torch sdpa").repeats == 1
    assert found.accuracy.decisions == whole.accuracy.decisions
    assert found.costs.calls == whole.costs.calls == ATTENTION_CALLS * result.batches
    assert found.costs.on_device.middle == pytest.approx(whole.costs.on_device.middle)
    assert found.costs.wall.low == found.costs.wall.high > found.costs.inside.middle > 0


def test_every_noisy_row_has_equal_draws_however_fast_the_host_is(encoder, text, device):
    """A row of three draws and a row of one cannot be compared: the worst of three is further out."""
    noisy, wide = device("noisy", noise=1e-2), device("wide", noise=1e-2, linear_error=1e-3)
    slow, fast = (
        comparison(encoder, text, [noisy, wide], linear=[wide], repeats=3, budget=budget) for budget in (1e-9, 1e9)
    )
    for name in ("noisy:0", "wide:0", "wide:0 +linear"):
        assert row(slow, name).repeats == row(fast, name).repeats == 3
        assert row(slow, name).accuracy.worst == row(fast, name).accuracy.worst, "the host's speed changes the draws"
        assert row(slow, name).accuracy.worst.low < row(slow, name).accuracy.worst.high


def test_a_simulated_device_runs_each_batch_once_for_each_draw_of_noise(encoder, text, device, monkeypatch):
    """Its time is modelled: warming up and timing it again cost minutes and tell nothing."""
    quiet, noisy = device("quiet"), device("noisy", noise=1e-2)
    runs = {quiet: 0, noisy: 0}
    kind = type(registry.backend_of(hal.device(quiet)))
    run = kind.run

    def counted(self, *operands):
        runs[f"{self.name}:0"] += 1
        return run(self, *operands)

    monkeypatch.setattr(kind, "run", counted)
    result = comparison(encoder, text, [quiet, noisy], repeats=3)
    assert runs[quiet] == ATTENTION_CALLS * result.batches
    assert runs[noisy] == 3 * ATTENTION_CALLS * result.batches
    assert row(result, quiet).repeats == 1
    assert row(result, noisy).repeats == 3


def test_every_refusal_is_listed_with_the_batches_it_concerns(encoder, text, device):
    bare = device("bare", masks=frozenset({MaskKind.NONE}))
    result = comparison(encoder, text, [bare, "cpu:0"], dtype="float32")
    found = row(result, bare)
    assert not found.ran
    assert found.costs is None
    assert 0 < found.refused_batches <= result.batches
    assert any("boolean" in reason for reason in found.refusals)
    assert row(result, "cpu:0").ran
    alone = comparison(encoder, text, [bare], batch_size=1)
    assert row(alone, bare).ran, "a batch of one text needs no mask"


def test_a_device_that_breaks_costs_the_others_nothing(encoder, text, device, monkeypatch):
    broken = device("broken", fails=True)
    result = comparison(encoder, text, [broken, "cpu:0"])
    assert row(result, "cpu:0").ran
    assert "the fake device broke" in row(result, broken).refusals[0]
    monkeypatch.setenv("HAL_DEBUG", "1")
    with pytest.raises(RuntimeError, match="the fake device broke"):
        comparison(encoder, text, [broken])


def test_an_emulated_devices_time_is_the_hosts(encoder, text, device):
    emulated = device("emulated", Fidelity.EMULATED)
    found = row(comparison(encoder, text, [emulated]), emulated)
    assert found.fidelity == "emulated"
    assert found.costs.on_device == found.costs.inside
    assert found.accuracy.worst.basis == Basis.MEASURED


def test_perplexity_and_next_tokens_of_a_causal_model(decoder, text, device):
    noisy = device("noisy", noise=0.5)
    result = comparison(decoder, text, ["cpu:0", noisy])
    ours, far = row(result, "cpu:0").accuracy, row(result, noisy).accuracy
    model = models.load(str(decoder), "float32")
    losses, count, tokens = 0.0, 0, 0
    reference = models.in_float64(model.network)
    for line in texts.read([text])[0].texts:  # one text at a time: no padding, no batches
        ids = torch.tensor([model.tokenizer(line)["input_ids"]])
        with torch.no_grad(), models.Float64Throughout():
            logits = reference(ids).logits
        losses += float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum"))
        count, tokens = count + ids.shape[1] - 1, tokens + ids.shape[1]
    assert ours.reference_perplexity == pytest.approx(math.exp(losses / count), rel=1e-9)
    assert ours.perplexity.middle == pytest.approx(ours.reference_perplexity, rel=1e-5)
    assert ours.decisions == tokens
    assert ours.agreement.middle == 1
    assert abs(far.perplexity.middle / far.reference_perplexity - 1) > 1e-4


def test_nearest_neighbours_are_by_cosine_and_never_oneself():
    vectors = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 2.0], [0.1, 1.0]])
    assert metrics.neighbours(vectors).tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_pooling_reads_real_tokens_alone(pooling, seed):
    hidden = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    want = {"mean": hidden[0, :3].mean(0), "cls": hidden[0, 0], "lasttoken": hidden[0, 2]}[pooling]
    assert torch.allclose(metrics.pool(hidden, mask, pooling)[0], want)


def test_errors_are_norms_over_real_tokens():
    reference = torch.ones(1, 3, 4, dtype=torch.float64)
    hidden = reference.clone()
    hidden[0, 0] += 0.1
    hidden[0, 2] = 1e9  # padding
    assert metrics.errors(hidden, reference, torch.tensor([[1, 1, 0]])) == pytest.approx([0.1 / math.sqrt(2)])


def test_the_reference_is_float64_from_end_to_end(decoder):
    """Llama's norms, rotary angles and softmax cast to float32; the reference run must not."""
    network = models.in_float64(models.load(str(decoder), "float32").network)
    seen = set()

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():
                seen.add(out.dtype)
            return out

    with torch.no_grad(), Watch(), models.Float64Throughout():
        network(torch.arange(1, 9)[None])
    assert seen == {torch.float64}


def test_variants_share_weights_and_no_setting(encoder):
    network = models.load(str(encoder), "float32").network
    twin = models.variant(network, "hal")
    assert [p.data_ptr() for p in twin.parameters()] == [p.data_ptr() for p in network.parameters()]
    assert network.config._attn_implementation == "eager"
    assert twin.config._attn_implementation == "hal"


def test_half_precision_weights_are_upcast_for_the_run_and_the_reference_and_said(encoder, text):
    file = encoder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    result = comparison(encoder, text, ["cpu:0"])
    assert result.model["stored_dtype"] == "float16"
    assert "float16" in result.model["note"]
    assert row(result, "cpu:0").accuracy.worst.middle <= 1e-5, (
        "rounding the weights is counted as an error of the device"
    )
    assert comparison(encoder, text, ["cpu:0"], dtype="float16").model["note"] == ""


def test_bfloat16_runs_are_compared_with_their_own_weights_in_float64(encoder, text):
    found = row(comparison(encoder, text, ["cpu:0"], dtype="bfloat16"), "cpu:0").accuracy
    assert 1e-4 < found.worst.middle < 5e-2


def test_texts_longer_than_the_model_are_cut_and_said(encoder, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text(("the dog " * 50 + "\n") * 3, encoding="utf-8")
    group = comparison(encoder, text, ["cpu:0"]).groups[0]
    assert (group.cut, group.longest) == (3, 40)
    group = comparison(encoder, text, ["cpu:0"], max_length=7).groups[0]
    assert (group.cut, group.longest) == (3, 7)


def test_a_comparison_is_json(encoder, text, device):
    noisy = device("noisy", noise=1e-2, joules=1e-12)
    bare = device("bare", masks=frozenset({MaskKind.NONE}))
    result = comparison(encoder, text, ["cpu:0", noisy, bare])
    data = json.loads(json.dumps(result.to_dict()))
    by_name = {entry["name"]: entry for entry in data["rows"]}
    assert by_name[noisy]["costs"]["energy"]["basis"] == "modelled"
    assert by_name[noisy]["costs"]["energy"]["provenance"] == "paper-projection"
    assert by_name["cpu:0"]["costs"]["energy"] is None
    assert by_name[bare]["ran"] is False
    assert by_name[bare]["refusals"]
    assert data["macs"] == result.macs
    assert data["versions"]["torch"] == importlib.metadata.version("torch")


def test_one_device_of_every_backend_is_taken_where_none_is_named(monkeypatch, device):
    """A backend with five devices has one row; "all", and the backend's own name, have them all."""
    fake = device("fake", count=3)
    names = [lane.name for lane in lanes.rows_for([])]
    assert names[0] == "torch sdpa"
    assert "cpu:0" in names
    assert [name for name in names if name.startswith("fake")] == [fake]
    backends = [name.partition(":")[0] for name in names[1:]]
    assert sorted(backends) == sorted(set(backends)) == sorted({d.id.partition(":")[0] for d in hal.devices()})
    every = {lane.name for lane in lanes.rows_for(["all"])}
    assert every == {"torch sdpa", *(d.id for d in hal.devices())}
    assert [lane.name for lane in lanes.rows_for(["fake"])] == ["torch sdpa", "fake:0", "fake:1", "fake:2"]
    assert [lane.name for lane in lanes.rows_for([fake, fake])] == ["torch sdpa", fake], "named twice, measured once"


def test_named_devices_that_are_all_absent_are_refused_before_anything_runs():
    with pytest.raises(hal.DeviceUnavailableError, match=r"cpu has cpu:0"):
        lanes.rows_for(["cpu:7", "cpu:8"])


def test_results_that_are_not_finite_are_null_in_json(encoder, text, device):
    """A device that gives NaN has a row; JSON has no NaN."""
    broken = device("broken", noise=math.nan)
    result = comparison(encoder, text, [broken])
    assert math.isnan(row(result, broken).accuracy.worst.middle)
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    found = next(entry for entry in data["rows"] if entry["name"] == broken)["accuracy"]
    assert found["worst"]["middle"] is None
    assert None in found["layers"]
    tables.summary(result), tables.details(result), report.render(result)


def test_progress_says_what_runs_and_never_goes_back(encoder, text, device):
    seen = []
    comparison(encoder, text, [device("fake")], progress=lambda what, share: seen.append((what, share)))
    assert {"float64 reference", "torch sdpa, warming up", "fake:0", "torch sdpa"} <= {what for what, _ in seen}
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] < 1


def test_a_sum_with_an_unknown_part_is_unknown():
    known = hal.Quantity(1, 2, "measured", "measured-silicon")
    worse = hal.Quantity(1, 1, "modelled", "assumed")
    assert measure._summed([known, None]) is None
    assert measure._summed([]) is None
    total = measure._summed([known, worse])
    assert (total.low, total.middle, total.high) == (2, 2.5, 3)
    assert (total.basis, total.provenance) == (Basis.MODELLED, Provenance.ASSUMED)
    assert Figure.over([3.0, 1.0, 2.0]).middle == 2.0


def test_a_model_that_bypasses_the_attention_interface_is_not_compared(encoder, text, monkeypatch):
    real = models.variant
    monkeypatch.setattr(lanes, "variant", lambda network, attention: real(network, "eager"))
    with pytest.raises(HalError, match="attention interface"):
        comparison(encoder, text, ["cpu:0"])
