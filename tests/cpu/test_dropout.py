"""Dropout is a function of (seed, offset) and of each pair's place, and nothing else."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hal_cpu.kernels.dropout import keep_mask
from torch import Tensor

import hal_core as hal
from hal_core.testing import relative_error, request_of

sys.path.insert(0, str(Path(__file__).parent))
from cpu_drawing import Call, hold

SHAPE = (2, 4, 70, 90)


def kept(rng: tuple[int, int], probability: float, tile_size: int | None = None, packed: bool = False) -> Tensor:
    """Read the kept pairs off an identity matrix as value."""
    batch, heads, len_q, len_k = SHAPE
    query, key = torch.zeros(batch, heads, len_q, 8), torch.zeros(batch, 2, len_k, 8)
    value = torch.eye(len_k).expand(batch, 2, -1, -1)
    request = request_of(query, key, value, dropout_p=probability)
    session = hal.session("cpu:0")
    prepared = session.prepare_attention(query, key, value, tile_size, request=request)
    return session.compute_attention(prepared, rng=rng).out != 0


def test_the_same_pair_drops_the_same_weights_for_any_tile_size(seed: int) -> None:
    whole = kept((seed, 3), 0.4)
    for tile_size in (16, 33, 64):
        assert torch.equal(kept((seed, 3), 0.4, tile_size), whole)


def test_the_same_pair_drops_the_same_weights_in_any_thread(seed: int) -> None:
    whole = kept((seed, 3), 0.4)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: kept((seed, 3), 0.4), range(16)):
            assert torch.equal(found, whole)


def test_another_seed_or_offset_drops_others(seed: int) -> None:
    masks = [kept(rng, 0.5) for rng in ((seed, 0), (seed, 1), (seed + 1, 0), (seed + (1 << 40), 0), (-seed - 2, 0))]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert 0.45 < float((one == other).float().mean()) < 0.55


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_the_asked_share_is_dropped_in_every_row_and_column(probability: float, seed: int) -> None:
    rows, columns = 4096, 2048
    scratch = torch.empty(2 * rows * columns, dtype=torch.int32)
    keep = keep_mask(
        (seed, 0),
        probability,
        slice(0, 1),
        slice(0, 1),
        slice(0, rows),
        slice(0, columns),
        scratch,
        torch.empty(3 * rows, dtype=torch.int64),
    )[0, 0]
    spread = (probability * (1 - probability)) ** 0.5
    for dim, count in ((0, rows), (1, columns)):
        share = 1 - keep.double().mean(dim)
        deviations = (share - probability) / (spread / count**0.5)
        assert float(deviations.abs().max()) < 5.5  # of thousands of normal draws
        assert 0.9 < float(deviations.std()) < 1.1
    whole = (1 - float(keep.double().mean()) - probability) / (spread / (rows * columns) ** 0.5)
    assert abs(whole) < 5


def test_neighbours_are_dropped_independently(seed: int) -> None:
    scratch = torch.empty(2 * 2048 * 2048, dtype=torch.int32)
    keep = (
        keep_mask(
            (seed, 0),
            0.5,
            slice(0, 1),
            slice(0, 1),
            slice(0, 2048),
            slice(0, 2048),
            scratch,
            torch.empty(3 * 2048, dtype=torch.int64),
        )[0, 0].double()
        - 0.5
    )
    for down, right in ((1, 0), (0, 1), (1, 1), (16, 0), (0, 16), (1024, 1024)):
        other = keep.roll((down, right), (0, 1))
        assert abs(float((keep * other).mean())) * 4 < 5 / 2048


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 8.0}, {"causal": hal.Causal.BOTTOM_RIGHT, "return_lse": True}], ids=str
)
def test_values_and_gradients_with_dropout_agree_with_float64(options: dict[str, object], seed: int) -> None:
    batch, heads, len_q, len_k = SHAPE
    torch.manual_seed(seed)
    query, key, value = (
        torch.randn(batch, heads, len_q, 16),
        torch.randn(batch, 2, len_k, 16),
        torch.randn(batch, 2, len_k, 24),
    )
    mask = torch.randn(len_q, len_k)
    rng = (seed, 7)
    call = Call(query, key, value, mask, None, None, {"dropout_p": 0.3, **options}, frozenset({"q", "k", "v", "mask"}))
    hold(call, kept(rng, 0.3), lambda leaves: call._replace(options=call.options | {"rng": rng}).run(leaves))


def test_packed_sequences_drop_what_a_batch_of_them_drops(seed: int) -> None:
    torch.manual_seed(seed)
    dense = [torch.randn(2, 4, 30, 16) for _ in range(3)]
    packed = [t.transpose(0, 1).reshape(1, 4, 60, 16) for t in dense]
    ends = torch.tensor([0, 30, 60], dtype=torch.int32)
    options = {"dropout_p": 0.4, "rng": (seed, 0), "backend": "cpu"}
    want = hal.attention(*dense, **options)
    got = hal.attention(*packed, **options, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=30, max_seqlen_k=30)
    assert relative_error(got.view(4, 2, 30, 16).transpose(0, 1), want) < 1e-6
