"""Grouped products of experts and embedding bags on the KPU: values, gradients, times and coverage."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hal_kpu import Coverage, DFXProgram, KPURuntime, get_last_stats, measure
from hal_kpu.frontend.emitter import Emitter
from hal_kpu.profiles.profile import load
from hal_kpu.runtime.timing import time_work
from hal_kpu.simulator.opcodes.specs import TensorSpec
from hal_kpu.simulator.opcodes.table import OPCODES
from torch import Tensor, nn

BACKENDS = ("kpu", "kpu_transactional", "kpu_cycle_accurate")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def last() -> Coverage:
    found = get_last_stats()
    assert found is not None
    return found


SHAPES = {
    "rows": ((24, 16), (4, 16, 32), 24),
    "rows that no number of groups divides": ((27, 16), (4, 16, 8), 27),
    "columns": ((4, 16, 32), (32, 24), 24),
    "inner": ((16, 40), (40, 24), 40),
    "a batch": ((4, 8, 16), (4, 16, 24), 0),
}


def ends_of(total: int, draw: torch.Generator, aligned: bool) -> Tensor:
    """Of four groups, one of them empty."""
    step = 8 if aligned else 1
    cuts = torch.randint(0, total // step + 1, (2,), generator=draw).sort()[0] * step
    return torch.tensor([int(cuts[0]), int(cuts[0]), int(cuts[1]), total], dtype=torch.int32)


def grouped(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """In the operands' type, group by group."""
    if ends is None:
        return a @ b
    bounds = [*itertools.pairwise([0, *ends.tolist()])]
    if a.dim() == b.dim():
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in bounds])
    if a.dim() == 2:
        return torch.cat([a[i:j] @ b[group] for group, (i, j) in enumerate(bounds)])
    return torch.cat([a[group] @ b[:, i:j] for group, (i, j) in enumerate(bounds)], 1)


def drawn(case: str, dtype: torch.dtype, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None, Tensor, int]:
    """(a, b, ends, the result in float64, multiply-accumulates)."""
    shape_a, shape_b, total = SHAPES[case]
    a, b = (torch.randn(shape, generator=draw).to(dtype) for shape in (shape_a, shape_b))
    ends = ends_of(total, draw, case in ("columns", "inner")) if total else None
    want = grouped(a.double(), b.double(), ends)
    return a, b, ends, want, 16 * 40 * 24 if case == "inner" else want.numel() * a.shape[-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHAPES)
def test_grouped_products_agree_with_float64(case: str, backend: str, draw: torch.Generator) -> None:
    """torch compiles them in bfloat16 alone."""
    a, b, ends, want, macs = drawn(case, torch.bfloat16, draw)
    with torch.no_grad():
        got = torch.compile(lambda a, b: torch._grouped_mm(a, b, offs=ends), backend=backend)(a, b)
    assert got.dtype == torch.bfloat16
    assert relative(got, want) <= 4e-3
    coverage = last()
    assert coverage.fallback == ()
    assert coverage.macs == coverage.kpu_macs == macs
    assert (coverage.cycles > 0) == (backend != "kpu")
    assert coverage.active_macs == (macs if backend == "kpu_cycle_accurate" else 0)
    assert sum(stats.total_macs for stats in coverage.execution) == (macs if backend != "kpu" else 0)


@pytest.mark.parametrize("fidelity", [0, 1, 2])
@pytest.mark.parametrize("case", ["rows", "rows that no number of groups divides", "columns", "inner"])
def test_the_opcode_takes_other_types_too(case: str, fidelity: int, draw: torch.Generator) -> None:
    a, b, ends, want, macs = drawn(case, torch.float32, draw)
    assert ends is not None
    e = Emitter()
    program = e.program([e.one("grouped_matmul", e.input(a), e.input(b), e.input(ends))])
    result, stats = KPURuntime(fidelity).execute(DFXProgram.from_json(program.to_json()), [a, b, ends])
    assert relative(result.data, want) <= 1e-6
    assert stats.total_macs == program.total_macs() == macs
    assert stats.ops_executed == 1
    assert (stats.cycles > 0) == bool(fidelity)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_experts_agree_with_float64(backend: str, draw: torch.Generator) -> None:
    x, w = (torch.randn(shape, generator=draw).bfloat16() for shape in ((32, 16), (4, 16, 24)))
    seed, ends = torch.randn(32, 24, generator=draw).bfloat16(), ends_of(32, draw, aligned=True)

    def gradients(dtype: torch.dtype, run: Any) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w)]
        (run(*leaves, ends) * seed.to(dtype)).sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    compiled = torch.compile(lambda x, w, ends: torch._grouped_mm(x, w, offs=ends), backend=backend)
    with measure() as measured:
        got = gradients(torch.bfloat16, compiled)
    for one, want in zip(got, gradients(torch.float64, grouped), strict=True):
        assert relative(one, want) <= 4e-3
    coverage = measured.coverage()
    assert coverage.fallback == ()
    assert coverage.kpu_macs == coverage.macs == 3 * 32 * 16 * 24


