"""The plain Triton kernels and everything around them, in Triton's interpreter. Run by tests/cuda/test_interpreted.py."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import interpreter

interpreter.prepare()

import torch  # noqa: E402
from hal_cuda import composed, portable  # noqa: E402
from hal_cuda.dropout import dropout_pattern  # noqa: E402
from hal_cuda.hopper import schedule  # noqa: E402
from hal_cuda.kernels.tiles import tile_table  # noqa: E402
from hal_cuda.plans import listed_once  # noqa: E402
from hal_cuda.portable import PortablePath  # noqa: E402
from hal_cuda.scratch import STREAMS, StreamScratch, scratch_of  # noqa: E402
from hal_cuda.tiles import choose_splits, choose_tiles, packs, shrunk  # noqa: E402
from interpreted_device import CHIP, InterpretedBackend  # noqa: E402
from torch import Tensor  # noqa: E402

import hal_core as hal  # noqa: E402
from hal_core import AttentionRequest, BlockPlan, Causal, MaskKind, SequenceTables  # noqa: E402
from hal_core.testing import check_backend  # noqa: E402

BOTTOM, TOP = Causal.BOTTOM_RIGHT, Causal.TOP_LEFT


def run(
    generator: torch.Generator, len_q: int, len_k: int, *, dim: int = 24, dim_v: int = 0, heads: tuple[int, int] = (4, 2),
    dtype: str = "float32", mask: str = "none", plan: BlockPlan | None = None, **options: Any,
) -> tuple[float, float]:  # fmt: skip
    """Errors of the output and of the log-sum-exp against float64; rows without keys are asserted on."""
    kind = getattr(torch, dtype)
    shapes = ((2, heads[0], len_q, dim), (2, heads[1], len_k, dim), (2, heads[1], len_k, dim_v or dim))
    query, key, value = (torch.randn(shape, generator=generator).to(kind) for shape in shapes)
    given = None
    if mask == "boolean":
        given = torch.rand(2, 1, len_q, len_k, generator=generator) > 0.4
        given[:, :, ::5] = False
    elif mask == "additive":
        given = torch.randn(1, heads[0], len_q, len_k, generator=generator)
        given[..., 1::4, :] = -math.inf
    request = AttentionRequest(
        batch=2, heads_q=heads[0], heads_kv=heads[1], len_q=len_q, len_k=len_k, dim_qk=dim, dim_v=dim_v or dim, dtype=dtype,
        lse=True, mask=MaskKind(mask), block_plan=plan and (plan.block_q, plan.block_k, plan.indices.shape[-1]), **options,
    )  # fmt: skip
    out, lse = PortablePath(request, CHIP)(query, key, value, given, plan, None, (5, 1 << 40))
    scores = query.double() @ key.double().repeat_interleave(heads[0] // heads[1], 1).mT * request.effective_scale
    if request.softcap:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    for hidden in (hal.dense_mask(request, len_q, len_k), plan and hal.expand_block_plan(plan, len_q, len_k)):
        scores = scores if hidden is None else scores.masked_fill(~hidden, -math.inf)
    if given is not None:
        scores = scores.masked_fill(~given, -math.inf) if mask == "boolean" else scores + given
    want_lse = scores.logsumexp(-1)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    if request.dropout:
        keep = dropout_pattern(CHIP, tuple(scores.shape), request.dropout, (5, 1 << 40), "cpu")  # type: ignore[arg-type]
        weights = weights * keep / (1 - request.dropout)
    want = weights @ value.double().repeat_interleave(heads[0] // heads[1], 1)
    dead = torch.isneginf(want_lse)
    assert torch.equal(torch.isneginf(lse), dead)
    assert bool((out[dead] == 0).all())
    return error(out, want), error(lse[~dead], want_lse[~dead])


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("len_q", "len_k", "options"),
    [
        (37, 53, {}),
        (64, 64, {"causal": TOP}),
        (70, 33, {"causal": BOTTOM}),
        (40, 90, {"causal": BOTTOM, "diagonal": -9, "window": (20, 0)}),
        (33, 47, {"window": (7, 3), "diagonal": 2}),
        (33, 47, {"window": (None, 3)}),
        (20, 30, {"mask": "boolean"}),
        (20, 30, {"mask": "additive", "softcap": 3.0, "causal": TOP}),
        (20, 64, {"softcap": 2.0}),
        (33, 40, {"dim": 40, "dim_v": 17}),
        (1, 400, {"causal": BOTTOM}),  # heads packed, keys split
        (3, 500, {"causal": BOTTOM, "window": (100, 0)}),
        (2, 300, {"mask": "boolean"}),
        (1, 300, {"heads": (1, 1)}),
    ],
)
def test_kernel_agrees_with_float64(generator: torch.Generator, len_q: int, len_k: int, options: dict[str, Any]) -> None:
    out, lse = run(generator, len_q, len_k, **options)
    assert out <= 2e-6
    assert lse <= 2e-6


@pytest.mark.parametrize("joined", [True, False], ids=["by the last program", "by a second kernel"])
@pytest.mark.parametrize(
    ("len_q", "len_k", "options"),
    [(1, 200, {}), (3, 260, {"heads": (6, 2)}), (2, 300, {"causal": BOTTOM, "window": (60, 0)}), (1, 130, {"heads": (8, 1)})],
)
def test_split_keys_are_joined(
    generator: torch.Generator, len_q: int, len_k: int, options: dict[str, Any], joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either way, and the counters are left as they were."""
    if not joined:
        monkeypatch.setattr(PortablePath, "_scratch", lambda self, query: None)
    made: list[Any] = []
    build = PortablePath._build

    def kept(*given: Any) -> Any:
        made.append(build(*given))
        return made[-1]

    monkeypatch.setattr(PortablePath, "_build", kept)
    for _ in range(2):
        out, lse = run(generator, len_q, len_k, **options)
        assert max(out, lse) <= 2e-6
    assert made[-1].partial > 0
    assert made[-1].joins == (made[-1].merge is None) == joined
    assert not bool(scratch_of(torch.device("cpu"))._arrived.any())


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_result_that_must_repeat_is_joined_as_in_a_capture(generator: torch.Generator, deterministic: bool) -> None:
    query, key = (torch.randn(1, 2, length, 16, generator=generator) for length in (1, 70))
    request = AttentionRequest(
        batch=1, heads_q=2, heads_kv=2, len_q=1, len_k=70, dim_qk=16, dim_v=16, dtype="float32", deterministic=deterministic
    )
    path = PortablePath(request, CHIP)
    path(query, key, key)
    (launch,) = path._launches.values()
    assert launch.partial > 0
    assert launch.joins != deterministic


