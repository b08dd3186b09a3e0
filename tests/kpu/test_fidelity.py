"""TRANSACTIONAL beside CYCLE_ACCURATE on what models run."""

from __future__ import annotations

import statistics

import pytest
from hal_kpu.profiles.profile import load
from hal_kpu.simulator.cycle_accurate import run_cycle_accurate
from hal_kpu.simulator.products.lowering import lower_product
from hal_kpu.simulator.products.product import Product
from hal_kpu.simulator.transactional import is_short, run_transactional

from .model_programs import KINDS, model_case
from .programs import run_averaged


def deviation(seed: int) -> float:
    """Of TRANSACTIONAL's cycles from CYCLE_ACCURATE's, as a share; with every turn of every loop timed."""
    case = model_case(seed)
    exact = sum(run_cycle_accurate(program, case.profile, reuse_above=1 << 60).cycles for program in case.programs)
    quick = sum(run_transactional(program, case.profile).cycles for program in case.programs)
    print(f"{quick / exact:.3f}", case.about)
    return abs(quick / exact - 1)


def test_one_case_of_every_kind_is_near():
    assert max(deviation(seed) for seed in range(len(KINDS))) <= 0.05


@pytest.mark.slow
def test_600_programs_are_near():
    found = sorted(deviation(seed) for seed in range(600))
    assert statistics.median(found) <= 0.01
    assert found[int(0.95 * len(found))] <= 0.05
    assert found[-1] <= 0.10


@pytest.mark.parametrize("seed", [552, 216])
def test_programs_that_are_not_short_are_near(seed):
    assert not all(is_short(program) for program in model_case(seed).programs)
    assert deviation(seed) <= 0.10


def test_a_group_of_many_rows_beside_one_long_row_is_not_taken_for_longer_than_it_is():
    """Four heads' scores: 512 rows of one operand share the memory with one row of the other."""
    profile = load("t256")
    program = lower_product(Product(batch=4, M=128, N=77, K=80, dtype="bfloat16", size=2, out_size=2), profile)
    exact = run_cycle_accurate(program, profile).cycles
    assert run_averaged(program, profile).cycles == pytest.approx(exact, rel=0.05)
