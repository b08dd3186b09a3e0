"""`hal kpu ...`: what is printed is what the simulators give, bad input is one sentence and exit code 2."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hal_kpu.simulator.products.gemm import simulate_gemm

from hal_core.cli import main


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["kpu", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("dataflow", "cycles"), [("os", 3039), ("ws", 3551), ("is", 3551)])
@pytest.mark.parametrize("fidelity", ["transactional", "cycle_accurate"])
def test_gemm_counts_as_published_simulators_do(capsys, dataflow, cycles, fidelity):
    found = as_json(capsys, "gemm", "128", "128", "128", "--dataflow", dataflow, "--fidelity", fidelity)
    assert found["counters"]["compute_cycles"] == cycles
    assert found["counters"]["total_macs"] == 128**3
    assert found["execution_backend"] == fidelity
    assert found["energy"]["calibrated"] is False


def test_gemm_takes_rows_columns_and_a_machines_memories(capsys):
    found = as_json(capsys, "gemm", "64", "48", "32", "--rows", "16", "--cols", "8", "--profile", "t64")
    want = simulate_gemm(64, 48, 32, rows=16, cols=8, fidelity=1, profile="t64")
    assert found["counters"]["cycles"] == want.cycles
    assert found["title"] == "64 x 48 x 32 float32 on 16 x 8, os"


def test_attention_shows_fused_against_scores_through_dram(capsys):
    found = as_json(capsys, "attention", "--shape", "1,8,256,64")
    assert found["fused"]["external_bytes"] < found["unfused"]["external_bytes"]
    assert found["speedup"] == pytest.approx(found["unfused"]["cycles"] / found["fused"]["cycles"])
    assert found["speedup"] > 1
    assert found["report"]["counters"]["cycles"] == found["fused"]["cycles"]
    causal = as_json(capsys, "attention", "--shape", "1,8,256,64", "--causal")
    assert causal["fused"]["cycles"] < found["fused"]["cycles"]
    assert causal["unfused"]["cycles"] == found["unfused"]["cycles"]


def test_attention_prints_tables_and_draws(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "160")
    plot = tmp_path / "report.png"
    assert main(["kpu", "attention", "--shape", "1,2,64,32", "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert "scores through DRAM" in text
    assert "simulated" in text
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("what", [("--shape", "1,2,64,32"), ("--gemm", "64,64,64", "--rows", "16", "--cols", "16")])
def test_trace_writes_what_it_counted(capsys, tmp_path, what):
    path = tmp_path / "t.json"
    found = as_json(capsys, "trace", *what, "--out", str(path))
    trace = json.loads(path.read_text())
    assert found["events"] == len(trace["traceEvents"])
    ends = [e["args"]["start"] + e["args"]["cycles"] for e in trace["traceEvents"] if e["ph"] == "X"]
    assert max(ends) == found["cycles"] == trace["otherData"]["cycles"]


def test_report_covers_a_small_model(capsys):
    pytest.importorskip("transformers")
    found = as_json(capsys, "report", "gpt2", "--length", "8")
    assert found["shares"]["nodes"] == 1.0
    assert found["fallback"] == []
    assert found["macs"] > 0
    timed = as_json(capsys, "report", "bert", "--length", "8", "--fidelity", "transactional")
    assert timed["cycles"] > 0
    assert timed["time_basis"] == "modelled"


def test_profile_shows_every_figure_with_its_origin(capsys):
    found = as_json(capsys, "profile", "t64")
    assert found["figures"]["array.rows"] == {
        "value": 32.0,
        "unit": "count",
        "provenance": "paper-projection",
        "source": found["figures"]["array.rows"]["source"],
    }
    assert main(["kpu", "profile", "t64"]) == 0
    assert "figures assumed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gemm", "0", "1", "1"], "M = 0 was given"),
        (["gemm", "8", "8", "8", "--profile", "nope"], "'nope' is no profile"),
        (["attention", "--shape", "1,4,x,64"], "pass batch,heads,length,head_dim"),
        (["attention", "--shape", "1,4,64,4000"], "head_dim 4000 was given: t64 holds"),
        (["attention", "--shape", "1,4,64,64", "--kv-heads", "3"], "multiple of key heads"),
        (["attention", "--shape", "1,1,32,32", "--plot", "nothing.abc"], "choose a name that ends in .png"),
        (["trace", "--gemm", "1,2"], "pass M,N,K"),
        (["trace", "--shape", "1,1,32,32", "--out", "no-such-folder/t.json"], "no-such-folder is no folder"),
        (["report", "berd"], "no model 'berd'"),
        (["profile", "none.toml"], "none.toml"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, words, sentence):
    assert main(["kpu", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
