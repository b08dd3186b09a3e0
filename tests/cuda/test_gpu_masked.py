"""The masked Hopper forward on a GPU: masks and block plans against float64, and what it hands on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpu_reference import agrees, draw, exact
from test_gpu_backward import bound, context
from torch import Tensor

import hal_core as hal
from hal_core import AttentionOutput, BlockPlan
from hal_core.testing import reference_gradients, relative_error
from hal_core.testing.reference import request_of


@pytest.fixture(autouse=True)
def hopper(gpu: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel needs compute capability 9.0")


class HandedOnError(AssertionError):
    """The kernel did not take the call."""


def hand_on(*given: Any) -> AttentionOutput:
    raise HandedOnError


def served(
    gpu: str, given: tuple[Tensor, ...], mask: Tensor | None = None, plan: BlockPlan | None = None, **options: Any
) -> AttentionOutput:
    """The call on the masked kernel alone; the output's memory is poisoned first."""
    from hal_cuda.kernels.hopper_masked.launch import HopperMaskedPath

    asked: dict[str, Any] = options | ({} if plan is None else {"block_plan": plan})
    request = hal.explain(*given, mask, backend=gpu, enable_gqa=True, return_lse=True, **asked).request
    path = HopperMaskedPath(request, context(gpu), hand_on)  # type: ignore[arg-type]
    poison = torch.full((given[0].numel() * 2 + 1024,), math.nan, device="cuda")
    del poison
    return path(*given, mask, plan)


