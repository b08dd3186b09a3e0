"""One of two processes that train with FP8 layers under FSDP2, on the CPU through gloo: run by test_fp8_sharded.py.

    python tests/precision/shard_worker.py RANK FILE GRANULARITY SCALING

Rank 0 prints JSON: the losses with and without sharding, the steps skipped, and how much of the parameters it holds.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from hal_precision import FP8Config, FP8TrainingEngine
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

STEPS, ROWS, BROKEN = 6, 32, 3


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 16))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(ROWS, 32, generator=generator)
    if step == BROKEN:
        inputs[0, 0] = torch.inf
    return inputs, torch.randn(ROWS, 16, generator=generator)


def train(model: Any, config: FP8Config, sharded: bool) -> tuple[list[float], int]:
    """(loss of every step on the whole batch, steps skipped); every process gets the whole batch."""
    engine = FP8TrainingEngine(model, config, clip_norm=0.5).setup_fp8_training()
    if sharded:
        for layer in (model[0], model[2], model[4], model):
            fully_shard(layer)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), list[float]()
    with engine:
        for step in range(STEPS):
            losses.append(float(engine.training_step(*batch(step))))
            engine.optimizer_step(optimizer)
    return losses, engine.get_training_statistics()["skipped_steps"]


def main() -> None:
    rank, (file, granularity, scaling) = int(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    config = FP8Config(granularity=granularity, scaling=scaling, emulate=True)
    plain = train(network(), config, False)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = network()
    found = train(model, config, True)
    held = sum(each.to_local().numel() for each in model.parameters())
    if rank == 0:
        whole = sum(each.numel() for each in model.parameters())
        print(json.dumps({"plain": plain, "sharded": found, "held": held / whole}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
