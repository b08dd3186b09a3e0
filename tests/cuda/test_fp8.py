"""FP8 is chosen where it is asked for and can be served, and nowhere else; decided from data, on any machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'hal-cuda[dev]'")

from hal_cuda import cost
from hal_cuda.backend import CAPABILITIES, CudaBackend
from hal_cuda.discovery import Chip
from hal_cuda.kernels.fp8.wish import ERROR, Wish, wish_of
from hal_cuda.paths import candidates, choose
from hal_cuda.runtime import binaries
from hal_cuda.tiling import CudaTiling

from hal_core import AttentionRequest, Causal, Device, Fidelity, MaskKind

PLAIN = AttentionRequest(
    batch=1,
    heads_q=16,
    heads_kv=4,
    len_q=4096,
    len_k=4096,
    dim_qk=128,
    dim_v=128,
    dtype="bfloat16",
    device="cuda:0",
    options=(("fp8", "block"),),
)
HOPPER = Chip(index=0, capability=(9, 0), multiprocessors=132, shared_memory=227 << 10)
ADA = Chip(index=0, capability=(8, 9), multiprocessors=128, shared_memory=99 << 10)
DEVICE = Device(id="cuda:0", family="cuda", vendor="NVIDIA", model="a chip of this test", fidelity=Fidelity.HARDWARE)


def refused(chip: Chip = HOPPER, **changes: Any) -> str:
    """What the plugin says against a request; nothing where it serves it."""
    backend, request = CudaBackend(), replace(PLAIN, **changes)
    backend._chips[DEVICE.id] = chip
    return "\n".join(map(str, CAPABILITIES.refusals(request) or backend.check(request, DEVICE)))


def test_fp8_serves_what_asks_for_it() -> None:
    assert refused() == ""
    assert refused(causal=Causal.BOTTOM_RIGHT, len_q=700, lse=True, dtype="float16", dim_qk=64, dim_v=96) == ""
    assert candidates(PLAIN, HOPPER) == ["fp8"]


def test_fp8_is_never_chosen_unasked() -> None:
    assert "fp8" not in candidates(replace(PLAIN, options=()), HOPPER)
    assert wish_of(replace(PLAIN, options=())) is None


def test_the_wish_of_a_request() -> None:
    assert wish_of(PLAIN) == Wish("block", False)
    assert wish_of(replace(PLAIN, options=(("fp8", "head centred"),))) == Wish("head", True)


@pytest.mark.parametrize("chip", [ADA, Chip(index=0, capability=(10, 0), multiprocessors=148, shared_memory=227 << 10)])
def test_other_chips_refuse_by_name(chip: Chip) -> None:
    said = refused(chip)
    major, minor = chip.capability
    assert f"fp8 on compute capability {major}.{minor} asked, 9.0 (Hopper)" in said


def test_an_untested_triton_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "TESTED_TRITON", ("0.0",))
    assert "untested Triton" in refused()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mask": MaskKind.BOOLEAN}, "mask"),
        ({"window": (100, 0)}, "window"),
        ({"softcap": 5.0}, "softcap"),
        ({"dropout": 0.1}, "dropout"),
        ({"packed": True}, "packed"),
        ({"page_size": 16}, "page_size"),
        ({"block_plan": (128, 128, 4)}, "block_plan"),
        ({"grads": frozenset({"q"})}, "backward"),
        ({"dtype": "float32"}, "dtype"),
        ({"dim_qk": 100, "dim_v": 100}, "head_dim"),
        ({"dim_v": 100}, "value_dim"),
        ({"last_dim_contiguous": False}, "strides"),
        ({"scale": -1.0}, "scale"),
        ({"max_error": ERROR / 2}, "max_error"),
    ],
)
def test_what_fp8_does_not_serve_is_refused_with_its_reason(changes: dict[str, Any], named: str) -> None:
    said = refused(**changes)
    assert said.startswith(named)
    assert "fp8" in said


def test_unknown_values_are_refused_with_the_known_ones() -> None:
    assert "'block', 'head', 'block centred', 'head centred' offered" in refused(options=(("fp8", "row"),))


def test_the_decision_says_what_is_used() -> None:
    rates = cost.Rates.assumed((9, 0), 132, None)
    found = cost.estimate(PLAIN, choose(PLAIN, HOPPER, rates), rates, HOPPER)
    assert found.error is not None
    assert found.error.high == ERROR
    assert "e4m3" in found.error.source
    assert "FP8 (e4m3)" in found.time.source
    assert found.energy is None
    plain = replace(PLAIN, options=())
    assert cost.estimate(plain, choose(plain, HOPPER, rates), rates, HOPPER).error is None
    assert found.memory > cost.memory(plain, "hopper", HOPPER)


def test_the_plan_has_the_tiles_of_the_kernel() -> None:
    plan = CudaTiling(HOPPER, lambda request: "fp8").plan(PLAIN, {})
    assert (plan.block_q, plan.block_k) == (192, 128)
    ragged = CudaTiling(HOPPER, lambda request: "fp8").plan(replace(PLAIN, len_k=4000), {})
    assert (ragged.block_q, ragged.block_k) == (128, 128)
