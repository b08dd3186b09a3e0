"""Training with FSDP2 and DDP on sequences that are cut over ranks: the losses of one process; the example, started by
torchrun, goes on from a checkpoint with another number of ranks.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("parallel")
HERE = str(Path(__file__))
EXAMPLE = Path(__file__).parents[2] / "examples" / "parallel" / "train.py"
STEPS = 50


def example() -> Any:
    spec = importlib.util.spec_from_file_location("train", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(wrapped: Any, model: Any, steps: int, row: int, rows: int) -> list[float]:
    train, found = example(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        tokens = train.batch(step, row, rows, 4, 29)
        loss = wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def one_process(steps: int) -> list[float]:
    model = example().make_model()
    return losses(model, model, steps, 0, 1)


def with_fsdp(mesh: Any, rank: int, world: int) -> list[list[float]]:
    import hal_parallel
    from torch.distributed.fsdp import fully_shard

    model = example().make_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with hal_parallel.context(mesh):
        found = losses(model, model, STEPS, 0, 1)
    return [found, one_process(STEPS)]


def with_ddp(mesh: Any, rank: int, world: int) -> list[list[float]]:
    """Two sequences' worth of ranks, two ranks each; the mean of the rows' losses is that of the whole batch."""
    import hal_parallel
    from torch.nn.parallel import DistributedDataParallel

    model = example().make_model()
    wrapped, row = DistributedDataParallel(model), mesh.get_local_rank(0)
    with hal_parallel.context(mesh["heads"], layout="striped"):
        found = torch.tensor(losses(wrapped, model, 10, row, 2))
    torch.distributed.all_reduce(found)
    return [(found / world).tolist(), one_process(10)]


@pytest.mark.parametrize(("function", "place"), [("with_fsdp", "mesh"), ("with_ddp", "2x2")])
def test_the_losses_are_those_of_one_process(ranks, function, place):
    for got, want in ranks.run("called", place, code=f"{HERE}:{function}"):
        assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < 1e-4
        assert want[-1] < want[0] - 0.4, "there was something to learn"


def run_example(world: int, *options: str) -> list[float]:
    command = [sys.executable, "-W", "ignore"]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HAL_PLUGINS": "cpu,parallel"}
    done = subprocess.run(
        [*command, str(EXAMPLE), *options], capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(number) for number in re.findall(r"loss ([\d.]+)", done.stdout)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [[], ["--ddp"]], ids=["fsdp2", "ddp"])
def test_the_example_goes_on_with_another_number_of_ranks(tmp_path, kind):
    whole = run_example(1, "--steps", "12")
    folder = str(tmp_path / "checkpoint")
    first = run_example(4, "--shards", "2", "--steps", "6", "--save", folder, *kind)
    then = run_example(2, "--shards", "2", "--first", "6", "--steps", "6", "--load", folder, *kind)
    assert len(first) == len(then) == 6
    assert max(abs(a - b) for a, b in zip([*first, *then], whole, strict=True)) < 1e-4