def test_streams_do_not_share_scratch_memory() -> None:
    """Each has its own, the same at every call; one too many goes without."""
    made = StreamScratch("cpu")
    pieces = [made.on(stream) for stream in range(STREAMS)]
    for part in (0, 1):
        assert len({piece[part].data_ptr() for piece in pieces if piece is not None}) == STREAMS
    assert made.on(3) is pieces[3]
    assert made.on(1 << 40) is None


def test_float16_rounds_once_more(generator: torch.Generator) -> None:
    out, lse = run(generator, 40, 64, dtype="float16", causal=TOP)
    assert 1e-5 < out <= 6e-4
    assert lse <= 2e-6


def test_dropout_keeps_its_share_and_scales(generator: torch.Generator) -> None:
    assert run(generator, 20, 30, dropout=0.3)[0] <= 2e-6
    keep = dropout_pattern(CHIP, (2, 2, 8, 1000), 0.3, (1, 2), "cpu")
    assert abs(float(keep.float().mean()) - 0.7) < 0.02
    assert not torch.equal(keep, dropout_pattern(CHIP, (2, 2, 8, 1000), 0.3, (1, 3), "cpu"))
    assert torch.equal(keep[1:], dropout_pattern(CHIP, (1, 2, 8, 1000), 0.3, (1, 2), "cpu", first_batch=1))


@pytest.mark.parametrize("blocks", [(16, 16), (48, 24), (7, 5)])
def test_block_plan(generator: torch.Generator, blocks: tuple[int, int]) -> None:
    rows, columns = -(-50 // blocks[0]), -(-60 // blocks[1])
    order = torch.stack([torch.randperm(columns, generator=generator) for _ in range(rows)])
    counts = torch.randint(0, columns + 1, (1, 1, rows), generator=generator, dtype=torch.int32)
    plan = BlockPlan(*blocks, order.view(1, 1, rows, columns).to(torch.int32), counts)
    assert run(generator, 50, 60, plan=plan, causal=TOP, heads=(2, 2))[0] <= 2e-6


@pytest.mark.parametrize("spread", [False, True], ids=["side by side", "every second entry"])
def test_a_block_listed_twice_is_read_once(generator: torch.Generator, spread: bool) -> None:
    """Lists of 150 of 4 blocks: duplicates lie within a stretch of comparisons and beyond it."""
    indices = torch.randint(0, 4, (1, 2, 2, 150), generator=generator, dtype=torch.int32)
    if spread:
        indices = indices.repeat_interleave(2, -1)[..., ::2]
    counts = torch.tensor([150, 70], dtype=torch.int32).expand(1, 2, 2)
    plan = BlockPlan(16, 16, indices, counts)
    once = listed_once(plan, CHIP)
    for head in range(2):
        for row in range(2):
            listed = indices[0, head, row, : int(counts[0, head, row])].tolist()
            assert once.indices[0, head, row, : int(once.counts[0, head, row])].tolist() == list(dict.fromkeys(listed))
    assert run(generator, 30, 60, plan=plan, heads=(2, 2))[0] <= 2e-6


def test_strides_are_taken_as_they_are(generator: torch.Generator) -> None:
    wide = torch.randn(2, 31, 3, 2 * 24 + 5, generator=generator)
    tensors = [wide[..., i : i + 48 : 2].transpose(1, 2) for i in (0, 1, 3)]
    request = AttentionRequest(
        batch=2, heads_q=3, heads_kv=3, len_q=31, len_k=31, dim_qk=24, dim_v=24, dtype="float32", last_dim_contiguous=False
    )
    got = PortablePath(request, CHIP)(*tensors).out
    want = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in tensors))
    assert error(got, want) <= 2e-6
    assert got.stride(1) < got.stride(2)  # laid out as the query is


