"""torch.compile with the KPU: outputs and gradients of real architectures, dynamic shapes, generation, what is
counted.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hal_kpu.frontend.fx.backend import KPUBackend, register_kpu_backend
from hal_kpu.frontend.fx.coverage import Coverage, get_last_stats, measure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hal_core.errors import ContractError

from .model_zoo import FULLY_ON_KPU, NAMES, build, floats

FAST = ("bert", "resnet18")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(before)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


#: Dynamo before 2.13 may take T5 and BART in several graphs.
OLDER = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


def fast_first(names: tuple[str, ...] | list[str], fast: tuple[str, ...] = FAST) -> list[Any]:
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", fast_first(NAMES))
def test_a_model_gives_what_it_gives_without_the_kpu(name, seed):
    model, inputs = build(name, seed)
    with torch.no_grad():
        want = floats(model(**inputs))
        got = floats(torch.compile(model, backend="kpu")(**inputs))
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        assert other.norm() > 0
        assert distance(one, other) <= 1e-5
    coverage = get_last_stats()
    assert coverage is not None
    assert coverage.graph_breaks == 0 or OLDER
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    assert coverage.macs == counter.get_total_flops() // 2 > 0
    if name in FULLY_ON_KPU:
        assert coverage.fallback == ()
        assert coverage.kpu_nodes == coverage.nodes > 0


@pytest.mark.parametrize("name", fast_first(NAMES))
def test_a_model_in_training_gets_the_gradients_it_gets_without_the_kpu(name, seed):
    """A gradient that is zero but for rounding, as a key's bias has, is held to 1e-5 of a ten-thousandth of the
    whole.
    """
    model, inputs = build(name, seed)
    model.train()
    other = copy.deepcopy(model)
    for network, run in ((model, torch.compile(model, backend="kpu")), (other, other)):
        outputs = floats(run(**inputs))
        draw = torch.Generator().manual_seed(seed)
        loss = sum((out * torch.randn(out.shape, generator=draw)).sum() for out in outputs)
        assert isinstance(loss, Tensor)
        loss.backward()
        assert any(parameter.grad is not None for parameter in network.parameters())
    grads = [(name, p.grad, q.grad) for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True)]
    assert [name for name, got, want in grads if (got is None) != (want is None)] == []
    kept = [(name, got, want) for name, got, want in grads if want is not None]
    whole = float(torch.stack([want.norm() for _, _, want in kept]).norm())
    errors = {name: float((got - want).norm()) / max(float(want.norm()), 1e-4 * whole) for name, got, want in kept}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-5, worst
    for one, another in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(one, another)
    if name in FULLY_ON_KPU:
        assert get_last_stats().fallback == ()


@pytest.mark.parametrize("automatic", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", fast_first(FULLY_ON_KPU, ("bert",)))
def test_a_model_in_bfloat16_lowers_whole_and_rounds_no_worse_than_eager(name, automatic, seed):
    """Weights in bfloat16, and float32 weights under autocast; both set against the same model in float64."""
    model, inputs = build(name, seed)
    model.train()
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    exact = floats(copy.deepcopy(model).double()(**wide))
    if not automatic:
        model = model.bfloat16()
        inputs = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    other = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=automatic):
        got, eager = floats(torch.compile(model, backend="kpu")(**inputs)), floats(other(**inputs))
    assert [one.dtype for one in got] == [one.dtype for one in eager]
    for one, another, want in zip(got, eager, exact, strict=True):
        assert distance(one.double(), want) <= 1.3 * distance(another.double(), want)
    sum(one.float().sum() for one in got).backward()
    assert get_last_stats().fallback == ()


@pytest.mark.parametrize("name", fast_first(FULLY_ON_KPU, ("bert",)))
def test_macs_are_those_that_torch_counts_under_the_math_kernel(name, seed):
    model, inputs = build(name, seed)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = sum(out.sum() for out in floats(model(**inputs)))
        loss.backward()
    compiled = torch.compile(model, backend="kpu")
    sum(out.sum() for out in floats(compiled(**inputs))).backward()
    assert get_last_stats().macs == counter.get_total_flops() // 2


def test_two_compiles_serve_every_length(seed):
    model, _ = build("llama", seed)
    compiled = torch.compile(model, backend="kpu")
    torch._dynamo.utils.counters.clear()
    for length in (8, 11, 17, 23):
        words = torch.randint(2, 99, (2, length))
        with torch.no_grad():
            got, want = compiled(words).logits, model(words).logits
        assert distance(got, want) <= 1e-5
        assert get_last_stats().fallback == ()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_generation_with_a_cache_gives_equal_tokens(seed):
    model, _ = build("llama", seed)
    words = torch.randint(2, 99, (2, 5))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(words, **options)
    model.forward = torch.compile(model.forward, backend="kpu")
    with measure() as measurement:
        got = model.generate(words, **options)
    assert torch.equal(got, want)
    assert measurement.coverage().graphs == 6
    assert measurement.coverage().fallback == ()


class Mixed(nn.Module):
    """A product on the KPU, Airy's function on the host, a product on the KPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.special.airy_ai(self.first(x)))


