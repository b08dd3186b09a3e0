"""Calls under gradients whose own lengths cuDNN serves faster than the bound of their bucket says, on any machine.

Torch's operations on host tensors stand in for cuDNN's operators.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: pip install 'hal-cuda[dev]'")

from hal_cuda import paths
from hal_cuda.cost import shipped
from hal_cuda.discovery import Chip
from hal_cuda.memory import CudaMemory
from hal_cuda.session import CudaSession
from test_host_calls import DEVICE, Backend, Kernel, launchless  # noqa: F401  the fixture

import hal_core as hal
from hal_core.testing import relative_error

#: ViT B/16 in small: the table's rates say cuDNN at 197 tokens, and the Hopper kernel at the bucket's 256.
BATCH, HEADS, DIM = 64, 12, 64


class WithCudnn(Backend):
    """The same GPU with torch's backends."""

    def open(self, device: hal.Device) -> CudaSession:
        memory = CudaMemory(0, name=device.id)
        memory._device = "cpu"
        chip = Chip(index=0, capability=(9, 0), multiprocessors=132, shared_memory=227 << 10)
        found = shipped()
        assert found is not None
        return CudaSession(device, chip, lambda: found[1], memory=memory)


def _weights(query: Tensor, key: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor, float]:
    factor = 1 / math.sqrt(query.shape[3]) if scale is None else scale
    scores = query.float() @ key.float().mT * factor
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -math.inf)
    return torch.softmax(scores, -1), scores.logsumexp(-1, keepdim=True), factor


class Operators:
    """cuDNN's operators on host tensors. calls: what was called. computing: right results, not zeros at once."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.computing = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Any,
        with_lse: bool,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        debug: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        assert bias is None
        assert with_lse
        assert not dropout_p
        self.calls.append("forward")
        none, zero = query.new_empty(0), torch.zeros((), dtype=torch.int64)
        rest = (none, none, query.shape[2], key.shape[2], zero, zero, none)
        if not self.computing:
            return torch.zeros_like(query), torch.zeros(*query.shape[:3], 1), *rest
        weights, lse, _ = _weights(query, key, is_causal, scale)
        return (weights @ value.float()).to(query.dtype), lse, *rest

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        seed: Tensor,
        offset: Tensor,
        bias: Any,
        cum_q: Any,
        cum_k: Any,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        *,
        scale: float | None = None,
    ) -> Any:
        assert lse.shape == (*query.shape[:3], 1)
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert seed.dtype == offset.dtype == torch.int64
        self.calls.append("backward")
        if not self.computing:
            return tuple(map(torch.zeros_like, (query, key, value)))
        weights, want, factor = _weights(query, key, is_causal, scale)
        torch.testing.assert_close(lse, want)
        grad = grad_out.float()
        inner = grad @ value.float().mT - (grad * out.float()).sum(-1, keepdim=True)
        of_scores = weights * inner * factor
        found = of_scores @ key.float(), of_scores.mT @ query.float(), weights.mT @ grad
        return tuple(each.to(query.dtype) for each in found)


@pytest.fixture
def cudnn(launchless: str) -> Iterator[Operators]:  # noqa: F811
    operators, library = Operators(), torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_cudnn_attention", operators.forward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", operators.backward, "CPU")
    hal.unregister("launchless")
    hal.register(WithCudnn(), name="launchless")
    try:
        with mock.patch.object(torch.backends.cuda, "cudnn_sdp_enabled", return_value=True):
            yield operators
    finally:
        library._destroy()


def _draw(length: int, batch: int = BATCH, heads: int = HEADS) -> list[Tensor]:
    shape = (batch, heads, length, DIM)
    return [torch.zeros(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]


def _served(cudnn: Operators, leaves: list[Tensor], **options: Any) -> tuple[list[str], int]:
    """What cuDNN's operators were called, and how many own kernels were launched."""
    cudnn.calls.clear()
    before = Kernel.launches
    out = hal.attention(*leaves, backend=DEVICE.id, **options)
    torch.autograd.grad(out, leaves, torch.zeros_like(out))
    return list(cudnn.calls), Kernel.launches - before


