"""Which strategy a call takes, what it says of bad input, and plans."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import hal_parallel
import pytest
import torch
from hal_parallel.cost import LinkRate
from hal_parallel.planning import AttentionLayers, plan

from hal_core import ContractError

pytestmark = pytest.mark.xdist_group("parallel")
HERE = str(Path(__file__))


def explained(mesh: Any, rank: int, world: int, shape: list[int], options: dict[str, Any]) -> list[Any]:
    tensors = [torch.empty(shape) for _ in range(3)]
    found = hal_parallel.explain(*tensors, mesh, backend="cpu", **options)
    return [found.strategy, {e.strategy: e.refusal for e in found.estimates}, str(found)]


def measured(mesh: Any, rank: int, world: int) -> list[Any]:
    rate = hal_parallel.measure_link(mesh, size=1 << 16, repeats=3)
    found = hal_parallel.explain(*[torch.empty(1, 4, 64, 16)] * 3, mesh, backend="cpu")
    return [rate, found.link]


def refusal(mesh: Any, rank: int, world: int, options: dict[str, Any], tensors: dict[str, Any]) -> str:
    sizes = {"query": (1, 6, 8, 16), "key": (1, 6, 8, 16), "value": (1, 6, 8, 16)}
    given = [torch.empty(sizes[n], **tensors.get(n, {})) for n in sizes]
    if "mask" in options:
        options["attn_mask"] = torch.zeros(options.pop("mask"), dtype=torch.bool)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "page_table"):
        if name in options:
            options[name] = torch.tensor(options[name], dtype=torch.int32)
    try:
        hal_parallel.attention(*given, mesh, backend="cpu", **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_auto_takes_the_strategy_of_least_time(ranks):
    """Few heads cannot be cut; a short query over long keys travels itself."""
    strategy, refusals, text = ranks.run("called", 4, code=f"{HERE}:explained", shape=[1, 4, 4096, 16], options={})[0]
    assert strategy in ("ring", "gathered", "ulysses")
    assert refusals["ring_ulysses"] == "it takes a mesh of 2 dimensions"
    assert text.startswith(f"strategy {strategy}; link ")
    assert "each rank's part: cpu:0" in text
    found = ranks.run("called", "2x2", code=f"{HERE}:explained", shape=[1, 4, 64, 16], options={})
    assert {each[0] for each in found} == {"ring_ulysses"}
    found = ranks.run("called", 4, code=f"{HERE}:explained", shape=[1, 3, 64, 16], options={})
    assert "3 query and 3 key heads cannot be cut into 4 parts" in found[0][1]["ulysses"]
    options = {"layout": ("replicated", "contiguous")}
    found = ranks.run("called", 4, code=f"{HERE}:explained", shape=[1, 4, 64, 16], options=options)
    assert found[0][0] == "pass_query"


def test_a_measured_link_is_stored_and_used(ranks):
    for rate, used in ranks.run("called", 2, code=f"{HERE}:measured"):
        assert rate.basis == "measured"
        assert used == rate
        assert 1e5 < rate.bandwidth < 1e12
        assert rate.latency < 1


def calibrated(mesh: Any, rank: int, world: int) -> Any:
    """What `hal calibrate cpu` does on each rank, without the device's own measurements."""
    from hal_cli.command_line import make_parser
    from hal_parallel import command

    run = make_parser().parse_args(["calibrate", "cpu"]).run
    assert run.func is command.with_links, "hal calibrate measures links"
    found = command.with_links(lambda _: command.CommandResult({"device": "cpu:0"}), argparse.Namespace(device="cpu"))
    used = hal_parallel.explain(*[torch.empty(1, 4, 64, 16)] * 3, mesh, backend="cpu").link
    return found and [found.data, found.tables[0].title], used


