"""Train a small Llama on sequences that are cut over ranks, with FSDP2 or DDP, and go on with another number of ranks.

    torchrun --nproc-per-node 4 examples/parallel/train.py --shards 4 --steps 10 --save out/checkpoint
    torchrun --nproc-per-node 2 examples/parallel/train.py --shards 2 --steps 10 --load out/checkpoint

The ranks form a mesh of (batches, tokens): ranks of one row share a sequence, rows have batches of their own. Gradients
are averaged over all ranks, by FSDP2, or by DDP with --ddp.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from typing import Any

import hal_nn
import hal_parallel
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
import transformers
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def make_model() -> Any:
    hal_nn.register_huggingface()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="hal",
    )
    return transformers.LlamaForCausalLM(config)


def batch(step: int, row: int, rows: int, size: int, tokens: int) -> torch.Tensor:
    """The row's part of a step's batch: counting up from a random start, so that there is something to learn."""
    start = torch.randint(0, 128, (size, 1), generator=torch.Generator().manual_seed(step))
    every = (start + torch.arange(tokens)) % 128
    return every.chunk(rows)[row]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=1, help="ranks that share a sequence")
    parser.add_argument("--ddp", action="store_true", help="DistributedDataParallel instead of FSDP2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="number of the first step")
    parser.add_argument("--tokens", type=int, default=61)
    parser.add_argument("--size", type=int, default=4, help="sequences of a whole batch")
    parser.add_argument("--save", help="folder of the checkpoint that is written")
    parser.add_argument("--load", help="folder of a checkpoint to go on from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    alone = "RANK" not in os.environ  # started without torchrun: one process, nothing is cut
    if not alone:
        dist.init_process_group("gloo")
    world = 1 if alone else dist.get_world_size()
    rows, model, row = world // options.shards, make_model(), 0
    wrapped: Any = model
    if not alone:
        mesh = init_device_mesh("cpu", (rows, options.shards), mesh_dim_names=("batches", "tokens"))
        row = mesh.get_local_rank("batches")
        if options.ddp:
            wrapped = DistributedDataParallel(model)
        else:
            whole = init_device_mesh("cpu", (world,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=whole)
            fully_shard(model, mesh=whole)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if options.load:
        weights, moments = get_state_dict(model, optimizer)
        checkpoint.load({"model": weights, "optimizer": moments}, checkpoint_id=options.load)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    shared = nullcontext() if alone else hal_parallel.context(mesh["tokens"], layout="zigzag")
    with shared:
        for step in range(options.first, options.first + options.steps):
            tokens = batch(step, row, rows, options.size, options.tokens)
            loss = wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shown = loss.detach().clone()
            if not alone:
                dist.all_reduce(shown)
            if alone or dist.get_rank() == 0:
                print(f"step {step} loss {float(shown) / world:.6f}", flush=True)
    if options.save:
        weights, moments = get_state_dict(model, optimizer)
        checkpoint.save({"model": weights, "optimizer": moments}, checkpoint_id=options.save)
    if not alone:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
