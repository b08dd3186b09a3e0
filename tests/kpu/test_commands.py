"""`hal kpu ...`: what is returned is what the simulators give, and bad input is one sentence."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest
from hal_kpu.cli import add_commands
from hal_kpu.simulator.products.gemm import simulate_gemm

from hal_core.plugin_api import CommandResult, HalError


def run(*words: str) -> CommandResult:
    """What `hal kpu ...` returns."""
    parser = argparse.ArgumentParser(prog="hal")
    add_commands(parser.add_subparsers())
    options = parser.parse_args(["kpu", *words])
    options.progress = lambda text, share: None
    return options.run(options)


def as_json(*words: str) -> dict[str, Any]:
    """The data of a command, as JSON carries it."""
    return json.loads(json.dumps(run(*words).data, allow_nan=False))


def shown(result: CommandResult) -> str:
    """Everything that a person reads."""
    cells = [" ".join([table.title, *(" ".join(row) for row in table.rows), *table.notes]) for table in result.tables]
    return " ".join([*cells, *result.text])


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", "t64").exit_code == 0
    assert run("gemm", "8", "8", "8").tables
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_it_is_a_command_of_hal(capsys: pytest.CaptureFixture[str]) -> None:
    main = pytest.importorskip("hal_cli").main
    assert main(["kpu", "gemm", "16", "16", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counters"]["total_macs"] == 16**3
    assert main(["kpu", "gemm", "0", "1", "1"]) == 2
    assert "M = 0 was given" in capsys.readouterr().err


@pytest.mark.parametrize(("dataflow", "cycles"), [("os", 3039), ("ws", 3551), ("is", 3551)])
@pytest.mark.parametrize("fidelity", ["transactional", "cycle_accurate"])
def test_gemm_counts_as_published_simulators_do(dataflow, cycles, fidelity):
    found = as_json("gemm", "128", "128", "128", "--dataflow", dataflow, "--fidelity", fidelity)
    assert found["counters"]["compute_cycles"] == cycles
    assert found["counters"]["total_macs"] == 128**3
    assert found["execution_backend"] == fidelity
    assert found["energy"]["calibrated"] is False


def test_gemm_takes_rows_columns_and_a_machines_memories():
    found = as_json("gemm", "64", "48", "32", "--rows", "16", "--cols", "8", "--profile", "t64")
    want = simulate_gemm(64, 48, 32, rows=16, cols=8, fidelity=1, profile="t64")
    assert found["counters"]["cycles"] == want.cycles
    assert found["title"] == "64 x 48 x 32 float32 on 16 x 8, os"


def test_attention_shows_fused_against_scores_through_dram():
    found = as_json("attention", "--shape", "1,8,256,64")
    assert found["fused"]["external_bytes"] < found["unfused"]["external_bytes"]
    assert found["speedup"] == pytest.approx(found["unfused"]["cycles"] / found["fused"]["cycles"])
    assert found["speedup"] > 1
    assert found["report"]["counters"]["cycles"] == found["fused"]["cycles"]
    causal = as_json("attention", "--shape", "1,8,256,64", "--causal")
    assert causal["fused"]["cycles"] < found["fused"]["cycles"]
    assert causal["unfused"]["cycles"] == found["unfused"]["cycles"]


def test_attention_gives_tables_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "report.png"
    text = shown(run("attention", "--shape", "1,2,64,32", "--plot", str(plot)))
    assert "scores through DRAM" in text
    assert "simulated" in text
    assert str(plot) in text
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("what", [("--shape", "1,2,64,32"), ("--gemm", "64,64,64", "--rows", "16", "--cols", "16")])
def test_trace_writes_what_it_counted(tmp_path, what):
    path = tmp_path / "t.json"
    found = as_json("trace", *what, "--out", str(path))
    trace = json.loads(path.read_text())
    assert found["events"] == len(trace["traceEvents"])
    ends = [e["args"]["start"] + e["args"]["cycles"] for e in trace["traceEvents"] if e["ph"] == "X"]
    assert max(ends) == found["cycles"] == trace["otherData"]["cycles"]


def test_report_covers_a_small_model():
    pytest.importorskip("transformers")
    found = as_json("report", "gpt2", "--length", "8")
    assert found["shares"]["nodes"] == 1.0
    assert found["fallback"] == []
    assert found["macs"] > 0
    timed = as_json("report", "bert", "--length", "8", "--fidelity", "transactional")
    assert timed["cycles"] > 0
    assert timed["time_basis"] == "modelled"


def test_profile_shows_every_figure_with_its_origin():
    found = as_json("profile", "t64")
    assert found["figures"]["array.rows"] == {
        "value": 32.0,
        "unit": "count",
        "provenance": "paper-projection",
        "source": found["figures"]["array.rows"]["source"],
        "uncertainty": None,
    }
    assert "figures assumed" in shown(run("profile", "t64"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gemm", "0", "1", "1"], "M = 0 was given"),
        (["gemm", "8", "8", "8", "--profile", "nope"], "'nope' is no profile"),
        (["attention", "--shape", "1,4,x,64"], "pass batch,heads,length,head_dim"),
        (["attention", "--shape", "1,4,64,4000"], "head_dim 4000 was given: t64 holds"),
        (["attention", "--shape", "1,4,64,64", "--kv-heads", "3"], "multiple of key heads"),
        (["attention", "--shape", "1,4,64,64", "--kv-heads", "0"], "0 key heads"),
        (["attention", "--shape", "1,4,²,64"], "pass batch,heads,length,head_dim"),
        (["attention", "--shape", "1,1,32,32", "--plot", "nothing.abc"], "choose a name that ends in .png"),
        (["gemm", "8", "8", "8", "--plot", "no-such-folder/p.png"], "no-such-folder is no folder"),
        (["attention", "--shape", "1,1,32,32", "--plot", "no-such-folder/p.png"], "no-such-folder is no folder"),
        (["trace", "--gemm", "1,2"], "pass M,N,K"),
        (["trace", "--shape", "1,1,32,32", "--out", "no-such-folder/t.json"], "no-such-folder is no folder"),
        (["report", "berd"], "no model 'berd'"),
        (["profile", "none.toml"], "none.toml"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence):
    with pytest.raises((HalError, OSError)) as caught:
        run(*words)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["no-such-folder/p.png", "p.docx"])
def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_simulated(monkeypatch, file):
    monkeypatch.setattr("hal_kpu.simulator.products.gemm.simulate_gemm", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(HalError, match=r"no-such-folder is no folder|\.png, \.svg or \.pdf"):
        run("gemm", "8", "8", "8", "--plot", file)
