"""Tiles cover each visible pair once; partial results merge; plans and masks mean what they say."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from test_request import random_pattern, seen

import hal_core as hal
from hal_core import (
    AttentionRequest,
    BlockPlan,
    ContractError,
    DenseTiling,
    Tile,
    dense_mask,
    expand_block_plan,
    merge_partials,
    slice_mask,
)
from hal_core.testing import reference, relative_error

BASE = AttentionRequest(batch=1, heads_q=2, heads_kv=2, len_q=20, len_k=20, dim_qk=8, dim_v=8, dtype="float32")


def test_every_visible_pair_lies_in_exactly_one_tile(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(400):
        r = random_pattern(draw)
        limits = draw.choice([(4, 4), (3, 5), (8, 1), (64, 64)])
        plan = DenseTiling(*limits).plan(r, {})
        plan.check("dense")
        count = [[0] * r.len_k for _ in range(r.len_q)]
        for tile in plan.tiles():
            assert 0 <= tile.q_start < tile.q_stop <= r.len_q, (r, tile)
            assert 0 <= tile.k_start < tile.k_stop <= r.len_k, (r, tile)
            assert tile.q_stop - tile.q_start <= plan.block_q
            assert tile.k_stop - tile.k_start <= plan.block_k
            pairs = [(i, j) for i in range(tile.q_start, tile.q_stop) for j in range(tile.k_start, tile.k_stop)]
            assert tile.full == all(seen(r, i, j) for i, j in pairs), (r, tile)
            for i, j in pairs:
                count[i][j] += 1
        for i in range(r.len_q):
            for j in range(r.len_k):
                assert count[i][j] <= 1, (r, limits)
                assert count[i][j] == 1 or not seen(r, i, j), (r, limits, i, j)
        assert list(plan.tiles()) == sorted(plan.tiles(), key=lambda t: (t.q_start, t.k_start))


def test_hidden_tiles_are_left_out() -> None:
    causal = DenseTiling(5).plan(replace(BASE, causal=hal.Causal.TOP_LEFT), {})
    assert len(list(causal.tiles())) == 10  # of 16
    window = DenseTiling(5).plan(replace(BASE, window=(0, 0)), {})
    assert [(t.q_start, t.k_start) for t in window.tiles()] == [(0, 0), (5, 5), (10, 10), (15, 15)]


def test_a_plan_takes_exact_lengths_from_the_tensors() -> None:
    bucket = replace(BASE, len_q=32, len_k=64)
    query, key = torch.zeros(1, 2, 19, 8), torch.zeros(1, 2, 33, 8)
    plan = DenseTiling(16).plan(bucket, {}, query=query, key=key)
    assert max(t.q_stop for t in plan.tiles()) == 19
    assert max(t.k_stop for t in plan.tiles()) == 33


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 300, 5000])
@pytest.mark.parametrize("memory", [1 << 14, 1 << 18, 1 << 24])
def test_a_tile_fits_its_memory(length: int, memory: int) -> None:
    constraints = {"head_dim": 32, "dtype_bytes": 4}
    tile = DenseTiling().compute_optimal_tile_size(length, memory, constraints)
    assert tile & (tile - 1) == 0
    assert 16 <= tile <= 1024
    assert tile <= max(16, 2 * max(length, 1))
    assert tile * 4 * 32 * 4 + tile * tile * 4 <= memory


def test_a_tile_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ContractError, match="1,000 are available"):
        DenseTiling().compute_optimal_tile_size(128, 1000, {"head_dim": 64, "dtype_bytes": 4})
    assert DenseTiling().compute_optimal_tile_size(128, 3000, {"head_dim": 64, "dtype_bytes": 4, "minimum": 2}) == 2


def test_tiles_of_a_tensor_are_views_and_the_last_one_is_ragged() -> None:
    tensor = torch.arange(2 * 3 * 10 * 4).view(2, 3, 10, 4)
    tiles = DenseTiling().split_into_tiles(tensor, 4)
    assert [t.shape[2] for t in tiles] == [4, 4, 2]
    assert all(t.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for t in tiles)
    assert torch.equal(torch.cat(tiles, 2), tensor)
    with pytest.raises(ContractError, match="tile_size 0"):
        DenseTiling().split_into_tiles(tensor, 0)


def parts_of(
    generator: torch.Generator, cuts: list[int], dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    """A random attention call and its partial results over key ranges that end at `cuts`."""
    query, key, value = (torch.randn(2, 2, n, 8, generator=generator, dtype=dtype) for n in (5, cuts[-1], cuts[-1]))
    mask = torch.rand(2, 1, 5, cuts[-1], generator=generator) < 0.6
    mask[0, :, 2] = False  # a row that reads no key at all
    mask[1, :, 3, : cuts[0]] = False  # and one that reads none in the first part
    parts = [
        reference(query, key[:, :, a:b], value[:, :, a:b], mask[..., a:b])
        for a, b in zip([0, *cuts], cuts, strict=False)
    ]
    whole = reference(query, key, value, mask)
    return torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts]), whole.out, whole.lse


def test_merged_parts_are_the_whole(generator: torch.Generator) -> None:
    out, lse, want, want_lse = parts_of(generator, [3, 4, 11, 12])
    merged, merged_lse = merge_partials(out, lse)
    assert relative_error(merged, want) < 1e-14
    assert relative_error(merged_lse, want_lse) < 1e-14
    assert (merged[0, :, 2] == 0).all()
    assert (merged_lse[0, :, 2] == -math.inf).all()


@pytest.mark.parametrize("payload", [math.nan, math.inf, 1e30])
def test_what_a_dead_part_holds_never_leaks(generator: torch.Generator, payload: float) -> None:
    out, lse, want, want_lse = parts_of(generator, [3, 12])
    out = out.masked_fill((lse == -math.inf).unsqueeze(-1), payload)
    merged, merged_lse = merge_partials(out, lse)
    assert relative_error(merged, want) < 1e-14
    assert relative_error(merged_lse, want_lse) < 1e-14


def test_merging_in_any_order_and_in_steps_gives_the_same(generator: torch.Generator) -> None:
    out, lse, *_ = parts_of(generator, [3, 4, 11, 12])
    once = merge_partials(out, lse)
    order = torch.randperm(4, generator=generator)
    first, second = merge_partials(out[order[:2]], lse[order[:2]]), merge_partials(out[order[2:]], lse[order[2:]])
    steps = merge_partials(torch.stack([first[0], second[0]]), torch.stack([first[1], second[1]]))
    assert relative_error(steps[0], once[0]) < 1e-14
    assert relative_error(steps[1], once[1]) < 1e-14


def test_merging_large_scores_does_not_overflow() -> None:
    lse = torch.tensor([[[[900.0]]], [[[-900.0]]]])
    out = torch.tensor([[[[[1.0]]]], [[[[5.0]]]]])
    merged, total = merge_partials(out, lse)
    assert merged.item() == 1.0
    assert total.item() == 900.0


def test_half_precision_parts_are_merged_in_the_precision_of_the_lse(generator: torch.Generator) -> None:
    out, lse, want, _ = parts_of(generator, [6, 12])
    merged, total = merge_partials(out.bfloat16(), lse.float())
    assert merged.dtype == torch.bfloat16
    assert total.dtype == torch.float32
    assert relative_error(merged, want) < 2**-8 * 1.5  # one rounding of the parts, one of the result


@pytest.mark.parametrize("payload", [0.0, math.nan])
def test_gradients_through_a_merge_of_dead_parts_are_zero(generator: torch.Generator, payload: float) -> None:
    out, lse, *_ = parts_of(generator, [3, 12])
    dead = lse == -math.inf
    out = out.masked_fill(dead.unsqueeze(-1), payload).requires_grad_()
    lse.requires_grad_()
    merged, total = merge_partials(out, lse)
    (merged.sum() + total.masked_fill(total == -math.inf, 0).sum()).backward()
    assert out.grad is not None
    assert lse.grad is not None
    assert (out.grad[dead] == 0).all()
    assert (lse.grad[dead] == 0).all()
    assert out.grad.isfinite().all()
    assert lse.grad.isfinite().all()


@pytest.mark.parametrize("lse", [torch.zeros(2, 1, 1, 3), torch.zeros(2, 1, 1, 4, dtype=torch.float16)])
def test_a_merge_of_things_that_do_not_fit_is_refused(lse: torch.Tensor) -> None:
    with pytest.raises(ContractError, match="lse wants"):
        merge_partials(torch.zeros(2, 1, 1, 4, 8), lse)


@pytest.mark.parametrize("shape", [(1, 1, 9, 11), (2, 4, 9, 11), (9, 11), (1, 1, 1, 11), (2, 1, 9, 1)])
def test_the_mask_of_a_tile_broadcasts_like_the_whole(generator: torch.Generator, shape: tuple[int, ...]) -> None:
    mask = torch.randn(shape, generator=generator)
    cut = slice_mask(mask, Tile(2, 7, 4, 11, False))
    whole = mask.expand(2, 4, 9, 11)[..., 2:7, 4:11]
    assert torch.equal(cut.expand(2, 4, 5, 7), whole)
    assert cut.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()


def test_a_block_plan_expands_to_what_it_lists(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(60):
        block_q, block_k = draw.randint(1, 7), draw.randint(1, 7)
        len_q, len_k = draw.randint(0, 20), draw.randint(0, 20)
        lead, rows, columns = (draw.choice([1, 2]), draw.choice([1, 3])), -(-len_q // block_q), -(-len_k // block_k)
        most = draw.randint(0, columns)
        indices = torch.full((*lead, rows, most), 12345, dtype=torch.int32)  # past the count lies what nobody wrote
        counts = torch.zeros((*lead, rows), dtype=torch.int32)
        want = torch.zeros((*lead, len_q, len_k), dtype=torch.bool)
        for b in range(lead[0]):
            for h in range(lead[1]):
                for row in range(rows):
                    listed = draw.sample(range(columns), draw.randint(0, most))
                    counts[b, h, row] = len(listed)
                    for n, column in enumerate(listed):
                        indices[b, h, row, n] = column
                        want[b, h, row * block_q : (row + 1) * block_q, column * block_k : (column + 1) * block_k] = (
                            True
                        )
        assert torch.equal(expand_block_plan(BlockPlan(block_q, block_k, indices, counts), len_q, len_k), want)


def test_the_dense_mask_is_the_definition_pair_by_pair(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        r = random_pattern(draw)
        mask = dense_mask(r, r.len_q, r.len_k)
        want = torch.tensor([[seen(r, i, j) for j in range(r.len_k)] for i in range(r.len_q)], dtype=torch.bool)
        want = want.view(r.len_q, r.len_k)
        assert (mask is None and bool(want.all())) or torch.equal(mask, want), r


def test_the_dense_mask_of_other_lengths_moves_the_bottom_right_diagonal() -> None:
    request = replace(BASE, causal=hal.Causal.BOTTOM_RIGHT, len_q=32, len_k=32)
    mask = dense_mask(request, 2, 5)
    assert mask is not None
    assert mask.tolist() == [[True, True, True, True, False], [True] * 5]
    assert dense_mask(BASE, 2, 5) is None
