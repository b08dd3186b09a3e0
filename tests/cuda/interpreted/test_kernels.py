"""The plain Triton kernels and everything around them, in Triton's interpreter. Run by
tests/cuda/test_interpreted.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hal_cuda.kernels.hopper.schedule import schedule
from hal_cuda.kernels.portable.block_plans import listed_once
from hal_cuda.kernels.portable.dropout import dropout_pattern
from hal_cuda.kernels.portable.launch import PortablePath
from hal_cuda.memory import STREAMS, StreamWorkspaces, borrowing
from hal_cuda.tiling import choose_splits, choose_tiles, packs, shrunk
from interpreted_device import CHIP, CONTEXT, InterpretedBackend
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, BlockPlan, Causal, MaskKind, PooledMemory, SequenceMetadata
from hal_core.testing import check_backend

BOTTOM, TOP = Causal.BOTTOM_RIGHT, Causal.TOP_LEFT


def run(
    generator: torch.Generator,
    len_q: int,
    len_k: int,
    *,
    dim: int = 24,
    dim_v: int = 0,
    heads: tuple[int, int] = (4, 2),
    dtype: str = "float32",
    mask: str = "none",
    plan: BlockPlan | None = None,
    **options: Any,
) -> tuple[float, float]:
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
        batch=2,
        heads_q=heads[0],
        heads_kv=heads[1],
        len_q=len_q,
        len_k=len_k,
        dim_qk=dim,
        dim_v=dim_v or dim,
        dtype=dtype,
        lse=True,
        mask=MaskKind(mask),
        block_plan=plan and (plan.block_q, plan.block_k, plan.indices.shape[-1]),
        **options,
    )
    out, lse = PortablePath(request, CONTEXT)(query, key, value, given, plan, None, (5, 1 << 40))
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
def test_kernel_agrees_with_float64(
    generator: torch.Generator, len_q: int, len_k: int, options: dict[str, Any]
) -> None:
    out, lse = run(generator, len_q, len_k, **options)
    assert out <= 2e-6
    assert lse <= 2e-6


@pytest.mark.usefixtures("divided")
@pytest.mark.parametrize("joined", [True, False], ids=["by the last program", "by a second kernel"])
@pytest.mark.parametrize(
    ("len_q", "len_k", "options"),
    [
        (1, 200, {}),
        (3, 260, {"heads": (6, 2)}),
        (2, 300, {"causal": BOTTOM, "window": (60, 0)}),
        (1, 130, {"heads": (8, 1)}),
    ],
)
def test_split_keys_are_joined(
    generator: torch.Generator,
    len_q: int,
    len_k: int,
    options: dict[str, Any],
    joined: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Either way, and the counters are left as they were."""
    if not joined:
        monkeypatch.setattr(PortablePath, "_workspace", lambda self, query: None)
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
    assert CONTEXT.workspaces.idle


@pytest.mark.usefixtures("divided")
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_result_that_must_repeat_is_joined_as_in_a_capture(generator: torch.Generator, deterministic: bool) -> None:
    query, key = (torch.randn(1, 2, length, 16, generator=generator) for length in (1, 70))
    request = AttentionRequest(
        batch=1,
        heads_q=2,
        heads_kv=2,
        len_q=1,
        len_k=70,
        dim_qk=16,
        dim_v=16,
        dtype="float32",
        deterministic=deterministic,
    )
    path = PortablePath(request, CONTEXT)
    path(query, key, key)
    (launch,) = path._launches.values()
    assert launch.partial > 0
    assert launch.joins != deterministic


