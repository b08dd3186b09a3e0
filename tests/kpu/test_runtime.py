"""Programs at three fidelities: values, times, settings, and what a wrong input is told."""

from __future__ import annotations

import hal_kpu
import pytest
import torch
from hal_kpu import BEHAVIORAL, CYCLE_ACCURATE, TRANSACTIONAL, KPURuntime
from hal_kpu.frontend.dfx.program import DFXProgram
from hal_kpu.profiles.profile import load

from hal_core.errors import ContractError


@pytest.fixture(autouse=True)
def _settings():
    yield
    hal_kpu.set_fidelity(BEHAVIORAL)
    hal_kpu.set_clock_frequency(None)


def layer(dtype: torch.dtype = torch.float32) -> tuple[DFXProgram, list[torch.Tensor], torch.Tensor]:
    """relu(x @ w) as a program, operands, and torch's result."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-9, 9, shape, generator=generator).to(dtype) for shape in ((40, 50), (50, 30)))

    @hal_kpu.compile
    def function(x, w):
        return hal_kpu.relu(hal_kpu.matmul(x, w))

    function(x, w)
    return function.get_dfx(), [x, w], torch.relu(x @ w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.bfloat16])
@pytest.mark.parametrize("fidelity", [BEHAVIORAL, TRANSACTIONAL, CYCLE_ACCURATE])
def test_values_are_equal_and_counts_are_there_at_every_fidelity(fidelity, dtype):
    program, inputs, want = layer(dtype)
    result, stats = KPURuntime(fidelity, profile="t32x32").execute(program, inputs)
    assert torch.equal(result.data, want)  # small whole numbers: exact in every type
    assert stats.total_macs == program.total_macs() == 40 * 50 * 30
    assert stats.matmul_flops == 2 * stats.total_macs
    assert stats.ops_executed == len(program.ops)
    assert stats.execution_backend == ("behavioral", "transactional", "cycle_accurate")[fidelity]
    assert (stats.cycles > 0) == (fidelity != BEHAVIORAL)
    assert stats.active_macs == (stats.total_macs if fidelity == CYCLE_ACCURATE else None)


@pytest.mark.parametrize("fidelity", [TRANSACTIONAL, CYCLE_ACCURATE])
def test_a_program_is_its_operations_one_after_the_other(fidelity):
    program, inputs, _ = layer()
    _, stats = KPURuntime(fidelity).execute(program, dict(zip(program.inputs, inputs, strict=True)))
    assert stats.cycles == sum(part.run.cycles for part in stats.parts if part.run)
    assert [part.start for part in stats.parts] == [0, stats.parts[0].run.cycles]
    assert max(span.end for span in stats.spans()) == stats.cycles
    for engine, time in stats.engines.items():
        assert time.total == stats.cycles, engine
        spans = [span for span in stats.spans() if span.engine == engine]
        assert time.busy == sum(span.end - span.start for span in spans)
    assert stats.busy_cycles + stats.stall_cycles + stats.idle_cycles == stats.cycles
    assert stats.external_bytes == sum(span.bytes for span in stats.spans() if span.engine.startswith("dma"))
    assert 0 < stats.utilization <= 1
    assert 0 < stats.efficiency <= 1
    assert stats.memory_bandwidth_gbps * 1e9 <= load("t64")["dram.bandwidth"]
    assert len(list(stats.spans(limit=5))) == 5


def test_equal_operations_are_timed_once(monkeypatch):
    program, inputs, _ = layer()
    KPURuntime(TRANSACTIONAL).execute(program, inputs)
    from hal_kpu.runtime import timing

    monkeypatch.setattr(timing, "run_transactional", lambda *_: pytest.fail("timed again"))
    KPURuntime(TRANSACTIONAL).execute(program, inputs)


def test_the_clock_changes_what_depends_on_it_and_not_the_memory():
    program, inputs, _ = layer()
    _, slow = KPURuntime(TRANSACTIONAL).execute(program, inputs)
    hal_kpu.set_clock_frequency(2 * hal_kpu.get_clock_frequency())
    assert hal_kpu.get_clock_frequency() == pytest.approx(0.95)
    _, fast = KPURuntime(TRANSACTIONAL).execute(program, inputs)
    assert slow.seconds / 2 <= fast.seconds < slow.seconds
    assert fast.cycles > slow.cycles  # the memory takes more of the shorter cycles


def test_settings_of_the_process():
    assert hal_kpu.get_fidelity_name() == "BEHAVIORAL"
    hal_kpu.set_fidelity(CYCLE_ACCURATE)
    assert hal_kpu.get_fidelity() == CYCLE_ACCURATE
    assert hal_kpu.get_runtime().fidelity == CYCLE_ACCURATE
    with pytest.raises(ContractError, match="fidelity 3 was given"):
        hal_kpu.set_fidelity(3)
    with pytest.raises(ContractError, match="clock frequency -1 was given: a number of GHz"):
        hal_kpu.set_clock_frequency(-1)
    with pytest.raises(ContractError, match="fidelity True was given"):
        KPURuntime(True)


def test_wrong_inputs_are_told():
    program, (x, w), _ = layer()
    first, second = program.inputs
    run = KPURuntime(TRANSACTIONAL).execute
    with pytest.raises(ContractError, match=f"{second} is missing, extra is unknown: give each once"):
        run(program, {first: x, "extra": w})
    with pytest.raises(ContractError, match="takes 2 inputs, 1 were given"):
        run(program, [x])
    with pytest.raises(
        ContractError, match=rf"input {first}: float64 \[40, 50\] was given, float32 \[40, 50\] is wanted"
    ):
        run(program, [x.double(), w])
