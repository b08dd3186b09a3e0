"""Layouts, the dense calls they lead to, and the pattern of dropout, without any process group."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hal_parallel.draws import Draws
from hal_parallel.layout import NAMES, TokenLayout, joined_ranks, make_layout, shard, unshard
from hal_parallel.visible import Call, Rule, band_options, find_calls, tokens_of

from hal_core import AttentionRequest, Causal, ContractError, dense_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_every_token_lies_in_one_slot(name):
    for length, world in itertools.product((0, 1, 5, 8, 17), (1, 2, 3, 4)):
        layout = make_layout(name, length, world)
        held = torch.cat([layout.indices(rank) for rank in range(world)])
        assert sorted(held[held >= 0].tolist()) == list(range(length))
        x = torch.arange(length).view(1, 1, -1, 1) + 1
        parts = [shard(x, layout, rank) for rank in range(world)]
        assert {part.shape[2] for part in parts} == {layout.local}
        assert layout.padding == sum(int((part == 0).sum()) for part in parts)
        assert torch.equal(unshard(parts, layout), x)


@pytest.mark.parametrize(
    "indices", [[[0, 1], [2]], [[0, 1], [1, 2]], [[0, 3], [1, -1]], []], ids=["uneven", "twice", "missing", "none"]
)
def test_explicit_indices_must_hold_each_token_once(indices):
    with pytest.raises(ContractError, match="token indices"):
        TokenLayout.of(indices)


def dense(call: Call) -> torch.Tensor:
    rows, keys = call.rows.stop - call.rows.start, call.keys.stop - call.keys.start
    if call.masked is not None:
        seen: Any = call.visible(CPU)
    else:
        request = AttentionRequest(1, 1, 1, rows, keys, 1, 1, "float32", **band_options(call.low, call.high))
        seen = dense_mask(request, rows, keys)
        seen = torch.ones(rows, keys, dtype=torch.bool) if seen is None else seen
    assert call.pairs == int(seen.sum())
    return seen.int()


def whole(rule: Rule) -> torch.Tensor:
    """The pairs that the rule lets be read, from the core's own mask of each sequence."""
    seen = torch.zeros(rule.cu_q[-1], rule.cu_k[-1], dtype=torch.int32)
    for (a, b), (c, d) in zip(itertools.pairwise(rule.cu_q), itertools.pairwise(rule.cu_k), strict=True):
        request = AttentionRequest(
            1, 1, 1, b - a, d - c, 1, 1, "float32", causal=rule.causal, diagonal=rule.diagonal, window=rule.window
        )
        mask = dense_mask(request, b - a, d - c)
        seen[a:b, c:d] = 1 if mask is None else mask.int()
    return seen


def test_the_calls_of_all_ranks_read_each_visible_pair_once(seed):
    draw = random.Random(seed)
    for _ in range(400):
        world, count = draw.choice([1, 2, 3, 4]), draw.choice([1, 1, 2, 3])
        lengths = [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(count)]
        edges = [(0, *itertools.accumulate(each)) for each in zip(*lengths, strict=True)]
        window = draw.choice([None, (2, None), (0, 0), (3, 1), (None, 2)])
        rule = Rule(draw.choice(list(Causal)), draw.randint(-3, 3), window, *edges)
        name, most = draw.choice(NAMES), draw.choice([None, None, 2, 3])
        queries = make_layout(name, edges[0][-1], world)
        keys = make_layout(draw.choice([name, *NAMES]), edges[1][-1], world)
        joined, order = joined_ranks(keys, tuple(range(world)), world if name == "striped" else 1)
        slots = torch.cat([keys.indices(rank) for rank in range(world)])
        slots = slots if order is None else slots[order]
        apart, together = torch.zeros_like(whole(rule)), torch.zeros_like(whole(rule))
        for rank, source in itertools.product(range(world), range(world)):
            rows, columns = queries.indices(rank), keys.indices(source)
            for call in find_calls(queries.pieces[rank], keys.pieces[source], rule, most and (most, most)):
                assert torch.equal(rows[call.rows], tokens_of(call.tokens[0], CPU))
                assert torch.equal(columns[call.keys], tokens_of(call.tokens[1], CPU))
                apart[rows[call.rows][:, None], columns[call.keys]] += dense(call)
            for call in find_calls(queries.pieces[rank], joined, rule) if source == 0 else ():
                together[rows[call.rows][:, None], slots[call.keys]] += dense(call)
        assert torch.equal(apart, whole(rule)), (rule, name, world)
        assert torch.equal(together, whole(rule)), (rule, name, world)


def test_zigzag_is_equal_work_and_contiguous_is_not():
    """Visible pairs of the busiest rank over the mean, causal, four ranks."""
    rule = Rule(Causal.TOP_LEFT, 0, None, (0, 4096), (0, 4096))

    def share(name: str) -> float:
        pieces = make_layout(name, 4096, 4).pieces
        work = [sum(c.pairs for keys in pieces for c in find_calls(queries, keys, rule)) for queries in pieces]
        return max(work) / (sum(work) / 4)

    assert share("zigzag") <= 1.02
    assert share("striped") <= 1.02
    assert share("contiguous") > 1.7


def test_causal_zigzag_takes_few_calls():
    """Whole runs are joined: a step of the ring is one call, and the first, of a rank's own keys, two at most."""
    rule, pieces = Rule(Causal.TOP_LEFT, 0, None, (0, 64), (0, 64)), make_layout("zigzag", 64, 4).pieces
    counts = [[len(find_calls(pieces[r], pieces[(r - s) % 4], rule)) for s in range(4)] for r in range(4)]
    assert max(count[0] for count in counts) <= 2
    assert {n for count in counts for n in count[1:]} == {1}


def test_dropout_keeps_the_share_it_says_and_no_row_is_like_another():
    rows, keys = torch.arange(512), torch.arange(1024)
    keep = Draws(0.3, (5, 6)).keep(2, 2, rows, keys)
    assert abs(float(keep.float().mean()) - 0.7) < 0.002
    for dim in (2, 3):
        assert float((keep.float().mean(dim) - 0.7).abs().max()) < 0.12
    flat = keep.flatten(0, 2).float() - 0.7
    likeness = flat[:200] @ flat[:200].T / flat.shape[1]
    assert float((likeness - likeness.diag().diag()).abs().max()) < 0.05
    assert not torch.equal(keep, Draws(0.3, (5, 7)).keep(2, 2, rows, keys))
    assert torch.equal(keep[:, 1:, 3:9, 5:], Draws(0.3, (5, 6), 1).keep(2, 1, rows[3:9], keys[5:]))
