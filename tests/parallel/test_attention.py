"""Attention of a sequence over ranks against one process: out, log-sum-exp and gradients, for every strategy and layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytestmark = pytest.mark.xdist_group("parallel")

LAYOUTS = ("contiguous", "zigzag", "striped")
WORLDS = (1, 2, 4)
BOUND = 1e-5

#: What a call may ask for, one a line.
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"options": {"is_causal": True}},
    "padded": {"options": {"is_causal": True}, "len_q": 21},
    "causal from the bottom right": {"options": {"causal": "bottom_right"}, "len_q": 11, "len_k": 24},
    "more rows than keys": {"options": {"causal": "bottom_right"}, "len_q": 24, "len_k": 13},
    "diagonal": {"options": {"causal": "top_left", "diagonal": -3}},
    "window": {"options": {"is_causal": True, "window": (4, None)}},
    "window on both sides": {"options": {"window": (3, 5)}},
    "grouped heads": {"options": {"is_causal": True}, "heads": 8, "heads_kv": 4, "batch": 2},
    "head sizes": {"dim": 8, "dim_v": 12, "options": {"scale": 0.3, "softcap": 5.0}},
    "boolean mask": {"mask": "boolean", "batch": 2},
    "boolean mask of heads": {"mask": "boolean", "mask_heads": 4, "options": {"is_causal": True}, "len_q": 21},
    "additive mask": {"mask": "additive", "options": {"is_causal": True}},
    "additive mask of heads": {"mask": "additive", "mask_heads": 4, "batch": 2, "len_q": 21},
    "mask of keys": {"mask": "additive", "mask_rows": 1},
    "mask of keys and heads": {"mask": "additive", "mask_rows": 1, "mask_heads": 4, "len_q": 22},
    "packed": {"cu_seqlens_q": [0, 5, 5, 19, 24], "cu_seqlens_k": [0, 5, 5, 19, 24], "options": {"is_causal": True}},
    "packed, other keys": {
        "len_q": 18, "len_k": 24, "cu_seqlens_q": [0, 7, 9, 18], "cu_seqlens_k": [0, 11, 12, 24],
        "options": {"causal": "bottom_right", "window": (5, None)},
    },
    "deterministic": {"options": {"is_causal": True, "deterministic": True}},
    "forward alone": {"options": {"is_causal": True}, "grads": False},
    "no token": {"len_q": 0},
    "one token": {"len_q": 1, "options": {"is_causal": True}},
}  # fmt: skip


def within(found: list[Any], cases: list[dict[str, Any]], bound: float = BOUND) -> None:
    wrong = [
        f"rank {rank}, {case}: {errors}"
        for rank, each in enumerate(found)
        for case, errors in zip(cases, each, strict=True)
        if max(errors.values()) > bound
    ]
    assert not wrong, "\n".join(wrong[:10])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("strategy", ["ring", "gathered", "ulysses", "pass_query"])
def test_results_are_those_of_one_process(ranks, strategy, world, seed):
    cases = [
        {**feature, "strategy": strategy, "layout": layout, "seed": seed + n}
        for n, (feature, layout) in enumerate(itertools.product(FEATURES.values(), LAYOUTS))
    ]
    within(ranks.run("compare_all", world, cases=cases), cases)


def test_a_ring_over_ulysses_gives_the_results_of_one_process(ranks, seed):
    cases = [
        {**feature, "strategy": "ring_ulysses", "layout": layout, "seed": seed + n}
        for n, (feature, layout) in enumerate(itertools.product(FEATURES.values(), LAYOUTS))
    ]
    within(ranks.run("compare_all", "2x2", cases=cases), cases)