@pytest.mark.parametrize("spread", [False, True], ids=["tables side by side", "every second entry"])
def test_paged_cache_reads_its_own_pages(generator: torch.Generator, spread: bool) -> None:
    held = torch.tensor([70, 0, 5], dtype=torch.int32)
    table = torch.randperm(15, generator=generator).to(torch.int32).view(3, 5)
    if spread:
        held, table = (torch.stack([t, t * 0 - 1], -1).flatten(-2)[..., ::2] for t in (held, table))
    key, value = (torch.randn(15, 2, 16, 24, generator=generator) for _ in range(2))
    for tokens in (1, 20):
        query = torch.randn(3, 4, tokens, 24, generator=generator)
        request = AttentionRequest(
            batch=3, heads_q=4, heads_kv=2, len_q=tokens, len_k=80, dim_qk=24, dim_v=24, dtype="float32", page_size=16,
            causal=BOTTOM, lse=True,
        )  # fmt: skip
        tables = SequenceTables(page_table=table, cache_seqlens=held)
        got = PortablePath(request, CHIP)(query, key, value, None, None, tables).out
        for s, length in enumerate(held.tolist()):
            if not length:
                assert bool((got[s] == 0).all())
                continue
            k, v = (t[table[s].long()].transpose(0, 1).reshape(1, 2, 80, 24)[:, :, :length] for t in (key, value))
            reach = torch.arange(length) <= torch.arange(tokens)[:, None] + length - tokens
            scores = (query[s : s + 1] @ k.repeat_interleave(2, 1).mT * 24**-0.5).masked_fill(~reach, -math.inf)
            want = torch.softmax(scores.double(), -1).nan_to_num(0.0) @ v.repeat_interleave(2, 1).double()
            assert error(got[s : s + 1], want) <= 3e-6


def test_splits_cover_every_key() -> None:
    for keys in (1, 63, 64, 1000, 8192, 131072):
        request = AttentionRequest(
            batch=1, heads_q=32, heads_kv=8, len_q=1, len_k=keys, dim_qk=128, dim_v=128, dtype="bfloat16"
        )
        assert packs(request, 1)
        tiles = choose_tiles(request, 1)
        splits = choose_splits(request, tiles, 1, keys, 1, CHIP)
        assert (splits.count - 1) * splits.chunk < keys <= splits.count * splits.chunk


def test_tiles_shrink_to_nothing_left() -> None:
    request = AttentionRequest(
        batch=1, heads_q=1, heads_kv=1, len_q=4096, len_k=4096, dim_qk=256, dim_v=256, dtype="bfloat16"
    )
    tiles, seen = choose_tiles(request, 4096), []
    while tiles is not None:
        seen.append(tiles)
        tiles = shrunk(tiles)
    areas = [t.rows * t.keys for t in seen]
    assert areas == sorted(areas, reverse=True)
    assert areas[-1] == 256
    assert len(seen) == len(set(seen))


def test_schedule_balances_causal_tiles() -> None:
    costs = list(range(18, 2, -1))
    plan = schedule(costs, 160, 132, 64)
    assert 160 % plan.together == 0
    assert schedule([5] * 8, 16, 132, 64).programs == 128
    assert schedule([5] * 8, 160, 132, 64).programs == 132