def test_calibrate_measures_links_where_there_are_ranks(ranks):
    (found, used), *others = ranks.run("called", 4, code=f"{HERE}:calibrated")
    assert found[0]["device"] == "cpu:0"
    assert found[0]["link"] == {**used._asdict(), "basis": "measured", "ranks": 4}
    assert found[1] == "Links between 4 ranks of cpu"
    assert others == [(None, used)] * 3


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"length": 17}, {}, "length 17 and a query shard of 8 tokens on each of 2 ranks were given: pass"),
    ({"layout": "round"}, {}, "layout 'round' of the query was given: use contiguous, zigzag, striped"),
    ({"strategy": "star"}, {}, "strategy 'star' was given: use auto, ring, gathered, ulysses"),
    (
        {"strategy": "ring_ulysses"},
        {},
        "it takes a mesh of 2 dimensions: use ring, gathered, ulysses, pass_query, auto",
    ),
    ({"mask": (16, 16)}, {}, "that is the mask of the whole sequence): pass this rank's shard of 8 rows"),
    ({"mask": (8, 8)}, {}, "attn_mask of 8 rows and 8 keys was given: pass this rank's shard of 8 rows in the order"),
    ({"block_plan": 1}, {}, "block_plan was given, which hal_parallel does not run: pass the pattern as a mask shard"),
    ({"page_table": [[1]]}, {}, "page_table was given, which hal_parallel does not run: gather the pages"),
    (
        {"cu_seqlens_q": [0, 8], "cu_seqlens_k": [0, 8]},
        {},
        "of the whole sequence, the same on every rank, from 0 to 16",
    ),
    ({"dropout_p": 1.5}, {}, "dropout_p 1.5 was given: use 0 or more and less than 1"),
    ({"window": (-1, 0)}, {}, "window (-1, 0) was given: use (left, right)"),
    ({"colour": "red"}, {}, "unknown argument 'colour' was given"),
    ({"rng": (1,)}, {}, "rng (1,) was given: pass (seed, offset)"),
    ({"timeout": 0}, {}, "timeout 0 was given: pass seconds, more than 0"),
    ({}, {"query": {"dtype": torch.float64}}, "cast"),
    ({}, {n: {"device": "meta"} for n in ("query", "key", "value")}, "a query on meta and a mesh of cpu"),
    (
        {"layout": ("replicated", "zigzag")},
        {"query": {"requires_grad": True}},
        "gradients of q with replicated queries",
    ),
]


@pytest.mark.parametrize(("options", "tensors", "said"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_bad_input_is_refused_with_what_to_do(ranks, options, tensors, said):
    for text in ranks.run("called", 2, code=f"{HERE}:refusal", options=options, tensors=tensors):
        assert said in text, text
        assert text.startswith(("ContractError", "UnsupportedError")), text


def test_heads_that_ulysses_cannot_cut_name_the_strategies_that_can(ranks):
    found = ranks.run("called", 4, code=f"{HERE}:refusal", options={"strategy": "ulysses"}, tensors={})
    for text in found:
        assert "6 query and 6 key heads cannot be cut into 4 parts: use ring, gathered, pass_query, auto" in text


LAYERS = [AttentionLayers(32, 32, 8, 128, 128)]


def test_a_plan_grows_as_its_arithmetic_says():
    """Memory of the cache: tokens / ranks x 2 x heads x head size x bytes x layers; time falls with ranks."""
    found = plan(LAYERS, 1 << 16, 8, device="cpu", dtype="bfloat16", link=LinkRate(1e11, 1e-6))
    assert found.memory["cache of keys and values"] == (1 << 16) // 8 * 2 * 8 * 128 * 2 * 32
    fewer = plan(LAYERS, 1 << 16, 4, device="cpu", dtype="bfloat16", link=LinkRate(1e11, 1e-6))
    assert 1.8 < fewer.seconds / found.seconds < 2.2
    slow = plan(LAYERS, 1 << 10, 8, device="cpu", dtype="bfloat16", link=LinkRate(1e3, 1e-6))
    assert slow.seconds > 10 * plan(LAYERS, 1 << 10, 8, device="cpu", link=LinkRate(1e11, 1e-6)).seconds
    with pytest.raises(ContractError, match="0 tokens, 8 ranks and a batch of 1 were given"):
        plan(LAYERS, 0, 8, device="cpu")
    with pytest.raises(ContractError, match="dtype 'int4' was given: use float64, float32"):
        plan(LAYERS, 64, 8, device="cpu", dtype="int4")


def test_the_plan_command_reads_a_configuration(tmp_path, capsys):
    from hal_cli.command_line import main

    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512, "num_hidden_layers": 6}
    config |= {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 3, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path), "--tokens", "4096", "--gpus", "4", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [kind["layers"]["number"] for kind in found["layers"]] == [3, 3]
    assert found["strategy"] in ("ring", "gathered", "pass_query")
    full, narrow = ({e["strategy"]: e["compute"] for e in kind["strategies"]} for kind in found["layers"])
    assert narrow["ring"] < full["ring"] / 4
    assert main(["plan", str(tmp_path), "--tokens", "4096", "--gpus", "4", "--device", "cpu", "--training"]) == 0
    assert "attention of 6 layers, forward and backward" in capsys.readouterr().out
