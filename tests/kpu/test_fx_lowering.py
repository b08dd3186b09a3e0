"""Lowered ATen operators against torch's own in float64, as programs that went through JSON, on random data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hal_kpu
import pytest
import torch
import torch.nn.functional as F
from hal_kpu.frontend.dfx.program import DFXProgram
from hal_kpu.frontend.fx.backend import decompositions
from hal_kpu.frontend.fx.lowering import FXToKPUConverter, is_operator, why_not
from hal_kpu.frontend.fx.registry import LOWERINGS, lowers
from hal_kpu.runtime.executor import Executor
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hal_core.errors import UnsupportedError

S = torch.special
aten = torch.ops.aten


def convert(function: Callable[..., Any], *inputs: Tensor) -> DFXProgram:
    graph = make_fx(function, decomposition_table=decompositions())(*inputs)
    assert [str(n.target) for n in graph.graph.nodes if is_operator(n) and why_not(n, {}) is not None] == []
    return FXToKPUConverter(graph, inputs).convert()


def as_list(function: Callable[..., Any]) -> Callable[..., list[Tensor]]:
    return lambda x: outputs(function(x))


def in_a_list(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    return lambda a, b, c: [function(a, b, c)]


def outputs(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def check(function: Callable[..., Any], *inputs: Tensor, rtol: float = 2e-5, atol: float = 1e-5) -> DFXProgram:
    """In float32 as in float64, bit for bit where the results are no fractions."""
    program = DFXProgram.from_json(convert(lambda *xs: outputs(function(*xs)), *inputs).to_json())
    got = Executor(program).run(inputs)
    kinds = [out.dtype for out in outputs(function(*inputs))]
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    for one, want, kind in zip(got, outputs(function(*wide)), kinds, strict=True):
        assert one.dtype == kind
        torch.testing.assert_close(one.to(want.dtype), want, rtol=rtol, atol=atol, equal_nan=True)
    return program


@pytest.fixture
def draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return normal


ONE: dict[str, Callable[..., Any]] = {
    "exp2": torch.exp2,
    "log2": lambda x: (x.abs() + 1).log2(),
    "log10": lambda x: (x.abs() + 1).log10(),
    "tan": torch.tan,
    "isnan": lambda x: (x / 0 * 0).isnan(),
    "isinf": lambda x: (x / 0).isinf(),
    "signbit": torch.signbit,
    "logical": lambda x: (x > 0).logical_xor(x < 1).logical_not(),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp by tensors": lambda x: x.clamp(-x.abs() / 2, x.abs() / 3),
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "silu": F.silu,
    "logsigmoid": F.logsigmoid,
    "softshrink": F.softshrink,
    "pow": lambda x: torch.stack([x**2, x**3, x.abs() ** 0.5, (x.abs() + 1) ** -0.5, (x.abs() + 1) ** 1.7, 2**x]),
    "floor division": lambda x: torch.stack([x // 0.3, torch.div(x, 0.3, rounding_mode="trunc")]),
    "frexp": lambda x: torch.frexp(x * 100),
    "ldexp": lambda x: torch.ldexp(x, torch.arange(6)),
    "round to places": lambda x: (x * 100).round(decimals=-1),
    "angle": torch.angle,
    "copysign": lambda x: torch.copysign(x, -x),
    "hypot": lambda x: torch.hypot(x, x + 1),
    "fmax": lambda x: torch.fmax(x, x.sqrt()),
    "atan2": lambda x: torch.atan2(x, x.flip(0)),
    "sum": lambda x: x.sum((0, -1), keepdim=True),
    "mean": lambda x: x.mean(1),
    "prod": lambda x: x.prod(1),
    "var": lambda x: torch.var_mean(x, 1),
    "std": lambda x: x.std(0, correction=0),
    "amax": lambda x: x.amax((0, 1)),
    "max": lambda x: x.max(1),
    "min": lambda x: x.min(0, keepdim=True),
    "argmax": lambda x: x.argmax(),
    "any": lambda x: torch.stack([(x > 1).any(1), (x > -1).all(1)]),
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: x.cumprod(0),
    "cummax": lambda x: x.cummax(1),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "sort": lambda x: x.sort(1, descending=True),
    "topk": lambda x: x.topk(3),
    "kthvalue": lambda x: x.kthvalue(2),
    "median": lambda x: x.median(1),
    "nanmedian": lambda x: x.sqrt().nanmedian(1),
    "softmax": lambda x: x.softmax(0),
    "log_softmax": lambda x: x.log_softmax(1),
    "logsumexp": lambda x: x.logsumexp(1),
    "norms": lambda x: torch.stack([torch.linalg.vector_norm(x, p) for p in (0, 1, 2, 3, float("inf"))]),
    "repeat": lambda x: x.repeat(2, 1, 3),
    "flip": lambda x: x.flip(0, 1),
    "roll": lambda x: x.roll(2, 1),
    "diagonal": lambda x: x.diagonal(1),
    "diag": lambda x: x.sum(0).diag_embed(),
    "unfold": lambda x: x.unfold(1, 3, 2),
    "tril": lambda x: x.tril(1),
    "pad": lambda x: F.pad(x, (1, -1, 2, 0), value=3.0),
    "split": lambda x: x.split([1, 4, 1], 1),
    "as_strided": lambda x: x.as_strided((3, 2), (2, 3), 1),
    "eye": lambda x: x.sum() + torch.eye(3),
    "cdist": lambda x: torch.cdist(x, x.flip(0), p=3.0),
    "searchsorted": lambda x: torch.searchsorted(x.sort(1)[0], x),
    "histc": lambda x: torch.histc(x, 5, -1, 1),
    "masked_scatter": lambda x: x.masked_scatter(x > 0, x.abs()),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x.view(1, 4, 6), 2),
    "normalize": lambda x: F.normalize(x),
    "interpolate": lambda x: F.interpolate(x.view(1, 1, 4, 6), scale_factor=2, mode="bilinear"),
    "adaptive max": lambda x: F.adaptive_max_pool2d(x.view(1, 1, 4, 6), (3, 4), return_indices=True),
    "max_pool1d": lambda x: F.max_pool1d(x.view(1, 4, 6), 2),
    "avg_pool1d": lambda x: F.avg_pool1d(x.view(1, 4, 6), 3),
}


@pytest.mark.parametrize("case", ONE)
def test_an_operator_of_one_tensor_agrees_with_float64(case, draw):
    check(ONE[case], draw(4, 6))


SPECIAL: dict[str, tuple[Callable[..., Any], float, float]] = {
    "erfc": (torch.erfc, -4, 4),
    "erfcx": (S.erfcx, -3, 30),
    "erfinv": (torch.erfinv, -0.999, 0.999),
    "ndtri": (S.ndtri, 1e-3, 0.999),
    "log_ndtr": (S.log_ndtr, -6, 6),
    "lgamma": (torch.lgamma, -4.7, 50),
    "digamma": (torch.digamma, -4.7, 50),
    "trigamma": (lambda x: torch.polygamma(1, x), 0.2, 20),
    "polygamma": (lambda x: torch.polygamma(3, x), 0.2, 20),
    "zeta": (lambda x: S.zeta(x, x + 1), 1.2, 8),
    "i0": (torch.i0, -9, 9),
    "i0e": (S.i0e, -40, 40),
    "i1": (S.i1, -9, 9),
    "i1e": (S.i1e, -40, 40),
    "j0": (S.bessel_j0, -30, 30),
    "j1": (S.bessel_j1, -30, 30),
    "y0": (S.bessel_y0, 0.1, 30),
    "y1": (S.bessel_y1, 0.1, 30),
    "k0": (S.modified_bessel_k0, 0.1, 9),
    "k1": (S.modified_bessel_k1, 0.1, 9),
    "k0 scaled": (S.scaled_modified_bessel_k0, 0.1, 40),
    "k1 scaled": (S.scaled_modified_bessel_k1, 0.1, 40),
    "spherical j0": (S.spherical_bessel_j0, -9, 9),
    **{
        f"chebyshev {kind}": (
            lambda x, kind=kind: getattr(S, f"chebyshev_polynomial_{kind}")(x, torch.arange(40, dtype=x.dtype) % 5),
            -1.5,
            1.5,
        )
        for kind in "tuvw"
    },
}


@pytest.mark.parametrize("case", SPECIAL)
def test_a_special_function_agrees_with_float64(case, seed):
    function, low, high = SPECIAL[case]
    x = torch.empty(40).uniform_(low, high, generator=torch.Generator().manual_seed(seed))
    got = Executor(convert(lambda x: [function(x)], x)).run([x])[0].double()
    want = function(x.double())
    assert float(((got - want).abs() / (want.abs() + 0.1)).max()) <= 3e-5
    assert float((got - want).norm() / want.norm()) <= 1e-5


def test_float64_special_functions_are_left_to_the_host():
    graph = make_fx(torch.lgamma)(torch.ones(3, dtype=torch.float64))
    (node,) = [node for node in graph.graph.nodes if is_operator(node)]
    assert why_not(node, {}) == "in float64"


def test_products_and_windows_agree_with_float64(draw):
    check(lambda a, b, c: torch.addmm(c, a, b, beta=0.5, alpha=2), draw(3, 4), draw(4, 5), draw(5))
    check(lambda a, b, c: torch.addbmm(c, a, b), draw(2, 3, 4), draw(2, 4, 5), draw(3, 5))
    check(lambda a, b: torch.stack([a @ b, torch.einsum("ij,jk->ik", a, b)]), draw(3, 4), draw(4, 5))
    check(lambda a, b: torch.stack([torch.dot(a, b), a @ b]), draw(7), draw(7))
    check(lambda a, b, w: F.bilinear(a, b, w), draw(3, 4), draw(3, 5), draw(2, 4, 5))
    check(lambda x, w: F.conv1d(x, w, stride=2, padding=1), draw(2, 3, 9), draw(4, 3, 3))
    check(lambda x, w: F.conv_transpose2d(x, w, stride=2, groups=2), draw(1, 4, 4, 5), draw(4, 3, 3, 2))
    check(lambda x, w: F.conv3d(x, w), draw(1, 2, 4, 5, 4), draw(3, 2, 2, 3, 2))
    check(lambda x: F.max_pool3d(x, 2, 1, 1, ceil_mode=True, return_indices=True), draw(1, 2, 4, 5, 5))
    check(lambda x: F.adaptive_avg_pool3d(x, (2, 3, 2)), draw(1, 2, 4, 5, 5))
    check(lambda x: F.avg_pool3d(x, 2), draw(1, 2, 4, 6, 5))
    check(lambda x: F.adaptive_avg_pool2d(x, (3, 2)), draw(1, 2, 7, 5))


def test_a_transposed_operand_is_read_by_the_product(draw):
    program = convert(lambda x, w: [F.linear(x, w)], draw(3, 4), draw(5, 4))
    assert program.op_counts() == {"matmul": 1}
    assert program.ops[0].attrs["transpose_b"] is True


def test_gathers_and_scatters_agree_with_float64(draw, seed):
    x = draw(4, 6)
    rows = torch.randint(0, 4, (5,), generator=torch.Generator().manual_seed(seed))
    places = torch.randint(0, 4, (3, 6), generator=torch.Generator().manual_seed(seed))
    source = draw(5, 6)
    check(lambda x, i: x[i, 1:3], x, rows)
    check(lambda x, i: x[:, None, i], x, rows)
    check(lambda x, i: x.index_select(1, i), x, rows)
    check(lambda x, i: F.embedding(i, x), x, rows)
    check(lambda x, i: x.gather(0, i), x, places)
    check(lambda x, i, s: x.scatter_add(0, i, s), x, places, source[:3])
    for kind in ("sum", "prod", "amax", "amin", "mean"):
        check(lambda x, i, s, kind=kind: x.scatter_reduce(0, i, s, kind, include_self=False), x, places, source[:3])
    check(lambda x, i, s: x.index_add(0, i, s), x, rows, source)
    check(lambda x, i, s: x.index_reduce(0, i, s, "prod"), x, rows, source)
    check(lambda x, i, s: x.index_put((i,), s, accumulate=True), x, rows, source)
    check(lambda x, i, s: x.put(i, s[:, 0], accumulate=True), x, rows, source)
    check(lambda x, s: x.slice_scatter(s[:4, :3], 1, 0, None, 2).select_scatter(s[0], 0, 2), x, source)
    check(lambda x, s: x.diagonal_scatter(s[0, :4], 2), x, source)
    check(lambda x: x.masked_fill(x > 0, 7.0), x)


def test_small_linear_algebra_agrees_with_float64(draw):
    a = draw(2, 5, 5)
    positive = a @ a.mT + 5 * torch.eye(5)
    lower = torch.linalg.cholesky(positive)
    check(lambda a: torch.linalg.cholesky_ex(a), positive)
    check(lambda a: torch.linalg.cholesky_ex(a, upper=True)[0], positive)
    check(lambda a: torch.linalg.cholesky_ex(a)[1], positive - 20 * torch.eye(5))
    check(lambda a: torch.cholesky_inverse(a), lower)
    check(lambda b, a: torch.cholesky_solve(b, a), draw(2, 5, 3), lower)
    for upper in (False, True):
        for left in (False, True):
            b = draw(2, 5, 3) if left else draw(2, 3, 5)
            side = lower.mT if upper else lower
            check(lambda a, b, u=upper, s=left: torch.linalg.solve_triangular(a, b, upper=u, left=s), side, b)
    check(lambda a, b: torch.linalg.solve_triangular(a, b, upper=False, unitriangular=True), lower / 5, draw(5, 3))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.bool])
def test_integers_take_the_types_that_torch_gives_them(dtype, seed):
    x = torch.randint(0, 2 if dtype == torch.bool else 9, (4, 6), generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )
    functions: list[Callable[..., Any]] = [
        lambda x: x.sum(1),
        lambda x: x.float().mean(1),
        lambda x: x.cumsum(0),
        lambda x: x.exp(),
        lambda x: x > 0,
        lambda x: x.amax(1),
        lambda x: x * 2.5,
        lambda x: x.prod(1),
        lambda x: x.any(1),
        lambda x: x.sqrt() + x,
    ]
    if dtype != torch.bool:
        functions += [
            lambda x: x // 3 - x % 3,
            lambda x: torch.div(-x, 3, rounding_mode="trunc"),
            lambda x: (x ^ 3) | (x & 5),
        ]
    for function in functions:
        want = function(x)
        got = Executor(convert(as_list(function), x)).run([x])[0]
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


def test_an_operator_without_a_lowering_is_named():
    graph = make_fx(lambda x: torch.linalg.svdvals(x).sum())(torch.randn(3, 3))
    with pytest.raises(UnsupportedError, match=r"aten\._linalg_svd\.default.*backend='kpu'"):
        FXToKPUConverter(graph, [torch.randn(3, 3)]).convert()


def test_a_lowering_that_gives_another_shape_or_type_is_not_used(monkeypatch):
    graph = make_fx(torch.sin)(torch.randn(3))
    (node,) = [node for node in graph.graph.nodes if is_operator(node)]
    assert why_not(node, {}) is None
    for wrong, reason in (
        (lambda e, x: e.one("reshape", x, shape=(3, 1)), r"float32[3, 1] for torch.float32[3]"),
        (lambda e, x: e.one("cast", x, dtype="float16"), r"float16[3] for torch.float32[3]"),
        (lambda e, x: e.one("nothing", x), "its lowering fails: KeyError"),
    ):
        monkeypatch.setitem(LOWERINGS, aten.sin.default, wrong)
        assert reason in why_not(node, {})


def test_tensors_elsewhere_are_left_where_they_are():
    graph = make_fx(torch.sin)(torch.randn(3))
    (node,) = [node for node in graph.graph.nodes if is_operator(node)]
    with FakeTensorMode():
        node.args[0].meta["val"] = torch.empty(3, device="cuda")
    assert "on cuda" in why_not(node, {})


def test_an_operator_has_one_lowering():
    with pytest.raises(ValueError, match="two lowerings"):
        lowers(aten.sin.default)(lambda e, x: x)


def test_programs_are_kept_by_sizes_and_the_oldest_goes(monkeypatch):
    import hal_kpu.frontend.fx.partition as parts

    monkeypatch.setattr(parts, "_SHAPES_KEPT", 2)
    graph = make_fx(lambda x: [x + x.sum(0)], tracing_mode="symbolic")(torch.randn(3, 2))
    partition = parts.Partition(graph.graph, lambda name: torch.empty(0), "kept")
    for rows in (3, 4, 3, 5, 4):
        x = torch.randn(rows, 2)
        numbers = [rows] * (len([node for node in graph.graph.nodes if node.op == "placeholder"]) - 1)
        assert torch.allclose(partition(*numbers, x)[0], x + x.sum(0))
    assert [next(item for item in key if isinstance(item, tuple)) for key in partition._plans] == [(5, 2), (4, 2)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_sixteen_bits_round_no_worse_than_eager(dtype, draw):
    """Statistics are kept wide inside; only what comes out is rounded."""
    x, mean, spread = draw(4, 6, 5, 5) + 10, draw(6) + 10, draw(6).abs() + 0.1  # far from 0: what is near cancels
    functions: list[Callable[..., Tensor]] = [
        lambda x, mean, spread: aten._native_batch_norm_legit_no_training(x, spread, spread, mean, spread, 0.1, 1e-5)[
            0
        ],
        lambda x, mean, spread: F.layer_norm(x, (5,)),
        lambda x, mean, spread: F.group_norm(x, 2, spread, mean),
        lambda x, mean, spread: x.mean((0, 2)),
        lambda x, mean, spread: x.var(1),
        lambda x, mean, spread: F.gelu(x),
    ]
    for function in functions:
        inputs = [one.to(dtype) for one in (x, mean, spread)]
        exact = function(*(one.double() for one in inputs))
        program = convert(in_a_list(function), *inputs)
        got = Executor(program).run(inputs)[0]
        assert got.dtype == dtype
        far, eager = (float((one.double() - exact).norm()) for one in (got, function(*inputs)))
        assert far <= 1.3 * eager


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: torch.rand(4, 6),
    "randn": lambda x: torch.randn(4, 6),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "bernoulli": lambda x: torch.bernoulli(x, 0.3),
    "dropout": lambda x: F.dropout(x, 0.4),
    "normal by tensors": lambda x: torch.normal(x, x.abs()),
    "normal by a number": lambda x: torch.normal(x, 2.0),
    "normal by numbers": lambda x: torch.normal(1.0, 2.0, (4, 6)),
    "normal in place": lambda x: x.clone().normal_(1, 2),
    "uniform in place": lambda x: x.clone().uniform_(-1, 3),
}


@pytest.mark.parametrize("case", RANDOM)
def test_random_numbers_are_those_that_eager_draws(case, draw):
    x = draw(4, 6)

    def run(x: Tensor) -> Tensor:
        return RANDOM[case](x)

    torch._dynamo.reset()
    torch.manual_seed(5)
    want = run(x)
    torch.manual_seed(5)
    torch.testing.assert_close(torch.compile(run, backend="kpu")(x), want)
    assert hal_kpu.get_last_stats().fallback == ()


# name: (draw 20,000 numbers, share of them that lies at or below a bound, the bound)
DISTRIBUTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "exponential": (lambda x: x.clone().exponential_(2.0), 1 - math.exp(-1), 0.5),
    "geometric": (lambda x: x.clone().geometric_(0.25), 1 - 0.75**3, 3.0),
    "cauchy": (lambda x: x.clone().cauchy_(1.0, 2.0), 0.75, 3.0),
    "log-normal": (lambda x: x.clone().log_normal_(1.0, 0.5), 0.5, math.e),
    "whole numbers": (lambda x: torch.randint(-2, 3, x.shape).float(), 0.6, 0.0),
    "whole numbers like": (lambda x: torch.randint_like(x, 4), 0.5, 1.0),
}


@pytest.mark.parametrize("case", DISTRIBUTIONS)
def test_other_distributions_are_torchs_though_not_number_by_number(case):
    function, share, bound = DISTRIBUTIONS[case]
    torch._dynamo.reset()
    torch.manual_seed(7)
    x = torch.zeros(20_000)
    got, want = torch.compile(lambda x: function(x), backend="kpu")(x), function(x)
    assert hal_kpu.get_last_stats().fallback == ()
    assert got.dtype == want.dtype
    for drawn in (got, want):  # four deviations of a share of 20,000
        assert abs(float((drawn <= bound).double().mean()) - share) <= 4 * math.sqrt(share * (1 - share) / 20_000)
    if case.startswith(("whole", "geom")):
        assert set(got.unique().tolist()) <= set(range(-2, 100))
