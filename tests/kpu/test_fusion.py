"""Operations that run as one: which ones, what they cost together, and that nothing else changes."""

from __future__ import annotations

import random
from itertools import pairwise

import hal_kpu
import pytest
import torch
import torch.nn.functional as F
from hal_kpu import Tensor
from hal_kpu.frontend.dfx.program import DFXProgram
from hal_kpu.frontend.emitter import Emitter, Value
from hal_kpu.frontend.fx.plan import Plan
from hal_kpu.profiles.profile import load
from hal_kpu.runtime.fusion import groups
from hal_kpu.runtime.timing import time_program, works
from torch import nn


def labels(program: DFXProgram) -> list[str]:
    return [group.label for group in groups(program, works(program))]


def drawn(e: Emitter, *shape: int) -> Value:
    return e.input(torch.randn(shape))


def test_an_activation_and_a_residual_leave_with_the_product() -> None:
    e = Emitter()
    x, w, rest = drawn(e, 64, 32), drawn(e, 32, 96), drawn(e, 64, 96)
    out = e.one("erf", e.reshape(e.matmul(x, w), (1, 64, 96))) * 0.5
    program = e.program([e.reshape(out, (64, 96)) + rest])
    (group,) = groups(program, works(program))
    assert group.label == "matmul+erf+mul+add"
    assert group.work.macs == 64 * 32 * 96
    assert group.work.epilogue_bytes == 4 * 64 * 96  # the residual
    assert group.work.writes_bytes == 4 * 64 * 96
    assert group.work.epilogue == sum(one.elements * one.passes for one in works(program)[1:])


def test_what_others_read_is_written_and_what_nobody_reads_is_not() -> None:
    e = Emitter()
    x = drawn(e, 64, 32)
    halved = x * 0.5
    program = e.program([halved, e.sum(halved * halved, (1,))])
    (group,) = groups(program, works(program))
    assert group.label == "mul+mul+sum"
    assert (group.work.reads_bytes, group.work.writes_bytes) == (4 * 64 * 32, 4 * 64 * 32 + 4 * 64)


def test_nothing_outside_of_a_group_lies_between_two_of_its_operations() -> None:
    """A mean is there only when its whole row is: what follows it is another pass."""
    e = Emitter()
    x = drawn(e, 8, 16)
    doubled = x * 2
    program = e.program([doubled - e.sum(doubled, (1,), True) / 16])
    assert labels(program) == ["mul+sum", "div", "sub"]


def test_a_softmax_waits_for_whole_rows_of_a_product() -> None:
    e = Emitter()
    scores = e.matmul(drawn(e, 8, 16), drawn(e, 16, 32))
    seen = e.one("softmax", scores * 0.25, axis=1)
    program = e.program([e.one("where", e.one("compare", scores, 0.0, predicate="gt"), seen, scores)])
    found = labels(program)
    assert all("matmul" not in label or "softmax" not in label for label in found)
    assert any(label.startswith("softmax+") for label in found)


def _random_program(seed: int) -> DFXProgram:
    rng, e = random.Random(seed), Emitter()
    values = [drawn(e, 48, 64), drawn(e, 48, 64)]
    weights = drawn(e, 64, 64)
    for _ in range(rng.randint(3, 14)):
        x, kind = rng.choice(values), rng.choice(["matmul", "unary", "unary", "binary", "binary", "rows", "softmax"])
        if kind == "matmul":
            values.append(e.matmul(x, weights))
        elif kind == "unary":
            values.append(e.one(rng.choice(["erf", "exp", "tanh"]), x))
        elif kind == "binary":
            values.append(x + rng.choice(values))
        elif kind == "rows":
            values.append(x - e.sum(x, (1,), True) / 64)
        else:
            values.append(e.one("softmax", x, axis=1))
    return e.program(rng.sample(values[2:], rng.randint(1, 2)) if len(values) > 3 else values[2:])


