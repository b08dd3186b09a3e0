"""Block-sparse attention: which tiles the machine skips, and the rounds that are left of a call.

A block of the plan is worked through as the same block of a dense call is, so a skipped block saves its loads, its
products and its softmax. Arrays share the keys that they load where they work for one key head through the same list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from hal_core.plugin_api import AttentionRequest, BlockPlan, pooled_size

from ...profiles.profile import Profile
from ...tiling import Cut, Round, block_of, cut_into

if TYPE_CHECKING:
    from torch import Tensor

#: Key blocks that each block of query rows reads, by query head of all batch entries: [heads][query blocks][reads].
Reads = Sequence[Sequence[tuple[int, ...]]]
#: Different rounds that are simulated at most; more are represented by as many, evenly spaced.
MOST_ROUNDS = 32


class Listed(NamedTuple):
    """A block plan as a table.

    Attributes:
        table: bool [batch or 1, heads_q or 1, query blocks, key blocks]. block_q, block_k: tokens in a block.
    """

    table: Tensor
    block_q: int
    block_k: int

    def of(self, batch: slice, heads: slice, key_block: int) -> Tensor:
        """Which query blocks read a key block, bool [batch or 1, heads or 1, query blocks]."""
        batches, query_heads = self.table.shape[:2]
        return self.table[
            slice(None) if batches == 1 else batch, slice(None) if query_heads == 1 else heads, :, key_block
        ]


def table_bytes(request: AttentionRequest) -> int:
    """Bytes of the buffer that `listed` fills, for a plan of its own for every head; 0 without a plan."""
    if request.block_plan is None:
        return 0
    block_q, block_k, most = request.block_plan
    lists = request.batch * request.heads_q * -(-request.len_q // block_q)
    return pooled_size(lists * _bytes_a_list(most, -(-request.len_k // block_k)))


def _bytes_a_list(most: int, key_blocks: int) -> int:
    """An int64 and a bool for each entry, and a bool for each key block, rounded up to keep int64 aligned."""
    return 8 * most + -(-(most + key_blocks + 1) // 8) * 8


def buffer_size(plan: BlockPlan, len_k: int) -> int:
    """int64 elements of the buffer that `listed` fills."""
    *_, most = plan.indices.shape
    lists = plan.counts.numel()
    return int(lists * _bytes_a_list(most, -(-len_k // plan.block_k)) // 8)


def listed(plan: BlockPlan, len_k: int, buffer: Tensor) -> Listed:
    """The plan's table, in the memory of `buffer`, int64 [buffer_size(plan, len_k)]; entries past a count do not
    count.
    """
    import torch

    shape, key_blocks = plan.indices.shape, -(-len_k // plan.block_k)
    entries = plan.indices.numel()
    columns, rest = buffer[:entries].view(shape), buffer[entries:].view(torch.bool)
    columns.copy_(plan.indices)
    unused = rest[:entries].view(shape)
    torch.ge(torch.arange(shape[-1]), plan.counts.unsqueeze(-1), out=unused)
    columns.masked_fill_(unused, key_blocks)  # a column beyond the last, which is cut off
    cells = plan.counts.numel() * (key_blocks + 1)
    table = rest[entries : entries + cells].view(*shape[:-1], key_blocks + 1).zero_()
    return Listed(table.scatter_(-1, columns, True)[..., :key_blocks], plan.block_q, plan.block_k)


def reads_of(plan: BlockPlan, request: AttentionRequest) -> Reads:
    """The plan as lists, one for each query head of each batch entry, in order and without repetitions."""
    indices, counts = plan.indices.tolist(), plan.counts.tolist()
    lists = [
        [
            [tuple(sorted(set(blocks[:count]))) for blocks, count in zip(rows, used, strict=True)]
            for rows, used in zip(heads, head_counts, strict=True)
        ]
        for heads, head_counts in zip(indices, counts, strict=True)
    ]
    entries = lists * request.batch if len(lists) == 1 else lists
    return [each for heads in entries for each in (heads * request.heads_q if len(heads) == 1 else heads)]


def macs_of(reads: Reads, request: AttentionRequest) -> int:
    """Multiply-accumulates of the query-key pairs that a plan reads and causal and window leave visible."""
    assert request.block_plan is not None
    block_q, block_k, _ = request.block_plan
    low, high = request.band(request.len_q, request.len_k)

    @cache
    def pairs(number: int, blocks: tuple[int, ...]) -> int:
        rows = range(number * block_q, min((number + 1) * block_q, request.len_q))
        seen = [
            (0 if low is None else row + low, request.len_k if high is None else min(row + high + 1, request.len_k))
            for row in rows
        ]
        return sum(
            max(min((block + 1) * block_k, stop) - max(block * block_k, first), 0)
            for block in blocks
            for first, stop in seen
        )

    found = sum(pairs(number, blocks) for rows in reads for number, blocks in enumerate(rows))
    return found * (request.dim_qk + request.dim_v)


def fullest(request: AttentionRequest) -> Reads:
    """What an estimate takes a plan of a request's sizes to read: everywhere as many blocks as a row may list, those
    nearest to its last visible key.
    """
    assert request.block_plan is not None
    block_q, block_k, most = request.block_plan
    _, high = request.band(request.len_q, request.len_k)
    key_blocks, rows = -(-request.len_k // block_k), []
    for start in range(0, request.len_q, block_q):
        last = request.len_k if high is None else min(max(start + block_q + high, 1), request.len_k)
        stop = key_blocks if high is None else -(-last // block_k)
        rows.append(tuple(range(max(stop - most, 0), stop)))
    return [rows] * (request.batch * request.heads_q)


def planned_rounds(profile: Profile, request: AttentionRequest, reads: Reads) -> list[tuple[Round, int]]:
    """The rounds of a call under a plan, equal ones together: query blocks of all heads, the costliest first."""
    assert request.block_plan is not None
    block_q, block_k, _ = request.block_plan
    cut = cut_into(profile, request, block_q, block_k)
    group, arrays = request.heads_q // max(request.heads_kv, 1), cut.blocks.arrays
    known: dict[tuple[int, tuple[int, ...]], list[Round]] = {}
    queue = []
    for head, rows in enumerate(reads):
        for number, blocks in enumerate(rows):
            made = known.get((number, blocks))
            if made is None:
                made = known[number, blocks] = list(_pieces(request, cut, number, blocks))
            queue += [(head // group, each) for each in made]
    queue.sort(key=lambda item: -sum(item[1].seen))  # stable: blocks of a head stay together where they cost the same
    together = [queue[start : start + arrays] for start in range(0, len(queue), arrays)]
    rounds = [part[0][1]._replace(active=len(part), heads=len({(h, r.at) for h, r in part})) for part in together]
    return [(key, len(list(same))) for key, same in groupby(rounds)]


def _pieces(request: AttentionRequest, cut: Cut, number: int, blocks: tuple[int, ...]) -> Iterator[Round]:
    """The rounds of one query block that reads these key blocks; a piece that sees no key takes none."""
    assert request.block_plan is not None
    block_q, block_k, _ = request.block_plan
    in_block = -(-block_k // cut.block_k)
    tiles = [
        (block * in_block + piece, start, min(start + cut.block_k, (block + 1) * block_k, request.len_k))
        for block in blocks
        for piece, start in enumerate(range(block * block_k, min((block + 1) * block_k, request.len_k), cut.block_k))
    ]
    end = min((number + 1) * block_q, request.len_q)
    for start in range(number * block_q, end, cut.block_q):
        found = block_of(request, cut, start, min(start + cut.block_q, end), tiles)
        if found.seen:
            yield found


def sampled(rounds: list[tuple[Round, int]]) -> tuple[tuple[tuple[Round, int], ...], float]:
    """(rounds to simulate, what their cost is multiplied by): all of them, or `MOST_ROUNDS` and their share of the
    tiles.
    """
    if len(rounds) <= MOST_ROUNDS:
        return tuple(rounds), 1.0
    last = len(rounds) - 1
    chosen = tuple(rounds[last * place // (MOST_ROUNDS - 1)] for place in range(MOST_ROUNDS))

    def tiles(some: Sequence[tuple[Round, int]]) -> int:
        return sum(sum(each.seen) * times for each, times in some)

    return chosen, tiles(rounds) / tiles(chosen)
