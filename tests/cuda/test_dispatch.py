"""Which path a request takes is decided from data, on any machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import attrs
import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install 'hal-cuda[dev]'")

from hal_cuda import cost
from hal_cuda.cost import FORMS, Rates, form_of, shipped
from hal_cuda.discovery import Chip
from hal_cuda.paths import candidates, choose, hopper_assists
from hal_cuda.runtime import binaries

from hal_core import AttentionRequest, Causal, Estimate, MaskKind

PLAIN = AttentionRequest(
    batch=2, heads_q=16, heads_kv=16, len_q=8192, len_k=8192, dim_qk=128, dim_v=128, dtype="bfloat16", device="cuda:0"
)
HOPPER = Chip(index=0, capability=(9, 0), multiprocessors=132, shared_memory=227 << 10)
AMPERE = Chip(index=0, capability=(8, 0), multiprocessors=108, shared_memory=163 << 10)


def rates() -> Rates:
    found = shipped()
    assert found is not None
    return found[1]


def paths(chip: Chip = HOPPER, **changes: Any) -> list[str]:
    return candidates(replace(PLAIN, **changes), chip)


def estimate(request: AttentionRequest, chip: Chip, rates: Rates) -> Estimate:
    return cost.estimate(request, choose(request, chip, rates), rates, chip)


def test_plain_attention_has_own_kernels_and_torch_beside_them() -> None:
    assert paths() == ["hopper", "portable", "cudnn", "flash"]
    assert paths(AMPERE) == ["portable", "cudnn", "flash"]


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": MaskKind.BOOLEAN},
        {"mask": MaskKind.ADDITIVE},
        {"dropout": 0.1},
        {"block_plan": (64, 64, 4)},
        {"packed": True, "dim_qk": 96},
        {"packed": True, "len_q": 64},
        {"page_size": 16},
        {"dtype": "float32"},
        {"len_q": 1},
        {"scale": -1.0, "lse": True},
        {"last_dim_contiguous": False},
    ],
)
def test_features_that_one_kernel_alone_has_go_there(changes: dict[str, Any]) -> None:
    found = paths(**changes)
    assert "portable" in found
    assert "hopper" not in found


@pytest.mark.parametrize(
    "changes",
    [{"window": (100, 0)}, {"softcap": 5.0}, {"causal": Causal.BOTTOM_RIGHT}, {"lse": True}, {"packed": True}],
)
def test_torch_is_no_candidate_for_what_it_does_not_do(changes: dict[str, Any]) -> None:
    assert paths(**changes) == ["hopper", "portable"]


def test_gradients_have_own_kernels_and_those_of_torch_as_candidates() -> None:
    grads = frozenset("qkv")
    assert paths(grads=grads) == ["hopper", "portable", "cudnn", "flash", "efficient"]
    assert paths(grads=grads, dim_v=64) == ["hopper", "portable", "cudnn", "efficient"]
    assert paths(grads=grads, softcap=3.0) == ["hopper", "portable"]
    assert paths(grads=grads, mask=MaskKind.BOOLEAN) == ["portable", "efficient"]
    assert paths(grads=grads, mask=MaskKind.ADDITIVE) == ["portable"]
    assert paths(grads=frozenset({"q"}), deterministic=True) == ["hopper", "portable"]
    assert paths(grads=grads, dtype="float64") == ["composed"]
    source = estimate(replace(PLAIN, grads=grads), HOPPER, rates()).time.source
    assert source.startswith("gradients by own Hopper kernel")


@pytest.mark.parametrize(
    ("changes", "torch_too"),
    [
        ({"len_q": 1, "len_k": 1}, False),  # cuDNN has no kernel for one query and one key
        ({"len_q": 1, "len_k": 2}, True),
        ({"causal": Causal.TOP_LEFT}, True),
        ({"causal": Causal.TOP_LEFT, "len_q": 4096}, False),  # torch's backends disagree about that diagonal
    ],
)
def test_torch_is_offered_the_lengths_that_it_takes(changes: dict[str, Any], torch_too: bool) -> None:
    assert ("cudnn" in paths(grads=frozenset("qkv"), **changes)) == torch_too


def test_gradients_that_repeat_have_the_hopper_kernel_up_to_a_head_size_of_128() -> None:
    wanted: dict[str, Any] = {"grads": frozenset("qkv"), "deterministic": True}
    assert paths(**wanted) == ["hopper", "portable"]
    assert paths(**wanted, dim_v=256) == ["portable"]


@pytest.mark.parametrize(
    ("changes", "assisted"),
    [
        ({}, False),
        ({"mask": MaskKind.BOOLEAN}, True),
        ({"mask": MaskKind.ADDITIVE}, True),
        ({"dropout": 0.1}, True),
        ({"block_plan": (128, 128, 4)}, True),
        ({"mask": MaskKind.BOOLEAN, "dtype": "float32"}, False),
        ({"dropout": 0.1, "packed": True}, False),
        ({"dropout": 0.1, "deterministic": True, "dim_v": 256}, False),
    ],
    ids=str,
)
def test_the_hopper_backward_assists_a_portable_forward(changes: dict[str, Any], assisted: bool) -> None:
    request = replace(PLAIN, grads=frozenset("qkv"), lse=True, **changes)
    assert hopper_assists(request, HOPPER) is assisted
    assert not hopper_assists(request, AMPERE)


def test_each_form_of_gradients_is_named_by_what_is_slowest_in_it() -> None:
    grads = frozenset("qkv")
    changes: tuple[dict[str, Any], ...] = (
        {"dtype": "float32", "mask": MaskKind.BOOLEAN},
        {"deterministic": True, "dropout": 0.1},
        {"dropout": 0.1, "mask": MaskKind.ADDITIVE},
        {"mask": MaskKind.BOOLEAN},
        {"mask": MaskKind.ADDITIVE},
        {"mask": MaskKind.ADDITIVE, "grads": grads | {"mask"}},
    )
    assert tuple(form_of(replace(PLAIN, **({"grads": grads} | change))) for change in changes) == FORMS
    assert form_of(replace(PLAIN, grads=grads)) == ""


def test_an_untested_triton_leaves_the_gluon_kernel_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries.triton, "__version__", "3.9.1")
    assert "hopper" not in paths()


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({"mask": MaskKind.BOOLEAN}, True),
        ({"mask": MaskKind.ADDITIVE, "dim_qk": 256, "dim_v": 256}, True),
        ({"block_plan": (128, 64, 4)}, True),
        ({"block_plan": (64, 64, 4)}, True),
        ({"block_plan": (64, 64, 4), "dim_qk": 256}, False),
        ({"block_plan": (96, 128, 4)}, False),
        ({"mask": MaskKind.BOOLEAN, "dropout": 0.1}, False),
        ({"mask": MaskKind.BOOLEAN, "dtype": "float32"}, False),
        ({"mask": MaskKind.BOOLEAN, "len_q": 64}, False),
        ({"mask": MaskKind.BOOLEAN, "tiling": ("theirs", 64, 64)}, False),
        ({}, False),
    ],
    ids=str,
)
def test_masks_and_block_plans_have_a_hopper_kernel(changes: dict[str, Any], takes: bool) -> None:
    assert ("masked" in paths(**changes)) is takes
    assert "masked" not in paths(AMPERE, **changes)


@pytest.mark.parametrize(
    ("changes", "form"),
    [
        ({"mask": MaskKind.BOOLEAN}, "mask"),
        ({"mask": MaskKind.ADDITIVE}, "bias"),
        ({"block_plan": (128, 128, 4)}, "block plan"),
        ({"block_plan": (64, 64, 4)}, "small block plan"),
    ],
)
def test_the_masked_kernel_is_chosen_where_it_was_measured_alone(changes: dict[str, Any], form: str) -> None:
    request, found = replace(PLAIN, **changes), rates()
    others = tuple(row for row in found.grid if row.get("grads") or not row.get("form"))
    rows = tuple(
        {"path": path, "dim": 128, "length": 8192, "causal": False, "rate": rate, "form": form}
        for path, rate in (("masked", 6e14), ("portable", 4e14))
    )
    assert choose(request, HOPPER, attrs.evolve(found, grid=others)).path == "portable"
    assert choose(request, HOPPER, attrs.evolve(found, grid=others + rows)).path == "masked"
    slower = tuple(dict(row, rate=row["rate"] / 2) if row["path"] == "masked" else row for row in rows)
    assert choose(request, HOPPER, attrs.evolve(found, grid=others + slower)).path == "portable"
    short = replace(request, len_q=2048, len_k=2048)
    assert choose(short, HOPPER, attrs.evolve(found, grid=others + rows)).path == "portable"


def test_the_shipped_table_sends_masks_and_plans_to_the_hopper_kernel() -> None:
    for changes in ({"mask": MaskKind.BOOLEAN}, {"mask": MaskKind.ADDITIVE}, {"block_plan": (128, 128, 32)}):
        for dim in (64, 128, 256):
            request = replace(PLAIN, dim_qk=dim, dim_v=dim, **changes)  # type: ignore[arg-type]
            assert choose(request, HOPPER, rates()).path == "masked"


def test_small_blocks_under_a_mask_wait_for_their_own_measurement() -> None:
    small = replace(PLAIN, mask=MaskKind.BOOLEAN, block_plan=(64, 64, 4))
    known = rates().knows("masked", replace(small, mask=MaskKind.NONE))
    assert known is (choose(small, HOPPER, rates()).path == "masked")


def test_the_forward_of_masked_calls_with_gradients_is_the_hopper_kernels_too() -> None:
    from hal_cuda.kernels.hopper_masked.launch import HopperMaskedPath
    from hal_cuda.kernels.portable.launch import PortablePath
    from hal_cuda.session import CudaSession

    from hal_core import Device, Fidelity, PooledMemory

    device = Device(id="cuda:9", family="cuda", vendor="", model="", fidelity=Fidelity.HARDWARE, reads=("cpu",))
    request = replace(PLAIN, mask=MaskKind.BOOLEAN, grads=frozenset("qkv"), lse=True)
    for chip, kind in ((HOPPER, HopperMaskedPath), (AMPERE, PortablePath)):
        with CudaSession(device, chip, rates, memory=PooledMemory("cpu")) as session:
            assert type(session._made(request)) is kind


def test_the_measured_table_decides() -> None:
    long = choose(PLAIN, HOPPER, rates())
    assert long.path == "hopper"
    assert [path for path, _ in long.seconds] == sorted(dict(long.seconds), key=dict(long.seconds).__getitem__)
    measured = rates()
    doubled = (dict(row, rate=row["rate"] * (2 if row["path"] == "cudnn" else 1)) for row in measured.grid)
    assert choose(PLAIN, HOPPER, attrs.evolve(measured, grid=tuple(doubled))).path == "cudnn"


def test_a_backward_with_few_programs_leaves_the_gpu_to_others() -> None:
    """One key head for 71 query heads (Falcon), and 77 keys (cross attention): at most one program a block of keys."""
    grads = replace(PLAIN, grads=frozenset("qkv"), batch=4, dim_qk=64, dim_v=64)
    many = replace(grads, heads_q=64, heads_kv=64, len_q=2048, len_k=2048, causal=Causal.TOP_LEFT)
    assert choose(many, HOPPER, rates()).path == "hopper"
    assert choose(replace(many, heads_q=71, heads_kv=1), HOPPER, rates()).path == "cudnn"
    assert choose(replace(grads, heads_q=10, heads_kv=10, len_q=4096, len_k=77), HOPPER, rates()).path == "cudnn"


def test_estimates_say_where_they_come_from() -> None:
    measured = estimate(PLAIN, HOPPER, rates())
    assert measured.time.basis == "measured"
    assert "measured on NVIDIA H200" in measured.time.source
    assert measured.energy is not None
    guessed = estimate(PLAIN, AMPERE, Rates.assumed((8, 0), 108, rates()))
    assert (guessed.time.basis, guessed.time.provenance) == ("modelled", "assumed")
    assert guessed.energy is None


def test_time_grows_with_the_length() -> None:
    times = [
        estimate(replace(PLAIN, len_q=n, len_k=n), HOPPER, rates()).time.middle
        for n in (32, 300, 512, 700, 2048, 5000, 16384, 40000)
    ]
    assert times == sorted(times)


def test_scores_of_composed_attention_count_as_memory() -> None:
    request = replace(PLAIN, grads=frozenset("qkv"), dtype="float64")
    assert estimate(request, HOPPER, rates()).memory > 2 * 16 * 8192 * 8192 * 8 * 2


def test_own_gradients_keep_no_scores() -> None:
    for change in ({}, {"softcap": 3.0}, {"mask": MaskKind.BOOLEAN}):
        request = replace(PLAIN, grads=frozenset("qkv"), **change)
        operands = 4 * 2 * 16 * 8192 * 128 * 2
        assert estimate(request, HOPPER, rates()).memory < 3 * operands