def test_what_does_not_lower_runs_on_the_host_and_is_counted_there():
    model, x = Mixed(), torch.randn(5, 6)
    with torch.no_grad():
        got, want = torch.compile(model, backend="kpu")(x), model(x)
    assert torch.allclose(got, want, atol=1e-6)
    coverage = get_last_stats()
    assert coverage.fallback == (("aten.special_airy_ai.default", "no lowering", 1),)
    assert coverage.nodes - coverage.kpu_nodes == 1
    assert coverage.boundary_bytes == 2 * 5 * 4 * 4  # to the host and back
    assert coverage.macs == coverage.kpu_macs == 5 * 6 * 4 + 5 * 4 * 3
    assert 0 < coverage.shares["bytes"] < 1
    assert 0 < coverage.shares["time"] < 1


def test_macs_left_to_the_host_are_counted_there():
    """A product of complex numbers has no lowering."""

    def run(a: Tensor, b: Tensor) -> Tensor:
        return torch.view_as_real(torch.complex(a, a) @ torch.complex(b, b)).sum(-1)

    a, b = torch.randn(3, 4), torch.randn(4, 5)
    got = torch.compile(run, backend="kpu")(a, b)
    assert torch.allclose(got, run(a, b), atol=1e-5)
    coverage = get_last_stats()
    assert (coverage.macs, coverage.kpu_macs) == (3 * 4 * 5, 0)


def test_threads_that_run_one_model_do_not_mix():
    """Each call of eight threads gets its own result; all calls are counted."""
    model = Mixed()
    compiled = torch.compile(model, backend="kpu", dynamic=True)
    inputs = [torch.randn(rows, 6) for rows in range(2, 10)]

    def call(x: Tensor) -> Tensor:
        # Each thread has its own gradient mode and its own limit. Guards that many threads check at once fail now and
        # then without a cause, and torch.compile compiles anew; at the limit it would run the model without a graph.
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            return compiled(x)

    call(inputs[0])
    with measure() as measurement, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, inputs * 4))
    for x, got in zip(inputs * 4, results, strict=True):
        assert torch.allclose(got, model(x), atol=1e-6)
    assert measurement.coverage().graphs == 32
    assert measurement.coverage().macs == 4 * sum(len(x) for x in inputs) * (6 * 4 + 4 * 3)


def test_graph_breaks_are_counted():
    def run(x: Tensor) -> Tensor:
        x = torch.sin(x)
        torch._dynamo.graph_break()
        return torch.cos(x)

    x = torch.randn(3)
    compiled = torch.compile(run, backend="kpu")
    for _ in range(2):
        assert torch.allclose(compiled(x), run(x))
        coverage = get_last_stats()
        assert (coverage.graphs, coverage.graph_breaks, coverage.nodes) == (2, 1, 2)


def test_a_model_that_sends_no_graph_covers_nothing():
    """That it ran with this backend's name says nothing: torch.compile leaves nn.LSTM to eager."""
    model, x = nn.LSTM(4, 4), torch.randn(3, 2, 4)
    with torch.no_grad(), measure() as measurement:
        torch.compile(model, backend="kpu")(x)
    coverage = measurement.coverage()
    assert coverage.graphs == coverage.kpu_nodes == 0
    assert coverage.macs == 3 * 2 * 16 * 8
    assert set(coverage.shares.values()) == {0.0}
    assert "sent no graph" in coverage.summary()