@pytest.mark.parametrize("seed", range(25))
def test_groups_hold_every_operation_once_and_can_be_put_in_order(seed: int) -> None:
    program = _random_program(seed)
    found = groups(program, works(program))
    moving = [index for index, work in enumerate(works(program)) if work.engine != "none"]
    assert sorted(member for group in found for member in group.members) == moving
    of = {name: index for index, op in enumerate(program.ops) for name in op.outputs}
    where = {member: number for number, group in enumerate(found) for member in group.members}

    def sources(index: int) -> set[int]:
        feeding = {of[name] for name in program.ops[index].inputs if name in of}
        return {f for one in feeding for f in ({one} if one in where else sources(one))}

    waits = {n: {where[s] for m in g.members for s in sources(m)} - {n} for n, g in enumerate(found)}
    while waits:
        ready = [number for number, others in waits.items() if not others & set(waits)]
        assert ready, "groups wait for each other"
        for number in ready:
            del waits[number]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fidelity", [hal_kpu.TRANSACTIONAL, hal_kpu.CYCLE_ACCURATE])
def test_as_one_they_do_the_same_work_in_less_time(seed: int, fidelity: int) -> None:
    program = _random_program(seed)
    apart, together = (time_program(program, fidelity, "t64", fuse=fuse) for fuse in (False, True))
    assert together.cycles <= apart.cycles
    assert together.external_bytes <= apart.external_bytes
    assert together.total_macs == apart.total_macs
    assert together.vector_operations == pytest.approx(apart.vector_operations, rel=0.01)  # shares of tiles, rounded up
    assert together.ops_executed == apart.ops_executed
    assert (together.cycles < apart.cycles) == bool(together.fused)
    starts = [part.start for part in together.parts]
    assert all(a <= b for a, b in pairwise(starts))


@pytest.mark.parametrize("name", ["t64", "t768"])
def test_the_two_timed_fidelities_agree_on_products_with_what_leaves_with_them(name: str) -> None:
    e = Emitter()
    x, w, rest = (e.input(torch.randn(shape).bfloat16()) for shape in ((128, 256), (256, 512), (128, 512)))
    program = e.program([e.one("erf", e.matmul(x, w)) + rest])
    quick, exact = (time_program(program, fidelity, name, fuse=True).cycles for fidelity in (1, 2))
    assert quick == pytest.approx(exact, rel=0.05)


def test_a_machine_without_room_runs_them_one_by_one() -> None:
    e = Emitter()
    program = e.program([e.one("erf", e.matmul(drawn(e, 64, 32), drawn(e, 32, 64)))])
    profile = load("t32x32")
    assert time_program(program, 1, profile, fuse=True).fused == ["matmul+erf"]
    small = profile.replace(buffers__l2=6000)
    assert time_program(program, 1, small, fuse=True).fused == []


class Layer(nn.Module):
    """A BERT layer's operations: attention, then two products with GELU between; residuals and norms."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = self.norms[0](x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.norms[1](x + self.down(F.gelu(self.up(x))))


def test_a_transformer_layer_takes_less_than_seven_tenths(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    made = Plan.__init__
    programs: list[DFXProgram] = []
    monkeypatch.setattr(Plan, "__init__", lambda plan, *given: (programs.append(given[0]), made(plan, *given))[1])
    layer, x = Layer(768, 12).eval().bfloat16(), torch.randn(1, 128, 768).bfloat16()
    with torch.no_grad():
        torch.compile(layer, backend="kpu_transactional")(x)
    found = hal_kpu.get_last_stats()
    assert found is not None
    assert found.cycles <= 0.70 * sum(time_program(program, 1).cycles for program in programs)
    assert any("erf" in label and label.startswith("matmul+") for label, _ in found.fused)
    assert "as one: matmul+" in found.summary()


def test_optimize_says_whether() -> None:
    def block(x: Tensor, weight: Tensor) -> Tensor:
        return hal_kpu.tanh(hal_kpu.relu(x @ weight))

    x, weight = Tensor.randn(96, 64), Tensor.randn(64, 96)
    results = {}
    for optimize in (True, False):
        function = hal_kpu.compile(block, fidelity=hal_kpu.TRANSACTIONAL, optimize=optimize)
        results[optimize] = function(x, weight).numpy(), function.stats.cycles, function.stats.fused
    assert (results[True][0] == results[False][0]).all()
    assert results[True][1] < results[False][1]
    assert (results[True][2], results[False][2]) == (["matmul+maximum+tanh"], [])
