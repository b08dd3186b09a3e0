"""The tracing API: every operator against float64 references on random data, types kept, shapes, outputs, refusals."""

from __future__ import annotations

import hal_kpu
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hal_kpu import Tensor
from hal_kpu.frontend.dfx.program import DFXProgram
from hal_kpu.frontend.tensors import operators
from hal_kpu.runtime.executor import Executor

from hal_core.errors import ContractError


@pytest.fixture
def draw(seed: int):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return normal


def attend(q, k, v, mask=None, causal=False):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def multi_head(q, k, v, heads, in_weight, out_weight, in_bias, out_bias):
    module = torch.nn.MultiheadAttention(q.shape[-1], heads, batch_first=True, dtype=torch.float64)
    names = ("in_proj_weight", "out_proj.weight", "in_proj_bias", "out_proj.bias")
    module.load_state_dict(dict(zip(names, (in_weight, out_weight, in_bias, out_bias), strict=True)))
    return module(q, k, v, need_weights=False)[0].detach()


def batch_norm(x, mean, variance, weight, bias):
    return F.batch_norm(x, mean, variance.abs(), weight, bias)


# name: (shapes of operands, ours, float64 reference). References take torch tensors in float64.
CASES = {
    "relu": ([(3, 5)], operators.relu, torch.relu),
    "gelu": ([(3, 5)], operators.gelu, F.gelu),
    "gelu tanh": ([(3, 5)], lambda x: operators.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "silu": ([(3, 5)], operators.silu, F.silu),
    "sigmoid": ([(3, 5)], operators.sigmoid, torch.sigmoid),
    "tanh": ([(3, 5)], operators.tanh, torch.tanh),
    "exp": ([(3, 5)], operators.exp, torch.exp),
    "log": ([(3, 5)], lambda x: operators.log(x * x + 1), lambda x: torch.log(x * x + 1)),
    "sqrt": ([(3, 5)], lambda x: operators.sqrt(x * x + 1), lambda x: torch.sqrt(x * x + 1)),
    "softmax": ([(3, 5)], operators.softmax, lambda x: x.softmax(-1)),
    "softmax first": ([(3, 5)], lambda x: operators.softmax(x, axis=0), lambda x: x.softmax(0)),
    "sum": ([(3, 5)], operators.sum, lambda x: x.sum().reshape(1)),
    "sum axis": ([(3, 5, 2)], lambda x: operators.sum(x, axis=(0, -1)), lambda x: x.sum((0, 2))),
    "mean": ([(3, 5)], operators.mean, lambda x: x.mean().reshape(1)),
    "mean axis": ([(3, 5)], lambda x: operators.mean(x, 1, keepdims=True), lambda x: x.mean(1, keepdim=True)),
    "reshape": ([(3, 4)], lambda x: operators.reshape(x, (2, -1)), lambda x: x.reshape(2, 6)),
    "transpose": ([(3, 4, 5)], operators.transpose, lambda x: x.permute(2, 1, 0)),
    "transpose axes": ([(3, 4, 5)], lambda x: operators.transpose(x, (1, 0, 2)), lambda x: x.permute(1, 0, 2)),
    "flatten": ([(2, 3, 4)], lambda x: x.flatten(1), lambda x: x.flatten(1)),
    "concat": ([(2, 3), (4, 3)], lambda a, b: operators.concat([a, b]), lambda a, b: torch.cat([a, b])),
    "matmul": ([(2, 3, 4), (4, 5)], operators.matmul, torch.matmul),
    "matmul vectors": ([(4,), (4,)], operators.matmul, torch.matmul),
    "matmul by a vector": ([(2, 3, 4), (4,)], operators.matmul, torch.matmul),
    "a vector by matmul": ([(4,), (2, 4, 3)], operators.matmul, torch.matmul),
    "linear": ([(2, 3, 4), (5, 4), (5,)], operators.linear, F.linear),
    "layer_norm": (
        [(2, 3, 4), (3, 4), (3, 4)],
        lambda x, w, b: operators.layer_norm(x, (3, 4), w, b),
        lambda x, w, b: F.layer_norm(x, (3, 4), w, b),
    ),
    "batch_norm2d": (
        [(2, 3, 4, 4), (3,), (3,), (3,), (3,)],
        lambda x, m, v, w, b: operators.batch_norm2d(x, m, operators.sqrt(v * v), w, b),
        batch_norm,
    ),
    "conv2d": (
        [(2, 3, 9, 8), (4, 3, 3, 2), (4,)],
        lambda x, w, b: operators.conv2d(x, w, b, (2, 1), 1),
        lambda x, w, b: F.conv2d(x, w, b, (2, 1), 1),
    ),
    "conv2d groups dilation": (
        [(2, 4, 9, 8), (6, 2, 3, 3)],
        lambda x, w: operators.conv2d(x, w, dilation=2, groups=2),
        lambda x, w: F.conv2d(x, w, dilation=2, groups=2),
    ),
    "conv2d depthwise": (
        [(1, 4, 6, 6), (4, 1, 3, 3)],
        lambda x, w: operators.conv2d(x, w, padding=1, groups=4),
        lambda x, w: F.conv2d(x, w, padding=1, groups=4),
    ),
    "max_pool2d": ([(2, 3, 9, 8)], lambda x: operators.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1)),
    "avg_pool2d": ([(2, 3, 9, 8)], lambda x: operators.avg_pool2d(x, (3, 2)), lambda x: F.avg_pool2d(x, (3, 2))),
    "adaptive_avg_pool2d": (
        [(2, 3, 9, 8)],
        lambda x: operators.adaptive_avg_pool2d(x, (4, 3)),
        lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    ),
    "attention": ([(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)], operators.scaled_dot_product_attention, attend),
    "attention causal": (
        [(2, 5, 4)] * 3,
        lambda q, k, v: operators.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: attend(q, k, v, causal=True),
    ),
    "attention mask": ([(2, 5, 4), (2, 7, 4), (2, 7, 4), (5, 7)], operators.scaled_dot_product_attention, attend),
    "multi_head_attention": (
        [(2, 5, 8), (2, 6, 8), (2, 6, 8), (24, 8), (8, 8), (24,), (8,)],
        lambda q, k, v, *rest: operators.multi_head_attention(q, k, v, 2, *rest),
        lambda q, k, v, *rest: multi_head(q, k, v, 2, *rest),
    ),
    "arithmetic": (
        [(3, 5), (5,)],
        lambda a, b: (2 - a) * b + a / 3 - 1 / (b * b + 1) - (-a),
        lambda a, b: (2 - a) * b + a / 3 - 1 / (b * b + 1) + a,
    ),
}


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_an_operator_agrees_with_float64_at_once_and_compiled(case, optimize, draw):
    shapes, ours, reference = CASES[case]
    operands = [draw(*shape) for shape in shapes]
    want = reference(*(operand.double() for operand in operands))
    compiled = hal_kpu.compile(lambda *tensors: ours(*tensors), optimize=optimize)
    for got in (ours(*map(Tensor, operands)), compiled(*map(Tensor, operands))):
        assert got.dtype == torch.float32
        assert got.shape == tuple(want.shape)
        torch.testing.assert_close(got.data.double(), want, rtol=1e-5, atol=1e-5)
    again = Executor(DFXProgram.from_json(compiled.dfx.to_json())).run(operands)[0]
    assert torch.equal(again, got.data)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_integers_stay_integers_and_are_exact(dtype, seed):
    numbers = np.random.default_rng(seed).integers(0, 5, (4, 4)).astype(dtype)

    @hal_kpu.jit
    def run(a, b):
        return operators.relu(a @ b + a * 2), operators.sum(a, axis=0), operators.max_pool2d(a.reshape(1, 1, 4, 4), 2)

    product, total, pooled = run(Tensor(numbers), Tensor(numbers))
    assert {str(one.dtype) for one in (product, total, pooled)} == {f"torch.{dtype}"}
    wide = numbers.astype(np.int64)
    assert np.array_equal(product.numpy(), (wide @ wide + wide * 2).astype(dtype))
    assert np.array_equal(total.numpy(), wide.sum(0).astype(dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_floating_types_stay_as_they_are(dtype, draw):
    x, w = Tensor(draw(4, 8), dtype=dtype), Tensor(draw(3, 8), dtype=dtype)

    @hal_kpu.compile
    def run(x):
        return operators.softmax(operators.gelu(operators.layer_norm(operators.linear(x, w), 3)))

    got = run(x)
    assert str(got.dtype) == f"torch.{dtype}"
    want = F.softmax(F.gelu(F.layer_norm(F.linear(x.data.double(), w.data.double()), (3,))), -1)
    torch.testing.assert_close(got.data.double(), want, rtol=0.05, atol={"float64": 1e-12}.get(dtype, 2e-2))


def test_types_are_never_mixed_or_changed_silently():
    whole, real = Tensor(np.array([1, 2], np.int8)), Tensor([1.0, 2.0])
    with pytest.raises(ContractError, match=r"add of int8\[2\], float32\[2\].*cast"):
        whole + real
    with pytest.raises(ContractError, match=r"holds no fractions"):
        whole + 1.5
    for operator in (operators.exp, operators.softmax, operators.mean, operators.gelu, operators.sqrt):
        with pytest.raises(ContractError, match=r"wants a floating type, and int8\[2\]"):
            operator(whole)
    with pytest.raises(ContractError, match="division wants a floating type"):
        whole / 2
    assert (whole.cast("float32") + real).data.tolist() == [2.0, 4.0]
    assert hal_kpu.compile(lambda x: x.cast("int32"))(Tensor([1.7, -1.7])).data.tolist() == [1, -1]


def test_one_function_serves_every_batch(draw):
    weight = Tensor(draw(6, 4))
    traced = []

    @hal_kpu.compile
    def run(x):
        traced.append(x.shape)
        return operators.relu(x @ weight.reshape(4, 6))

    for batch in (1, 5, 1, 5, 3):
        x = draw(batch, 4)
        assert torch.allclose(run(Tensor(x)).data, torch.relu(x @ weight.data.reshape(4, 6)))
        assert run.dfx.tensors["x"].shape == (batch, 4)
    assert traced == [(1, 4), (5, 4), (3, 4)]


def test_weights_are_read_at_each_run_and_marked_as_constants(draw):
    weight = Tensor(draw(4, 3), name="weight")
    run = hal_kpu.compile(lambda x: x @ weight)
    x = draw(2, 4)
    run(x)
    assert run.graph.tensors["weight"].is_weight
    assert run.dfx.tensors["weight"].is_const
    assert run.dfx.inputs == ("x", "weight")
    weight.data = weight.data * 2
    assert torch.allclose(run(x).data, x @ weight.data)


def test_results_come_back_as_they_were_returned(draw):
    x = draw(3, 4)

    def several(x):
        return x + 1, x * 2

    def named(x):
        return {"more": x + 1, "same": x}

    first, second = hal_kpu.compile(several)(x)
    assert torch.equal(first.data, x + 1)
    assert torch.equal(second.data, x * 2)
    out = hal_kpu.compile(named)(x)
    assert list(out) == ["more", "same"]
    assert torch.equal(out["same"].data, x)


def test_optimizing_takes_out_what_is_not_needed_and_changes_no_value(draw):
    x, w = draw(3, 4), Tensor(draw(5, 4))

    def run(x):
        operators.exp(x)
        return operators.linear(x, w)

    plain, optimized = hal_kpu.compile(run, optimize=False), hal_kpu.compile(run)
    assert torch.equal(plain(x).data, optimized(x).data)
    assert list(plain.dfx.op_counts()) == ["exp", "transpose", "matmul"]
    assert list(optimized.dfx.op_counts()) == ["matmul"]
    assert optimized.dfx.total_macs() == 3 * 4 * 5


def test_a_product_carries_its_sizes(draw):
    run = hal_kpu.compile(lambda a, b: a @ b)
    run(draw(3, 4), draw(4, 5))
    (op,) = run.get_dfx().ops
    assert {key: op.attrs[key] for key in "MKN"} == {"M": 3, "K": 4, "N": 5}
    assert "matmul" in run.summary()
    assert run.get_graph() is run.graph
    assert (run.get_stats().cycles, run.get_stats().total_macs) == (0, 3 * 4 * 5)
    assert hal_kpu.compile(lambda a: a).stats is None


def test_a_method_is_compiled_too(draw):
    class Layer:
        def __init__(self, weight):
            self.weight = weight

        @hal_kpu.jit
        def forward(self, x):
            return x @ self.weight

    first, second = Layer(Tensor(draw(4, 3))), Layer(Tensor(draw(4, 2)))
    x = draw(2, 4)
    for layer in (first, second, first):
        assert torch.allclose(layer.forward(x).data, x @ layer.weight.data)
    assert first.forward.dfx.op_counts() == {"matmul": 1}


def test_numbers_are_fixed_when_tracing_and_others_trace_anew(draw):
    run = hal_kpu.compile(lambda x, power, scale=1: x * power * scale)
    x = draw(2)
    assert torch.allclose(run(x, 2).data, x * 2)
    assert torch.allclose(run(x, 3, scale=2).data, x * 6)
    with pytest.raises(ContractError, match="argument 'power' of <lambda> is a set"):
        run(x, {1})


def test_a_tensor_has_what_arrays_have():
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    t = Tensor.from_numpy(array, name="a")
    assert (t.shape, t.ndim, t.size, t.numel(), t.nbytes, t.name) == ((2, 3), 2, 6, 6, 12, "a")
    assert t.dtype == torch.int16
    assert np.array_equal(t.numpy(), array)
    assert t.reshape(3, 2).shape == t.view((3, 2)).shape == (3, 2)
    assert t.flatten().shape == (6,)
    assert not t.is_symbolic()
    assert Tensor.zeros(2, 3, dtype="int8").data.sum() == 0
    assert Tensor.ones((2, 3)).data.sum() == 6
    assert Tensor.randn(100).data.std() > 0.5
    assert Tensor([1.0, 2.0]).dtype == torch.float32
    assert Tensor(np.array([1.0])).dtype == torch.float64
    with pytest.raises(ContractError, match="NumPy has no bfloat16"):
        Tensor([1.0], dtype="bfloat16").numpy()
    with pytest.raises(ContractError, match="dtype complex64 was given"):
        Tensor([1j], dtype="complex64")


WRONG = {
    "inner sizes": (lambda x: x @ x, r"matmul of float32\[2, 3\], float32\[2, 3\]: inner sizes 3 and 2"),
    "axis": (lambda x: operators.softmax(x, 2), r"softmax's axis is 2, and float32\[2, 3\] has 2 axes: use -2 to 1"),
    "reshape": (lambda x: x.reshape(4, 2), r"reshape of float32\[2, 3\] to \[4, 2\]: 6 elements"),
    "broadcast": (lambda x: x + Tensor([1.0, 2.0]), r"add cannot take float32\[2, 3\], float32\[2\]"),
    "transpose": (lambda x: operators.transpose(x, (0, 0)), r"each of its 2 axes is wanted once"),
    "norm": (lambda x: operators.layer_norm(x, 4), r"layer_norm of float32\[2, 3\] over \[4\]"),
    "conv": (lambda x: operators.conv2d(x.reshape(1, 2, 3, 1), Tensor.ones(2, 3, 1, 1)), r"conv2d cannot take"),
    "values while tracing": (lambda x: x.numpy(), r"while tracing"),
    "a result that is none": (lambda x: 3, r"returned int, and a Tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_refused_with_what_was_given(case, draw):
    function, message = WRONG[case]
    with pytest.raises(ContractError, match=message):
        hal_kpu.compile(function)(draw(2, 3))


def test_a_symbolic_tensor_does_not_leave_its_function(draw):
    kept = []
    hal_kpu.compile(lambda x: kept.append(x) or x + 1)(draw(2))
    with pytest.raises(ContractError, match="after its function was traced"):
        kept[0] + 1
    with pytest.raises(ContractError, match="belongs to another traced function"):
        hal_kpu.compile(lambda x: x + kept[0])(draw(2))


@pytest.mark.parametrize("fidelity", [hal_kpu.TRANSACTIONAL, hal_kpu.CYCLE_ACCURATE])
def test_a_timed_function_gives_the_same_values_and_what_they_cost(fidelity, draw):
    w = Tensor(draw(5, 4))

    def run(x):
        return operators.relu(operators.linear(x, w)), operators.softmax(x)

    x = draw(3, 4)
    want = hal_kpu.compile(run)(x)
    timed = hal_kpu.compile(run, fidelity=fidelity)
    got, stats = timed.execute_with_stats(x)
    again = timed(x)
    for one, other, third in zip(got, again, want, strict=True):
        torch.testing.assert_close(one.data, third.data)
        assert torch.equal(one.data, other.data)
    assert stats.cycles == timed.get_stats().cycles > 0
    assert stats.total_macs == 3 * 4 * 5
    assert stats.ops_executed == len(timed.dfx.ops)


def test_integer_products_of_the_stepped_array_are_those_of_numpy(seed):
    numbers = np.random.default_rng(seed).integers(-9, 9, (5, 7))
    got = hal_kpu.compile(lambda a, b: a @ b, fidelity=hal_kpu.CYCLE_ACCURATE)(numbers, numbers.T.copy())
    assert np.array_equal(got.numpy(), numbers @ numbers.T)


def test_a_runtime_runs_a_traced_program(draw):
    run = hal_kpu.compile(lambda x, y: x @ y)
    x, y = draw(3, 4), draw(4, 2)
    run(x, y)
    out, stats = hal_kpu.KPURuntime(hal_kpu.TRANSACTIONAL).execute(run.dfx, {"x": Tensor(x), "y": y.numpy()})
    assert isinstance(out, Tensor)
    assert torch.allclose(out.data, x @ y)
    assert stats.cycles > 0


def test_a_function_without_a_fidelity_follows_the_process(draw):
    run = hal_kpu.compile(lambda x: x + 1, fidelity=None)
    try:
        hal_kpu.set_fidelity(hal_kpu.TRANSACTIONAL)
        run(draw(3))
        assert run.stats.cycles > 0
    finally:
        hal_kpu.set_fidelity(hal_kpu.BEHAVIORAL)
    run(draw(3))
    assert run.stats.cycles == 0


def test_an_unknown_fidelity_is_refused():
    with pytest.raises(ContractError, match="fidelity 5 was given"):
        hal_kpu.compile(lambda x: x, fidelity=5)


def test_a_tuple_of_whole_numbers_is_a_shape_and_is_timed(draw):
    @hal_kpu.compile(fidelity=hal_kpu.TRANSACTIONAL)
    def block(x, weight):
        return operators.relu(x @ weight), x.reshape(-1)

    x, weight = Tensor((96, 64), dtype="bfloat16"), Tensor((64, 32), dtype="bfloat16", name="weight")
    assert x.is_symbolic()
    assert (x.shape, x.dtype, x.nbytes) == ((96, 64), torch.bfloat16, 2 * 96 * 64)
    (first, second), stats = block.execute_with_stats(x, weight)
    assert first.is_symbolic()
    assert (first.shape, first.dtype, second.shape) == ((96, 32), torch.bfloat16, (96 * 64,))
    assert block(x, weight)[0].shape == (96, 32)
    data = [draw(96, 64).bfloat16(), draw(64, 32).bfloat16()]
    _, measured = block.execute_with_stats(*data)
    assert stats.cycles == measured.cycles > 0
    with pytest.raises(ContractError, match="a symbolic tensor has none"):
        first.numpy()
    with pytest.raises(ContractError, match=r"the shape \(2, -1\) was given: sizes of 0 or more"):
        Tensor((2, -1))
    assert Tensor([2, 3]).values().tolist() == [2, 3]
    assert Tensor((2.0, 3.0)).values().tolist() == [2.0, 3.0]


def test_concat_takes_its_axis_by_either_name(draw):
    a, b = draw(2, 3), draw(2, 5)
    for named in ({"axis": 1}, {"dim": 1}, {"dim": -1}):
        assert torch.equal(hal_kpu.concat([a, b], **named).values(), torch.cat([a, b], 1))
    assert hal_kpu.concat([a, a]).shape == (4, 3)
    with pytest.raises(ContractError, match="two names of one thing, pass one"):
        hal_kpu.concat([a, b], axis=1, dim=1)


def test_info_says_what_a_run_would_use(monkeypatch):
    monkeypatch.setenv("HAL_KPU_PROFILE", "t256")
    found = hal_kpu.info()
    assert (found["profile"], found["clock_ghz"], found["fidelity"]) == ("t256", 0.6, "BEHAVIORAL")
    assert found["torch"] == torch.__version__
    assert hal_kpu.TORCH_AVAILABLE