def test_another_model_begins_another_count():
    for function, nodes in ((torch.sin, 1), (lambda x: x.sin().cos(), 2)):
        torch.compile(function, backend="kpu")(torch.randn(3))
        assert get_last_stats().nodes == nodes


def test_masked_and_grouped_attention_has_right_gradients(seed):
    """torch's own table splits the forward of the CPU's flash attention and not its backward."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, heads, 7, 8, requires_grad=True) for heads in (4, 2, 2))
    mask = torch.randn(7, 7)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    want = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    got = torch.autograd.grad(torch.compile(attend, backend="kpu")(q, k, v).square().sum(), (q, k, v))
    assert get_last_stats().fallback == ()
    for one, other in zip(got, want, strict=True):
        assert distance(one, other) <= 1e-6


def test_outputs_lie_in_memory_as_eager_ones_do():
    """What follows a graph may ask for a view, which memory in another order cannot give."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        turned = (x * 2).permute(0, 2, 1)
        return turned + 1, turned.contiguous()

    x = torch.randn(2, 3, 4)
    for got, want in zip(torch.compile(run, backend="kpu")(x), run(x), strict=True):
        assert got.stride() == want.stride()
        assert torch.equal(got, want)


def test_a_result_does_not_share_memory_with_what_it_copies():
    x = torch.ones(3)
    out = torch.compile(lambda x: x.clone(), backend="kpu")(x)
    out.add_(1)
    assert x.tolist() == [1, 1, 1]


def test_an_input_changed_in_place_is_changed():
    x = torch.ones(3)
    torch.compile(lambda x: x.mul_(3).add(1), backend="kpu")(x)
    assert x.tolist() == [3, 3, 3]


def test_dropout_draws_what_eager_dropout_draws():
    x = torch.randn(50)
    drop = nn.Dropout(0.5)
    torch.manual_seed(1)
    want = drop(x)
    torch.manual_seed(1)
    assert torch.equal(torch.compile(drop, backend="kpu")(x), want)


def test_the_report_says_what_ran_where(capsys):
    torch.compile(Mixed(), backend="kpu")(torch.randn(5, 6))
    coverage = get_last_stats()
    assert isinstance(coverage, Coverage)
    data = coverage.to_dict()
    assert data["fallback"][0]["operator"] == "aten.special_airy_ai.default"
    assert set(data["shares"]) == {"nodes", "macs", "bytes", "time"}
    assert data["opcodes"]["matmul"] == 2
    from rich.console import Console

    Console(width=120).print(coverage.table())
    assert "special_airy_ai" in capsys.readouterr().out
    assert "special_airy_ai" in coverage.summary()


