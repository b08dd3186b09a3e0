"""Ranks that die, hang, or are given different calls: the others say which, and none waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.xdist_group("parallel")
HERE = Path(__file__).parent
PLACES = ("forward", "backward", "exchange", "wait")


def run(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", str(HERE / "dying_ranks.py"), json.dumps(trials)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HAL_PLUGINS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def check(trials: list[dict[str, Any]]) -> None:
    for trial, others in zip(trials, run(trials), strict=True):
        assert len(others) == 3
        for rank, each in others.items():
            assert each["said"].startswith(f"ExchangeError: rank {rank} waited for rank"), (trial, others)
            assert each["seconds"] < 10, (trial, others)
        said = " ".join(each["said"] for each in others.values())
        if trial["strategy"] == "ring":  # some may be in the comparison before the next call
            assert "step " in said or "comparing what the ranks were given" in said, said
        if trial["how"] == "killed":
            assert "the connection is lost" in said, said
        else:
            assert f"nothing came within {trial['timeout']:g} s" in said, said


def test_a_rank_that_is_killed_or_hangs_ends_the_others():
    trials = [{"at": at, "how": "killed", "strategy": "ring", "timeout": 60} for at in PLACES]
    trials.append({"at": "exchange", "how": "killed", "strategy": "ulysses", "timeout": 60})
    check([*trials, {"at": "forward", "how": "asleep", "strategy": "ring", "timeout": 3}])


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_each_time():
    trials = [
        {"at": at, "how": "killed", "strategy": "ring", "timeout": 60, "visit": visit}
        for at in PLACES
        for visit in (1, 2, 3, 4, 5)
    ]
    assert len(trials) == 20
    check(trials)


#: What two ranks are given, and what every rank then says, by the words that have to be in it.
DIFFERENT: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({"layout": "zigzag"}, {"layout": "contiguous"}, ["layout zigzag and zigzag on rank 0", "on rank 1"]),
    ({"heads": 4, "heads_kv": 4}, {"heads": 8, "heads_kv": 4}, ["query [1, 4, 12, 8] on rank 0, [1, 8, 12"]),
    ({"dtype": "float32"}, {"dtype": "bfloat16"}, ["dtype float32 on rank 0, bfloat16 on rank 1"]),
    ({"strategy": "ring"}, {"strategy": "gathered"}, ["strategy ring on rank 0, gathered on rank 1"]),
    ({}, {"options": {"is_causal": True}}, ["causal", "rank 0", "rank 1"]),
    ({"grads": True}, {"grads": False}, ["gradients k, q, v on rank 0, none on rank 1"]),
    ({"mask": "boolean"}, {}, ["mask [1, 1, 12, 24] torch.bool on rank 0, none on rank 1"]),
    ({"options": {"scale": 1.0}}, {"options": {"scale": 2.0}}, ["scale 1.0 on rank 0, 2.0"]),
    (
        {"cu_seqlens_q": [0, 4, 24], "cu_seqlens_k": [0, 4, 24]},
        {"cu_seqlens_q": [0, 5, 24], "cu_seqlens_k": [0, 5, 24]},
        ["sequences", "rank 0", "rank 1"],
    ),
    ({"len_q": 24}, {"len_q": 23}, ["tokens 24 and 24 on rank 0, 23 and 23 on rank 1"]),
    (
        {"options": {"dropout_p": 0.1, "rng": (1, 2)}},
        {"options": {"dropout_p": 0.1, "rng": (1, 3)}},
        ["rng (1, 2) on rank 0, (1, 3) on rank 1"],
    ),
]


def test_ranks_that_were_given_different_calls_all_refuse(ranks):
    found = ranks.run("refused", 2, cases=[[first, second] for first, second, _ in DIFFERENT])
    for said, (first, second, words) in zip(zip(*found, strict=True), DIFFERENT, strict=True):
        for rank, text in enumerate(said):
            assert text.startswith("ContractError: the ranks were given different calls"), (rank, first, second, text)
            assert text.endswith("Nothing was sent")
            assert [word for word in words if word not in text] == [], text


def test_what_one_rank_cannot_run_no_rank_runs(ranks):
    """The rank that refuses says why, the others who refused."""
    found = ranks.run("refused", 4, cases=[[{}, {}, {"options": {"softcap": -1.0}}, {}]])
    assert found[2][0].startswith("ContractError: softcap -1.0 was given")
    for rank in (0, 1, 3):
        assert found[rank][0].startswith("ContractError: rank 2 refused this call, so no rank runs it: softcap -1.0")
