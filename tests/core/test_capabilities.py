"""`Capabilities`: what data refuses, why, and what to do instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fakes import NUMERICS, full, plain

from hal_core import FEATURES, AttentionRequest, Capabilities, Causal, Choice, Code, MaskKind, Numerics, Range, Refusal

BASE = AttentionRequest(batch=2, heads_q=4, heads_kv=4, len_q=5, len_k=7, dim_qk=64, dim_v=64, dtype="float32")

#: For each code that data decides: a change of the request that plain capabilities refuse for this reason alone.
ASKED: dict[Code, dict[str, Any]] = {
    Code.DTYPE: {"dtype": "float64"},
    Code.HEAD_DIM: {"dim_qk": 520, "dim_v": 520},
    Code.VALUE_DIM: {"dim_v": 32},
    Code.BATCH: {"batch": 0},
    Code.HEADS: {"heads_q": 0, "heads_kv": 0},
    Code.LENGTH: {"len_k": 0},
    Code.GROUPED_HEADS: {"heads_kv": 2},
    Code.STRIDES: {"last_dim_contiguous": False},
    Code.MASK: {"mask": MaskKind.BOOLEAN},
    Code.CAUSAL: {"causal": Causal.TOP_LEFT},
    Code.DIAGONAL: {"diagonal": 1},
    Code.WINDOW: {"window": (3, 3)},
    Code.SOFTCAP: {"softcap": 30.0},
    Code.DROPOUT: {"dropout": 0.1},
    Code.PACKED: {"packed": True},
    Code.PAGED: {"page_size": 16},
    Code.CACHE_DTYPE: {"cache_dtype": "float8_e4m3fn"},
    Code.BLOCK_PLAN: {"block_plan": (16, 16, 2)},
    Code.LSE: {"lse": True},
    Code.BACKWARD: {"grads": frozenset({"q"})},
    Code.LSE_GRADIENT: {"grad_lse": True},
    Code.DETERMINISTIC: {"deterministic": True},
    Code.MAX_ERROR: {"max_error": 1e-9},
}


@pytest.mark.parametrize("code", ASKED)
def test_what_is_not_claimed_is_refused_for_its_own_reason_alone(code: Code) -> None:
    refusals = plain().refusals(replace(BASE, **ASKED[code]))
    assert [refusal.code for refusal in refusals] == [code]
    assert refusals[0].field
    assert refusals[0].wanted
    assert refusals[0].offered


@pytest.mark.parametrize("code", set(ASKED) - {Code.BATCH, Code.HEADS, Code.HEAD_DIM, Code.MAX_ERROR})
def test_what_is_claimed_is_not_refused(code: Code) -> None:
    everything = full(features=FEATURES, page_sizes=Range(1), cache_dtypes={"float8_e4m3fn"})
    assert everything.refusals(replace(BASE, **ASKED[code])) == []


def test_the_gradient_of_a_mask_is_a_claim_of_its_own() -> None:
    asked = replace(BASE, mask=MaskKind.ADDITIVE, grads=frozenset({"q", "mask"}))
    assert [r.code for r in full(features=FEATURES - {"mask_grad"}).refusals(asked)] == [Code.MASK_GRADIENT]


def test_every_reason_is_given_at_once() -> None:
    asked = replace(BASE, dtype="bfloat16", dim_qk=80, dim_v=80, window=(1, 1), mask=MaskKind.ADDITIVE)
    codes = {r.code for r in plain(head_dim=Choice({32, 64, 96})).refusals(asked)}
    assert codes == {Code.DTYPE, Code.HEAD_DIM, Code.WINDOW, Code.MASK}


def test_nothing_claimed_means_nothing_runs() -> None:
    empty = Capabilities(dtypes=(), numerics={}, head_dim=Choice(()), masks=(), causal=())
    codes = {r.code for r in empty.refusals(BASE)}
    assert codes == {Code.DTYPE, Code.HEAD_DIM, Code.MASK, Code.CAUSAL}


def test_a_feature_that_does_not_exist_cannot_be_claimed() -> None:
    with pytest.raises(ValueError, match="telepathy"):
        plain(features={"lse", "telepathy"})


def test_a_dtype_without_an_error_bound_cannot_be_claimed() -> None:
    with pytest.raises(ValueError, match="float16"):
        Capabilities(dtypes={"float32", "float16"}, numerics={"float32": Numerics(relative=1e-5)}, head_dim=Range(1))


@pytest.mark.parametrize(
    ("capabilities", "changes", "fix"),
    [
        (plain(head_dim=Choice({32, 64, 96, 128})), {"dim_qk": 80, "dim_v": 80}, "pad to 96"),
        (plain(head_dim=Range(32, 256, multiple=32)), {"dim_qk": 80, "dim_v": 80}, "pad to 96"),
        (plain(head_dim=Range(1, 64)), {"dim_qk": 80, "dim_v": 80}, ""),
        (plain(), {"dim_v": 80}, "pad to 80"),
        (plain(dtypes={"float32", "float16"}), {"dtype": "bfloat16"}, "cast to float32"),
        (plain(length=Range(16, None, multiple=16)), {"len_q": 16, "len_k": 33}, "pad to 48"),
        (full(masks={MaskKind.NONE, MaskKind.ADDITIVE}), {"mask": MaskKind.BOOLEAN}, "convert it to 0 and -inf"),
        (full(dtypes={"float16", "float32"}), {"dtype": "float16", "max_error": 1e-4}, "cast to float32"),
        (full(causal={Causal.NONE}), {"causal": Causal.TOP_LEFT}, "pass a boolean mask"),
    ],
)
def test_a_refusal_says_what_to_do(capabilities: Capabilities, changes: dict[str, Any], fix: str) -> None:
    refusals = capabilities.refusals(replace(BASE, **changes))
    assert [refusal.fix for refusal in refusals] == [fix]


def test_sizes_of_pages_and_blocks_are_held_to_what_is_offered() -> None:
    some = full(features=FEATURES, page_sizes=Choice({16, 32}), block_sizes=Choice({64}))
    assert not some.refusals(replace(BASE, page_size=16, block_plan=(64, 64, 3)))
    codes = [r.code for r in some.refusals(replace(BASE, page_size=24, block_plan=(64, 32, 3)))]
    assert codes == [Code.PAGED, Code.BLOCK_PLAN]


@pytest.mark.parametrize(
    ("sizes", "inside", "outside"),
    [
        (Range(8, 64, multiple=8), (8, 16, 64), (0, 7, 12, 72)),
        (Range(1), (1, 10**9), (0, -1)),
        (Choice({32, 64}), (32, 64), (31, 96)),
    ],
)
def test_ranges_and_choices(sizes: Range | Choice, inside: tuple[int, ...], outside: tuple[int, ...]) -> None:
    assert all(value in sizes for value in inside)
    assert not any(value in sizes for value in outside)
    assert "8" not in sizes


def test_the_next_size_up() -> None:
    assert [Range(8, 64, multiple=8).next_up(value) for value in (1, 8, 9, 64, 65)] == [8, 8, 16, 64, None]
    assert Range(10, multiple=8).next_up(3) == 16  # the smallest member, not the bound
    assert [Choice({32, 96}).next_up(value) for value in (1, 33, 97)] == [32, 96, None]


def test_a_refusal_reads_as_a_sentence() -> None:
    refusal = Refusal("head_dim", "head_dim", "80", str(Choice({32, 64, 96})), "pad to 96")
    assert refusal.code is Code.HEAD_DIM
    assert str(refusal) == "head_dim  80 asked, 32, 64 or 96 offered  -> pad to 96"
    assert str(Range(1, 64)) == "1 to 64"
    assert str(Range(16, multiple=16)) == "16 and up in steps of 16"


def test_numerics_hold_for_the_request_s_dtype() -> None:
    exact = full(numerics=NUMERICS | {"float32": Numerics(relative=1e-6)})
    assert not exact.refusals(replace(BASE, max_error=1e-6))
    assert [r.code for r in exact.refusals(replace(BASE, max_error=0.9e-6))] == [Code.MAX_ERROR]
