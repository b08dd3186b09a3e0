"""`hal warm`: what is compiled ahead for a model, in processes of their own, and what a failure says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeBackend
from hal_cli import model_config, warm
from hal_cli.model_config import Layers

import hal_core as hal
from hal_core import AttentionRequest, Causal, Device, HalError

Fake = Callable[..., FakeBackend]
Run = Callable[..., tuple[int, str, str]]
asked: list[AttentionRequest] = []


def warmed(fake: Fake, *work: tuple[str, Callable[[], int]]) -> None:
    """A device with this work to do ahead."""
    asked.clear()

    def warm_up(device: Device, requests: Sequence[AttentionRequest]) -> Any:
        asked.extend(requests)
        return list(work)

    fake("compiled").warm_up = warm_up  # type: ignore[attr-defined]


def test_work_runs_in_processes_and_is_counted(run: Run, fake: Fake) -> None:
    warmed(fake, ("two", partial(len, (1, 2))), ("one", partial(len, (1,))))
    code, out, _ = run("warm", "compiled", "--json", "--processes", "2")
    found = json.loads(out)
    assert code == 0
    assert found["kernels"] == 3
    assert {(piece["device"], piece["name"], piece["kernels"]) for piece in found["pieces"]} == {
        ("compiled:0", "two", 2),
        ("compiled:0", "one", 1),
    }
    assert found["seconds"] > 0


def test_a_failure_is_told_and_the_rest_is_done(run: Run, fake: Fake) -> None:
    warmed(fake, ("broken", partial(int, "no number")), ("one", partial(len, (1,))))
    code, out, _ = run("warm", "compiled")
    assert code == 1
    assert "broken: ValueError: invalid literal" in " ".join(out.split())
    assert "1 kernels are ready" in out


def test_a_device_that_compiles_nothing_ahead_says_so(run: Run, toy: FakeBackend) -> None:
    code, out, _ = run("warm", "toy")
    assert code == 0
    assert out.strip() == "toy:0 offers nothing to compile ahead."


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nosuch",), "unknown backend 'nosuch'"),
        (("compiled", "--processes", "0"), "--processes 0 was given: pass 1 or more"),
        (("compiled", "--dtype", "bfloat61"), "--dtype bfloat61 was given: pass names among"),
        (("compiled", "--model", "{folder}/empty.json"), "names no attention heads"),
        (("compiled", "--model", "{folder}/list.json"), "holds no JSON object"),
        (("compiled", "--model", "{folder}/broken.json"), "cannot be read"),
    ],
)
def test_an_error_is_one_sentence(run: Run, fake: Fake, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    warmed(fake)
    for name, text in (("empty", "{}"), ("list", "[]"), ("broken", "{")):
        (tmp_path / f"{name}.json").write_text(text)
    code, _, err = run("warm", *(word.replace("{folder}", str(tmp_path)) for word in words))
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (LLAMA, [Layers(32, 8, 128, 128, dtype="bfloat16")]),
        ({"n_embd": 768, "n_head": 12, "architectures": ["GPT2LMHeadModel"]}, [Layers(12, 12, 64, 64)]),
        (
            {"hidden_size": 384, "num_attention_heads": 12, "type_vocab_size": 2, "architectures": ["BertModel"]},
            [Layers(12, 12, 32, 32, causal=False)],
        ),
        (
            LLAMA
            | {
                "head_dim": 256,
                "sliding_window": 4096,
                "layer_types": ["sliding_attention", "full_attention"],
                "attn_logit_softcapping": 50.0,
                "query_pre_attn_scalar": 256,
            },
            [
                Layers(32, 8, 256, 256, softcap=50.0, scale=0.0625, dtype="bfloat16"),
                Layers(32, 8, 256, 256, softcap=50.0, scale=0.0625, dtype="bfloat16", window=4096),
            ],
        ),
        (LLAMA | {"sliding_window": 4096}, [Layers(32, 8, 128, 128, dtype="bfloat16", window=4096)]),
        (
            LLAMA | {"sliding_window": 4096, "use_sliding_window": False},
            [Layers(32, 8, 128, 128, dtype="bfloat16")],
        ),
        (
            LLAMA | {"num_key_value_heads": 32, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
            [Layers(32, 32, 192, 128, dtype="bfloat16")],
        ),
        (
            {
                "dtype": "float16",
                "text_config": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
                "vision_config": {"num_attention_heads": 16, "hidden_size": 1024, "image_size": 224},
            },
            [Layers(8, 4, 64, 64, dtype="float16"), Layers(16, 16, 64, 64, causal=False, dtype="float16")],
        ),
    ],
    ids=["llama", "gpt2", "bert", "gemma2", "mistral", "qwen2", "deepseek", "text and vision"],
)
def test_attention_layers_are_read_from_a_configuration(config: dict[str, Any], want: list[Layers]) -> None:
    assert model_config.layers(config) == want


def test_a_models_requests(run: Run, fake: Fake, tmp_path: Path) -> None:
    warmed(fake, ("one", partial(len, (1,))))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"sliding_window": 1024}))
    assert run("warm", "compiled", "--model", str(tmp_path), "--processes", "1")[0] == 0
    assert all((r.heads_q, r.heads_kv, r.dim_qk, r.dtype, r.device) == (32, 8, 128, "bfloat16", "cpu") for r in asked)
    assert {r.window for r in asked if r.causal is not Causal.NONE} == {(1023, None)}
    assert any(r.len_q == 1 and r.causal is Causal.BOTTOM_RIGHT for r in asked)
    assert not any(r.grads for r in asked)
    trained = {r.grads for r in warm.requests(hal.device("compiled:0"), [Layers(8, 8, 64, 64)], ("float16",), True)}
    assert trained == {frozenset(), frozenset({"q", "k", "v"})}


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(HalError, match="transformers, which would find a model of that name, is not installed"):
        model_config.read("no/such")
