"""Packed and paged sequences in Triton's interpreter: their tiles listed and shared out, and tables that are wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hal_cuda.kernels import composed
from hal_cuda.kernels.hopper.tile_table import tile_table
from hal_cuda.kernels.portable import launch as portable
from hal_cuda.kernels.portable.launch import PortablePath
from hal_cuda.runtime.launch import launcher
from interpreted_device import CHIP, CONTEXT
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, Causal, SequenceMetadata
from hal_core.testing import reference, relative_error


def listed(
    lengths_q: list[int], lengths_k: list[int], most: int, heads: int = 16
) -> tuple[int, list[list[int]], list[Tensor]]:
    """(tiles counted, entries of the whole table, cumulative lengths)."""
    ends = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (lengths_q, lengths_k)]
    table = torch.full((8 + 8 * most,), -1, dtype=torch.int32)
    list_tiles = launcher(CHIP, tile_table, {}, {"ROWS": 64, "BLOCK": 4}, num_warps=4)
    count = len(lengths_q)
    list_tiles((count, 1, 1), (table, *ends), [count, int(ends[0][-1]), int(ends[1][-1]), most, heads, 132])
    return int(table[0]), table[8:].view(-1, 8)[:, :5].tolist(), ends


def test_table_lists_every_tile_of_packed_sequences() -> None:
    """Longest sequences first; empty sequences have no tile, and those without keys have theirs."""
    lengths_q, lengths_k = [5, 0, 130, 64, 65, 1], [7, 9, 130, 0, 400, 130]
    tiles, entries, ends = listed(lengths_q, lengths_k, 16)
    order = sorted((s for s in range(6) if lengths_q[s]), key=lambda s: (-lengths_k[s], s))
    want = [
        [row, int(ends[0][s]), int(ends[1][s]), lengths_q[s], lengths_k[s]]
        for place, s in enumerate(order)
        for row in (reversed if (len(order) - 1 - place) % 2 == 0 else list)(range(0, lengths_q[s], 64))
    ]
    assert tiles == len(want)
    assert entries[:tiles] == want
    assert entries[tiles:] == [[-1] * 5] * (16 - tiles)


@pytest.mark.parametrize(
    ("heads", "rows"),
    [(16, [1024] * 8), (16, [2048] * 4), (16, [3000, 100]), (16, [4096, 4096]), (8, [1024] * 8), (4, [2048] * 8)],
)
def test_table_gives_programs_below_a_diagonal_about_as_much_each(heads: int, rows: list[int]) -> None:
    """132 programs that take every 132nd tile, forwards and backwards in turn: at most a tenth above the mean."""
    tiles, entries, _ = listed(rows, rows, sum(rows) // 64 + len(rows), heads)
    cost = torch.tensor([row + 64 for row, *_ in entries[:tiles]], dtype=torch.float64).repeat_interleave(heads)
    number = torch.arange(len(cost))
    program = torch.where(number // 132 % 2 == 1, 131 - number % 132, number % 132)
    each = torch.zeros(132, dtype=torch.float64).index_add_(0, program, cost)
    assert float(each.max() / each.mean()) <= 1.1


#: Cumulative lengths that name tokens which are not there, of two sequences in 100 tokens.
WRONG = [
    [0, 40, 1 << 30],
    [0, 1 << 30, 100],
    [-60, 40, 100],
    [40, -9, 100],
    [-(1 << 31), (1 << 31) - 1, -5],
    [200, 300, 400],
]


@pytest.mark.parametrize("ends", WRONG)
def test_table_of_wrong_lengths_names_nothing_outside_the_tensors(ends: list[int]) -> None:
    """Every entry that is counted is written, lies within the tokens, and none is written behind the table."""
    wrong, fine = torch.tensor(ends, dtype=torch.int32), torch.tensor([0, 40, 100], dtype=torch.int32)
    list_tiles = launcher(CHIP, tile_table, {}, {"ROWS": 64, "BLOCK": 4}, num_warps=4)
    for cu_q, cu_k in ((wrong, fine), (fine, wrong), (wrong, wrong)):
        table = torch.full((8 + 8 * 5,), -1, dtype=torch.int32)
        list_tiles((2, 1, 1), (table, cu_q, cu_k), [2, 100, 100, 3, 16, 132])
        assert 0 <= int(table[0]) <= 3
        entries = table[8:].view(-1, 8)
        for row, first_q, first_k, queries, keys in entries[: int(table[0]), :5].tolist():
            assert 0 <= row < queries <= 100 - first_q <= 100
            assert 0 <= keys <= 100 - first_k <= 100
        assert bool((entries[3:] == -1).all())


def test_table_of_sequences_that_overlap_ends_where_its_memory_does() -> None:
    ends = torch.tensor([0, 1000, 0, 1000], dtype=torch.int32)
    table = torch.full((8 + 8 * 40,), -1, dtype=torch.int32)
    list_tiles = launcher(CHIP, tile_table, {}, {"ROWS": 64, "BLOCK": 4}, num_warps=4)
    list_tiles((3, 1, 1), (table, ends, ends), [3, 1000, 1000, 18, 16, 132])
    assert int(table[0]) == 18
    assert bool((table[8:].view(-1, 8)[:18, :5] >= 0).all() and (table[8:].view(-1, 8)[18:] == -1).all())


@pytest.mark.parametrize("ends", WRONG)
def test_wrong_lengths_are_refused_where_they_are_read_on_the_host(generator: torch.Generator, ends: list[int]) -> None:
    given = [torch.randn(1, 2, 100, 8, generator=generator, dtype=torch.float64) for _ in range(3)]
    request = AttentionRequest(
        batch=2, heads_q=2, heads_kv=2, len_q=100, len_k=100, dim_qk=8, dim_v=8, dtype="float64", packed=True
    )
    wrong, fine = torch.tensor(ends, dtype=torch.int32), torch.tensor([0, 40, 100], dtype=torch.int32)
    for tables in (SequenceMetadata(wrong, fine), SequenceMetadata(fine, wrong)):
        with pytest.raises(hal.ContractError, match="start at 0, never fall, end at 100"):
            composed.attend(request, CONTEXT, *given, None, None, tables)
    assert composed.attend(request, CONTEXT, *given, None, None, SequenceMetadata(fine, fine)).out.shape == (
        1,
        2,
        100,
        8,
    )


def surrounded(generator: torch.Generator, tokens: int) -> Tensor:
    """[1, 2, tokens, 32] of numbers, with NaN before, behind and between."""
    whole = torch.full((4, tokens + 400, 32), math.nan)
    whole[1:3, 200 : 200 + tokens] = torch.randn(2, tokens, 32, generator=generator)
    return whole[None, 1:3, 200 : 200 + tokens]


@pytest.mark.parametrize("ends", WRONG)
def test_wrong_lengths_read_and_write_inside_the_tensors(
    generator: torch.Generator, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys behind the tensors would give NaN, and rows behind the result would change what lies there."""
    query, key, value = (surrounded(generator, 100) for _ in range(3))
    room = torch.full((4, 500, 32), 7.0)
    monkeypatch.setattr(portable, "empty_result", lambda *_: room[None, 1:3, 200:300])
    request = AttentionRequest(
        batch=2, heads_q=2, heads_kv=2, len_q=100, len_k=100, dim_qk=32, dim_v=32, dtype="float32", packed=True
    )
    wrong, fine = torch.tensor(ends, dtype=torch.int32), torch.tensor([0, 40, 100], dtype=torch.int32)
    for tables in (SequenceMetadata(wrong, fine), SequenceMetadata(fine, wrong), SequenceMetadata(wrong, wrong)):
        out, _ = PortablePath(request, CONTEXT)(query, key, value, tables=tables)
        assert bool(torch.isfinite(out).all())
        assert bool((room[0] == 7.0).all() and (room[3] == 7.0).all())
        assert bool((room[:, :200] == 7.0).all() and (room[:, 300:] == 7.0).all())


