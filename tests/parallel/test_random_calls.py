"""Random calls: right, or refused on all ranks with one sentence; none hangs."""

from __future__ import annotations

from typing import Any

import pytest

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings, strategies as st  # noqa: E402

pytestmark = pytest.mark.xdist_group("parallel")
BOUND = 1e-5


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """A call; some ask for what no rank runs."""
    group = draw(st.sampled_from([1, 1, 2, 4]))
    heads_kv = draw(st.sampled_from([1, 2, 3, 4]))
    len_q = draw(st.integers(0, 40))
    case: dict[str, Any] = {
        "seed": draw(st.integers(0, 2**31)),
        "batch": draw(st.integers(1, 2)),
        "heads": heads_kv * group,
        "heads_kv": heads_kv,
        "len_q": len_q,
        "len_k": draw(st.one_of(st.just(len_q), st.integers(0, 40))),
        "dim": draw(st.sampled_from([4, 8, 12])),
        "dim_v": draw(st.sampled_from([None, None, 5])),
        "strategy": draw(
            st.sampled_from(["ring", "ring", "gathered", "ulysses", "pass_query", "auto", "ring_ulysses"])
        ),
        "grads": draw(st.booleans()),
        "timeout": 20,
    }
    names = ("contiguous", "zigzag", "striped")
    case["layout"] = draw(st.one_of(st.sampled_from(names), st.tuples(st.sampled_from(names), st.sampled_from(names))))
    options: dict[str, Any] = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "causal": st.sampled_from(["none", "top_left", "bottom_right"]),
                "diagonal": st.integers(-9, 9),
                "window": st.tuples(*[st.one_of(st.none(), st.integers(0, 12))] * 2),
                "softcap": st.sampled_from([5.0, -1.0]),
                "scale": st.sampled_from([0.1, 0.5, 0.0]),
            },
        )
    )
    if draw(st.integers(0, 4)) == 0:
        edges = sorted(draw(st.lists(st.integers(0, len_q), max_size=4)))
        case |= {"cu_seqlens_q": [0, *edges, len_q], "cu_seqlens_k": [0, *edges, len_q], "len_k": len_q, "batch": 1}
    elif draw(st.booleans()):
        case["mask"] = draw(st.sampled_from(["boolean", "additive"]))
        case["mask_heads"] = draw(st.sampled_from([1, case["heads"]]))
        case["mask_rows"] = draw(st.sampled_from([1, len_q]))
    return case | {"options": options}


def check(ranks: Any, world: int, case: dict[str, Any]) -> None:
    found = [each[0] for each in ranks.run("tried", world, cases=[case])]
    said = [each for each in found if isinstance(each, str)]
    if said:
        assert len(said) == world, found
        assert all(text.startswith(("ContractError: ", "UnsupportedError: ")) for text in said), found
        wrong = case["options"].get("softcap") == -1.0
        wrong |= case["strategy"] == "ring_ulysses"
        wrong |= case["strategy"] == "ulysses" and case["heads_kv"] % world != 0
        assert wrong, f"refused without need: {said[0]}"
    else:
        assert max(max(errors.values()) for errors in found) <= BOUND, found


@pytest.mark.parametrize("world", [2, 4])
def test_random_calls_are_right_or_refused_on_all_ranks(ranks, world):
    @settings(max_examples=60)
    @given(case=calls())
    def run(case: dict[str, Any]) -> None:
        check(ranks, world, case)

    run()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_five_hundred_random_calls_are_right_or_refused_on_all_ranks(ranks, world):
    @settings(max_examples=500, derandomize=False)
    @given(case=calls())
    def run(case: dict[str, Any]) -> None:
        check(ranks, world, case)

    run()
