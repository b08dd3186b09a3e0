"""A call as numbers: sparse plans and masks as ranges of keys, and memory cut from blocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

import hal_core as hal

problem = pytest.importorskip("hal_compute.problem", exc_type=ImportError)
from hal_compute import pool  # noqa: E402


def scratch(shape: Sequence[int], dtype: str) -> torch.Tensor:
    return torch.full(tuple(shape), 7, dtype=getattr(torch, dtype))


@pytest.mark.parametrize(("rows", "keys"), [(1, 500), (130, 200), (200, 130), (64, 256)])
def test_tiles_are_hidden_where_every_element_is(rows: int, keys: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks_q, blocks_k = -(-rows // 64), -(-keys // 64)
    tiles = torch.rand(2, 3, blocks_q, blocks_k, generator=generator) > 0.5
    mask = tiles.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, :rows, :keys]
    mask = mask & (torch.rand(mask.shape, generator=generator) > 0.2)
    found = problem.hidden_tiles(problem.mask_of(mask, keys, scratch), rows, scratch)
    seen = torch.zeros(2, 3, blocks_q, blocks_k, dtype=torch.bool)
    for block in range(2 * 3 * blocks_q):
        for start, stop in found.bounds[found.offsets[block] : found.offsets[block + 1]].tolist():
            seen.view(-1, blocks_k)[block, start // 64 : -(-stop // 64)] = True
    assert torch.equal(seen, tiles)
    assert found.bounds.max() <= keys


def test_ranges_of_a_plan_join_neighbours_and_read_no_block_twice() -> None:
    indices = torch.tensor([[[[2, 0, 1, 9], [3, 3, 9, 9], [9, 9, 9, 9]]]], dtype=torch.int32)
    counts = torch.tensor([[[3, 2, 0]]], dtype=torch.int32)
    found = problem.ranges_of(hal.BlockPlan(64, 64, indices, counts), 230, scratch)
    assert found.offsets.tolist() == [0, 1, 2, 2]
    assert found.bounds.tolist() == [[0, 192], [192, 230]]


def test_tiles_that_a_mask_hides_are_found(seed: int) -> None:
    mask = torch.zeros(1, 1, 1, 500, dtype=torch.bool)
    mask[..., 70:130] = True
    found = problem.hidden_tiles(problem.mask_of(mask, 500, scratch), 40, scratch)
    assert found is not None
    assert found.bounds.tolist() == [[64, 192]]
    shown = problem.mask_of(torch.ones(1, 1, 1, 500, dtype=torch.bool), 500, scratch)
    assert problem.hidden_tiles(shown, 40, scratch) is None


def test_freed_regions_join_again(seed: int) -> None:
    generator, made = torch.Generator().manual_seed(seed), []
    memory = pool.DevicePool("test:0", lambda n: object(), lambda b: None, alignment=64, largest=1 << 30, limit=1 << 30)
    held: list[pool.Region] = []
    for _ in range(500):
        size = int(torch.randint(1, 100_000, (1,), generator=generator))
        held.append(memory.allocate(size))
        made.append(size)
        if len(held) > 20:
            memory.free(held.pop(int(torch.randint(0, len(held), (1,), generator=generator))))
        spans = sorted((id(r.block), r.offset, r.offset + r.size) for r in held)
        assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(spans))
    for region in held:
        memory.free(region)
    assert memory.in_use == 0
    assert memory.fragmentation == 0
    with pytest.raises(hal.ContractError, match="freed already"):
        memory.free(held[0])
    with pytest.raises(hal.MemoryLimitError):
        memory.allocate(1 << 31)
