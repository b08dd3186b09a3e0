"""Opcodes: at most 80, values against NumPy in float64, and the work they ask for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hal_kpu.simulator.opcodes.specs import TensorSpec
from hal_kpu.simulator.opcodes.table import LIMIT, OPCODES
from torch.utils.flop_counter import FlopCounterMode


def spec(tensor: torch.Tensor, name: str = "t") -> TensorSpec:
    return TensorSpec(name, tensor.shape, str(tensor.dtype).removeprefix("torch."))


def run(name: str, *inputs: torch.Tensor, **attrs):
    opcode = OPCODES[name]
    outputs = opcode.value(inputs, attrs)
    return outputs, opcode.work([spec(t) for t in inputs], [spec(t) for t in outputs], attrs)


def test_there_are_no_more_opcodes_than_the_machine_may_have():
    assert LIMIT == 80
    assert 0 < len(OPCODES) <= LIMIT
    assert all(name == opcode.name for name, opcode in OPCODES.items())


UNARY = {
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "floor": np.floor,
    "ceil": np.ceil,
    "round": np.round,
    "trunc": np.trunc,
    "reciprocal": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: x**-0.5,
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sin": np.sin,
    "cos": np.cos,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "atanh": np.arctanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_tensor_agree_with_numpy(name, seed):
    x = np.random.default_rng(seed).uniform(0.05, 0.95, (3, 5))
    (got,), work = run(name, torch.tensor(x))
    np.testing.assert_allclose(got.numpy(), UNARY[name](x), rtol=1e-12)
    assert (work.engine, work.elements, work.reads_bytes, work.writes_bytes) == ("vector", 15, 120, 120)
    assert work.passes >= 1


BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "pow": np.power,
    "atan2": np.arctan2,
    "fmod": np.fmod,
    "remainder": np.remainder,
    "floor_divide": np.floor_divide,
}


@pytest.mark.parametrize("name", BINARY)
def test_functions_of_two_tensors_agree_with_numpy_and_take_numbers(name, seed):
    draw = np.random.default_rng(seed)
    x, y = draw.uniform(0.5, 4, (3, 5)), draw.uniform(0.5, 4, 5)
    (got,), work = run(name, torch.tensor(x), torch.tensor(y))
    np.testing.assert_allclose(got.numpy(), BINARY[name](x, y), rtol=1e-12)
    assert work.elements == 15
    (after,), _ = run(name, torch.tensor(x), scalar=1.7)
    np.testing.assert_allclose(after.numpy(), BINARY[name](x, 1.7), rtol=1e-12)
    (before,), _ = run(name, torch.tensor(x), scalar=1.7, scalar_first=True)
    np.testing.assert_allclose(before.numpy(), BINARY[name](1.7, x), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["add", "mul", "maximum", "neg", "abs"])
def test_types_stay_as_they_are(name, dtype):
    x = torch.arange(-3, 3).to(dtype)
    inputs = (x,) if OPCODES[name].arity == (1, 1) else (x, x)
    assert OPCODES[name].value(inputs, {})[0].dtype == dtype
    if len(inputs) == 2:
        assert OPCODES[name].value((x,), {"scalar": 2})[0].dtype == dtype


@pytest.mark.parametrize(("a", "b"), [((), (4, 3)), ((), (3, 4)), ((2,), (4, 3)), ((2, 3), (4, 3))])
def test_integer_products_are_exact_and_count_their_macs(a, b, seed):
    draw = np.random.default_rng(seed)
    flipped = b == (3, 4)
    x, y = draw.integers(-9, 9, (*a, 5, 4)), draw.integers(-9, 9, (*a, *b) if not flipped else (*a, 3, 4))
    start = draw.integers(-9, 9, 3)
    (got,), work = run("matmul", *map(torch.tensor, (x, y, start)), transpose_b=flipped)
    assert np.array_equal(got.numpy(), x @ (y.swapaxes(-1, -2) if flipped else y) + start)
    assert (work.M, work.K, work.N) == (5, 4, 3)
    assert work.macs == got.numel() * 4


CONVOLUTIONS = [
    (2, 4, 6, (9, 8), (3, 2), {"stride": (2, 1), "padding": (1, 0)}),
    (1, 4, 8, (7, 7), (3, 3), {"groups": 2, "dilation": (2, 2)}),
    (2, 3, 4, (11,), (4,), {"stride": (3,), "padding": (2,)}),
    (2, 4, 6, (5, 4), (3, 3), {"transposed": True, "groups": 2, "stride": (2, 2), "output_padding": (1, 1)}),
]


@pytest.mark.parametrize(("n", "c_in", "c_out", "space", "window", "options"), CONVOLUTIONS)
def test_convolutions_and_their_gradients_count_the_macs_that_torch_counts(n, c_in, c_out, space, window, options):
    zero, one = (0,) * len(space), (1,) * len(space)
    attrs = {"stride": one, "padding": zero, "dilation": one, "transposed": False, "output_padding": zero, "groups": 1}
    attrs |= options
    g = attrs["groups"]
    x = torch.randn(n, c_in, *space, requires_grad=True)
    w = torch.randn(*((c_in, c_out // g) if attrs["transposed"] else (c_out, c_in // g)), *window, requires_grad=True)
    (out,), forward = run("convolution", x, w, **attrs)
    with FlopCounterMode(display=False) as counter:
        again = OPCODES["convolution"].value((x, w), attrs)[0]
    assert forward.macs == counter.get_total_flops() // 2
    grad = torch.randn_like(out)
    want = torch.autograd.grad(again, (x, w), grad)
    for name, wanted in zip(("convolution_input_grad", "convolution_weight_grad"), want, strict=True):
        (got,), work = run(name, grad, x.detach(), w.detach(), **attrs)
        torch.testing.assert_close(got, wanted)
        assert work.macs == forward.macs  # a convolution is bilinear: its two gradients cost what it costs


def test_carrying_writes_what_it_writes_and_reads_no_more_than_it_needs():
    table, rows = torch.randn(1000, 8), torch.tensor([3, 1, 3])
    (got,), work = run("index", table, rows, axes=(0,))
    assert torch.equal(got, table[rows])
    assert (work.engine, work.writes_bytes, work.reads_bytes) == ("mover", 3 * 8 * 4, 3 * 8 * 4 + 3 * 8)
    assert run("reshape", table, shape=(8000,))[1].engine == "none"
    (joined,), work = run("concat", table, table, axis=1)
    assert torch.equal(joined, torch.cat([table, table], 1))
    assert work.writes_bytes == 2 * table.nbytes


def test_a_slice_is_written_where_it_was_read():
    x = torch.arange(24.0).reshape(4, 6)
    (part,), _ = run("slice", x, axis=1, start=1, stop=6, step=2)
    assert torch.equal(part, x[:, 1:6:2])
    (out,), _ = run("slice_update", x, -part, axis=1, start=1, stop=6, step=2)
    assert torch.equal(out[:, 1:6:2], -part)
    assert torch.equal(out[:, ::2], x[:, ::2])


@pytest.mark.parametrize("combine", ["replace", "add", "mul", "max", "min"])
def test_scatter_combines_as_numpy_does(combine, seed):
    draw = np.random.default_rng(seed)
    x, source = draw.normal(size=6), draw.normal(size=6)
    index = draw.permutation(6) if combine == "replace" else draw.integers(0, 6, 6)
    want = x.copy()
    if combine == "replace":
        want[index] = source
    else:
        {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}[combine].at(want, index, source)
    (got,), _ = run("scatter", *map(torch.tensor, (x, index, source)), axis=0, combine=combine)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)


def test_numbers_are_made_in_their_type():
    assert run("iota", length=4, dtype="int32", start=3, step=-1)[0][0].tolist() == [3, 2, 1, 0]
    assert run("iota", length=2, dtype="int32")[0][0].dtype == torch.int32
    assert run("fill", shape=(2,), scalar=7, dtype="int8")[0][0].dtype == torch.int8
    (drawn,), work = run("random", shape=(1000,), kind="uniform", dtype="float32")
    assert 0.45 < drawn.mean() < 0.55
    assert work.engine == "vector"


def test_windows_and_softmax_agree_with_torch(seed):
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(seed))
    options = {"kernel": (3, 2), "stride": (2, 2), "padding": (1, 0)}
    (values, places), _ = run("max_pool", x, **options, dilation=(1, 1))
    assert torch.equal(values, torch.max_pool2d(x, (3, 2), 2, (1, 0)))
    assert torch.equal(x.flatten(2).gather(2, places.flatten(2)).view_as(values), values)
    leaf = x.clone().requires_grad_()
    pooled = torch.nn.functional.avg_pool2d(leaf, (3, 2), 2, (1, 0))
    assert torch.equal(run("avg_pool", x, **options)[0][0], pooled)
    (want,) = torch.autograd.grad(pooled.sum(), leaf)
    assert torch.equal(run("avg_pool_grad", torch.ones_like(pooled), x, **options)[0][0], want)
    (soft,), work = run("softmax", x, axis=-1)
    assert torch.allclose(soft.sum(-1), torch.ones(2, 3, 9))
    assert work.elements == x.numel()
