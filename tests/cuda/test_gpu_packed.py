"""Packed sequences on a GPU: each as if alone, whatever its length, its neighbours and its head size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gpu_reference import agrees, draw, exact, on_path
from torch import Tensor

import hal_core as hal
from hal_core import AttentionRequest, Causal, SequenceMetadata


def test_packed_sequences_do_not_see_each_other(gpu: str, seed: int) -> None:
    lengths = [100, 1, 700, 333]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    query, key, value = (draw(seed + i, 1, 4, sum(lengths), 128, torch.bfloat16) for i in range(3))
    got = hal.attention(
        query,
        key,
        value,
        is_causal=True,
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=700,
        max_seqlen_k=700,
        return_lse=True,
        backend=gpu,
    )
    for start, length in zip(ends.tolist(), lengths, strict=False):
        rows = slice(start, start + length)
        want = exact(query[:, :, rows], key[:, :, rows], value[:, :, rows], causal="top_left")
        agrees(hal.AttentionOutput(got.out[:, :, rows], got.lse[:, :, rows]), want, torch.bfloat16)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": "top_left"},
        {"causal": "bottom_right"},
        {"causal": "bottom_right", "diagonal": -37, "softcap": 8.0},
        {"causal": "bottom_right", "window": (200, 0)},
    ],
)
@pytest.mark.parametrize("same", [True, False], ids=["same lengths", "own lengths"])
def test_packed_sequences_on_the_hopper_kernel(
    gpu: str, seed: int, dim: int, options: dict[str, Any], same: bool
) -> None:
    packed_agree(gpu, seed, dim, options, same)


@pytest.mark.parametrize("layout", ["heads first", "heads last"])
@pytest.mark.parametrize(("dim", "dim_v"), [(40, 40), (104, 104), (200, 200), (128, 80)])
def test_packed_rows_end_where_their_head_size_does(gpu: str, seed: int, dim: int, dim_v: int, layout: str) -> None:
    for options in ({}, {"causal": "top_left"}):
        packed_agree(gpu, seed, dim, options, True, layout, dim_v)


def packed_agree(
    gpu: str, seed: int, dim: int, options: dict[str, Any], same: bool, layout: str = "heads first", dim_v: int = 0
) -> None:
    """Each sequence as if alone, though NaN lies behind the last one and around a sequence of its own."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel needs compute capability 9.0")
    lengths_q = [100, 1, 700, 0, 333, 64, 129]
    lengths_k = lengths_q if same else [300, 129, 700, 40, 1, 500, 0]
    ends = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda() for lengths in (lengths_q, lengths_k)]
    tables = SequenceMetadata(ends[0], ends[0] if same else ends[1])
    query = draw(seed, 1, 4, sum(lengths_q) + 77, dim, torch.bfloat16, layout)
    total_k = sum(lengths_k) + 77
    key = draw(seed + 1, 1, 2, total_k, dim, torch.bfloat16, "heads last")
    value = draw(seed + 2, 1, 2, total_k, dim_v or dim, torch.bfloat16, "heads last")
    poison = slice(int(ends[1][4]), int(ends[1][5]))
    for tensor in (key, value):
        tensor[:, :, sum(lengths_k) :] = math.nan
        tensor[:, :, poison] = math.nan
    request = AttentionRequest(
        batch=len(lengths_q),
        heads_q=4,
        heads_kv=2,
        len_q=700,
        len_k=700,
        dim_qk=dim,
        dim_v=dim_v or dim,
        dtype="bfloat16",
        device="cuda:0",
        packed=True,
        lse=True,
        **{**options, "causal": Causal(options.get("causal", "none"))},
    )
    call = on_path(gpu, "hopper", request)
    for _ in range(3):
        got = call(query, key, value, None, None, tables, None)
        for s, length in enumerate(lengths_q):
            rows = slice(int(ends[0][s]), int(ends[0][s]) + length)
            keys = slice(int(ends[1][s]), int(ends[1][s]) + lengths_k[s])
            if (keys.start == poison.start and keys.stop > keys.start) or not length:
                continue
            want = exact(query[:, :, rows], key[:, :, keys], value[:, :, keys], **options)
            agrees(hal.AttentionOutput(got.out[:, :, rows], got.lse[:, :, rows]), want, torch.bfloat16)


@pytest.mark.parametrize(
    "ends",
    [[0, 400, 1 << 30], [0, 1 << 30, 1000], [-600, 400, 1000], [400, -9, 1000], [0, 1000, 0, 1000], [2000, 3000, 4000]],
)
@pytest.mark.parametrize("path", ["hopper", "portable"])
def test_wrong_packed_lengths_stay_inside_the_tensors(
    gpu: str, seed: int, path: str, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bound call does not look at them: NaN beside the keys would show in the result, and rows beside it would
    change.
    """
    if path == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Hopper kernel needs compute capability 9.0")
    from hal_cuda.kernels.hopper import packed
    from hal_cuda.kernels.portable import launch as portable

    def surrounded(number: int) -> Tensor:
        whole = torch.full((1, 2, 1600, 128), math.nan, device="cuda", dtype=torch.bfloat16)
        whole[:, :, 300:1300] = draw(seed + number, 1, 2, 1000, 128, torch.bfloat16)
        return whole[:, :, 300:1300]

    query, key, value = (surrounded(number) for number in range(3))
    room = torch.full((1, 2, 1600, 128), 7.0, device="cuda", dtype=torch.bfloat16)
    for module in (packed, portable):
        monkeypatch.setattr(module, "empty_result", lambda *_: room[:, :, 300:1300])
    fine = [1000 * n // (len(ends) - 1) for n in range(len(ends))]
    request = AttentionRequest(
        batch=len(ends) - 1,
        heads_q=2,
        heads_kv=2,
        len_q=1000,
        len_k=1000,
        dim_qk=128,
        dim_v=128,
        dtype="bfloat16",
        device="cuda:0",
        packed=True,
        causal=Causal.BOTTOM_RIGHT,
    )
    call = on_path(gpu, path, request)
    wrong, right = (torch.tensor(each, dtype=torch.int32, device="cuda") for each in (ends, fine))
    for tables in (SequenceMetadata(wrong, right), SequenceMetadata(right, wrong), SequenceMetadata(wrong, wrong)):
        out = call(query, key, value, None, None, tables, None)
        assert bool(torch.isfinite(out[0] if isinstance(out, tuple) else out).all())
        assert bool((room[:, :, :300] == 7.0).all() and (room[:, :, 1300:] == 7.0).all())
