"""The heads of a model: numbers against the weights themselves, models read as they are, and `hal geometric`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hal_geometric import graph, heads

import hal_core as hal
from hal_core import ContractError, HalError

pytest.importorskip("hal_compare")
transformers = pytest.importorskip("transformers")

from hal_cli.command_line import main  # noqa: E402


@pytest.mark.parametrize("causal", [False, True])
def test_numbers_of_heads_are_those_of_their_weights(causal: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, n, 24, 16, generator=generator) for n in (4, 2, 2))
    options = {"is_causal": True} if causal else {}
    with hal.use("cpu:0"):
        found = heads.measure(q, k, v, **options)
    layer = heads.LayerAttention("layer", q[:1], k[:1], v[:1], {"scale": 0.25, **options})
    p = torch.stack([layer.weights(), layer._replace(query=q[1:], key=k[1:]).weights()]).double()
    seen = torch.ones(24, 24).tril() if causal else torch.ones(24, 24)
    assert torch.allclose(found.entropy.double(), torch.special.entr(p).sum(-1).mean((0, 2)), atol=1e-3)
    assert torch.allclose(found.uniform, seen.sum(1).log().mean().expand(4), atol=1e-3)
    out, wide = p @ v.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    spread = [(x - x.mean(2, keepdim=True)).norm(dim=(2, 3)) for x in (out, wide)]
    assert torch.allclose(found.kept.double(), (spread[0] / spread[1]).mean(0), rtol=1e-3)
    for a in range(4):
        assert found.distance[a, a] == math.inf
        for b in range(a):
            want = 2 * (p[:, a] * p[:, b]).sqrt().sum(-1).clamp(max=1).arccos().mean()
            assert float(found.distance[a, b]) == pytest.approx(float(want), rel=1e-2)
    assert found.neighbour.tolist() == found.distance.argmin(1).tolist()
    assert torch.equal(heads.mean([found, found]).nearest, found.nearest)


def tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{n}": n for n in range(60)} | {"[UNK]": 60}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(path)


@pytest.fixture(scope="module", params=["bert", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    common = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    path: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "bert":
        config = transformers.BertConfig(**common, num_attention_heads=4, max_position_embeddings=48)
        transformers.BertModel(config).save_pretrained(path)
    else:
        config = transformers.LlamaConfig(**common, num_attention_heads=4, num_key_value_heads=2)
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer(path)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    generator, file = torch.Generator().manual_seed(3), tmp_path / "text.txt"
    draw = [" ".join(f"w{int(n)}" for n in torch.randint(60, (30,), generator=generator)) for _ in range(3)]
    file.write_text("\n".join(draw), encoding="utf-8")
    return file


def test_a_model_is_read_as_it_computes(folder: Path) -> None:
    model = heads.ModelHeads(str(folder))
    tokens = model.tokens("w1 w2 w3 w3 w7 nothing w9")
    hidden, calls = model.read(tokens)
    kind = transformers.AutoModelForCausalLM if "llama" in str(folder) else transformers.AutoModel
    plain = kind.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        want = plain(tokens, output_attentions=True)
    right = want.logits if "llama" in str(folder) else want.last_hidden_state
    assert float((hidden - right).abs().max()) <= 1e-4
    named = "model.layers.{}.self_attn" if "llama" in str(folder) else "encoder.layer.{}.attention.self"
    assert [call.name for call in calls] == [named.format(n) for n in range(2)]
    for call, weights in zip(calls, want.attentions, strict=True):
        assert float((call.weights() - weights[0]).abs().max()) <= 1e-5
    model.off = {(0, 1)}
    assert float((model.read(tokens)[0] - hidden).abs().max()) > 1e-4
    model.off = set()
    assert torch.equal(model.read(tokens)[0], hidden)


def test_the_command_shows_layers_heads_and_the_graph(
    folder: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["geometric", str(folder), "--text", str(text), "--length", "20", "--top", "3"]
    assert main([*given, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["tokens"] == [20, 20, 20]
    model = heads.ModelHeads(str(folder))
    tokens = [model.tokens(line, 20) for line in text.read_text(encoding="utf-8").splitlines()]
    for n, layer in enumerate(data["layers"]):
        want = heads.mean([model.read(each)[1][n].numbers("cpu:0") for each in tokens])
        assert [head["entropy"] for head in layer["heads"]] == pytest.approx(want.entropy.tolist(), rel=1e-4)
        assert [head["neighbour"] for head in layer["heads"]] == want.neighbour.tolist()
        seen = graph.diagnose(model.read(tokens[0])[1][n].weights().mean(0))
        assert layer["graph"]["second"] == pytest.approx(seen.second, rel=1e-3)
        assert layer["graph"]["edges"][0]["curvature"] == pytest.approx(float(seen.curvature[0]), abs=1e-6)
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert "Most redundant heads" in shown
    assert "3 texts of 20 to 20 tokens" in shown


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--texts", "0"], "--texts is 0: give 1 or more"),
        (["--length", "1"], "--length is 1: give 2 or more"),
        (["--top", "-1"], "--top is -1: give 0 or more"),
        (["--device", "nowhere:0"], "nowhere"),
        (["--text", "absent.txt"], "absent.txt cannot be read"),
        (["--text", "SHORT"], "no two tokens"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    given: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w1\nw2\n", encoding="utf-8")
    given = [str(short) if each == "SHORT" else each for each in given]
    assert main(["geometric", str(folder), *given]) != 0
    assert said in " ".join(capsys.readouterr().err.split())


def test_models_whose_weights_are_no_softmax_of_products_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HalError, match="no model at nothing"):
        heads.ModelHeads("nothing")
    config = transformers.Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, head_dim=16
    )
    config.num_key_value_heads = 2
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    model = heads.ModelHeads(str(tmp_path))
    with pytest.raises(ContractError, match="caps its scores at 50"):
        model.read(model.tokens("w1 w2 w3"))
    bias = torch.zeros(1, 1, 3, 3)
    bias[..., 1] = -2.0
    with pytest.raises(ContractError, match="adds to its scores"):
        heads._visible(bias, "layer")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    with pytest.raises(ContractError, match="give an encoder or a causal decoder of text"):
        heads.ModelHeads(str(tmp_path))


def test_the_help_of_hal_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "geometric" in capsys.readouterr().out


def test_a_diagnosis_finds_the_bridge_and_parts_that_never_meet() -> None:
    apart: Any = torch.block_diag(torch.full((4, 4), 0.25), torch.full((4, 4), 0.25)).double()
    found = graph.diagnose(apart)
    assert found.second == pytest.approx(1)
    assert found.halving > 1e6
    joined = apart.clone()
    joined[3, 3] = joined[4, 4] = 0.05
    joined[3, 4] = joined[4, 3] = 0.2
    found = graph.diagnose(joined)
    assert found.edges[0].tolist() == [3, 4]
    assert float(found.curvature[0]) < 0
    values = torch.linalg.eigvals(joined).abs().sort().values
    assert found.second == pytest.approx(float(values[-2]), abs=1e-12)
    assert found.second**found.halving == pytest.approx(0.5)
