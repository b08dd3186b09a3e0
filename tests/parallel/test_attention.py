"""Attention over ranks against one process: out, log-sum-exp and gradients, for every strategy and layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hal_parallel.layout import make_layout, unshard

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
        "len_q": 18,
        "len_k": 24,
        "cu_seqlens_q": [0, 7, 9, 18],
        "cu_seqlens_k": [0, 11, 12, 24],
        "options": {"causal": "bottom_right", "window": (5, None)},
    },
    "deterministic": {"options": {"is_causal": True, "deterministic": True}},
    "forward alone": {"options": {"is_causal": True}, "grads": False},
    "no token": {"len_q": 0},
    "one row on each rank": {"mask": "additive", "mask_heads": 4, "len_q": 3, "len_k": 9, "batch": 2},
    "one row and key on each rank": {"mask": "boolean", "len_q": 4, "batch": 2},
    "one token": {"len_q": 1, "options": {"is_causal": True}},
}


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
        if world == 4 or n // 3 % 3 == n % 3  # of fewer ranks, each feature in one layout
    ]
    within(ranks.run("compare_all", world, cases=cases), cases)


def test_a_ring_over_ulysses_gives_the_results_of_one_process(ranks, seed):
    cases = [
        {**feature, "strategy": "ring_ulysses", "layout": layout, "seed": seed + n}
        for n, (feature, layout) in enumerate(itertools.product(FEATURES.values(), LAYOUTS))
    ]
    within(ranks.run("compare_all", "2x2", cases=cases), cases)


DROPOUT = {"dropout_p": 0.3, "rng": (11, 7)}
DROPPED = (
    {"options": {**DROPOUT, "is_causal": True}, "heads": 8, "batch": 2, "len_q": 21},
    {"options": DROPOUT, "mask": "boolean", "mask_heads": 4},
    {"options": {**DROPOUT, "is_causal": True}, "mask": "additive"},
)


@pytest.mark.parametrize("place", [2, 4, "2x2"])
def test_heads_that_travel_apart_give_the_same_results(ranks, place, seed):
    names = ("causal", "grouped heads", "boolean mask of heads", "additive mask", "mask of keys and heads", "packed")
    strategy = "ring_ulysses" if place == "2x2" else "ring"
    cases = [
        {**feature, "strategy": strategy, "layout": "zigzag", "seed": seed}
        for feature in (*(FEATURES[name] for name in names), *DROPPED)
    ]
    within(ranks.run("compare_by_heads", place, cases=cases), cases)


@pytest.mark.parametrize("world", WORLDS)
def test_dropout_follows_the_positions_in_the_sequence(ranks, world, seed):
    """The pattern is that of the whole sequence for any number of ranks, layout and strategy, in both passes."""
    strategies = ("ring", "gathered", "ulysses", "pass_query")
    cases = [
        {**feature, "strategy": strategy, "layout": layout, "seed": seed}
        for feature, strategy, layout in itertools.product(DROPPED, strategies, LAYOUTS)
    ]
    within(ranks.run("compare_all", world, cases=cases), cases)


def test_dropout_without_rng_is_drawn_by_the_first_rank(ranks, seed):
    """Ranks whose generators differ run one pattern."""
    cases = [{"options": {"dropout_p": 0.5}, "strategy": "gathered", "grads": False, "seed": seed}]
    first, second = (ranks.run("drawn_dropout", 2, cases=cases) for _ in range(2))
    assert first[0] == first[1]
    assert first != second


@pytest.mark.parametrize("device", ["lightmatter:0", pytest.param("luminous:0", marks=pytest.mark.slow)])
def test_noise_follows_the_positions_in_the_sequence(ranks, device, seed):
    """A device's noise is that of one rank with the same rng for any number of ranks, layout and strategy."""
    case: dict[str, Any] = {"len_q": 512, "dim": 16, "grads": False, "seed": seed, "strategy": "ring"}
    options = {"is_causal": True, "rng": (5, 3)}
    case |= {"backend": device, "options": options}
    others = [case, case | {"options": options | {"rng": (5, 4)}}, case | {"backend": "cpu"}]
    want, other, exact = (found["out"] for found in ranks.run("results", 1, cases=others)[0])
    assert 1e-4 < distance(other, want) < 2 * distance(want, exact)
    strategies = ("ring", "gathered", "ulysses", "pass_query")
    for world, layout in ((2, "contiguous"), (4, "zigzag")):
        cases = [case | {"strategy": strategy, "layout": layout} for strategy in strategies]
        parts = ranks.run("results", world, cases=cases)
        for n, strategy in enumerate(strategies):
            got = unshard([found[n]["out"] for found in parts], make_layout(layout, 512, world))
            assert distance(got, want) < 1e-5, (world, layout, strategy)
    said = ranks.run("refused", 4, cases=[[case | {"layout": "striped"}] * 4])
    assert all("tokens over 4 ranks cuts them apart: use contiguous or zigzag" in text for [text] in said)


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("device", ["opencl", "kpu"])
def test_other_devices_inside_give_the_same_results(ranks, device, seed):
    features = [FEATURES[name] for name in ("causal", "padded", "window", "grouped heads", "boolean mask")]
    features.append(DROPPED[0])
    cases = [
        {**feature, "strategy": strategy, "layout": "zigzag", "seed": seed, "backend": device}
        for feature, strategy in itertools.product(features, ("ring", "ulysses"))
    ]
    within(ranks.run("compare_all", 2, cases=cases), cases)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["opencl", "kpu"])