@pytest.mark.parametrize(
    ("batch", "heads", "length", "causal"), [(64, 12, 197, False), (64, 16, 257, False), (16, 20, 448, True)]
)
def test_what_runs_is_the_fastest_path_of_the_call_s_own_lengths(
    cudnn: Operators, batch: int, heads: int, length: int, causal: bool
) -> None:
    leaves = _draw(length, batch, heads)
    options = {"is_causal": True} if causal else {}
    request = hal.explain(*leaves, backend=DEVICE.id, **options).request
    assert request.len_q == length
    session: Any = hal.session(DEVICE.id)
    assert session.path_of(request) == "cudnn"
    assert _served(cudnn, leaves, **options) == (["forward", "backward"], 0)


def test_the_bound_of_the_bucket_runs_on_own_kernels(cudnn: Operators) -> None:
    calls, launches = _served(cudnn, _draw(256))
    assert calls == []
    assert launches >= 3
    assert _served(cudnn, _draw(197))[0] == ["forward", "backward"]
    assert _served(cudnn, _draw(256))[0] == []


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
def test_gradients_agree_with_autograd(cudnn: Operators, options: dict[str, Any]) -> None:
    cudnn.computing = True
    leaves = [torch.randn(2, 3, 50, DIM, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    grad_out = torch.randn(2, 3, 50, DIM, dtype=torch.bfloat16)
    session: Any = hal.session(DEVICE.id)
    with mock.patch.object(type(session), "path_of", lambda self, r: "hopper" if r.lse or r.len_q > 50 else "cudnn"):
        out = hal.attention(*leaves, backend=DEVICE.id, **options)
        found = torch.autograd.grad(out, leaves, grad_out)
    assert cudnn.calls == ["forward", "backward"]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = torch._C._nn.scaled_dot_product_attention(*exact, **options)
    assert relative_error(out, want) < 1e-2
    for got, right in zip(found, torch.autograd.grad(want, exact, grad_out.double()), strict=True):
        assert relative_error(got, right) < 1e-2


def test_a_gradient_of_the_log_sum_exp_goes_to_own_kernels(cudnn: Operators) -> None:
    leaves = _draw(197)
    result = hal.attention(*leaves, backend=DEVICE.id, return_lse=True)
    assert result.lse.shape == (BATCH, HEADS, 197)
    before = Kernel.launches
    torch.autograd.grad((result.out.sum() + result.lse.sum()), leaves)
    assert "backward" not in cudnn.calls
    assert Kernel.launches > before


def test_an_address_of_8_bytes_goes_to_own_kernels(cudnn: Operators) -> None:
    flat = torch.zeros(BATCH * HEADS * 197 * DIM + 4, dtype=torch.bfloat16)
    query = flat[4:].view(BATCH, HEADS, 197, DIM).requires_grad_()
    _, key, value = _draw(197)
    with mock.patch.object(CudaSession, "_bound_to", return_value=_own):
        out = hal.attention(query, key, value, backend=DEVICE.id)
    assert cudnn.calls == []
    assert out.shape == query.shape


def _own(query: Tensor, *given: Any) -> Any:
    return hal.AttentionOutput(torch.zeros_like(query), torch.zeros(query.shape[:3]))


@pytest.mark.parametrize(
    "changes", [{"heads_kv": 4}, {"deterministic": True}, {"dropout": 0.1}, {"window": (10, 0)}, {"grads": frozenset()}]
)
def test_what_cudnn_s_operators_do_not_say_is_not_lent(changes: dict[str, Any]) -> None:
    plain: dict[str, Any] = {
        **{
            "batch": BATCH,
            "heads_q": HEADS,
            "heads_kv": HEADS,
            "len_q": 197,
            "len_k": 197,
            "dim_qk": DIM,
            "dim_v": DIM,
        },
        **{"dtype": "bfloat16", "device": "cuda:0", "grads": frozenset("qkv"), "lse": True},
    }
    chip = Chip(index=0, capability=(9, 0), multiprocessors=132, shared_memory=227 << 10)
    with mock.patch.object(torch.backends.cuda, "cudnn_sdp_enabled", return_value=True):
        assert paths.lends_to_cudnn(hal.AttentionRequest(**plain), chip)
        assert not paths.lends_to_cudnn(hal.AttentionRequest(**plain | changes), chip)