@pytest.mark.parametrize(
    ("pages", "held"), [([[0, 999]], [32]), ([[0, -3]], [32]), ([[1, 0]], [1 << 30]), ([[1, 0]], [-4])]
)
def test_wrong_page_tables_read_inside_the_cache(
    generator: torch.Generator, pages: list[list[int]], held: list[int]
) -> None:
    whole = torch.full((40, 2, 16, 32), math.nan)
    whole[20:22] = torch.randn(2, 2, 16, 32, generator=generator)
    cache = whole[20:22]
    request = AttentionRequest(
        batch=1, heads_q=2, heads_kv=2, len_q=1, len_k=32, dim_qk=32, dim_v=32, dtype="float32", page_size=16
    )
    tables = SequenceMetadata(
        page_table=torch.tensor(pages, dtype=torch.int32), cache_seqlens=torch.tensor(held, dtype=torch.int32)
    )
    query = torch.randn(1, 2, 1, 32, generator=generator)
    assert bool(torch.isfinite(PortablePath(request, CONTEXT)(query, cache, cache, tables=tables).out).all())


@pytest.mark.parametrize("len_q", [1, 20])
@pytest.mark.parametrize("packed", [False, True])
def test_keys_that_are_not_used_are_not_read(generator: torch.Generator, packed: bool, len_q: int) -> None:
    """Each sequence has its own diagonal, which ends in the last used key; packed ones begin in any order."""
    begins, counts, longest = [40, 0, 70], [25, 40, 7], 40
    query = torch.randn(3, 4, len_q, 32, generator=generator)
    whole = torch.full((2, 2, 100, 32), math.nan)
    caches = torch.full((2, 3, 2, longest, 32), math.nan)
    for s, (begin, count) in enumerate(zip(begins, counts, strict=True)):
        whole[:, :, begin : begin + count] = torch.randn(2, 2, count, 32, generator=generator)
        caches[:, s, :, :count] = whole[:, :, begin : begin + count]
    held = torch.tensor(counts, dtype=torch.int32)
    request = AttentionRequest(
        batch=3,
        heads_q=4,
        heads_kv=2,
        len_q=len_q,
        len_k=longest,
        dim_qk=32,
        dim_v=32,
        dtype="float32",
        causal=Causal.BOTTOM_RIGHT,
        window=(9, None),
        diagonal=2,
        used=True,
        packed=packed,
    )
    if packed:
        begin, rows = torch.tensor([*begins, 100]).int(), torch.arange(0, 3 * len_q + 1, len_q).int()
        tables = SequenceMetadata(cu_seqlens_q=rows, cu_seqlens_k=begin, cache_seqlens=held)
        given = query.transpose(0, 1).flatten(1, 2)[None], *whole[:, None]
    else:
        tables, given = SequenceMetadata(cache_seqlens=held), (query, *caches)
    out = PortablePath(request, CONTEXT)(*given, tables=tables).out
    out = out[0].unflatten(1, (3, len_q)).transpose(0, 1) if packed else out
    for s, count in enumerate(counts):
        want = reference(
            query[s, None], *caches[:, s, None, :, :count], causal="bottom_right", window=(9, None), diagonal=2
        ).out
        assert relative_error(out[s, None], want) <= 3e-6


@pytest.mark.parametrize("held", [1 << 30, -4])
@pytest.mark.parametrize("begin", [-7, 60, 1 << 30])
def test_wrong_used_lengths_read_inside_the_keys(generator: torch.Generator, held: int, begin: int) -> None:
    key = surrounded(generator, 100)
    query = torch.randn(1, 2, 8, 32, generator=generator)
    request = AttentionRequest(
        batch=1, heads_q=2, heads_kv=2, len_q=8, len_k=100, dim_qk=32, dim_v=32, dtype="float32", packed=True, used=True
    )
    rows, begins, counts = (torch.tensor(numbers).int() for numbers in ([0, 8], [begin, 100], [held]))
    tables = SequenceMetadata(cu_seqlens_q=rows, cu_seqlens_k=begins, cache_seqlens=counts)
    assert bool(torch.isfinite(PortablePath(request, CONTEXT)(query, key, key, tables=tables).out).all())
