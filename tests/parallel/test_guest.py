"""hal's attention as a guest inside torch's own `context_parallel`: torch cuts the sequence, rotates and merges, and
each dense step runs on a hal device. Only this test depends on torch's private names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard

import hal_core as hal
from hal_core.plugin_api import AttentionRequest, Causal

torch_cp = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._attention")
pytestmark = pytest.mark.xdist_group("parallel")
HERE = str(Path(__file__))
FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
calls: list[str] = []


def forward(query: Any, key: Any, value: Any, is_causal: bool, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    calls.append("forward")
    with torch.no_grad():
        return hal.attention(query, key, value, is_causal=is_causal, return_lse=True, backend="cpu")


def backward(
    query: Any, key: Any, value: Any, out: Any, logsumexp: Any, is_causal: bool, grad_out: Any, **_: Any
) -> tuple[torch.Tensor, ...]:
    calls.append("backward")
    sizes = (*query.shape[:2], key.shape[1], query.shape[2], key.shape[2], query.shape[3], value.shape[3])
    causal = Causal.TOP_LEFT if is_causal else Causal.NONE
    request = AttentionRequest(*sizes, "float32", causal=causal, lse=True, grads=frozenset("qkv"))
    session = hal.session("cpu")
    prepared = session.prepare_attention(query, key, value, request=request)
    given = (tensor.contiguous() for tensor in (out, logsumexp, grad_out))
    return tuple(session.compute_attention_backward(prepared, *given)[:3])


def handled(op: Any, args: Any, _: Any) -> Any:
    """What torch's ring gives for torch's processor operator, which its own table leaves out."""
    mesh, local = args[0].device_mesh, [a._local_tensor if isinstance(a, DTensor) else a for a in args]
    if op is FORWARD:
        query, key, value, *rest = local
        found = torch_cp._templated_ring_attention(
            mesh.get_group(), 2, forward, query, key, value, is_causal=rest[1] if len(rest) > 1 else False
        )
    else:
        grad_out, query, key, value, out, lse, _dropout, is_causal = local[:8]
        found = torch_cp._templated_ring_attention_backward(
            mesh.get_group(), 2, backward, grad_out, "grad_out", query, key, value, out, lse, is_causal=is_causal
        )
    return tuple(DTensor.from_local(tensor, mesh, [Shard(2)], run_check=False) for tensor in found)


def guest(mesh: Any, rank: int, world: int, rotate: str) -> list[Any]:
    """Errors of output and gradients of the whole sequence, and how often hal ran."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard, set_rotate_method

    torch.manual_seed(2)
    whole = [torch.randn(2, 4, 32, 16, requires_grad=True) for _ in range(3)]
    flowing = torch.randn(2, 4, 32, 16)
    want = F.scaled_dot_product_attention(*whole, is_causal=True)
    wanted = [want, *torch.autograd.grad(want, whole, flowing)]
    parts = [tensor.detach().clone() for tensor in (*whole, flowing)]
    handlers = DTensor._op_dispatcher._custom_op_handlers
    handlers |= {FORWARD: handled, BACKWARD: handled}
    calls.clear()
    set_rotate_method(rotate)
    try:
        with context_parallel(mesh, buffers=parts, buffer_seq_dims=[2] * 4):
            leaves = [part.detach().clone().requires_grad_() for part in parts[:3]]
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)
            found = [out.detach(), *torch.autograd.grad(out, leaves, parts[3].clone())]
        got = context_parallel_unshard(mesh, [tensor.contiguous() for tensor in found], [2] * 4)
    finally:
        del handlers[FORWARD], handlers[BACKWARD]
    errors = [float((mine - right).norm() / right.norm()) for mine, right in zip(got, wanted, strict=True)]
    return [errors, calls.count("forward"), calls.count("backward")]


@pytest.mark.parametrize("rotate", ["alltoall", "allgather"])
def test_hal_runs_inside_torchs_context_parallel(ranks, rotate):
    for errors, forwards, backwards in ranks.run("called", "mesh", code=f"{HERE}:guest", rotate=rotate):
        assert max(errors) < 1e-5
        assert (forwards, backwards) == (4, 4)
