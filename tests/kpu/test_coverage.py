"""Coverage counts a model whole: what graphs did, what was left to the host, and what ran outside of any graph."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hal_kpu import Coverage, get_last_stats, measure
from hal_kpu.frontend.fx.macs import FORMULAS, Counting
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.library.custom_op("hal_kpu_tests::hidden_product", mutates_args=())
def hidden_product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


@hidden_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


class Hidden(nn.Module):
    """A product inside of an operator that nobody can look into."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.hal_kpu_tests.hidden_product(x, self.weight)


class Disabled(nn.Module):
    """A part that torch.compile is told to leave alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.part = nn.Linear(width, width)

    @torch._dynamo.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Break(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.part = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x)
        torch._dynamo.graph_break()
        return self.part(torch.relu(x))


class Experts(nn.Module):
    """Rows sorted by expert, one grouped product for all of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.weight = nn.Linear(width, 3), nn.Parameter(torch.randn(3, width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        order = chosen.argsort()
        ends = torch.bincount(chosen, minlength=3).cumsum(0).to(torch.int32)
        done = torch._grouped_mm(x[order].bfloat16(), self.weight.bfloat16(), offs=ends)
        return torch.zeros_like(x).index_copy(0, order, done.to(x.dtype))


class Recurrent(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.part = nn.LSTM(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x[:, None])[0][:, 0]


class Attend(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.part = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (t[None, None] for t in self.part(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(query, key, value)[0, 0]


class Vector(nn.Module):
    """A matrix by a vector, and a vector by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.mv(self.matrix, x[0]) * torch.dot(x[0], x[1])


PARTS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda width: nn.Linear(width, width),
    "activation": lambda width: nn.GELU(),
    **{kind.__name__: kind for kind in (Hidden, Disabled, Break, Experts, Recurrent, Attend, Vector)},
}


def counted_by_torch(call: Callable[[], Any]) -> int:
    """FlopCounterMode's count, with this package's formulas for what it counts nothing for."""
    added = {packet: _flops(formula) for packet, formula in FORMULAS.items()}
    added[torch.ops.hal_kpu_tests.hidden_product] = lambda a, b, **_: 2 * a[0] * a[1] * b[1]
    with FlopCounterMode(display=False, custom_mapping=added) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() // 2


def _flops(formula: Callable[..., int]) -> Callable[..., int]:
    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 2 * formula(*args, **kwargs)

    count._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
    return count


@pytest.mark.parametrize("number", range(30))
def test_macs_on_the_kpu_and_named_elsewhere_are_all_of_a_model(number: int, seed: int) -> None:
    rng, width = random.Random(seed + number), 16
    names = rng.choices(list(PARTS), k=rng.randint(2, 5))
    torch.manual_seed(seed)
    model, x = nn.Sequential(*(PARTS[name](width) for name in names)).eval(), torch.randn(8, width)
    compiled = torch.compile(model, backend="kpu")
    with torch.no_grad(), measure() as measured:
        got = compiled(x)
    assert torch.allclose(got, model(x), atol=1e-2 if "Experts" in names else 1e-4), names
    coverage, whole = measured.coverage(), counted_by_torch(lambda: model(x))
    assert coverage.macs == whole, names
    outside = sum(macs for _, _, macs in coverage.outside)
    if {"Disabled", "Recurrent"} & set(names):
        assert outside > 0, names
    if {"Disabled", "Recurrent", "Hidden"} & set(names):
        assert coverage.kpu_macs < whole, names
        assert "100.0%" not in coverage.rows()[1][-1], names
    elif "Break" not in names:  # next to one torch runs whole modules outside of graphs
        assert coverage.kpu_macs == whole, names


def test_gradients_are_counted_and_what_starts_them_is_named() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), Disabled(4)), torch.randn(5, 8)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    with measure() as measured:
        torch.compile(model, backend="kpu")(x).sum().backward()
    assert measured.coverage().macs == counter.get_total_flops() // 2
    assert ("aten.ones_like.default", 1, 0) in measured.coverage().outside


def test_without_measure_the_shares_say_that_they_are_of_graphs() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4), Disabled(4)), torch.randn(5, 8)
    with torch.no_grad():
        torch.compile(model, backend="kpu")(x)
    coverage = get_last_stats()
    assert isinstance(coverage, Coverage)
    assert not coverage.whole
    assert coverage.rows()[1][-1] == "100.0% of graphs"
    assert "outside of compiled graphs: not seen" in coverage.summary()


def test_a_share_is_rounded_down() -> None:
    wide = nn.Linear(512, 512)
    part = Disabled(1)

    class Almost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.part = wide, part

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(x) + self.part(x[:, :1])

    with torch.no_grad(), measure() as measured:
        torch.compile(Almost(), backend="kpu")(torch.randn(2, 512))
    assert 0.9999 < measured.coverage().shares["macs"] < 1
    assert measured.coverage().rows()[1][-1] == "99.9%"


@pytest.mark.parametrize(
    ("call", "macs"),
    [
        (lambda: torch._int_mm(torch.ones(17, 8, dtype=torch.int8), torch.ones(8, 16, dtype=torch.int8)), 17 * 8 * 16),
        (lambda: torch.mv(torch.ones(3, 5), torch.ones(5)), 15),
        (lambda: torch.addmv(torch.ones(3), torch.ones(3, 5), torch.ones(5)), 15),
        (lambda: torch.dot(torch.ones(7), torch.ones(7)), 7),
        (lambda: torch.vdot(torch.ones(7), torch.ones(7)), 7),
        (lambda: torch.addbmm(torch.ones(3, 5), torch.ones(2, 3, 4), torch.ones(2, 4, 5)), 2 * 3 * 4 * 5),
        (lambda: nn.LSTM(8, 6)(torch.ones(5, 3, 8)), 15 * 24 * (8 + 6)),
        (lambda: nn.GRU(8, 6)(torch.ones(5, 3, 8)), 15 * 18 * (8 + 6)),
        (lambda: nn.RNN(8, 6, num_layers=2, bidirectional=True)(torch.ones(5, 3, 8)), 15 * 2 * 6 * (14 + 18)),
        (lambda: nn.LSTMCell(8, 6)(torch.ones(3, 8)), 3 * 24 * 14),
        (lambda: nn.functional.scaled_dot_product_attention(*torch.ones(3, 2, 4, 7, 8)), 2 * 4 * 7 * 7 * 16),
    ],
)
@pytest.mark.parametrize("inference", [True, False])
def test_a_hand_count(call: Callable[[], Any], macs: int, inference: bool) -> None:
    with torch.inference_mode(inference), torch.set_grad_enabled(not inference), Counting() as counted:
        call()
    assert counted.macs == macs


@pytest.mark.parametrize(
    ("a", "b", "ends", "macs"),
    [
        ((12, 16), (3, 16, 32), 3, 12 * 16 * 32),
        ((3, 12, 16), (3, 16, 32), 0, 3 * 12 * 16 * 32),
        ((3, 12, 16), (16, 48), 3, 12 * 16 * 48),
        ((16, 24), (24, 32), 3, 16 * 24 * 32),
    ],
)
def test_a_grouped_product_is_counted_by_hand(a, b, ends, macs) -> None:
    total = a[0] if len(a) == 2 and len(b) == 3 else b[1] if len(a) == 3 else a[1]
    offs = torch.tensor([total // 3, total // 3, total], dtype=torch.int32) if ends else None
    packet = torch.ops.aten._grouped_mm
    assert FORMULAS[packet](torch.ones(a), torch.ones(b), offs) == macs


def test_the_last_call_is_one_call_with_gradients_and_without() -> None:
    compiled, x = torch.compile(nn.Linear(16, 32), backend="kpu_transactional"), torch.randn(4, 16)

    def cycles(gradients: bool) -> int:
        with torch.set_grad_enabled(gradients):
            out = compiled(x)
        if gradients:
            out.sum().backward()
        return get_last_stats().cycles

    without, training = cycles(False), cycles(True)
    assert [cycles(True), cycles(False), cycles(False), cycles(True)] == [training, without, without, training]


def test_a_layer_that_torch_runs_whole_is_counted_and_nothing_is_no_share() -> None:
    layer, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(3, 5, 16)
    with torch.no_grad(), measure() as measured:
        torch.compile(layer, backend="kpu")(x)
    coverage = measured.coverage()
    assert coverage.macs == 3 * (5 * 16 * (48 + 16 + 2 * 32) + 2 * 5 * 5 * 16)
    assert coverage.kpu_macs == 0
    assert coverage.rows()[1][-1] == "0.0%"
    with measure() as measured:
        pass
    assert measured.coverage().rows()[1][-1] == "-"


@pytest.mark.parametrize("backend", ["kpu", "kpu_transactional"])
@pytest.mark.parametrize("part", [Recurrent, Hidden], ids=["no graph", "a graph of fallback"])
def test_where_nothing_ran_on_the_kpu_no_time_of_it_is_stated(part: type[nn.Module], backend: str) -> None:
    with torch.no_grad(), measure() as measured:
        torch.compile(part(16), backend=backend)(torch.randn(3, 16))
    coverage = measured.coverage()
    assert coverage.kpu_nodes == coverage.kpu_macs == coverage.kpu_seconds == 0
    assert coverage.rows()[-1] == ["time of the host", "-", f"{coverage.seconds:.3g} s", "-"]
    for text in ("time, measured", "time, modelled", "KPU time", "100"):
        assert text not in coverage.summary()
