"""`AttentionRequest`: sizes, work and the JSON form."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from hal_core import AttentionRequest, Causal, MaskKind
from hal_core.plans import visible_keys

BASE = AttentionRequest(batch=2, heads_q=6, heads_kv=3, len_q=5, len_k=7, dim_qk=8, dim_v=4, dtype="float32")


def seen(request: AttentionRequest, row: int, key: int) -> bool:
    """Whether a query row reads a key: the definition of causal and window, once more and pair by pair."""
    offset = request.diagonal + (request.len_k - request.len_q if request.causal is Causal.BOTTOM_RIGHT else 0)
    left, right = request.window or (None, None)
    return (
        (request.causal is Causal.NONE or key <= row + offset)
        and (left is None or key >= row + offset - left)
        and (right is None or key <= row + offset + right)
    )


def random_pattern(draw: random.Random) -> AttentionRequest:
    side = lambda: draw.choice([None, 0, 1, 2, 5, 40])  # noqa: E731
    return replace(
        BASE,
        len_q=draw.randint(0, 23),
        len_k=draw.randint(0, 23),
        causal=draw.choice(list(Causal)),
        diagonal=draw.choice([0, 0, 1, -1, 3, -4, 30, -30]),
        window=draw.choice([None, (side(), side()), (side(), side())]),
    )


def test_visible_work_is_the_count_of_visible_pairs(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(600):
        r = random_pattern(draw)
        pairs = sum(seen(r, row, key) for row in range(r.len_q) for key in range(r.len_k))
        assert r.visible_macs == 2 * 6 * pairs * 12, r


def test_visible_keys_are_those_of_the_definition(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(300):
        r = random_pattern(draw)
        for row in range(r.len_q):
            start, stop = visible_keys(r, row, r.len_q, r.len_k)
            assert list(range(start, stop)) == [key for key in range(r.len_k) if seen(r, row, key)], (r, row)


def test_a_block_plan_bounds_the_visible_work() -> None:
    dense = replace(BASE, len_q=64, len_k=64)
    assert replace(dense, block_plan=(16, 16, 1)).visible_macs * 4 == dense.visible_macs
    assert replace(dense, block_plan=(16, 16, 9)).visible_macs == dense.visible_macs


def test_dense_work_and_bytes() -> None:
    assert BASE.macs == 2 * 6 * 5 * 7 * (8 + 4)
    assert BASE.bytes_moved == 4 * (2 * 6 * 5 * 12 + 2 * 3 * 7 * 12)
    assert replace(BASE, cache_dtype="float8_e4m3fn").bytes_moved == 4 * 2 * 6 * 5 * 12 + 2 * 3 * 7 * 12


def test_the_default_scale_is_that_of_the_key_size() -> None:
    assert BASE.effective_scale == pytest.approx(8**-0.5)
    assert replace(BASE, scale=0.0).effective_scale == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": (3, None), "block_plan": (16, 32, 4), "causal": Causal.BOTTOM_RIGHT, "diagonal": -2},
        {"grads": frozenset({"q", "mask"}), "mask": MaskKind.ADDITIVE, "lse": True, "grad_lse": True},
        {"softcap": 30.0, "scale": 0.5, "dropout": 0.25, "packed": True, "page_size": 16, "max_error": 1e-3},
    ],
)
def test_a_request_survives_json(changes: dict[str, object]) -> None:
    request = replace(BASE, **changes)  # type: ignore[arg-type]
    again = AttentionRequest.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again == request
    assert hash(again) == hash(request)


def test_the_description_names_everything_that_was_asked() -> None:
    request = replace(
        BASE,
        causal=Causal.TOP_LEFT,
        mask=MaskKind.BOOLEAN,
        window=(4, 0),
        softcap=20.0,
        dropout=0.1,
        packed=True,
        page_size=16,
        block_plan=(8, 8, 2),
        grads=frozenset({"q"}),
        lse=True,
    )
    text = request.describe()
    for part in (
        "batch 2",
        "heads 6/3",
        "5 x 7",
        "head_dim 8/4",
        "float32",
        "causal",
        "boolean mask",
        "window (4, 0)",
        "softcap 20",
        "dropout 0.1",
        "packed",
        "pages of 16",
        "block plan (8, 8, 2)",
        "gradients of q",
        "log-sum-exp",
    ):
        assert part in text
    assert BASE.describe() == "batch 2, heads 6/3, 5 x 7, head_dim 8/4, float32"
