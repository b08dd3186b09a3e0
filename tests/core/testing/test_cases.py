"""Cases come from the claims: everything claimed is asked for, and everything else is a request that must be
refused.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

import hal_core as hal
from hal_core import FEATURES, Capabilities, Causal, Choice, MaskKind, Numerics, Range
from hal_core.testing import claimed_cases, request_of, unclaimed_cases
from hal_core.testing.cases import DTYPES, LAYOUTS

DEVICE = hal.Device(id="x:0", family="x", vendor="", model="", fidelity=hal.Fidelity.HARDWARE)
EVERYTHING: dict[str, Any] = {
    "dtypes": DTYPES,
    "numerics": {name: Numerics(1e-5, gradient=1e-5) for name in DTYPES},
    "head_dim": Range(1, 256),
    "masks": MaskKind,
    "causal": Causal,
    "features": FEATURES,
    "length": Range(0),
    "page_sizes": Range(1),
    "cache_dtypes": {"float8_e4m3fn", "float8_e5m2"},
    "block_sizes": Range(1),
}
LITTLE: dict[str, Any] = {
    "dtypes": {"float16"},
    "numerics": {"float16": Numerics(1e-3)},
    "head_dim": Choice({32, 64}),
    "length": Range(16, 128, 16),
    "batch": Range(1, 1),
    "heads": Range(1, 4),
}


def claims(base: dict[str, Any] = EVERYTHING, **changes: Any) -> Capabilities:
    return Capabilities(**(base | changes))


@pytest.mark.parametrize(
    "capabilities", [claims(), claims(LITTLE), claims(length=Range(1)), claims(features=())], ids=repr
)
def test_claimed_cases_are_inside_and_unclaimed_ones_outside_for_the_reason_given(capabilities: Capabilities) -> None:
    cases = claimed_cases(capabilities, DEVICE)
    assert cases
    assert all(not capabilities.refusals(case.request) for case in cases)
    outside = unclaimed_cases(capabilities, DEVICE)
    assert outside
    assert all(code in {r.code for r in capabilities.refusals(case.request)} for case, code in outside)


def test_every_claim_is_in_some_case(seed: int) -> None:
    cases = claimed_cases(claims(), DEVICE, seed=seed)
    requests = [case.request for case in cases]
    assert {r.dtype for r in requests} == set(DTYPES)
    assert {r.mask for r in requests} == set(MaskKind)
    assert {r.causal for r in requests} == set(Causal)
    assert {1, 256} <= {r.dim_qk for r in requests}
    assert 0 in {r.len_q for r in requests}
    assert {case.layout for case in cases} == set(LAYOUTS)
    for field in ("softcap", "scale", "dropout", "packed", "page_size", "cache_dtype", "block_plan", "lse", "grad_lse"):
        assert any(getattr(r, field) for r in requests), field
    assert any("mask" in r.grads for r in requests)
    assert any(r.dim_v != r.dim_qk and r.heads_q != r.heads_kv for r in requests)


@pytest.mark.parametrize("feature", sorted(FEATURES))
def test_a_feature_that_is_not_claimed_is_asked_for_to_be_refused(feature: str) -> None:
    without = claims(features=FEATURES - {feature})
    assert not any(without.refusals(case.request) for case in claimed_cases(without, DEVICE, quick=True))
    before, after = (len(unclaimed_cases(c, DEVICE)) for c in (claims(), without))
    assert after > before


def test_practically_every_two_claims_meet(seed: int) -> None:
    fields = (
        "dtype",
        "mask",
        "causal",
        "softcap",
        "window",
        "scale",
        "dim_qk",
        "heads_kv",
        "lse",
        "grads",
        "batch",
        "len_k",
    )
    cases = [c for c in claimed_cases(claims(), DEVICE, seed=seed) if c.subject == "combinations"]
    values = {name: {getattr(c.request, name) for c in cases} for name in fields}
    wanted = {(a, x, b, y) for a, b in combinations(fields, 2) for x in values[a] for y in values[b]}
    met = {(a, getattr(c.request, a), b, getattr(c.request, b)) for c in cases for a, b in combinations(fields, 2)}
    # The mask's gradient needs an additive mask, so three of these pairs cannot be; nearly all others are.
    assert len(wanted - met) <= 0.007 * len(wanted), wanted - met
    assert len(cases) <= 160


def test_tensors_are_as_the_request_says(seed: int) -> None:
    for case in claimed_cases(claims(), DEVICE, seed=seed):
        inputs, r = case.draw(seed), case.request
        tensors = {"attn_mask", "block_plan", *hal.SequenceMetadata._fields}
        options = {name: value for name, value in case.options(inputs).items() if name not in tensors}
        made = request_of(*inputs[:4], plan=inputs.plan, tables=inputs.tables, grads=r.grads, **options)
        assert made.to_dict() | {"grad_lse": r.grad_lse} == r.to_dict(), str(case)
        if r.mask is MaskKind.BOOLEAN and case.mask_shape == "full" and r.len_q > 3:
            assert not inputs.mask[..., 3, :].any()


def test_a_seed_gives_the_same_cases_and_tensors_and_another_seed_others(seed: int) -> None:
    first, again, other = (claimed_cases(claims(), DEVICE, seed=n) for n in (seed, seed, seed + 1))
    assert first == again != other
    assert torch.equal(first[0].draw(seed).query, again[0].draw(seed).query)
    assert not torch.equal(first[0].draw(seed).query, first[0].draw(seed + 1).query)


def test_a_device_that_only_does_causal_has_a_plain_request() -> None:
    cases = claimed_cases(claims(LITTLE, causal={Causal.BOTTOM_RIGHT}, masks={MaskKind.BOOLEAN}), DEVICE)
    assert cases
    assert {(c.request.causal, c.request.mask) for c in cases} == {(Causal.BOTTOM_RIGHT, MaskKind.BOOLEAN)}
