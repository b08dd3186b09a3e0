"""What a training call does on the host once its kernels are known, on any machine: nothing is described anew."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'hal-cuda[dev]'")

from hal_cuda.backend import CAPABILITIES
from hal_cuda.cost import estimate, shipped
from hal_cuda.discovery import Chip
from hal_cuda.memory import CudaMemory, borrowing
from hal_cuda.paths import choose
from hal_cuda.runtime import binaries
from hal_cuda.session import CudaSession

import hal_core as hal
from hal_core import AttentionRequest, Capabilities, Device, Estimate, Fidelity, Refusal

DEVICE = Device(
    id="launchless:0",
    family="cuda",
    vendor="NVIDIA",
    model="a Hopper GPU whose launches do nothing",
    fidelity=Fidelity.EMULATED,
    reads=("cpu",),
)
CHIP = Chip(index=0, capability=(9, 0), multiprocessors=132, shared_memory=227 << 10, torch_attention=False)


class Backend:
    """Host tensors on a Hopper GPU's paths."""

    def devices(self) -> Sequence[Device]:
        return [DEVICE]

    def capabilities(self, device: Device) -> Capabilities:
        return CAPABILITIES

    def check(self, request: AttentionRequest, device: Device) -> Sequence[Refusal]:
        return ()

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        rates = self._rates()
        return estimate(request, choose(request, CHIP, rates), rates, CHIP)

    def open(self, device: Device) -> CudaSession:
        memory = CudaMemory(0, name=device.id)
        memory._device = "cpu"
        return CudaSession(device, CHIP, self._rates, memory=memory)

    def _rates(self) -> Any:
        found = shipped()
        assert found is not None
        return found[1]


class Kernel(SimpleNamespace):
    """A kernel whose launch does nothing. maps: as many as its launch asks for."""

    def __call__(self, *launch: Any) -> None:
        Kernel.launches += 1

    launches = 0


def _kernel(key: Any, make: Any) -> Kernel:
    count = {"hopper": 4, "hopper masked": 5, "hopper backward": 9}.get(key[0], 0)
    return Kernel(maps=[{}] * count, constants=[])


@pytest.fixture
def launchless() -> Iterator[str]:
    with (
        mock.patch.object(binaries, "kernel", _kernel),
        mock.patch.object(binaries, "tensor_map", return_value=0),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0, create=True),
    ):
        hal.register(Backend(), name="launchless")
        try:
            yield DEVICE.id
        finally:
            hal.unregister("launchless")


def _draw(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


def _padding() -> torch.Tensor:
    return torch.ones(2, 1, 1, 512, dtype=torch.bool)


#: Masks and options of calls.
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (None, {}),
    "causal": (None, {"is_causal": True}),
    "padding": (_padding(), {}),
    "boolean": (torch.ones(512, 512, dtype=torch.bool), {}),
    "dropout": (None, {"dropout_p": 0.1}),
    "bias": (_draw(1, 4, 512, 512), {}),
    "deterministic": (None, {"deterministic": True}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_training_call_describes_nothing_anew(launchless: str, name: str) -> None:
    mask, options = CALLS[name]
    leaves = query, key, value = _draw(2, 4, 512, 64), _draw(2, 4, 512, 64), _draw(2, 4, 512, 64)
    wanted = [*leaves, *([mask] if mask is not None and mask.requires_grad else [])]
    grad_out = torch.zeros(2, 4, 512, 64, dtype=torch.bfloat16)

    def call() -> Any:
        return torch.autograd.grad(
            hal.attention(query, key, value, mask, backend=launchless, **options), wanted, grad_out
        )

    call()
    call()
    before = Kernel.launches
    with (
        mock.patch.object(AttentionRequest, "__init__", side_effect=AssertionError("a request was built")),
        mock.patch.object(AttentionRequest, "__hash__", side_effect=AssertionError("a request was hashed")),
        mock.patch.object(inspect, "signature", side_effect=AssertionError("a signature was read")),
    ):
        found = call()
    assert Kernel.launches - before >= 3  # forward, and a backward of several kernels
    assert [grad.shape for grad in found] == [leaf.shape for leaf in wanted]


def test_lengths_of_one_bucket_have_backwards_of_their_own(launchless: str) -> None:
    session: Any = hal.session(launchless)
    for length in (512, 384, 512, 384):
        leaves = query, key, value = (_draw(2, 4, length, 64), _draw(2, 4, length, 64), _draw(2, 4, length, 64))
        out = hal.attention(query, key, value, backend=launchless)
        found = torch.autograd.grad(out, leaves, torch.zeros_like(out))
        assert all(grad.shape == leaf.shape for grad, leaf in zip(found, leaves, strict=True))
    assert sorted(request.len_q for request in session._backwards) == [384, 512]


def test_what_was_borrowed_is_given_back_after_an_error() -> None:
    memory = CudaMemory(0)
    memory._device = "cpu"
    borrow = borrowing(memory)

    def fail() -> None:
        with borrow:
            assert borrow((4, 3), torch.int16).shape == (4, 3)
            borrow((1000,), torch.float32)
            assert memory._in_use == 24 + 4000
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert memory._in_use == 0
