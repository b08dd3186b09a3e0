"""Bad input: one sentence that says what was given, what is wanted and what to do, and nothing is run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeBackend, full, plain

import hal_core as hal
from hal_core import FEATURES, BlockPlan, ContractError, Range, UnsupportedError

Fake = Callable[..., FakeBackend]
NAN, INF = float("nan"), float("inf")


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def table(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


Q = t(2, 4, 5, 8)
#: What is wrong -> (query, key, value, options, a part of the sentence).
BAD: dict[str, tuple[Any, Any, Any, dict[str, Any], str]] = {
    "rank 1": (t(8), t(8), t(8), {}, "query has shape [8]: reshape it to [batch, heads"),
    "rank 5": (Q, t(3, 3, 4, 5, 8), Q, {}, "[3, 3, 4, 5, 8]"),
    "rank 3 with a cache's scales": (
        t(4, 5, 8),
        t(4, 5, 8),
        t(4, 5, 8),
        {"key_scale": t(1), "value_scale": t(1)},
        "query has shape [4, 5, 8]: reshape it to [batch, heads",
    ),
    "rank of value": (Q, Q, t(2, 4, 5), {}, "[2, 4, 5]"),
    "no tensor": (np.zeros((2, 4, 5, 8), np.float32), Q, Q, {}, "query is a ndarray: pass a torch tensor"),
    "nothing": (Q, None, Q, {}, "key is a NoneType"),
    "a list": (Q, Q, [1.0], {}, "value is a list"),
    "batch": (Q, t(3, 4, 5, 8), t(3, 4, 5, 8), {}, "batch 2 of query and 3 of key were given"),
    "batch of value": (Q, Q, t(3, 4, 5, 8), {}, "batch, heads and length must be equal"),
    "heads": (Q, t(2, 3, 5, 8), t(2, 3, 5, 8), {"enable_gqa": True}, "4 query heads and 3 key heads were given"),
    "fewer query heads": (t(2, 2, 5, 8), Q, Q, {"enable_gqa": True}, "must be a multiple"),
    "no key heads": (Q, t(2, 0, 5, 8), t(2, 0, 5, 8), {"enable_gqa": True}, "0 key heads"),
    "heads of value": (Q, Q, t(2, 2, 5, 8), {}, "must be equal"),
    "grouped heads unasked": (Q, t(2, 2, 5, 8), t(2, 2, 5, 8), {}, "pass enable_gqa=True"),
    "lengths of key and value": (Q, Q, t(2, 4, 6, 8), {}, "key [2, 4, 5, 8] and value [2, 4, 6, 8]"),
    "head size": (Q, t(2, 4, 5, 16), t(2, 4, 5, 16), {}, "head_dim 8 of query and 16 of key"),
    "head size 0": (t(2, 4, 5, 0), t(2, 4, 5, 0), Q, {}, "head_dim of 0"),
    "value size 0": (Q, Q, t(2, 4, 5, 0), {}, "head_dim of 0"),
    "dtypes": (Q, t(2, 4, 5, 8, dtype=torch.float16), t(2, 4, 5, 8, dtype=torch.float16), {}, "cast them to one dtype"),
    "dtype of value": (Q, Q, t(2, 4, 5, 8, dtype=torch.bfloat16), {}, "cast them to one dtype"),
    "integers": (Q.int(), Q.int(), Q.int(), {}, "query is torch.int32: cast it"),
    "complex": (Q.cfloat(), Q.cfloat(), Q.cfloat(), {}, "query is torch.complex64"),
    "FP8 query": (Q.to(torch.float8_e5m2),) * 3 + ({}, "only key and value may be FP8"),
    "FP8 without scales": (Q, Q.to(torch.float8_e5m2), Q.to(torch.float8_e5m2), {}, "pass key_scale and value_scale"),
    "devices": (
        Q,
        t(2, 4, 5, 8, device="meta"),
        t(2, 4, 5, 8, device="meta"),
        {},
        "key on meta and value on meta were given",
    ),
    "sparse": (Q.to_sparse(), Q, Q, {}, "query is torch.sparse_coo"),
    "mask of a wrong length": (
        Q,
        Q,
        Q,
        {"attn_mask": torch.ones(5, 6, dtype=torch.bool)},
        "attn_mask has shape [5, 6]",
    ),
    "mask of wrong heads": (Q, Q, Q, {"attn_mask": torch.ones(2, 3, 5, 5)}, "broadcasts to [2, 4, 5, 5]"),
    "mask of rank 1": (Q, Q, Q, {"attn_mask": torch.ones(5)}, "attn_mask has shape [5]"),
    "mask of rank 5": (Q, Q, Q, {"attn_mask": torch.ones(1, 2, 4, 5, 5)}, "attn_mask has shape"),
    "mask of integers": (Q, Q, Q, {"attn_mask": torch.ones(5, 5, dtype=torch.int64)}, "attn_mask is torch.int64"),
    "mask of another float": (Q, Q, Q, {"attn_mask": torch.ones(5, 5, dtype=torch.float16)}, "torch.float16"),
    "mask elsewhere": (Q, Q, Q, {"attn_mask": t(5, 5, device="meta")}, "attn_mask on meta"),
    "mask that is none": (Q, Q, Q, {"attn_mask": [[True]]}, "attn_mask is a list"),
    "NaN scale": (Q, Q, Q, {"scale": NAN}, "scale nan was given"),
    "infinite scale": (Q, Q, Q, {"scale": INF}, "scale inf was given"),
    "scale as text": (Q, Q, Q, {"scale": "0.5"}, "scale '0.5' was given"),
    "scale as a tensor of two": (Q, Q, Q, {"scale": torch.tensor([0.5, 0.5])}, "scale"),
    "a scale that is trained": (Q, Q, Q, {"scale": torch.tensor(0.5, requires_grad=True)}, "scale"),
    "scale above every float": (Q, Q, Q, {"scale": 10**400}, "scale of 1329 bits was given"),
    "no dropout": (Q, Q, Q, {"dropout_p": None}, "dropout_p None was given"),
    "causal as text": (Q, Q, Q, {"is_causal": "yes"}, "is_causal 'yes' was given: pass True or False"),
    "a diagonal of 400 digits": (Q, Q, Q, {"diagonal": 10**400}, "diagonal of 1329 bits was given"),
    "a window of 400 digits": (Q, Q, Q, {"window": (10**400, 0)}, "was given: use (left, right)"),
    "a list as objective": (Q, Q, Q, {"objective": ["time"]}, "objective ['time'] was given"),
    "transfer as a number": (Q, Q, Q, {"transfer": 5}, "transfer=5 was given: use True, False or None"),
    "an integer mask": (
        Q,
        Q,
        Q,
        {"attn_mask": torch.ones(5, 5, dtype=torch.int32)},
        "pass bool (True: attend), or torch.float32,",
    ),
    "a nested tensor": (
        torch.nested.nested_tensor([Q[0]]),
        Q,
        Q,
        {},
        "query is a nested tensor",
    ),
    "a block plan of text": (
        Q,
        Q,
        Q,
        {"block_plan": hal.BlockPlan("8", 8, torch.zeros(1, 1, 1, 1).int(), torch.ones(1, 1, 1).int())},  # type: ignore[arg-type]
        "blocks of '8' x 8 were given",
    ),
    "packed lengths as text": (
        t(1, 4, 5, 8),
        t(1, 4, 5, 8),
        t(1, 4, 5, 8),
        {
            "cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, 5], dtype=torch.int32),
            "max_seqlen_q": "a",
            "max_seqlen_k": 5,
        },
        "max_seqlen_q 'a' and max_seqlen_k 5 were given",
    ),
    "FP8 scales of a wrong shape": (
        Q,
        Q.to(torch.float8_e5m2),
        Q.to(torch.float8_e5m2),
        {"key_scale": torch.ones(3), "value_scale": torch.ones(1)},
        "key_scale [3] torch.float32 was given: pass float32 that broadcasts to [2, 4, 1, 8]",
    ),
    "NaN softcap": (Q, Q, Q, {"softcap": NAN}, "softcap nan"),
    "softcap of 0": (Q, Q, Q, {"softcap": 0.0}, "softcap 0.0"),
    "negative softcap": (Q, Q, Q, {"softcap": -3.0}, "softcap -3.0"),
    "negative dropout": (Q, Q, Q, {"dropout_p": -0.1}, "dropout_p -0.1"),
    "dropout above 1": (Q, Q, Q, {"dropout_p": 1.5}, "dropout_p 1.5"),
    "NaN dropout": (Q, Q, Q, {"dropout_p": NAN}, "dropout_p nan"),
    "NaN error": (Q, Q, Q, {"max_error": NAN}, "max_error nan"),
    "negative error": (Q, Q, Q, {"max_error": -1.0}, "max_error -1.0"),
    "negative window": (Q, Q, Q, {"window": (-1, 0)}, "window (-1, 0) was given"),
    "window of one side": (Q, Q, Q, {"window": (1,)}, "window (1,)"),
    "window of three sides": (Q, Q, Q, {"window": (1, 1, 1)}, "window (1, 1, 1)"),
    "window as a number": (Q, Q, Q, {"window": 4}, "window 4"),
    "window of halves": (Q, Q, Q, {"window": (1.5, 0)}, "window (1.5, 0)"),
    "window as a list": (Q, Q, Q, {"window": [1, -2]}, "window [1, -2]"),
    "unknown causal": (Q, Q, Q, {"causal": "diagonal"}, "causal 'diagonal' was given"),
    "causal twice": (Q, Q, Q, {"is_causal": True, "causal": "bottom_right"}, "is_causal is"),
    "half a diagonal": (Q, Q, Q, {"diagonal": 1.5}, "diagonal 1.5"),
    "rng of one number": (Q, Q, Q, {"dropout_p": 0.1, "rng": (1,)}, "rng (1,)"),
    "negative rng": (Q, Q, Q, {"dropout_p": 0.1, "rng": (-1, 0)}, "rng (-1, 0)"),
    "no block plan": (Q, Q, Q, {"block_plan": (1, 1)}, "block_plan is a tuple"),
    "blocks of 0": (Q, Q, Q, {"block_plan": BlockPlan(0, 4, table(), table())}, "blocks of 0"),
    "plan of wrong rows": (
        Q,
        Q,
        Q,
        {"block_plan": BlockPlan(4, 4, t(1, 1, 3, 1, dtype=torch.int32), t(1, 1, 3, dtype=torch.int32))},
        "use int32",
    ),
    "plan of floats": (Q, Q, Q, {"block_plan": BlockPlan(4, 4, t(1, 1, 2, 1), t(1, 1, 2))}, "torch.float32"),
    "plan beyond the keys": (
        Q,
        Q,
        Q,
        {"block_plan": BlockPlan(4, 4, t(1, 1, 2, 1, dtype=torch.int32) + 2, t(1, 1, 2, dtype=torch.int32) + 1)},
        "outside 0 to 1",
    ),
    "count over its list": (
        Q,
        Q,
        Q,
        {"block_plan": BlockPlan(4, 4, t(1, 1, 2, 1, dtype=torch.int32), t(1, 1, 2, dtype=torch.int32) + 2)},
        "over its list",
    ),
    "negative count": (
        Q,
        Q,
        Q,
        {"block_plan": BlockPlan(4, 4, t(1, 1, 2, 1, dtype=torch.int32), t(1, 1, 2, dtype=torch.int32) - 1)},
        "count",
    ),
    "one cumulative length": (t(1, 4, 5, 8), t(1, 4, 5, 8), t(1, 4, 5, 8), {"cu_seqlens_q": table(0, 5)}, "pass both"),
    "scales of a cache that has none": (Q, Q, Q, {"key_scale": t(1), "value_scale": t(1)}, "key_scale"),
    "int8 without scales": (Q, Q.to(torch.int8), Q.to(torch.int8), {}, "pass key_scale and value_scale"),
    "int8 query": (Q.to(torch.int8),) * 3 + ({}, "only key and value may be FP8, int8 or int4"),
    "int4 of another head size": (Q, Q.to(torch.uint8), Q.to(torch.uint8), {}, "head_dim 8 of query and 16 of key"),
    "value scales of other tokens": (
        Q,
        Q.to(torch.int8),
        Q.to(torch.int8),
        {"key_scale": t(1), "value_scale": t(2, 4, 3, 1)},
        "value_scale [2, 4, 3, 1] torch.float32 was given: pass float32 that broadcasts to [2, 4, 5, 1]",
    ),
    "value scales of channels": (
        Q,
        Q.to(torch.int8),
        Q.to(torch.int8),
        {"key_scale": t(1), "value_scale": t(4, 1, 8)},
        "pass float32 that broadcasts to [2, 4, 1, 1]",
    ),
    "one scale": (Q, Q.to(torch.float8_e5m2), Q.to(torch.float8_e5m2), {"key_scale": t(1)}, "value_scale"),
}
PACKED = {"max_seqlen_q": 3, "max_seqlen_k": 3}
P = t(1, 4, 5, 8)
BAD_TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "no longest length of one": (
        {"cu_seqlens_q": table(0, 5), "cu_seqlens_k": table(0, 5), "max_seqlen_q": 3},
        "no step over 3",
    ),
    "int64": (
        PACKED | {"cu_seqlens_q": table(0, 3, 5, dtype=torch.int64), "cu_seqlens_k": table(0, 3, 5)},
        "cu_seqlens_q is",
    ),
    "another device": (
        PACKED | {"cu_seqlens_q": table(0, 3, 5).to("meta"), "cu_seqlens_k": table(0, 3, 5)},
        "on meta and query on cpu",
    ),
    "a list": (PACKED | {"cu_seqlens_q": [0, 3, 5], "cu_seqlens_k": table(0, 3, 5)}, "cu_seqlens_q is list"),
    "other counts": (PACKED | {"cu_seqlens_q": table(0, 3, 5), "cu_seqlens_k": table(0, 2, 3, 5)}, "[sequences + 1]"),
    "one entry": (PACKED | {"cu_seqlens_q": table(0), "cu_seqlens_k": table(0)}, "[sequences + 1]"),
    "no start at 0": (PACKED | {"cu_seqlens_q": table(1, 3, 5), "cu_seqlens_k": table(0, 3, 5)}, "start at 0"),
    "beyond the end": (PACKED | {"cu_seqlens_q": table(0, 3, 6), "cu_seqlens_k": table(0, 3, 5)}, "end at 5"),
    "falling": (PACKED | {"cu_seqlens_q": table(0, 3, 2, 5), "cu_seqlens_k": table(0, 1, 3, 5)}, "never fall"),
    "longer than the longest": (
        PACKED | {"cu_seqlens_q": table(0, 3, 5), "cu_seqlens_k": table(0, 1, 5)},
        "no step over 3",
    ),
    "with a mask": (
        PACKED | {"cu_seqlens_q": table(0, 3, 5), "cu_seqlens_k": table(0, 3, 5), "attn_mask": t(3, 3)},
        "use one of them",
    ),
    "with pages": (
        PACKED
        | {
            "cu_seqlens_q": table(0, 3, 5),
            "cu_seqlens_k": table(0, 3, 5),
            "page_table": t(1, 1, dtype=torch.int32),
            "cache_seqlens": table(3),
        },
        "use one of them",
    ),
    "pages without lengths": ({"page_table": t(1, 1, dtype=torch.int32)}, "pass both"),
    "used lengths of another batch": ({"cache_seqlens": table(3, 3)}, "use [1]"),
    "more keys than there are": ({"cache_seqlens": table(6)}, "keys that there are"),
    "fewer keys than none": ({"cache_seqlens": table(-1)}, "keys that there are"),
    "used keys behind the end": (
        PACKED | {"cu_seqlens_q": table(0, 3, 5), "cu_seqlens_k": table(3, 0, 5), "cache_seqlens": table(3, 1)},
        "keys that there are",
    ),
    "used lengths of another count": (
        PACKED | {"cu_seqlens_q": table(0, 3, 5), "cu_seqlens_k": table(0, 3, 5), "cache_seqlens": table(3)},
        "use [2]",
    ),
    "page table of another batch": (
        {"page_table": t(2, 1, dtype=torch.int32), "cache_seqlens": table(3)},
        "with batch 1",
    ),
    "pages of int64": (
        {"page_table": t(1, 1, dtype=torch.int64), "cache_seqlens": table(3)},
        "page_table is torch.int64",
    ),
    "a page that is not there": (
        {"page_table": t(1, 1, dtype=torch.int32) + 1, "cache_seqlens": table(3)},
        "outside 0 to 0",
    ),
    "a negative page": ({"page_table": t(1, 1, dtype=torch.int32) - 1, "cache_seqlens": table(3)}, "outside 0 to 0"),
    "more keys than pages": ({"page_table": t(1, 1, dtype=torch.int32), "cache_seqlens": table(6)}, "use 0 to 5"),
    "negative length": ({"page_table": t(1, 1, dtype=torch.int32), "cache_seqlens": table(-1)}, "use 0 to 5"),
}


@pytest.fixture
def everything(fake: Fake) -> FakeBackend:
    """A device that claims all there is, so that nothing but the contract refuses."""
    return fake("everything", time=1e-15, capabilities=full(features=FEATURES, page_sizes=Range(1)))


def refused(call: Callable[..., Any], query: Any, key: Any, value: Any, part: str, options: dict[str, Any]) -> None:
    with pytest.raises(ContractError) as caught:
        call(query, key, value, **options)
    sentence = str(caught.value)
    assert part in sentence
    assert "\n" not in sentence
    assert len(sentence) < 400


@pytest.mark.parametrize("given", [{}, {"backend": "everything"}], ids=["automatic", "named"])
@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_is_one_sentence(everything: FakeBackend, wrong: str, given: dict[str, str]) -> None:
    query, key, value, options, part = BAD[wrong]
    refused(hal.attention, query, key, value, part, options | given)
    with torch.no_grad():
        refused(hal.attention, query, key, value, part, options | given)
    if "rng" not in wrong:
        refused(hal.explain, query, key, value, part, options | given)
        refused(hal.bind, query, key, value, part, options | given)
    assert not everything.ran


@pytest.mark.parametrize("wrong", BAD_TABLES)
def test_bad_tables_are_one_sentence(everything: FakeBackend, wrong: str) -> None:
    options, part = BAD_TABLES[wrong]
    for call in (hal.attention, hal.explain, hal.bind):
        refused(call, P, P, P, part, options)
    assert not everything.ran


def test_bad_input_is_refused_after_a_good_call_of_the_same_form(everything: FakeBackend) -> None:
    for _ in range(2):
        hal.attention(Q, Q, Q)
        ran = len(everything.ran)
        for query, key, value, options, part in BAD.values():
            refused(hal.attention, query, key, value, part, options)
        assert len(everything.ran) == ran


def test_good_corners_are_not_refused(everything: FakeBackend) -> None:
    masks = (t(5, 5), t(1, 1, 5, 5), t(2, 1, 5, 5), t(4, 5, 5), t(1, 5), t(2, 4, 1, 1), t(5, 5) == 0)
    good = [
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": 1},
        {"scale": np.float32(0.5)},
        {"window": (0, 0)},
        {"window": [1, None]},
        {"window": (None, None)},
        {"diagonal": -7},
        {"causal": "none"},
        {"causal": hal.Causal.TOP_LEFT, "is_causal": True},
        {"dropout_p": 0},
        {"max_error": 0.5},
        {"softcap": 5},
        *({"attn_mask": mask} for mask in masks),
    ]
    for options in good:
        assert hal.attention(Q, Q, Q, **options).shape == (2, 4, 5, 8), options


def test_an_unknown_argument_is_refused_by_explain_and_bind(everything: FakeBackend) -> None:
    for call in (hal.explain, hal.bind):
        with pytest.raises(ContractError, match="unknown argument 'sliding_window'"):
            call(Q, Q, Q, sliding_window=4)
    with pytest.raises(TypeError):
        hal.attention(Q, Q, Q, sliding_window=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(("len_q", "len_k"), [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths_are_refused_by_a_device_that_does_not_claim_them(fake: Fake, len_q: int, len_k: int) -> None:
    backend = fake("one", capabilities=plain())
    with pytest.raises(UnsupportedError, match="0 asked, 1 and up offered"):
        hal.attention(t(2, 4, len_q, 8), t(2, 4, len_k, 8), t(2, 4, len_k, 8), backend="one")
    assert not backend.ran


@pytest.mark.parametrize("autograd", ["native", "explicit"])
@pytest.mark.parametrize(("len_q", "len_k"), [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths_give_empty_rows_or_zeros(fake: Fake, autograd: str, len_q: int, len_k: int) -> None:
    fake("one", autograd=autograd)
    query, key, value = (t(2, 4, n, 8).requires_grad_() for n in (len_q, len_k, len_k))
    out, lse = hal.attention(query, key, value, return_lse=True, backend="one")
    assert out.shape == (2, 4, len_q, 8)
    assert bool((out == 0).all())
    assert bool((lse == -INF).all()) or len_k
    out.sum().backward()
    assert query.grad is not None
    assert bool((query.grad == 0).all())


@pytest.mark.parametrize("length", [0, 5])
def test_empty_batches_and_heads_are_refused_with_reasons(fake: Fake, length: int) -> None:
    fake("one")
    with pytest.raises(UnsupportedError, match=r"batch +0 asked, 1 and up offered"):
        hal.attention(*(t(0, 4, length, 8),) * 3, backend="one")
    with pytest.raises(UnsupportedError, match=r"heads +0 asked, 1 and up offered"):
        hal.attention(*(t(2, 0, length, 8),) * 3, backend="one")


def test_a_bound_call_takes_nothing_but_other_lengths(fake: Fake) -> None:
    backend = fake("one", bound=True)
    call = hal.bind(Q, Q, Q, backend="one", max_len_q=8, max_len_k=8)
    call(Q, Q, Q)
    call(t(2, 4, 8, 8), t(2, 4, 3, 8), t(2, 4, 3, 8))
    ran = len(backend.ran)
    strided = t(2, 4, 8, 5).mT
    wrong: dict[str, tuple[Any, ...]] = {
        "batch": (t(1, 4, 5, 8),) * 3,
        "heads": (t(2, 2, 5, 8),) * 3,
        "head_dim": (t(2, 4, 5, 16),) * 3,
        "too long": (t(2, 4, 9, 8), Q, Q),
        "dtype": (Q.double(),) * 3,
        "key's dtype": (Q, Q.double(), Q.double()),
        "strides of the query": (strided, Q, Q),
        "strides of the key": (Q, strided, Q),
        "a mask": (Q, Q, Q, t(5, 5) == 0),
        "a gradient": (Q.clone().requires_grad_(), Q, Q),
        "rank": (t(4, 5, 8),) * 3,
    }
    taken = []
    for name, tensors in wrong.items():
        try:
            call(*tensors)
            taken.append(name)
        except ContractError:
            continue
    assert not taken
    assert len(backend.ran) == ran
    call(Q, Q, Q)


def test_a_call_bound_with_a_mask_never_runs_without_it(fake: Fake) -> None:
    fake("one", bound=True)
    mask = torch.ones(5, 5, dtype=torch.bool)
    call = hal.bind(Q, Q, Q, mask, backend="one")
    call(Q, Q, Q, mask)
    with pytest.raises(ContractError, match="bound for boolean"):
        call(Q, Q, Q)
    with pytest.raises(ContractError, match="bound for boolean"):
        call(Q, Q, Q, t(5, 5))
    with pytest.raises(ContractError, match="broadcasts"):
        call(Q, Q, Q, torch.ones(6, 5, dtype=torch.bool))


def test_a_bound_that_is_shorter_than_its_example_is_refused(fake: Fake) -> None:
    fake("one")
    with pytest.raises(ContractError, match="max_len_q"):
        hal.bind(Q, Q, Q, backend="one", max_len_q=4)


@pytest.mark.parametrize("variant", ["upper_left", "lower_right"])
def test_a_causal_bias_of_torch_is_the_causal_option_that_it_means(fake: Any, variant: str) -> None:
    from torch.nn.attention import bias

    fake("one")
    query, key, value = t(2, 4, 5, 8), t(2, 4, 7, 8), t(2, 4, 7, 8)
    mask = getattr(bias, f"causal_{variant}")(5, 7)
    corner = "top_left" if variant == "upper_left" else "bottom_right"
    want = hal.attention(query, key, value, backend="one", causal=corner)
    for call in (hal.attention, hal.bind(query, key, value, mask, backend="one")):
        named = {"backend": "one", "attn_mask": mask} if call is hal.attention else {}
        got = call(query, key, value, **named)
        assert type(got) is torch.Tensor
        assert torch.equal(got, want)
    assert hal.explain(query, key, value, mask, backend="one").request.causal == corner
    with pytest.raises(ContractError, match="CausalBias as attn_mask and is_causal"):
        hal.attention(query, key, value, mask, is_causal=True)


def test_explain_and_bind_do_not_import_dynamo() -> None:
    """Dynamo takes seconds to import; a call that has no CausalBias does not need it."""
    code = (
        "import sys, torch, hal_core as hal\n"
        "from fakes import FakeBackend\n"
        "hal.register(FakeBackend('one'))\n"
        "t = torch.zeros(1, 1, 2, 2)\n"
        "hal.explain(t, t, t, torch.zeros(2, 2), backend='one'), hal.bind(t, t, t, backend='one')\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["False"], done.stderr


def test_other_tensor_subclasses_are_refused_by_name(fake: Any) -> None:
    class Mine(torch.Tensor):
        pass

    fake("one")
    plain = t(2, 4, 5, 8)
    for given in ({"query": plain.as_subclass(Mine)}, {"attn_mask": torch.ones(5, 5).bool().as_subclass(Mine)}):
        with pytest.raises(ContractError, match="is a Mine, a tensor subclass"):
            hal.attention(**({"query": plain, "key": plain, "value": plain, "backend": "one"} | given))


def test_a_mistake_of_the_caller_is_a_value_error_and_a_runtime_error() -> None:
    with pytest.raises(ValueError, match="reshape it"):
        hal.attention(t(8), t(8), t(8))
    with pytest.raises(RuntimeError, match="reshape it"):
        hal.attention(t(8), t(8), t(8))


def test_under_hal_check_inputs_that_are_not_finite_are_refused_by_name(fake: Any, monkeypatch: Any) -> None:
    fake("one")
    monkeypatch.setenv("HAL_CHECK", "1")
    query, key = t(2, 4, 5, 8), t(2, 4, 5, 8)
    hal.attention(query, key, key, backend="one")
    key[1, 2, 3, 4] = NAN
    with pytest.raises(ContractError, match="key holds NaN or infinity"):
        hal.attention(query, key, query, backend="one")