def operands(
    seed: int, len_q: int, len_k: int, dim: int, kind: torch.dtype = torch.bfloat16, dim_v: int = 0, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads on two key heads, heads last in memory."""
    query = draw(seed, batch, 4, len_q, dim, kind, "heads last")
    return query, *(draw(seed + i, batch, 2, len_k, d, kind, "heads last") for i, d in ((1, dim), (2, dim_v or dim)))


def drawn_mask(seed: int, shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    """Three in ten pairs hidden, and every seventh row wholly where the mask runs over rows."""
    generator = torch.Generator("cuda").manual_seed(seed + 7)
    visible = torch.rand(shape, device="cuda", generator=generator) > 0.3
    if shape[2] > 1:
        visible[:, :, ::7] = False
    if kind == torch.bool:
        return visible
    return torch.randn(shape, device="cuda", generator=generator).to(kind).masked_fill(~visible, -math.inf)


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": "top_left"},
    {"causal": "bottom_right", "softcap": 10.0},
    {"causal": "bottom_right", "window": (200, 0)},
    {"window": (150, 90)},
)


@pytest.mark.parametrize("kind", [torch.bool, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_masks_of_rows_and_keys(gpu: str, seed: int, dim: int, kind: torch.dtype) -> None:
    if dim == 256 and kind == torch.float32:
        pytest.skip("shared memory does not hold its tiles")
    for place, options in enumerate(OPTIONS):
        len_q, len_k = ((500, 1008), (1024, 768))[place % 2]
        own = torch.float16 if kind == torch.float16 else torch.bfloat16
        given = operands(seed + place, len_q, len_k, dim, own)
        mask = drawn_mask(seed + place, (1 + place % 2, (1, 4, 4, 1, 4)[place], len_q, len_k), kind)
        for _ in range(3):  # a race shows as an error that moves
            agrees(served(gpu, given, mask, **options), exact(*given, mask, **options), own)


@pytest.mark.parametrize("kind", [torch.bool, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_masks_of_keys(gpu: str, seed: int, dim: int, kind: torch.dtype) -> None:
    """Any length; one batch entry reads no key at all; a mask may be expanded over rows."""
    for place, options in enumerate(OPTIONS):
        given = operands(seed + place, 333, 1001, dim)
        mask = drawn_mask(seed + place, (2, 1 + 3 * (place % 2), 1, 1001), kind)
        mask[1] = False if kind == torch.bool else -math.inf
        whole = mask.expand(2, -1, 333, 1001) if place % 2 else mask
        agrees(served(gpu, given, whole, **options), exact(*given, mask, **options), torch.bfloat16)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_float16_and_other_value_sizes(gpu: str, seed: int, dim: int) -> None:
    given, mask = operands(seed, 600, 640, dim, torch.float16), drawn_mask(seed, (1, 1, 600, 640), torch.bool)
    agrees(served(gpu, given, mask), exact(*given, mask), torch.float16)
    given = operands(seed, 600, 640, dim, dim_v=72)
    agrees(served(gpu, given, mask), exact(*given, mask), torch.bfloat16)


def test_rows_wholly_at_a_masks_lowest_number_weigh_their_keys_alike(gpu: str, seed: int) -> None:
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        own = torch.float16 if kind == torch.float16 else torch.bfloat16
        given = operands(seed, 512, 512, 128, own)
        mask = torch.zeros(1, 1, 512, 512, device="cuda", dtype=kind)
        mask[:, :, 100:300] = torch.finfo(kind).min
        mask[:, :, 300:310, :200] = -math.inf
        agrees(served(gpu, given, mask, scale=2.0**-19), exact(*given, mask, scale=2.0**-19), own)


def drawn_plan(seed: int, blocks: tuple[int, int], len_q: int, len_k: int, batch: int = 2, heads: int = 4) -> BlockPlan:
    """Blocks named twice, rows without any, in no order."""
    generator = torch.Generator("cuda").manual_seed(seed + 9)
    rows, columns = -(-len_q // blocks[0]), -(-len_k // blocks[1])
    drawn: Any = {"generator": generator, "device": "cuda", "dtype": torch.int32}
    indices = torch.randint(0, columns, (batch, heads, rows, 5), **drawn)
    counts = torch.randint(0, 6, (batch, 1, rows), **drawn).expand(batch, heads, rows)
    return BlockPlan(*blocks, indices, counts)


@pytest.mark.parametrize("blocks", [(128, 128), (128, 64), (256, 256), (384, 192), (64, 64), (192, 128)], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 192, 256])
def test_block_plans(gpu: str, seed: int, dim: int, blocks: tuple[int, int]) -> None:
    if dim > 128 and blocks[0] % 128:
        pytest.skip("two programs of one warpgroup do not fit a multiprocessor")
    for place, options in enumerate(OPTIONS):
        len_q, len_k = ((1000, 1500), (1536, 1152))[place % 2]
        given = operands(seed + place, len_q, len_k, dim)
        plan = drawn_plan(seed + place, blocks, len_q, len_k, 1 + place % 2, 1 + 3 * (place % 2))
        want = exact(*given, hal.expand_block_plan(plan, len_q, len_k), **options)
        for _ in range(3):
            agrees(served(gpu, given, plan=plan, **options), want, torch.bfloat16)


@pytest.mark.parametrize("kind", [torch.bool, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_block_plans_under_masks(gpu: str, seed: int, dim: int, kind: torch.dtype) -> None:
    given, plan = operands(seed, 1000, 1008, dim), drawn_plan(seed, (128, 128), 1000, 1008)
    for options in ({}, {"causal": "top_left"}):
        mask = drawn_mask(seed, (1, 4, 1000, 1008), kind)
        both = hal.expand_block_plan(plan, 1000, 1008)
        both = mask & both if kind == torch.bool else mask.float().masked_fill(~both, -math.inf)
        agrees(served(gpu, given, mask, plan, **options), exact(*given, both, **options), torch.bfloat16)


def test_many_tiles_a_program(gpu: str, seed: int) -> None:
    """More tiles than multiprocessors: programs go round."""
    given = tuple(draw(seed + i, 4, 8, 2048, 64, torch.bfloat16) for i in range(3))
    mask = drawn_mask(seed, (1, 1, 2048, 2048), torch.bool)
    for options in ({}, {"causal": "top_left"}):
        agrees(served(gpu, given, mask, **options), exact(*given, mask, **options), torch.bfloat16)


def test_what_the_kernel_does_not_take_is_handed_on(gpu: str, seed: int) -> None:
    given = operands(seed, 333, 1001, 64)
    odd = drawn_mask(seed, (1, 1, 333, 1001), torch.bool)  # rows in steps of 1001 bytes
    with pytest.raises(HandedOnError):
        served(gpu, given, odd)
    with pytest.raises(HandedOnError):
        served(gpu, given, plan=drawn_plan(seed, (96, 128), 333, 1001))
    with pytest.raises(HandedOnError):
        served(gpu, given, drawn_mask(seed, (1, 1, 333, 1), torch.bool))


def test_calls_with_gradients_run_this_forward(gpu: str, seed: int) -> None:
    from hal_cuda.kernels.hopper_masked.launch import HopperMaskedPath

    given = tuple(draw(seed + i, 2, 4, 2048, 64, torch.bfloat16).requires_grad_() for i in range(3))
    mask = drawn_mask(seed, (1, 1, 2048, 2048), torch.bool)
    session: Any = hal.session(gpu)
    assert isinstance(session._made(hal.explain(*given, mask, backend=gpu).request), HopperMaskedPath)
    grad_out = draw(seed + 9, 2, 4, 2048, 64, torch.bfloat16)
    out = hal.attention(*given, mask, backend=gpu)
    found = torch.autograd.grad(out, given, grad_out)
    plain = [tensor.detach() for tensor in given]
    want = reference_gradients(
        *plain, mask, grad_out=grad_out, request=request_of(*plain, mask, grads=frozenset("qkv"))
    )
    for got, right in zip(found, want, strict=False):
        assert relative_error(got, right) <= bound(torch.bfloat16)
