"""Modules on shards and on whole sequences against torch's own attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hal_parallel
import pytest
import torch
import torch.nn.functional as F

from hal_core import ContractError

pytestmark = pytest.mark.xdist_group("parallel")
HERE = str(Path(__file__))
BATCH, TOKENS, WIDTH, HEADS = 2, 21, 32, 4


def plain(layer: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The layer on a whole sequence in one process."""
    q, k, v = (
        part(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() if layer.causal else None
    if mask is not None:
        seen = mask.bool()[:, None, None, :] if seen is None else seen & mask.bool()[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
    return layer.out_proj(out.transpose(1, 2).flatten(-2))


def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(BATCH, TOKENS, WIDTH), torch.arange(TOKENS).expand(BATCH, -1) < torch.tensor([[TOKENS], [15]])


def ring_layer(mesh: Any, rank: int, world: int, layout: str, masked: bool) -> list[float]:
    x, mask = drawn()
    layer = hal_parallel.create_ring_attention(WIDTH, HEADS, mesh=mesh, layout=layout, causal=True, num_kv_heads=2)
    want = plain(layer, x, mask if masked else None)
    part = hal_parallel.shard(x, mesh, layout, dim=1)
    got = layer(part, mask if masked else None, length=TOKENS)
    whole = hal_parallel.unshard(got, mesh, layout, dim=1, length=TOKENS)
    return [float((whole - want).norm() / want.norm())]


def context_layer(mesh: Any, rank: int, world: int, layout: str) -> list[float]:
    """Values, and gradients averaged over the ranks."""
    x, mask = drawn()
    layer = hal_parallel.create_context_parallel_attention(WIDTH, HEADS, world, mesh, layout=layout)
    x.requires_grad_()
    parameters = [x, *layer.parameters()]
    want = plain(layer, x, mask)
    wanted = torch.autograd.grad(want.square().sum(), parameters)
    got = layer(x, mask)
    found = torch.autograd.grad(got.square().sum(), parameters)
    errors = [float((got - want).norm() / want.norm())]
    for mine, right in zip(found, wanted, strict=True):
        torch.distributed.all_reduce(mine, group=mesh)
        errors.append(float((mine / world - right).norm() / max(float(right.norm()), 1.0)))  # the bias of keys has none
    return errors


@pytest.mark.parametrize(("layout", "masked"), [("contiguous", True), ("zigzag", False), ("striped", True)])
def test_the_ring_layer_is_attention_of_the_whole_sequence(ranks, layout, masked):
    for errors in ranks.run("called", 4, code=f"{HERE}:ring_layer", layout=layout, masked=masked):
        assert max(errors) < 1e-5


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_context_parallel_attention_gives_every_rank_the_whole(ranks, layout):
    for errors in ranks.run("called", 2, code=f"{HERE}:context_layer", layout=layout):
        assert max(errors) < 1e-5


@pytest.mark.filterwarnings("ignore:hal_parallel. there is no process group")
def test_without_a_process_group_the_layers_run_on_one_device():
    x, _ = drawn()
    layer = hal_parallel.create_ring_attention(WIDTH, HEADS, causal=True)
    assert torch.allclose(layer(x), plain(layer, x), atol=1e-6)
    assert torch.allclose(hal_parallel.create_context_parallel_attention(WIDTH, HEADS, 4)(x).sum() * 0, torch.zeros(()))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: hal_parallel.create_ring_attention(30, 4), "num_heads must divide it"),
        (lambda: hal_parallel.create_ring_attention(32, 4, num_kv_heads=3), "multiple of key heads"),
        (lambda: hal_parallel.create_context_parallel_attention(32, 4, 0), "context_parallel_size 0 was given"),
        (lambda: hal_parallel.create_ring_attention(32, 4, 10)(torch.zeros(1, 11, 32)), "max_sequence_length is 10"),
        (lambda: hal_parallel.create_ring_attention(32, 4)(torch.zeros(1, 11, 31)), r"pass \[batch, local, 32\]"),
    ],
)
def test_bad_sizes_are_refused(build, said):
    with pytest.raises(ContractError, match=said):
        build()
