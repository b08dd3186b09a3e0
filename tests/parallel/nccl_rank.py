"""One rank on a CUDA device with NCCL: every strategy against float64, and every operation of a link.

Started by torchrun; the first rank prints one line of JSON: the largest error over all ranks, by name.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import hal_parallel
import torch
import torch.distributed as dist
from hal_parallel.exchange import Link, gather_tokens, trade
from hal_parallel.layout import make_layout, shard
from hal_parallel.topology import topology_of
from torch.distributed.device_mesh import init_device_mesh

import hal_core as hal
from hal_core.registry import registry

TOKENS, HEADS, DIM = 1024, 4, 64


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def dense(tensors: list[torch.Tensor], grad_out: torch.Tensor) -> list[torch.Tensor]:
    """Causal attention in float64 and its gradients."""
    q, k, v = (t.double().requires_grad_() for t in tensors)
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=q.device).triu(1)
    out = (q @ k.mT * DIM**-0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out.double())]


def of_strategy(strategy: str, mesh: Any, rank: int, world: int, device: torch.device) -> dict[str, float]:
    """Errors of a strategy on this rank's tokens."""
    g = torch.Generator(device).manual_seed(3)
    options: dict[str, Any] = {"generator": g, "device": device, "dtype": torch.bfloat16}
    *tensors, grad_out = (torch.randn(2, HEADS, TOKENS, DIM, **options) for _ in range(4))
    layout = make_layout("zigzag", TOKENS, world)
    leaves = [shard(t, layout, rank).requires_grad_() for t in tensors]
    call: dict[str, Any] = {"layout": "zigzag", "strategy": strategy, "is_causal": True, "backend": "cuda"}
    out = hal_parallel.attention(*leaves, mesh, timeout=60, **call)
    found = [out.detach(), *torch.autograd.grad(out, leaves, shard(grad_out, layout, rank))]
    wanted = (shard(t, layout, rank) for t in dense(tensors, grad_out))
    names = ("out", "query", "key", "value")
    return {f"{strategy}, {n}": error(*both) for n, *both in zip(names, found, wanted, strict=True)}


def of_link(link: Link) -> dict[str, float]:
    """Differences from what each operation has to give. A group of one rank takes no short way here."""
    device, world = link.device, link.size
    own = torch.arange(64.0, device=device) + 1000 * link.rank
    found = {}
    if world > 1:  # torch sends nothing to the same rank
        came = torch.empty_like(own)
        link.shift([own], [came], 1, "a shift")()
        found["shift"] = came - torch.arange(64.0, device=device) - 1000 * ((link.rank - 1) % world)
    total = world * torch.arange(64.0, device=device) + 1000 * (world * (world - 1) // 2)
    found["all_reduce"] = link.all_reduce(own, "a sum") - total
    every = torch.arange(64.0, device=device) + 1000 * torch.arange(world, device=device)[:, None]
    found["all_gather"] = link._run(dist.all_gather_into_tensor, own, (world, 64), "gathering") - every
    found["reduce_scatter"] = link._run(dist.reduce_scatter_tensor, every, (64,), "scattering") - world * own
    found["all_to_all"] = link._run(dist.all_to_all_single, every, every.shape, "trading") - every[link.rank]
    whole = torch.randn(1, 2 * world, 4 * world, 8, device=device, dtype=torch.bfloat16)
    back = trade(trade(whole, link, 1, 2, "heads"), link, 2, 1, "tokens")
    found["trade and back"] = back - whole
    found["gather_tokens"] = gather_tokens(own, link, 0, "tokens").view_as(every) - every
    return {name: float(difference.abs().max()) for name, difference in found.items()}


def main() -> int:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", device_id=device)
    try:
        registry.entry("cuda")
    except hal.UnknownBackendError:  # not installed: on the path
        from hal_cuda.backend import CudaBackend

        hal.register(CudaBackend(), name="cuda")
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cuda", (world,))
    two = init_device_mesh("cuda", (world // 2, 2) if world % 2 == 0 else (world, 1))
    topology = topology_of(mesh)
    assert topology is not None
    found = of_link(topology.ring)
    for strategy in ("ring", "gathered", "ulysses", "pass_query", "ring_ulysses"):
        found |= of_strategy(strategy, two if strategy == "ring_ulysses" else mesh, rank, world, device)
    largest = torch.tensor(list(found.values()), dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    if rank == 0:
        print(json.dumps(dict(zip(found, largest.tolist(), strict=True))), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