@pytest.mark.usefixtures("divided")
@pytest.mark.parametrize("deterministic", [False, True], ids=["by the last program", "by a second kernel"])
@pytest.mark.parametrize("lowest", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_split_keys_of_very_low_rows_are_joined_by_their_weights(
    generator: torch.Generator, deterministic: bool, lowest: float
) -> None:
    """Their log-sum-exp has no digits left for how many keys each part has; the last part has fewer than the others."""
    query, key = torch.randn(1, 2, 1, 16, generator=generator), torch.randn(1, 2, 70, 16, generator=generator)
    mask = torch.randn(1, 2, 1, 70, generator=generator)
    mask[:, 0] = lowest
    request = AttentionRequest(
        batch=1,
        heads_q=2,
        heads_kv=2,
        len_q=1,
        len_k=70,
        dim_qk=16,
        dim_v=16,
        dtype="float32",
        lse=True,
        mask=MaskKind.ADDITIVE,
        deterministic=deterministic,
    )
    path = PortablePath(request, CONTEXT)
    out, _ = path(query, key, key, mask)
    (launch,) = path._launches.values()
    assert launch.partial > 0
    assert launch.joins != deterministic
    scores = (query @ key.mT / 4 + mask).double()  # float32 takes from the scores what their size leaves no digits for
    assert error(out, torch.softmax(scores, -1) @ key.double()) <= 1e-5


def test_streams_do_not_share_a_workspace() -> None:
    """Each has its own, the same at every call; one too many goes without. All of it is the session's memory."""
    memory = PooledMemory("cpu")
    made = StreamWorkspaces(memory)
    pieces = [made.on(stream) for stream in range(STREAMS)]
    for part in (0, 1):
        assert len({piece[part].data_ptr() for piece in pieces if piece is not None}) == STREAMS
    assert made.on(3) is pieces[3]
    assert made.on(1 << 40) is None
    assert memory.stats().in_use >= STREAMS * (1 << 20)
    made.close()
    assert memory.stats().in_use == 0


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


def test_a_last_block_that_is_cut_short_is_read_to_the_keys_end(generator: torch.Generator) -> None:
    """Keys are a multiple of the tiles and not of the blocks: some tiles of the last block have no key."""
    indices = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    plan = BlockPlan(64, 64, indices, torch.tensor([[[2, 1]]], dtype=torch.int32))
    assert run(generator, 96, 96, plan=plan, heads=(2, 2))[0] <= 2e-6


@pytest.mark.parametrize("spread", [False, True], ids=["side by side", "every second entry"])
def test_a_block_listed_twice_is_read_once(generator: torch.Generator, spread: bool) -> None:
    """Lists of 150 of 4 blocks: duplicates lie within a stretch of comparisons and beyond it."""
    indices = torch.randint(0, 4, (1, 2, 2, 150), generator=generator, dtype=torch.int32)
    if spread:
        indices = indices.repeat_interleave(2, -1)[..., ::2]
    counts = torch.tensor([150, 70], dtype=torch.int32).expand(1, 2, 2)
    plan = BlockPlan(16, 16, indices, counts)
    with borrowing(CONTEXT.memory) as borrow:
        once = listed_once(plan, CHIP, borrow)
    for head in range(2):
        for row in range(2):
            listed = indices[0, head, row, : int(counts[0, head, row])].tolist()
            assert once.indices[0, head, row, : int(once.counts[0, head, row])].tolist() == list(dict.fromkeys(listed))
    assert run(generator, 30, 60, plan=plan, heads=(2, 2))[0] <= 2e-6


def test_strides_are_taken_as_they_are(generator: torch.Generator) -> None:
    wide = torch.randn(2, 31, 3, 2 * 24 + 5, generator=generator)
    tensors = [wide[..., i : i + 48 : 2].transpose(1, 2) for i in (0, 1, 3)]
    request = AttentionRequest(
        batch=2,
        heads_q=3,
        heads_kv=3,
        len_q=31,
        len_k=31,
        dim_qk=24,
        dim_v=24,
        dtype="float32",
        last_dim_contiguous=False,
    )
    got = PortablePath(request, CONTEXT)(*tensors).out
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
            batch=3,
            heads_q=4,
            heads_kv=2,
            len_q=tokens,
            len_k=80,
            dim_qk=24,
            dim_v=24,
            dtype="float32",
            page_size=16,
            causal=BOTTOM,
            lse=True,
        )
        tables = SequenceMetadata(page_table=table, cache_seqlens=held)
        got = PortablePath(request, CONTEXT)(query, key, value, None, None, tables).out
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
        tiles = choose_tiles(request, 1, CHIP)
        splits = choose_splits(request, tiles, 1, keys, 1, CHIP)
        assert (splits.programs - 1) * splits.chunk < keys <= splits.programs * splits.chunk


def test_tiles_shrink_to_nothing_left() -> None:
    request = AttentionRequest(
        batch=1, heads_q=1, heads_kv=1, len_q=4096, len_k=4096, dim_qk=256, dim_v=256, dtype="bfloat16"
    )
    tiles, seen = choose_tiles(request, 4096, CHIP), []
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
        batch=1,
        heads_q=2,
        heads_kv=2,
        len_q=len_q,
        len_k=len_k,
        dim_qk=8,
        dim_v=8,
        dtype="float32",
        lse=True,
        mask=MaskKind.ADDITIVE,
        grads=frozenset({"q", "k", "v", "mask"}),
        grad_lse=True,
    )
    device = InterpretedBackend().devices()[0]
    out, lse = InterpretedBackend().open(device).bind(request)(*tensors)
    assert not bool(out.any())
    assert bool(torch.isneginf(lse).all())
    (out.sum() + torch.nan_to_num(lse, neginf=0.0).sum()).backward()
    assert all(t.grad is not None and t.grad.shape == t.shape and not bool(t.grad.any()) for t in tensors)


@pytest.mark.parametrize("check", ["contract", "refusals", "inputs_unchanged", "strides", "options"])
def test_conformance(check: str) -> None:
    result = check_backend(InterpretedBackend(), checks=[check], quick=True).results[0]
    assert result.status in ("passed", "skipped"), result.detail


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    ["dtypes", "lengths", "masks", "causal", "used_lengths", "fp8_cache", "gradients", "mask_gradient", "lse_gradient"],
)
def test_conformance_of_results(check: str) -> None:
    result = check_backend(InterpretedBackend(), checks=[check], quick=True).results[0]
    assert result.status in ("passed", "skipped"), result.detail


def test_dropout_keeps_pairs_as_if_drawn_one_by_one() -> None:
    """Its share, and the shares of pairs of neighbours along keys, rows and heads, are those of independent draws."""
    probability = 0.3
    keep = dropout_pattern(CHIP, (1, 2, 24, 2048), probability, (12, 1 << 35), "cpu").double()
    bound = 5 * math.sqrt(0.21 / keep.numel())
    assert abs(float(keep.mean()) - 0.7) <= bound
    other = dropout_pattern(CHIP, (1, 2, 24, 2048), probability, (13, 1 << 35), "cpu").double()
    centred = keep - 0.7
    for one, two in (
        (centred[..., ::2], centred[..., 1::2]),  # of one word
        (centred[..., 1:], centred[..., :-1]),
        (centred[..., 2:], centred[..., :-2]),
        (centred[:, :, 1:], centred[:, :, :-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred, other - 0.7),
    ):
        assert abs(float((one * two).mean())) <= 5 * 0.21 / math.sqrt(one.numel())


@pytest.mark.parametrize("probability", [1e-6, 0.5, 0.999])
def test_dropout_of_any_probability(probability: float) -> None:
    keep = dropout_pattern(CHIP, (1, 2, 16, 1024), probability, (1, 2), "cpu").double()
    assert abs(float(keep.mean()) - (1 - probability)) <= 5 * math.sqrt(probability / keep.numel()) + 2**-16
