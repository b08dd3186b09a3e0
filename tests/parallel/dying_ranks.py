"""Ranks that die or hang in the middle of a call. Started with a list of trials as JSON; prints what the others did.

The ranks are forked from one process that has everything imported: each trial takes a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hal_parallel
import torch
import torch.distributed as dist
from hal_parallel import exchange, inner

import hal_core as hal

WORLD = 4
VICTIM = 2


def rank_of_a_trial(rank: int, trial: dict[str, Any], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), WORLD), rank=rank, world_size=WORLD)
    tensors = [torch.randn(1, 4, 64, 16, requires_grad=True) for _ in range(3)]

    def call() -> Any:
        return hal_parallel.attention(
            *tensors,
            strategy=trial["strategy"],
            layout="zigzag",
            is_causal=True,
            backend="cpu",
            timeout=trial["timeout"],
        )

    call().sum().backward()
    if rank == VICTIM:
        _arm(trial, folder)
    try:
        out = call()
        if trial["at"] != "forward":
            out.sum().backward()
        for _ in range(3):
            call().sum().backward()
        said = "nothing happened"
    except hal.HalError as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps({"said": said, "at": time.time()}))


def _arm(trial: dict[str, Any], folder: Path) -> None:
    """Have this rank end, or sleep, at its second visit to a place."""
    visits = []

    def before(function: Any) -> Any:
        def run(*given: Any, **named: Any) -> Any:
            visits.append(1)
            if len(visits) == trial.get("visit", 2):
                (folder / "end").write_text(str(time.time()))
                if trial["how"] == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            return function(*given, **named)

        return run

    place = {
        "forward": (inner.Inner, "forward"),
        "backward": (inner.Inner, "backward"),
        "exchange": (exchange.Link, "shift" if trial["strategy"] == "ring" else "_run"),
        "wait": (exchange.Link, "wait"),
    }[trial["at"]]
    setattr(*place, before(getattr(*place)))


def run(trial: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), {}
        for rank in range(WORLD):
            child = os.fork()
            if child == 0:
                try:
                    rank_of_a_trial(rank, trial, folder)
                except BaseException as error:
                    (folder / f"{rank}.json").write_text(json.dumps({"said": repr(error), "at": time.time()}))
                os._exit(0)
            children[rank] = child
        for rank, child in children.items():
            if rank != VICTIM:
                os.waitpid(child, 0)
        os.kill(children[VICTIM], signal.SIGKILL)
        os.waitpid(children[VICTIM], 0)
        end = float((folder / "end").read_text())
        others = {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in children if rank != VICTIM}
        return {rank: {"said": each["said"], "seconds": each["at"] - end} for rank, each in others.items()}


if __name__ == "__main__":
    hal.attention(*[torch.randn(1, 1, 2, 2) for _ in range(3)], backend="cpu")
    print(json.dumps([run(trial) for trial in json.loads(sys.argv[1])]))