@pytest.mark.parametrize("world", WORLDS)
def test_every_strategy_and_layout_over_other_devices(ranks, device, world, seed):
    features = [FEATURES[name] for name in ("causal", "padded", "grouped heads", "boolean mask", "additive mask")]
    strategies = ("ring", "gathered", "ulysses", "pass_query")
    cases = [
        {**feature, "strategy": strategy, "layout": layout, "seed": seed, "backend": device}
        for feature, strategy, layout in itertools.product(features, strategies, LAYOUTS)
    ]
    within(ranks.run("compare_all", world, cases=cases), cases)


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float64", 1e-12), ("bfloat16", 2e-2), ("float16", 5e-3)], ids=lambda value: str(value)
)
def test_dtypes(ranks, dtype, bound, seed):
    cases = [
        {"dtype": dtype, "strategy": strategy, "layout": "zigzag", "options": {"is_causal": True}, "seed": seed}
        for strategy in ("ring", "gathered", "ulysses", "pass_query")
    ]
    within(ranks.run("compare_all", 4, cases=cases), cases, bound)


def test_equal_calls_give_equal_bits(ranks, seed):
    case = {
        "strategy": "ring",
        "layout": "striped",
        "options": {"is_causal": True, "deterministic": True},
        "seed": seed,
    }
    for first, second in ranks.run("results", 4, cases=[case, case]):
        assert all(first[name].equal(second[name]) for name in first)


def test_explicit_token_indices_are_a_layout(ranks, seed):
    """Tokens in any order, unevenly held: steps that no two pieces share are said by a mask."""
    held = [
        [5, 3, 17, 0, 1, 2, -1],
        [4, 6, 8, 10, 12, 14, 16],
        [7, 9, -1, -1, 11, 13, 15],
        [18, 19, 20, 21, 22, 23, -1],
    ]
    cases = [
        {"indices": held, "options": options, "strategy": strategy, "seed": seed, "mask": mask}
        for options in ({"is_causal": True}, {"is_causal": True, "window": (5, None)})
        for strategy in ("ring", "gathered", "ulysses", "pass_query")
        for mask in (None, "boolean", "additive")
    ]
    within(ranks.run("compare_all", 4, cases=cases), cases)
