"""The Hopper backward's own source on the host, with its launch, against gradients in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gluon_host
import pytest
import torch
from hal_cuda.kernels.hopper_backward import kernel, launch
from hal_cuda.kernels.portable.launch import PortablePath
from hal_cuda.runtime import binaries
from interpreted_device import CONTEXT
from torch import Tensor

from hal_core.testing import reference_gradients, relative_error
from hal_core.testing.reference import request_of

FOLDER = "hal_cuda.kernels.hopper_backward"
MODULES = [f"{FOLDER}.{name}" for name in ("pipeline", "consumer", "wide", "kernel")]
SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    function = gluon_host.on_host(kernel.backward, MODULES)

    def made(key: Any, compile_it: Any) -> Any:
        _, _, dtype, config = key
        return gluon_host.HostKernel(function, launch.kernel_signature(dtype, config), config, {})

    def add_map(form: Any, kept: dict[int, list[Any]], pointer: int) -> list[Any]:
        kept[pointer] = [gluon_host.Map(pointer, *form)]
        return kept[pointer]

    monkeypatch.setattr(binaries, "kernel", made)
    monkeypatch.setattr(launch, "add_map", add_map)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)


def operands(
    generator: torch.Generator, heads: tuple[int, int], lengths: tuple[int, int], dims: tuple[int, int]
) -> list[Tensor]:
    shapes = [(heads[0], lengths[0], dims[0]), (heads[1], lengths[1], dims[0]), (heads[1], lengths[1], dims[1])]
    return [torch.randn(2, *shape, generator=generator).half() for shape in shapes]


@pytest.mark.parametrize(
    ("dims", "heads", "lengths", "options"),
    [
        ((256, 256), (2, 1), (70, 130), {"causal": "top_left"}),
        ((192, 128), (2, 1), (70, 130), {"causal": "bottom_right"}),
        pytest.param((192, 128), (1, 1), (200, 129), {"window": (60, 30)}, marks=SLOW),
        ((160, 192), (1, 1), (100, 64), {"softcap": 5.0, "window": (20, 9)}),
        pytest.param((200, 136), (2, 1), (333, 200), {"causal": "bottom_right", "window": (100, 0)}, marks=SLOW),
        pytest.param((128, 256), (4, 1), (64, 64), {}, marks=SLOW),
        pytest.param((256, 64), (2, 2), (1, 300), {"causal": "bottom_right"}, marks=SLOW),
        pytest.param((192, 192), (2, 2), (320, 256), {"causal": "top_left", "diagonal": -100}, marks=SLOW),
        pytest.param((256, 256), (1, 1), (300, 190), {"window": (None, 70)}, marks=SLOW),
        pytest.param((256, 256), (1, 1), (300, 190), {"window": (10, None), "softcap": 20.0}, marks=SLOW),
        ((128, 128), (2, 1), (70, 130), {"causal": "top_left"}),
        pytest.param((64, 64), (1, 1), (200, 300), {}, marks=SLOW),
    ],
)
def test_gradients(
    generator: torch.Generator,
    dims: tuple[int, int],
    heads: tuple[int, int],
    lengths: tuple[int, int],
    options: dict[str, Any],
) -> None:
    query, key, value = operands(generator, heads, lengths, dims)
    request = replace(request_of(query, key, value, None, grads=frozenset("qkv"), **options), lse=True)
    out, lse = PortablePath(request, CONTEXT)(query, key, value, None, None, None, (5, 1))
    grad_out = torch.randn(out.shape, generator=generator).half()
    grad_lse = torch.randn(lse.shape, generator=generator)
    found = launch.HopperBackward(request, CONTEXT)(query, key, value, out, lse, grad_out, grad_lse)
    assert found is not None, "the kernel takes these tensors"
    want = reference_gradients(query, key, value, None, grad_out=grad_out, grad_lse=grad_lse, request=request)
    for name, got, right in zip("qkv", found, want, strict=False):
        assert relative_error(got, right) <= 2e-3, name