def test_experts_take_no_fewer_cycles_than_one_product_of_as_many_rows() -> None:
    """Each group brings a weight of its own; rows are spread evenly, the remainder one to a group."""

    def work(groups: int) -> Any:
        a, b = TensorSpec("a", (101, 64), "bfloat16"), TensorSpec("b", (groups, 64, 96), "bfloat16")
        ends, out = TensorSpec("ends", (groups,), "int32"), TensorSpec("out", (101, 96), "bfloat16")
        return OPCODES["grouped_matmul"].work((a, b, ends), (out,), {})

    assert [(part.batch, part.M) for part in work(8).parts] == [(3, 12), (5, 13)]
    assert work(8).macs == work(1).macs == 101 * 64 * 96
    assert [(part.batch, part.M) for part in work(120).parts] == [(101, 1)]
    for fidelity in (1, 2):
        cycles = [
            sum(time_work(part, load("t64"), fidelity).cycles for part in work(groups).parts)  # type: ignore[union-attr]
            for groups in (1, 8)
        ]
        assert cycles[0] < cycles[1]


def test_a_grouped_product_with_another_result_type_stays_on_the_host_by_name() -> None:
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(2, 16, 16).bfloat16()
    ends = torch.tensor([8, 16], dtype=torch.int32)

    def run(a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.aten._grouped_mm(a, b, ends, None, torch.float32)

    with torch.no_grad():
        try:
            run(a, b)
        except RuntimeError:
            pytest.skip("this torch has no such product on the CPU")
        torch.compile(run, backend="kpu")(a, b)
    ((name, reason, _),) = last().fallback
    assert (name, reason) == ("aten._grouped_mm.default", "with a result in torch.float32")


MODES = [
    ("sum", {}),
    ("mean", {}),
    ("max", {}),
    ("sum", {"padding_idx": 3}),
    ("mean", {"padding_idx": 3}),
    ("max", {"padding_idx": 3}),
    ("sum", {"per_sample_weights": True}),
    ("sum", {"include_last_offset": True}),
    ("mean", {"include_last_offset": True}),
    ("sum", {"scale_grad_by_freq": True}),
]


def bag_reference(
    table: Tensor, indices: Tensor, offsets: Tensor, mode: str, factors: Tensor | None, **options: Any
) -> Tensor:
    """Bag by bag in the table's type; gradients by torch's indexing."""
    ends = offsets.tolist()[1:] if options.get("include_last_offset") else [*offsets.tolist()[1:], len(indices)]
    padding, bags = options.get("padding_idx", -1), []
    for begin, end in zip(offsets.tolist(), ends, strict=False):
        places = [i for i in range(begin, end) if indices[i] != padding]
        rows = table[indices[places]]
        if not places:
            bags.append(table.sum(0) * 0)
        elif mode == "max":
            bags.append(rows.max(0)[0])
        else:
            rows = rows if factors is None else rows * factors[places][:, None]
            bags.append(rows.sum(0) / (len(places) if mode == "mean" else 1))
    return torch.stack(bags)


@pytest.mark.parametrize(("backend", "kind"), [*zip(BACKENDS, (torch.int32, torch.int64, torch.int64), strict=True)])
@pytest.mark.parametrize(("mode", "options"), MODES)
def test_embedding_bags_and_their_gradients_agree_with_float64(
    mode: str, options: dict[str, Any], backend: str, kind: torch.dtype, draw: torch.Generator
) -> None:
    table, n = torch.randn(11, 6, generator=draw), 23
    indices = torch.randint(0, 11, (n,), generator=draw).to(kind)
    offsets = torch.tensor([0, 5, 5, 9, 20, *([n] if "include_last_offset" in options else [])], dtype=kind)
    factors = torch.randn(n, generator=draw) if options.get("per_sample_weights") else None
    seed = torch.randn(5, 6, generator=draw)
    given = {name: value for name, value in options.items() if name != "per_sample_weights"}

    def run(table: Tensor, factors: Tensor | None) -> Tensor:
        return F.embedding_bag(indices, table, offsets, mode=mode, per_sample_weights=factors, **given)

    def gradients(dtype: torch.dtype, call: Any) -> list[Tensor]:
        leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in (table, factors)]
        out = call(*leaves)
        (out * seed.to(dtype)).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None)]

    with measure() as measured:
        got = gradients(torch.float32, torch.compile(run, backend=backend))
    coverage = measured.coverage()
    assert coverage.fallback == ()
    assert (coverage.cycles > 0) == (backend != "kpu")
    want = gradients(torch.float64, lambda t, f: bag_reference(t, indices.long(), offsets, mode, f, **given))
    if "scale_grad_by_freq" in options:
        often = torch.bincount(indices.long(), minlength=11).clamp_min(1)
        want[1] /= often[:, None]
    for one, right in zip(got, want, strict=True):
        assert relative(one, right) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bag_of_a_model_leaves_nothing_to_the_host(dtype: torch.dtype, draw: torch.Generator) -> None:
    torch.manual_seed(draw.initial_seed())
    model = nn.Sequential(nn.EmbeddingBag(20, 16, mode="mean"), nn.Linear(16, 4)).to(dtype)
    words = torch.randint(0, 20, (6, 9), generator=draw)
    with torch.no_grad():
        got = torch.compile(model, backend="kpu_transactional")(words)
        want = model.double()(words)
    assert relative(got, want) <= (1e-6 if dtype == torch.float32 else 1e-2)
    assert last().fallback == ()
    assert last().shares["nodes"] == 1


