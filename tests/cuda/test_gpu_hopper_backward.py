"""The Hopper backward on a GPU: masks, block plans, dropout, sums in order, and short rows, against float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_gpu_backward import bound, context, normal, operands
from torch import Tensor

from hal_core import AttentionRequest, BlockPlan, Grads
from hal_core.testing import reference_gradients, relative_error
from hal_core.testing.reference import request_of

RNG = (5, 1 << 40)


@pytest.fixture(autouse=True)
def hopper(gpu: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel needs compute capability 9.0")


class Served:
    """A backward that the Hopper kernel serves, after the portable forward."""

    def __init__(
        self,
        gpu: str,
        seed: int,
        given: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None = None,
        plan: BlockPlan | None = None,
        deterministic: bool = False,
        **options: Any,
    ) -> None:
        from hal_cuda.kernels.hopper_backward.launch import HopperBackward
        from hal_cuda.kernels.portable.launch import PortablePath

        self.context, self.given, self.mask, self.plan = context(gpu), given, mask, plan
        request = request_of(*given, mask, plan=plan, grads=frozenset("qkv"), **options)
        self.request: AttentionRequest = replace(request, lse=True, deterministic=deterministic)
        self.out, self.lse = PortablePath(self.request, self.context)(*given, mask, plan, None, RNG)
        self.grad_out = normal(seed + 50, *self.out.shape, dtype=given[0].dtype)
        self.backward = HopperBackward(self.request, self.context)

    def run(self) -> Grads:
        found = self.backward(
            *self.given,
            self.out,
            self.lse,
            self.grad_out,
            None,
            self.mask,
            self.plan,
            RNG if self.request.dropout else None,
        )
        assert found is not None, "the kernel takes these tensors"
        return found

    def agrees(self) -> None:
        from hal_cuda.kernels.portable.dropout import dropout_pattern

        keep = None
        if self.request.dropout:
            shape: Any = (*self.out.shape[:3], self.given[1].shape[2])
            keep = dropout_pattern(self.context.chip, shape, self.request.dropout, RNG, "cuda")
        exact: dict[str, Any] = {"grad_out": self.grad_out, "request": self.request, "plan": self.plan, "keep": keep}
        want = reference_gradients(*self.given, self.mask, **exact)
        for name, got, right in zip(("query", "key", "value"), self.run(), want, strict=False):
            assert relative_error(got, right) <= bound(self.given[0].dtype), name


@pytest.mark.parametrize(
    ("dim", "len_q", "len_k", "options"),
    [
        (64, 512, 512, {}),
        (64, 512, 512, {"causal": "top_left"}),
        (128, 500, 600, {"softcap": 10.0}),
        (256, 500, 600, {}),
        (64, 500, 600, {"dropout_p": 0.3}),
    ],
)
def test_masks_of_keys(gpu: str, seed: int, dim: int, len_q: int, len_k: int, options: dict[str, Any]) -> None:
    """One entry may read no key at all."""
    lengths = torch.tensor([[[[0]]], [[[len_k // 3]]], [[[len_k]]]], device="cuda")
    mask = torch.arange(len_k, device="cuda") < lengths
    Served(gpu, seed, operands(seed, len_q, len_k, dim, batch=3), mask, **options).agrees()


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
@pytest.mark.parametrize(
    ("dim", "kind", "options"),
    [
        (64, "boolean", {"causal": "top_left"}),
        (64, "boolean", {"dropout_p": 0.2}),
        (128, "boolean", {"softcap": 10.0}),
        (128, "additive", {}),
        (128, "additive", {"causal": "bottom_right", "softcap": 10.0}),
    ],
)
def test_masks_of_rows_and_keys(
    gpu: str, seed: int, dim: int, kind: str, options: dict[str, Any], shape: tuple[int, int]
) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    visible = torch.rand(*shape, 1000, 1008, device="cuda", generator=generator) > 0.3
    visible[:, :, ::7] = False
    bias = normal(seed + 9, *shape, 1000, 1008).masked_fill(~visible, -math.inf)
    mask = visible if kind == "boolean" else bias
    Served(gpu, seed, operands(seed, 1000, 1008, dim), mask, **options).agrees()


def test_rows_wholly_at_a_masks_lowest_number_weigh_their_keys_alike(gpu: str, seed: int) -> None:
    mask = torch.zeros(1, 1, 512, 512, device="cuda", dtype=torch.bfloat16)
    mask[:, :, 100:300] = torch.finfo(torch.bfloat16).min
    Served(gpu, seed, operands(seed, 512, 512, 128), mask, scale=2.0**-30).agrees()


@pytest.mark.parametrize(
    ("dim", "blocks", "len_q", "len_k", "options"),
    [
        (128, (128, 128), 1024, 1024, {}),
        (64, (128, 128), 1024, 1000, {}),
        (128, (64, 256), 1000, 1024, {"causal": "top_left"}),
        (64, (256, 128), 1024, 1024, {"dropout_p": 0.2}),
    ],
)
def test_block_plans(
    gpu: str, seed: int, dim: int, blocks: tuple[int, int], len_q: int, len_k: int, options: dict[str, Any]
) -> None:
    """The last block of keys is read by nobody."""
    generator = torch.Generator("cuda").manual_seed(seed)
    rows, columns = -(-len_q // blocks[0]), -(-len_k // blocks[1])
    most = min(columns, 5)
    drawn: Any = {"generator": generator, "device": "cuda", "dtype": torch.int32}
    indices = torch.randint(0, columns - 1, (2, 4, rows, most), **drawn)
    plan = BlockPlan(*blocks, indices, torch.randint(0, most + 1, (2, 1, rows), **drawn).expand(2, 4, rows))
    Served(gpu, seed, operands(seed, len_q, len_k, dim), plan=plan, **options).agrees()


@pytest.mark.parametrize(("dim", "length"), [(64, 512), (128, 777)])
@pytest.mark.parametrize("options", [{}, {"causal": "top_left"}], ids=str)
def test_dropout_repeats_the_forwards_pattern(
    gpu: str, seed: int, dim: int, length: int, options: dict[str, Any]
) -> None:
    Served(gpu, seed, operands(seed, length, length, dim), dropout_p=0.3, **options).agrees()


@pytest.mark.parametrize(
    ("dim", "len_q", "len_k", "options"),
    [
        (64, 1024, 1024, {"causal": "top_left"}),
        (64, 1000, 1000, {}),
        (128, 1024, 1024, {"causal": "top_left"}),
        (128, 900, 900, {"causal": "top_left", "window": (100, 0)}),
        (128, 333, 700, {"causal": "bottom_right"}),
        (128, 700, 333, {"causal": "bottom_right"}),
        (128, 640, 640, {"dropout_p": 0.2}),
    ],
)
def test_gradients_in_order_repeat_bit_by_bit(
    gpu: str, seed: int, dim: int, len_q: int, len_k: int, options: dict[str, Any]
) -> None:
    call = Served(gpu, seed, operands(seed, len_q, len_k, dim, heads=(8, 2)), deterministic=True, **options)
    call.agrees()
    first = call.run()
    for _ in range(20):
        for one, two in zip(first[:3], call.run()[:3], strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("dim", [64, 128])
def test_many_blocks_add_in_order(gpu: str, seed: int, dim: int) -> None:
    """More programs than run at a time."""
    given = operands(seed, 8192, 8192, dim, heads=(16, 16))
    call = Served(gpu, seed, given, deterministic=True, causal="top_left")
    first = call.run()
    for _ in range(10):
        for one, two in zip(first[:3], call.run()[:3], strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("shape", "dim", "options"),
    [((1, 4, 49, 49), 32, {}), ((1, 4, 64, 64), 64, {"dropout_p": 0.2}), (None, 32, {"causal": "top_left"})],
)
def test_short_rows(gpu: str, seed: int, shape: tuple[int, ...] | None, dim: int, options: dict[str, Any]) -> None:
    from hal_cuda.kernels.portable.dropout import dropout_pattern
    from hal_cuda.kernels.portable.short_launch import ShortBackward, ShortPath

    length = 33 if shape is None else shape[2]
    given = operands(seed, length, length, dim, batch=128, heads=(4, 4))
    mask = None if shape is None else normal(seed + 9, *shape)
    wanted = frozenset({"q", "k", "v"} | ({"mask"} if mask is not None else set()))
    request = replace(request_of(*given, mask, grads=wanted, **options), lse=True)
    own = context(gpu)
    out, lse = ShortPath(request, own, None)(*given, mask, None, None, RNG)
    grad_out = normal(seed + 50, *out.shape)
    found = ShortBackward(request, own)(*given, out, lse, grad_out, mask, None, RNG)
    assert found is not None
    keep = (
        dropout_pattern(own.chip, (*out.shape[:3], length), request.dropout, RNG, "cuda") if request.dropout else None
    )  # type: ignore[arg-type]
    want = reference_gradients(*given, mask, grad_out=grad_out, request=request, keep=keep)
    for name, got, right in zip(Grads._fields, found, want, strict=True):
        assert (got is None) == (right is None), name
        if got is not None:
            assert relative_error(got, right) <= bound(torch.bfloat16), name
