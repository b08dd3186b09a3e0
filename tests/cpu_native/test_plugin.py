"""The CPU device with hal-cpu-native: which path runs and why, and every promise of the device held on that path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("hal_cpu_native", reason="hal-cpu-native is not built here: make native")

from hal_cpu import paths  # noqa: E402
from hal_cpu.backend import CpuBackend  # noqa: E402
from hal_cpu.cost import Rates, check_values  # noqa: E402
from hal_cpu.discovery import Machine, this_machine  # noqa: E402

import hal_core as hal  # noqa: E402
from hal_core import AttentionRequest, Causal, MaskKind  # noqa: E402
from hal_core.testing import ConformanceSuite, relative_error  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))
import test_footprint as footprint  # noqa: E402
import test_low_masks as low_masks  # noqa: E402
from cpu_drawing import draw, hold  # noqa: E402

PLAIN = AttentionRequest(2, 8, 8, 512, 512, 64, 64, "float32")
DECODE = AttentionRequest(1, 32, 8, 1, 1024, 64, 64, "bfloat16")


@pytest.fixture
def always() -> Iterator[None]:
    """Compiled kernels serve all that they can."""
    with paths.offering("always"):
        yield


@pytest.fixture
def gains() -> Iterator[Any]:
    """A function that puts measured gains in force."""
    before = paths._gains
    yield paths.use_gains
    paths.use_gains(before)


@pytest.mark.usefixtures("always")
class TestCpuCompiled(ConformanceSuite):
    backend = "cpu"
    quick = True


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("feature", ["plain", "mask", "causal", "window", "softcap", "packed", "strides"])
def test_random_calls_agree_with_float64(feature: str, dtype: str, seed: int) -> None:
    for number in range(12):
        hold(draw(seed + number, feature, dtype))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("options", low_masks.OPTIONS, ids=str)
@pytest.mark.parametrize("len_q", [1, 3, 40])
def test_a_row_at_the_lowest_finite_number_gives_the_mean(len_q: int, options: dict[str, Any], seed: int) -> None:
    low_masks.test_a_row_at_the_lowest_finite_number_gives_the_mean(len_q, options, seed)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    ["native", "native, causal", "native, boolean mask of every head", "packed", "packed, rows", "fused", "decode"],
)
def test_estimated_memory_is_the_allocators_peak(name: str, dtype: torch.dtype) -> None:
    footprint.test_estimated_memory_is_the_allocators_peak(name, dtype)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("request_", "path"),
    [
        (PLAIN, "compiled"),
        (replace(PLAIN, causal=Causal.BOTTOM_RIGHT, lse=True), "compiled"),
        (replace(PLAIN, mask=MaskKind.BOOLEAN, causal=Causal.TOP_LEFT), "compiled"),
        (replace(PLAIN, window=(10, 10), softcap=30.0), "compiled"),
        (DECODE, "streamed"),
        (replace(DECODE, dim_v=40), "compiled"),
        (replace(DECODE, len_q=5), "compiled"),
        (replace(PLAIN, dtype="float64"), "native"),
        (replace(PLAIN, grads=frozenset("qkv")), "compiled"),
        (replace(DECODE, grads=frozenset("qkv")), "compiled"),
        (replace(PLAIN, grads=frozenset("qkv"), mask=MaskKind.ADDITIVE), "native"),
        (replace(PLAIN, grads=frozenset("qkv"), block_plan=(64, 64, 4)), "blocks"),
        (replace(PLAIN, mask=MaskKind.ADDITIVE), "compiled"),
        (replace(DECODE, mask=MaskKind.ADDITIVE), "streamed"),
        (replace(PLAIN, dim_qk=20, dim_v=20), "native"),
        (replace(PLAIN, dropout=0.1), "tiled"),
        (replace(PLAIN, scale=-1.0), "tiled"),
        (replace(PLAIN, tiling=("dense", 64, 64)), "tiled"),
        (replace(DECODE, page_size=16), "decode"),
        (replace(PLAIN, block_plan=(64, 64, 4)), "compiled"),
        (replace(DECODE, block_plan=(64, 64, 4)), "compiled"),
        (replace(PLAIN, block_plan=(8, 64, 4)), "blocks"),
        (replace(PLAIN, last_dim_contiguous=False), "native"),
    ],
    ids=str,
)
def test_what_the_kernels_can_serve_is_offered_to_them(request_: AttentionRequest, path: str) -> None:
    assert paths.path_of(request_) == path


def test_the_faster_path_is_taken_by_what_was_measured(gains: Any) -> None:
    macs = PLAIN.visible_macs
    gains({"compiled float32": [(macs / 2, 1.3), (macs * 2, 1.2)]})
    assert paths.path_of(PLAIN) == "compiled"
    assert "1.2 times native" in paths.considered(PLAIN)
    gains({"compiled float32": [(macs / 2, 1.3), (macs * 2, 0.9)]})
    assert paths.path_of(PLAIN) == "native"
    assert "0.9 times native" in paths.considered(PLAIN)
    gains({"compiled float32": [(1.0, 1.2)]})
    assert paths.path_of(replace(PLAIN, len_q=33)) == "native", "the last block has one row of 32"
    gains({"compiled float32": [(macs * 2, 3.0)]})
    assert paths.path_of(PLAIN) == "native", "a smaller call than any that was measured"
    gains({})
    assert paths.path_of(PLAIN) == "native"


def test_additive_masks_have_a_gain_of_their_own(gains: Any) -> None:
    masked = replace(PLAIN, mask=MaskKind.ADDITIVE)
    gains({"compiled float32": [(1.0, 2.0)]})
    assert paths.path_of(masked) == "native"
    gains({"compiled additive float32": [(1.0, 2.0)]})
    assert paths.path_of(masked) == "compiled"
    assert paths.path_of(PLAIN) == "native"


def test_training_has_a_gain_of_its_own(gains: Any) -> None:
    trained = replace(PLAIN, grads=frozenset("qkv"))
    gains({"compiled float32": [(1.0, 2.0)]})
    assert paths.path_of(trained) == "native"
    gains({"compiled backward float32": [(1.0, 2.0)]})
    assert paths.path_of(trained) == "compiled"
    assert paths.path_of(PLAIN) == "native"


def test_shared_key_heads_have_a_gain_of_their_own(gains: Any) -> None:
    gains({"streamed shared bfloat16": [(1.0, 2.0)]})
    assert paths.path_of(DECODE) == "streamed"
    assert paths.path_of(replace(DECODE, heads_q=8)) == "packed"


@pytest.mark.parametrize(
    ("vendor", "simd", "taken"),
    [
        ("AuthenticAMD", ("avx2", "avx512f", "avx512_bf16"), {"compiled", "streamed"}),
        ("GenuineIntel", ("avx2", "avx512f", "avx512_bf16", "amx_bf16"), {"streamed"}),
        ("AuthenticAMD", ("avx2",), set()),
        ("GenuineIntel", ("avx2",), set()),
    ],
)
def test_a_first_guess_covers_kinds_of_processors_that_were_measured(
    vendor: str, simd: tuple[str, ...], taken: set[str]
) -> None:
    machine = this_machine()
    values = {name: getattr(machine, name) for name in ("model", "cores", "frequency", "l2", "l3", "memory")}
    guessed = paths.first_guess(Machine(vendor=vendor, simd=simd, frequency_known=True, **values))
    assert {name.split()[0] for name in guessed} == taken
    assert all(gain >= paths.LEAST_GAIN for pairs in guessed.values() for _, gain in pairs)


def test_explain_says_which_path_runs_and_what_the_other_was_worth(gains: Any) -> None:
    query = torch.randn(1, 4, 128, 64)
    hal.explain(query, query, query)  # the first estimate of a process puts stored gains in force
    gains({"compiled float32": [(1.0, 1.7)]})
    assert "path compiled; compiled: 1.7 times native at least (measured)" in str(hal.explain(query, query, query))


def test_tensors_that_are_trained_stay_with_torch(gains: Any, seed: int) -> None:
    gains({"compiled float32": [(1.0, 9.0)]})
    torch.manual_seed(seed)
    query = torch.randn(1, 4, 64, 32, requires_grad=True)
    key, value = torch.randn(2, 1, 4, 64, 32).unbind()
    hal.attention(query, key, value, backend="cpu").sum().backward()
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    grad, query.grad = query.grad, None
    wanted.sum().backward()
    assert grad is not None
    assert relative_error(grad, query.grad) <= 1e-5


@pytest.mark.parametrize("bad", [{"compiled float32": 3}, {"compiled float32": [[1.0]]}, {"x": [[1.0, "2"]]}, [1]])
def test_gains_that_are_none_are_refused_with_their_name(bad: Any) -> None:
    values = {"bandwidth": 1e9, "spread": 2.0, "rates": {}, "calls": {}, "gains": bad}
    with pytest.raises(ValueError, match="gains"):
        check_values(values)


@pytest.mark.slow
def test_calibration_measures_the_compiled_paths(gains: Any) -> None:
    from hal_cpu.calibrate import measure
    from hal_cpu.session import CpuSession

    values = measure(CpuSession(hal.device("cpu:0")), lambda text, part: None)
    assert {"compiled float32", "compiled bfloat16", "compiled float16"} <= set(values["gains"])
    assert {"compiled float32", "compiled bfloat16"} <= set(values["rates"])
    rates = Rates.measured(values, this_machine())
    assert rates.gains == values["gains"]
    assert all(len(pairs) >= 2 for pairs in values["gains"].values())


def test_the_device_says_that_the_kernels_are_there() -> None:
    assert "hal-cpu-native" in CpuBackend().devices()[0].features