def test_the_backends_are_found_by_torch_and_need_no_registration():
    code = (
        "import torch, sys; names = torch._dynamo.list_backends(); "
        "assert {'kpu', 'kpu_behavioral', 'kpu_transactional', 'kpu_cycle_accurate'} <= set(names), names; "
        "assert 'hal_kpu.frontend.fx.backend' not in sys.modules; "
        "import hal_kpu.frontend.fx.backend as b; b.register_kpu_backend(); b.register_kpu_backend()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    register_kpu_backend()


def test_an_unknown_fidelity_is_refused():
    with pytest.raises(ContractError, match="fidelity 7 was given"):
        KPUBackend(7)


@pytest.mark.parametrize("name", fast_first(FULLY_ON_KPU, ("bert",)))
def test_a_model_is_timed_and_its_values_stay(name, seed):
    """TRANSACTIONAL: the same values, and simulated cycles no fewer than the products alone need at the array's
    peak.
    """
    model, inputs = build(name, seed)
    compiled = torch.compile(model, backend="kpu_transactional")
    with torch.no_grad():
        want, got = floats(model(**inputs)), floats(compiled(**inputs))
    assert max(distance(one, other) for one, other in zip(got, want, strict=True)) <= 1e-5
    coverage = get_last_stats()
    parts = coverage.execution
    assert len(parts) == 1 or OLDER
    assert (coverage.fidelity, coverage.time_basis) == ("transactional", "modelled")
    assert sum(stats.total_macs for stats in parts) == coverage.macs > 0
    assert coverage.cycles == sum(stats.cycles for stats in parts) >= coverage.macs / parts[0].peak_macs
    assert coverage.kpu_seconds == pytest.approx(sum(stats.seconds for stats in parts))
    assert coverage.kpu_seconds > 0
    assert coverage.shares["time"] == 1


def test_every_operation_that_computes_or_moves_costs_cycles(seed):
    """What lowers is charged for: of a timed program only new names for the same bytes are free."""
    model, inputs = build("bert", seed)
    with torch.no_grad():
        torch.compile(model, backend="kpu_transactional")(**inputs)
    parts = get_last_stats().execution[0].parts
    free = {part.label for part in parts if part.run is None}
    assert free <= {"reshape"}
    assert all(part.run.cycles > 0 for part in parts if part.run is not None)


def test_cycle_accurate_values_come_from_the_stepped_array(seed):
    """Forward and backward: as eager's, with one active multiply-accumulate for each that is reported."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    other, x = copy.deepcopy(model), torch.randn(2, 1, 4, 4)
    out = torch.compile(model, backend="kpu_cycle_accurate")(x)
    out.square().sum().backward()
    other(x).square().sum().backward()
    for one, another in zip(model.parameters(), other.parameters(), strict=True):
        assert distance(one.grad, another.grad) <= 1e-5
    coverage = get_last_stats()
    assert coverage.fidelity == "cycle_accurate"
    assert coverage.active_macs == coverage.macs > 0
    assert coverage.cycles > 0


def test_the_plain_backend_follows_the_process(monkeypatch):
    from hal_kpu.runtime.settings import set_fidelity
    from hal_kpu.simulator.fidelity import BEHAVIORAL, TRANSACTIONAL

    compiled, x = torch.compile(nn.Linear(8, 4), backend="kpu"), torch.randn(2, 8)
    try:
        for fidelity, name in ((TRANSACTIONAL, "transactional"), (BEHAVIORAL, "behavioral")):
            set_fidelity(fidelity)
            compiled(x)
            assert get_last_stats().fidelity == name
            assert (get_last_stats().cycles > 0) == (fidelity == TRANSACTIONAL)
    finally:
        set_fidelity(BEHAVIORAL)


def test_compiled_models_follow_the_process_machine(monkeypatch):
    import hal_kpu

    compiled, x = torch.compile(nn.Linear(64, 64), backend="kpu_transactional"), torch.randn(128, 64)

    def cycles() -> int:
        with torch.no_grad():
            compiled(x)
        return get_last_stats().cycles

    first = cycles()
    monkeypatch.setenv("HAL_KPU_PROFILE", "t768")
    by_variable = cycles()
    try:
        hal_kpu.set_profile("t256")
        assert hal_kpu.get_profile().name == "t256"
        assert len({first, by_variable, cycles()}) == 3
    finally:
        hal_kpu.set_profile(None)
    assert cycles() == by_variable
    with pytest.raises(ContractError, match=r"'t65' is no profile \(did you mean 't64'\?\): use"):
        hal_kpu.set_profile("t65")


@pytest.mark.parametrize("backend", ["kpu_transactional", "kpu_cycle_accurate"])
def test_int8_products_run_on_the_arrays_that_multiply_them(backend, seed):
    """T64 multiplies int8 on 44 arrays and float32 on 7."""
    torch.manual_seed(seed)
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((256, 64), (96, 64)))

    def run(a: Tensor, b: Tensor) -> Tensor:
        return torch._int_mm(a, b.T)

    got, coverage = torch.compile(run, backend=backend)(a, b), get_last_stats()
    assert got.dtype == torch.int32
    assert torch.equal(got, (a.long() @ b.T.long()).int())
    assert coverage.fallback == ()
    assert coverage.macs == coverage.kpu_macs == 256 * 64 * 96
    assert coverage.active_macs == (coverage.macs if backend.endswith("accurate") else 0)
    floats = torch.compile(lambda a, b: a @ b.T, backend=backend)
    floats(a.float(), b.float())
    assert coverage.cycles < get_last_stats().cycles