@pytest.mark.parametrize("with_last", [False, True])
def test_an_inference_bag_gives_all_four_results_of_torch(with_last: bool, draw: torch.Generator) -> None:
    table, n = torch.randn(11, 6, generator=draw), 23
    indices = torch.randint(0, 11, (n,), generator=draw)
    offsets = torch.tensor([0, 5, 5, 9, 20, *([n] if with_last else [])])

    def run(table: Tensor) -> Any:
        return torch.ops.aten._embedding_bag_forward_only(table, indices, offsets, False, 1, False, None, with_last, -1)

    with torch.no_grad():
        got, want = torch.compile(run, backend="kpu")(table), run(table)
    assert relative(got[0], want[0].double()) <= 1e-6
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[2][:5], want[2][:5])
    assert got[2].shape == offsets.shape  # torch.compile is told so; torch's own kernel gives one less
    assert got[3].shape == want[3].shape


def test_empty_bags_are_zeros() -> None:
    table, none = torch.randn(4, 3), torch.zeros(0, dtype=torch.int64)
    for mode in ("sum", "mean", "max"):
        with torch.no_grad():
            got = torch.compile(
                lambda t, mode=mode: F.embedding_bag(none, t, torch.tensor([0, 0]), mode=mode), backend="kpu"
            )(table)
        assert torch.equal(got, torch.zeros(2, 3)), mode


def test_a_sparse_gradient_and_a_fourier_transform_stay_on_the_host_by_name() -> None:
    bag, words = nn.EmbeddingBag(8, 4, sparse=True), torch.randint(0, 8, (3, 5))
    with measure() as measured:
        torch.compile(bag, backend="kpu")(words).sum().backward()
    assert bag.weight.grad is not None
    assert bag.weight.grad.is_sparse
    names = {name for name, *_ in measured.coverage().fallback} | {name for name, *_ in measured.coverage().outside}
    assert any("embedding_bag" in name and "backward" in name for name in names), names
    with torch.no_grad():
        torch.compile(lambda x: torch.fft.rfft(x).abs(), backend="kpu")(torch.randn(16))
    assert any("fft" in name for name, *_ in last().fallback)
