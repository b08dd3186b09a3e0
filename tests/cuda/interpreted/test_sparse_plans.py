"""Plans of the sparse tilings by the device's kernels, in Triton's interpreter, against those that torch makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hal_cuda import kernels
from hal_cuda.kernels.extra import references
from hal_nn.sparse import SparseGate, learned, scores, selection, tiling_of
from hal_nn.sparse.attention import request_of

from hal_core import ContractError

FORMS = {
    "mean": ("dynamic_threshold", {}),
    "antidiagonal": ("dynamic_threshold", {"score": "antidiagonal"}),
    "whole blocks": ("dynamic_threshold", {"stride": 16, "budget": "row"}),
    "learned": ("learned", {"gate": SparseGate(4, 24, 2)}),
}


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Planning takes the kernels for tensors on the host; yields the names that it took."""
    taken = set[str]()

    def found(name: str, tensor: torch.Tensor) -> Any:
        taken.add(name)
        return getattr(kernels, name)

    with monkeypatch.context() as patch:
        for module in (learned, scores, selection):
            patch.setattr(module, "device_kernel", found)
        yield taken


def _sets(plan: Any) -> list[set[int]]:
    rows, counts = plan.indices.flatten(0, 2), plan.counts.flatten()
    return [set(row[:count].tolist()) for row, count in zip(rows, counts.tolist(), strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [(192, 192, "none"), (200, 200, "top_left"), (70, 150, "bottom_right")], ids=str)
def test_plans_are_those_of_torch(
    form: str, lengths: tuple[int, int, str], generator: torch.Generator, accelerated: set[str]
) -> None:
    name, options = FORMS[form]
    len_q, len_k, causal = lengths
    query, key = (
        torch.randn((2, heads, length, 24), generator=generator).transpose(1, 2).contiguous().transpose(1, 2)
        for heads, length in ((4, len_q), (2, len_k))
    )
    request = request_of(query, key, key, causal, None)
    tiling = tiling_of(name, 0.7, 16, **options)
    got = tiling.plan(request, {}, query=query, key=key)
    wanted = {"mean": {"triton_pool_rows"}, "learned": {"triton_pool_extremes"}, "whole blocks": set()}
    wanted_of_form = wanted.get(form, set()) | ({"triton_choose_blocks"} if form != "whole blocks" else set())
    assert wanted_of_form <= accelerated
    with pytest.MonkeyPatch.context() as plain:
        for module in (learned, scores, selection):
            plain.setattr(module, "device_kernel", lambda *_: None)
        want = tiling.plan(request, {}, query=query, key=key)
    assert torch.equal(got.counts, want.counts)
    assert _sets(got) == _sets(want)


@pytest.mark.parametrize("total", [0, 1, 37, 399, 600, 1199, 1200])
def test_a_choice_of_any_size(total: int, generator: torch.Generator) -> None:
    share = torch.rand((2, 3, 20, 20), generator=generator) ** 8
    share[1, :, :7] = 0.0
    hidden = torch.ones(20, 20, dtype=torch.bool).triu(3)
    forced = torch.eye(20, dtype=torch.bool)
    want = references.choose_blocks(share, hidden, forced, total)
    got = kernels.triton_choose_blocks(share, hidden, forced, total)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_equal_shares_stay_within_the_total_and_miss_at_most_one_a_row() -> None:
    share, none = torch.full((1, 2, 10, 30), 0.25), torch.zeros(10, 30, dtype=torch.bool)
    _, counts = kernels.triton_choose_blocks(share, none, none, 215)
    assert 215 - 20 <= int(counts.sum()) <= 215


def test_what_is_no_number_is_chosen_last() -> None:
    share, none = torch.rand((1, 1, 4, 8)) + 0.1, torch.zeros(4, 8, dtype=torch.bool)
    share[0, 0, 1] = float("nan")
    _, counts = kernels.triton_choose_blocks(share, none, none, 24)
    assert counts.flatten().tolist() == [8, 0, 8, 8]


def test_rows_longer_than_a_program_are_read_twice(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from hal_cuda.kernels.extra import block_scores

    monkeypatch.setattr(block_scores, "SCORED", 64)
    monkeypatch.setattr(block_scores, "_forms", {})
    block_scores._summing.cache_clear()
    given = references.draw_square_sums(generator)
    got = kernels.triton_square_sums(*given)
    block_scores._summing.cache_clear()
    assert torch.allclose(got, references.square_sums(*given), atol=1e-6)


def test_sizes_that_cannot_be_are_refused() -> None:
    share, none = torch.rand(1, 1, 4, 8), torch.zeros(4, 8, dtype=torch.bool)
    for call, message in (
        (lambda: kernels.triton_choose_blocks(share, none, none, 33), "total 33 of 32: use at most all"),
        (lambda: kernels.triton_choose_blocks(share, none[:2], none, 3), r"use float32 \[B, H, R, C\]"),
        (lambda: kernels.triton_pool_rows(share, 0), "size 0: use"),
        (lambda: kernels.triton_square_sums(share, 256, 256), "use at most 16384 in one"),
    ):
        with pytest.raises(ContractError, match=message):
            call()
