"""The PE array: values, cycles and active MACs from the registers, against closed forms, a table and numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hal_kpu.simulator.array import DATAFLOWS, accumulator_dtype, multiply

from hal_core.errors import ContractError

from .programs import quick_first

# "Total Cycles" of SCALE-Sim 3: (M, N, K), array, by dataflow
TABLE = [
    ((128, 128, 128), (32, 32), {"os": 3039, "ws": 3551, "is": 3551}),
    ((64, 64, 64), (16, 16), {"os": 1503, "ws": 1759, "is": 1759}),
    ((16, 16, 16), (16, 16), {"os": 45, "ws": 61, "is": 61}),
    ((1, 1000, 512), (16, 16), {"os": 34145, "ws": 94751, "is": 33471}),
]


def closed_form(shape: tuple[int, int, int], array: tuple[int, int], dataflow: str) -> int:
    """Index of the last cycle: tiles one after the other, each filled, streamed through, and left by its wave."""
    (M, N, K), (R, C) = shape, array
    if dataflow == "os":
        return -(-M // R) * -(-N // C) * (K + R + C - 2) - 1
    if dataflow == "ws":
        return -(-K // R) * -(-N // C) * (R + M + R + C - 2) - 1
    return -(-K // R) * -(-M // C) * (R + N + R + C - 2) - 1


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize(("shape", "array", "cycles"), TABLE)
def test_cycles_equal_the_published_table(shape, array, cycles, dataflow, seed):
    rng = np.random.default_rng(seed)
    M, N, K = shape
    a, b = rng.integers(-9, 9, (M, K), dtype=np.int32), rng.integers(-9, 9, (K, N), dtype=np.int32)
    done = multiply(a, b, *array, dataflow)
    assert done.compute_cycles == cycles[dataflow]
    assert np.array_equal(done.product[0], a @ b)


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize("number", quick_first(1, (250, 2000)))
def test_cycles_values_and_active_macs_of_random_products(dataflow, number, seed):
    rng = np.random.default_rng(seed)
    for _ in range(number):
        (M, N, K), (R, C) = rng.integers(1, 24, 3), rng.integers(1, 10, 2)
        a, b = rng.integers(-128, 128, (M, K), dtype=np.int8), rng.integers(-128, 128, (K, N), dtype=np.int8)
        done = multiply(a, b, R, C, dataflow)
        case = f"{M} x {N} x {K} on {R} x {C}"
        assert done.compute_cycles == closed_form((M, N, K), (R, C), dataflow), case
        assert np.array_equal(done.product[0], a.astype(np.int32) @ b.astype(np.int32)), case
        assert done.active_macs == M * N * K, case
        assert done.drain_cycles.sum() == (R * len(done.tile_cycles) if dataflow == "os" else 0), case


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int32", "int64", "float16", "float32", "float64"])
def test_every_type_keeps_its_product(dataflow, dtype, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 100, (2, 13, 21)).astype(dtype), rng.integers(0, 100, (2, 21, 6)).astype(dtype)
    done = multiply(a, b, 4, 5, dataflow)
    wide = accumulator_dtype(np.dtype(dtype))
    assert done.product.dtype == wide
    assert np.array_equal(done.product, a.astype(wide) @ b.astype(wide))  # whole numbers: exact in floats, too


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_integers_wrap_as_the_accumulator_does(dataflow):
    a = np.full((3, 5), 2**30, np.int32)
    assert np.array_equal(multiply(a, a.T.copy(), 2, 2, dataflow).product[0], a @ a.T)


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_infinities_meet_no_filling(dataflow):
    a, b = np.ones((3, 3), np.float32), np.ones((3, 3), np.float32)
    a[0, 0] = np.inf
    done = multiply(a, b, 2, 2, dataflow)
    assert np.array_equal(done.product[0], [[np.inf] * 3, [3] * 3, [3] * 3])


@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize("which", ["right", "down"])
@pytest.mark.parametrize("at", [(0, 0), (1, 2), (2, 1)])
def test_one_register_a_cycle_late_changes_the_values(dataflow, which, at, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(1, 99, (3, 7), dtype=np.int32), rng.integers(1, 99, (7, 3), dtype=np.int32)
    good = multiply(a, b, 3, 3, dataflow)
    late = multiply(a, b, 3, 3, dataflow, delays=((which, *at),))
    assert not np.array_equal(late.product, good.product)
    assert late.active_macs < good.active_macs


def test_what_an_array_cannot_multiply_is_told():
    with pytest.raises(ContractError, match=r"\[1, 2, 3\] and \[1, 4, 5\] were given: reshape them"):
        multiply(np.ones((2, 3)), np.ones((4, 5)), 2, 2)
    with pytest.raises(ContractError, match=r"none of them 0"):
        multiply(np.ones((2, 0)), np.ones((0, 5)), 2, 2)
    with pytest.raises(ContractError, match=r"dataflow 'rs' was given: use 'os', 'ws' or 'is'"):
        multiply(np.ones((2, 2)), np.ones((2, 2)), 2, 2, "rs")  # type: ignore[arg-type]
    with pytest.raises(ContractError, match=r"an array of 0 x 2 was given"):
        multiply(np.ones((2, 2)), np.ones((2, 2)), 0, 2)
