"""The CPU's results against float64, for random calls of every feature, and for the corners that go wrong first."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

import hal_core as hal
from hal_core import Causal
from hal_core.testing import reference, relative_error

sys.path.insert(0, str(Path(__file__).parent))
from cpu_drawing import BOUNDS, Call, draw, hold

FEATURES = ("plain", "mask", "causal", "window", "softcap", "plan", "packed", "paged", "fp8", "int", "strides")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("feature", FEATURES)
def test_random_calls_agree_with_float64(feature: str, dtype: str, seed: int) -> None:
    for number in range(12):
        hold(draw(seed + number, feature, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_many_random_calls_agree_with_float64(feature: str, seed: int) -> None:
    for number in range(400):
        hold(draw(seed + number, feature, ("float32", "bfloat16", "float16", "float64")[number % 4]))


@pytest.mark.parametrize("shape", [(1, 4096), (4, 4096), (300, 1300), (1025, 1025), (1, 20000)])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_many_tiles_agree_with_float64(shape: tuple[int, int], softcap: float | None, seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (
        torch.randn(1, 4, shape[0], 32),
        torch.randn(1, 2, shape[1], 32),
        torch.randn(1, 2, shape[1], 32),
    )
    options = {"softcap": softcap, "causal": Causal.BOTTOM_RIGHT, "return_lse": True, "window": (900, 0)}
    hold(Call(query, key, value, None, None, None, options, frozenset("qkv") if shape[0] > 1 else frozenset()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (8, 1)])
def test_decoding_over_a_long_cache_agrees_with_float64(dtype: str, heads: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    kind = getattr(torch, dtype)
    query = torch.randn(1, heads[0], 1, 128).to(kind)
    key, value = (torch.randn(1, heads[1], 9001, 128).to(kind) for _ in range(2))
    hold(Call(query, key, value, None, None, None, {}, frozenset()))
    mask = torch.rand(1, 1, 1, 9001) > 0.5
    hold(Call(query, key, value, mask, None, None, {"return_lse": True}, frozenset()))


@pytest.mark.parametrize("options", [{}, {"return_lse": True}, {"softcap": 20.0}, {"window": (50, 50)}], ids=str)
@pytest.mark.parametrize("additive", [False, True])
def test_a_row_without_keys_gives_zero_and_no_gradient(options: dict[str, object], additive: bool, seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(2, 4, 60, 16, requires_grad=True) for _ in range(3))
    mask = torch.rand(2, 1, 60, 60) > 0.4
    mask[:, :, 7] = False
    given = torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if additive else mask
    result = hal.attention(query, key, value, given, backend="cpu", **options)
    out, lse = result if "return_lse" in options else (result, None)
    out.square().sum().backward()
    assert not out[:, :, 7].any()
    assert not query.grad[:, :, 7].any()
    assert all(t.grad.isfinite().all() for t in (query, key, value))
    if lse is not None:
        assert bool((lse[:, :, 7] == -math.inf).all())


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("sizes", [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 5), (0, 1, 5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_lse": True},
        {"softcap": 5.0},
        {"causal": "bottom_right"},
        {"causal": "top_left", "return_lse": True},
        {"dropout_p": 0.5},
        {"window": (3, 3)},
        {"attn_mask": torch.ones(1, 1, dtype=torch.bool)},
    ],
    ids=str,
)
def test_empty_tensors_give_zeros(sizes: tuple[int, int, int], options: dict[str, object], needs_grad: bool) -> None:
    batch, len_q, len_k = sizes
    query = torch.randn(batch, 4, len_q, 8, requires_grad=needs_grad)
    key, value = (torch.randn(batch, 2, len_k, 8, requires_grad=needs_grad) for _ in range(2))
    result = hal.attention(query, key, value, enable_gqa=True, backend="cpu", **options)
    out, lse = result if "return_lse" in options else (result, None)
    if needs_grad:
        out.sum().backward()
    assert out.shape == query.shape
    assert not out.any()
    assert lse is None or bool((lse == -math.inf).all())
    assert all(t.grad is None or not t.grad.any() for t in (query, key, value))


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"return_lse": True}], ids=str)
def test_strides_of_gigabytes_are_followed(options: dict[str, object], seed: int) -> None:
    torch.manual_seed(seed)
    big = torch.empty(2, 3 * 2**28, dtype=torch.int8)  # untouched pages cost nothing
    tensors = []
    for _ in range(3):
        far = big.view(torch.float32).as_strided((2, 2, 20, 8), (3 * 2**26, 2**25, 2**10, 1))
        far.copy_(torch.randn(2, 2, 20, 8))
        tensors.append(far.clone())
    got = hal.attention(tensors[0], tensors[1], far, backend="cpu", **options)
    out = got.out if "return_lse" in options else got
    want = reference(*tensors, **options).out
    assert relative_error(out, want) <= BOUNDS["float32"][0]


def test_blocks_that_a_plan_leaves_out_are_not_read(seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 2, 128, 16) for _ in range(3))
    indices = torch.tensor([[0, 3], [1, 1], [3, 0], [2, 2]], dtype=torch.int32).view(1, 1, 4, 2)
    counts = torch.tensor([2, 1, 1, 0], dtype=torch.int32).view(1, 1, 4)
    plan = hal.BlockPlan(32, 32, indices, counts)
    want = hal.attention(query, key, value, block_plan=plan, backend="cpu")
    for tensor in (key, value):
        tensor[:, :, 64:96] = math.nan  # block 2 is listed past a count only
    assert torch.equal(hal.attention(query, key, value, block_plan=plan, backend="cpu"), want)


@pytest.mark.parametrize("len_q", [1, 40])
def test_keys_past_a_sequence_and_unlisted_pages_are_not_read(len_q: int, seed: int) -> None:
    torch.manual_seed(seed)
    key, value = torch.full((6, 2, 8, 16), math.nan), torch.full((6, 2, 8, 16), math.nan)
    table = torch.tensor([[4, 1, 0], [2, 0, 0]], dtype=torch.int32)
    held = torch.tensor([20, 8], dtype=torch.int32)
    for page, tokens in ((4, 8), (1, 8), (0, 4), (2, 8)):
        key[page, :, :tokens], value[page, :, :tokens] = torch.randn(2, tokens, 16), torch.randn(2, tokens, 16)
    query = torch.randn(2, 4, len_q, 16)
    tables = hal.SequenceMetadata(page_table=table, cache_seqlens=held)
    hold(Call(query, key, value, None, None, tables, {"causal": Causal.BOTTOM_RIGHT}, frozenset()))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": (70, 0)}, {"softcap": 9.0}], ids=str)
@pytest.mark.parametrize("len_q", [1, 50])
def test_pages_of_odd_sizes_are_read_in_place(len_q: int, options: dict[str, object], narrow: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(120, 2, 24, 16, generator=generator) for _ in range(2))
    scales = (torch.rand(2, 2, 1, 1, generator=generator) + 0.5 for _ in range(2)) if narrow else (None, None)
    if narrow:
        key, value = key.to(torch.float8_e4m3fn), value.to(torch.float8_e4m3fn)
    table = torch.randperm(120, generator=generator).view(2, 60).int()
    held = torch.tensor([1440, 1111], dtype=torch.int32)
    tables = hal.SequenceMetadata(None, None, table, held, *scales)
    query = torch.randn(2, 4, len_q, 16, generator=generator)
    options = {"causal": Causal.BOTTOM_RIGHT, "return_lse": True} | options
    hold(Call(query, key, value, None, None, tables, options, frozenset()))


@pytest.mark.parametrize("lengths", [(40, 40), (60, 25), (25, 60)])
@pytest.mark.parametrize("diagonal", [-50, -3, 0, 5, 50])
@pytest.mark.parametrize("causal", [Causal.TOP_LEFT, Causal.BOTTOM_RIGHT])
def test_diagonals_anywhere_agree_with_float64(
    causal: Causal, diagonal: int, lengths: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    query, key, value = torch.randn(2, 4, lengths[0], 16), *(torch.randn(2, 2, lengths[1], 16) for _ in range(2))
    options = {"causal": causal, "diagonal": diagonal}
    hold(Call(query, key, value, None, None, None, options, frozenset("qkv")))
    hold(Call(query, key, value, None, None, None, options | {"return_lse": True}, frozenset()))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (2, 6, 1), (1, 6, 3), (2, 1, 3), (1, 1, 3)])
@pytest.mark.parametrize("len_k", [40, 700])
def test_masks_of_every_shape_reach_packed_heads(shape: tuple[int, int, int], len_k: int, seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = torch.randn(2, 6, 3, 16), torch.randn(2, 2, len_k, 16), torch.randn(2, 2, len_k, 16)
    visible = torch.rand(*shape, len_k) > 0.4
    for mask in (visible, torch.randn(*shape, len_k).masked_fill(~visible, -math.inf)):
        hold(Call(query, key, value, mask, None, None, {}, frozenset()))
        hold(Call(query, key, value, mask, None, None, {"softcap": 5.0}, frozenset()))


def test_inputs_are_left_alone(seed: int) -> None:
    for feature in FEATURES:
        call = draw(seed, feature, "float32")
        before = [None if t is None else t.clone() for t in call[:4]]
        call.run()
        for tensor, copy in zip(call[:4], before, strict=True):
            assert tensor is None or copy is None or torch.equal(tensor, copy), feature


def test_a_float32_mask_on_float64_operands_is_read_as_float32(seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 2, 40, 16, dtype=torch.float64) for _ in range(3))
    hold(Call(query, key, value, torch.randn(40, 40), None, None, {}, frozenset("qkv")))