@pytest.mark.parametrize(("len_q", "len_k"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_read_gives_zeros_with_gradients(generator: torch.Generator, len_q: int, len_k: int) -> None:
    shapes = ((1, 2, len_q, 8), (1, 2, len_k, 8), (1, 2, len_k, 8), (1, 1, 1, len_k))
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    request = AttentionRequest(
        batch=1, heads_q=2, heads_kv=2, len_q=len_q, len_k=len_k, dim_qk=8, dim_v=8, dtype="float32", lse=True,
        mask=MaskKind.ADDITIVE, grads=frozenset({"q", "k", "v", "mask"}), grad_lse=True,
    )  # fmt: skip
    device = InterpretedBackend().devices()[0]
    out, lse = InterpretedBackend().open(device).bind(request)(*tensors)
    assert not bool(out.any())
    assert bool(torch.isneginf(lse).all())
    (out.sum() + torch.nan_to_num(lse, neginf=0.0).sum()).backward()
    assert all(t.grad is not None and t.grad.shape == t.shape and not bool(t.grad.any()) for t in tensors)


@pytest.mark.parametrize("check", ["contract", "refusals", "inputs_unchanged", "strides"])
def test_conformance(check: str) -> None:
    result = check_backend(InterpretedBackend(), checks=[check], quick=True).results[0]
    assert result.status in ("passed", "skipped"), result.detail


@pytest.mark.slow
@pytest.mark.parametrize("check", ["dtypes", "lengths", "masks", "causal", "gradients", "mask_gradient", "lse_gradient"])
def test_conformance_of_results(check: str) -> None:
    result = check_backend(InterpretedBackend(), checks=[check], quick=True).results[0]
    assert result.status in ("passed", "skipped"), result.detail


def listed(lengths_q: list[int], lengths_k: list[int], most: int, heads: int = 16) -> tuple[int, list[list[int]], list[Tensor]]:
    """(tiles counted, entries of the whole table, cumulative lengths)."""
    ends = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32) for lengths in (lengths_q, lengths_k)]
    table = torch.full((8 + 8 * most,), -1, dtype=torch.int32)
    list_tiles = CHIP.launcher(tile_table, {}, {"ROWS": 64, "BLOCK": 4}, num_warps=4)
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
    ]  # fmt: skip
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
WRONG = [[0, 40, 1 << 30], [0, 1 << 30, 100], [-60, 40, 100], [40, -9, 100], [-(1 << 31), (1 << 31) - 1, -5], [200, 300, 400]]


@pytest.mark.parametrize("ends", WRONG)
def test_table_of_wrong_lengths_names_nothing_outside_the_tensors(ends: list[int]) -> None:
    """Every entry that is counted is written, lies within the tokens, and none is written behind the table."""
    wrong, fine = torch.tensor(ends, dtype=torch.int32), torch.tensor([0, 40, 100], dtype=torch.int32)
    list_tiles = CHIP.launcher(tile_table, {}, {"ROWS": 64, "BLOCK": 4}, num_warps=4)
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
    list_tiles = CHIP.launcher(tile_table, {}, {"ROWS": 64, "BLOCK": 4}, num_warps=4)
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
    for tables in (SequenceTables(wrong, fine), SequenceTables(fine, wrong)):
        with pytest.raises(hal.ContractError, match="start at 0, never fall, end at 100"):
            composed.attend(request, CHIP, *given, None, None, tables)
    assert composed.attend(request, CHIP, *given, None, None, SequenceTables(fine, fine)).out.shape == (1, 2, 100, 8)


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
    for tables in (SequenceTables(wrong, fine), SequenceTables(fine, wrong), SequenceTables(wrong, wrong)):
        out, _ = PortablePath(request, CHIP)(query, key, value, tables=tables)
        assert bool(torch.isfinite(out).all())
        assert bool((room[0] == 7.0).all() and (room[3] == 7.0).all())
        assert bool((room[:, :200] == 7.0).all() and (room[:, 300:] == 7.0).all())


@pytest.mark.parametrize(("pages", "held"), [([[0, 999]], [32]), ([[0, -3]], [32]), ([[1, 0]], [1 << 30]), ([[1, 0]], [-4])])
def test_wrong_page_tables_read_inside_the_cache(generator: torch.Generator, pages: list[list[int]], held: list[int]) -> None:
    whole = torch.full((40, 2, 16, 32), math.nan)
    whole[20:22] = torch.randn(2, 2, 16, 32, generator=generator)
    cache = whole[20:22]
    request = AttentionRequest(
        batch=1, heads_q=2, heads_kv=2, len_q=1, len_k=32, dim_qk=32, dim_v=32, dtype="float32", page_size=16
    )
    tables = SequenceTables(
        page_table=torch.tensor(pages, dtype=torch.int32), cache_seqlens=torch.tensor(held, dtype=torch.int32)
    )
    query = torch.randn(1, 2, 1, 32, generator=generator)
    assert bool(torch.isfinite(PortablePath(request, CHIP)(query, cache, cache, tables=tables).out).all())
