"""What users of kpu-sim do with its Python package works here after changing the import: every behaviour that its own
tests of tensors, operators, compiler, DFX, convolutional networks and fusion ask for.

One meaning differs, and says so in its docstring: a tensor's `dtype` is torch's, as NumPy has no bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import hal_kpu as kpu
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hal_kpu import FusionCompiler, FusionPattern, OpType, Tensor
from hal_kpu.runtime.fusion import groups
from hal_kpu.runtime.timing import time_program


@pytest.fixture(autouse=True)
def _behavioral() -> Iterator[None]:
    before = kpu.get_fidelity()
    kpu.set_fidelity(kpu.BEHAVIORAL)
    yield
    kpu.set_fidelity(before)


@pytest.fixture
def draw(seed: int) -> Callable[..., np.ndarray]:
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.standard_normal(shape).astype(np.float32)


def floats(*values: Any) -> Tensor:
    return Tensor(np.array(values[0] if len(values) == 1 else values, dtype=np.float32))


def near(got: Tensor, want: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(got.numpy(), want, rtol=tolerance, atol=tolerance)


# tensors


def test_a_tensor_is_made_of_an_array_of_a_shape_or_by_a_factory(draw: Callable[..., np.ndarray]) -> None:
    array = draw(32, 64)
    made, symbol = Tensor(array), Tensor((32, 64), dtype=np.float32, name="test")
    assert made.shape == symbol.shape == (32, 64)
    assert made.dtype == symbol.dtype == torch.float32
    assert made.numpy().dtype == np.float32
    assert not made.is_symbolic()
    assert symbol.is_symbolic()
    assert symbol.name == "test"
    np.testing.assert_array_equal(made.numpy(), array)
    np.testing.assert_array_equal(Tensor.zeros((4, 4)).numpy(), np.zeros((4, 4)))
    np.testing.assert_array_equal(Tensor.ones((4, 4)).numpy(), np.ones((4, 4)))
    assert Tensor.randn(4, 4).shape == (4, 4)


# operators, called at once


def test_operators_compute_at_once(draw: Callable[..., np.ndarray]) -> None:
    a, b = draw(32, 64), draw(64, 128)
    near(Tensor(a) @ Tensor(b), a.astype(np.float64) @ b, 1e-4)
    np.testing.assert_array_equal(kpu.relu(floats([-1, 2], [3, -4])).numpy(), [[0, 2], [3, 0]])
    np.testing.assert_allclose(kpu.gelu(floats([0, 1, -1])).numpy(), [0, 0.841, -0.159], atol=0.01)
    near(kpu.sigmoid(floats([0, 1, -1])), 1 / (1 + np.exp(-np.array([0.0, 1, -1]))))
    near(kpu.silu(Tensor(a)), a / (1 + np.exp(-a.astype(np.float64))), 1e-4)
    np.testing.assert_allclose(kpu.softmax(floats([1, 2, 3], [1, 1, 1])).numpy().sum(-1), [1, 1], rtol=1e-5)
    x, y = floats([1, 2, 3]), floats([4, 5, 6])
    for got, want in [
        (x + y, [5, 7, 9]),
        (x * y, [4, 10, 18]),
        (x + 1, [2, 3, 4]),
        (x * 2, [2, 4, 6]),
        (x - 1, [0, 1, 2]),
    ]:
        np.testing.assert_array_equal(got.numpy(), want)


def test_convolutions_and_pooling() -> None:
    ones, kernel = floats(np.ones((1, 1, 4, 4))), floats(np.ones((1, 1, 3, 3)))
    near(kpu.conv2d(ones, kernel), np.full((1, 1, 2, 2), 9.0))
    assert kpu.conv2d(ones, kernel, padding=1).shape == (1, 1, 4, 4)
    assert kpu.conv2d(floats(np.ones((1, 1, 8, 8))), floats(np.ones((2, 1, 3, 3))), stride=2).shape == (1, 2, 3, 3)
    counted = floats(np.arange(1, 17).reshape(1, 1, 4, 4))
    np.testing.assert_array_equal(kpu.max_pool2d(counted, kernel_size=2, stride=2).numpy(), [[[[6, 8], [14, 16]]]])
    near(kpu.avg_pool2d(counted, kernel_size=2, stride=2), [[[[3.5, 5.5], [11.5, 13.5]]]])
    near(kpu.adaptive_avg_pool2d(floats(np.ones((1, 1, 8, 8))), output_size=(1, 1)), np.ones((1, 1, 1, 1)))


def test_norms_and_shapes() -> None:
    normed = kpu.layer_norm(floats([1, 2, 3], [4, 5, 6]), normalized_shape=3).numpy()
    np.testing.assert_allclose(normed.mean(-1), [0, 0], atol=1e-5)
    np.testing.assert_allclose(normed.std(-1), [1, 1], atol=0.1)
    a, b = floats([1, 2], [3, 4]), floats([5, 6], [7, 8])
    np.testing.assert_array_equal(kpu.concat([a, b], dim=0).numpy(), [[1, 2], [3, 4], [5, 6], [7, 8]])
    np.testing.assert_array_equal(kpu.concat([a, b], dim=1).numpy(), [[1, 2, 5, 6], [3, 4, 7, 8]])
    row = floats(np.arange(12))
    assert kpu.reshape(row, (3, 4)).shape == row.reshape(3, 4).shape == (3, 4)
    assert kpu.reshape(row, (2, -1)).shape == row.reshape((2, 6)).shape == (2, 6)
    block = floats(np.ones((2, 3, 4)))
    assert (kpu.flatten(block, start_dim=1).shape, block.flatten(start_dim=0).shape) == ((2, 12), (24,))


@pytest.mark.parametrize(
    ("image", "weight", "stride", "padding"),
    [
        ((1, 1, 8, 8), (4, 1, 3, 3), 1, 0),
        ((2, 3, 16, 16), (8, 3, 3, 3), 1, 1),
        ((1, 16, 14, 14), (32, 16, 3, 3), 2, 1),
        ((4, 1, 28, 28), (16, 1, 5, 5), 1, 2),
    ],
)
def test_convolutions_agree_with_float64(
    image: tuple[int, ...], weight: tuple[int, ...], stride: int, padding: int, draw: Callable[..., np.ndarray]
) -> None:
    x, w, b = draw(*image), draw(*weight), draw(weight[0])
    want = F.conv2d(*(torch.tensor(t).double() for t in (x, w, b)), stride, padding)
    got = kpu.conv2d(Tensor(x), Tensor(w), Tensor(b), stride=stride, padding=padding)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "kernel", "stride"), [((1, 1, 8, 8), 2, 2), ((2, 16, 14, 14), 2, 2), ((1, 32, 7, 7), 3, 1)]
)
def test_pooling_agrees_with_torch(
    shape: tuple[int, ...], kernel: int, stride: int, draw: Callable[..., np.ndarray]
) -> None:
    x = draw(*shape)
    want = F.max_pool2d(torch.tensor(x), kernel, stride)
    np.testing.assert_array_equal(kpu.max_pool2d(Tensor(x), kernel_size=kernel, stride=stride).numpy(), want)


@pytest.mark.parametrize(("shape", "over"), [((2, 128), 128), ((4, 16, 32), 32), ((1, 64, 7, 7), (7, 7))])
def test_layer_norms_agree_with_float64(shape: tuple[int, ...], over: Any, draw: Callable[..., np.ndarray]) -> None:
    x = draw(*shape)
    want = F.layer_norm(torch.tensor(x).double(), (over,) if isinstance(over, int) else over)
    np.testing.assert_allclose(kpu.layer_norm(Tensor(x), normalized_shape=over).numpy(), want, atol=1e-4)


# compiled functions


def test_compiled_layers_and_networks(draw: Callable[..., np.ndarray]) -> None:
    @kpu.compile
    def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kpu.relu(x @ w + b)

    @kpu.compile
    def mnist_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor) -> Tensor:
        h = kpu.relu(kpu.relu(x @ w1 + b1) @ w2 + b2)
        return h @ w3 + b3

    x, w, b = draw(16, 784), draw(784, 128), draw(128)
    wide = np.maximum(x.astype(np.float64) @ w + b, 0)
    near(layer(Tensor(x), Tensor(w), Tensor(b)), wide, 1e-3)
    rest = [draw(128, 64) * 0.1, draw(64), draw(64, 10) * 0.1, draw(10)]
    hidden = np.maximum(np.maximum(x.astype(np.float64) @ (w * 0.01) + b, 0) @ rest[0] + rest[1], 0)
    got = mnist_mlp(*map(Tensor, (x, w * np.float32(0.01), b, *rest)))
    assert got.shape == (16, 10)
    near(got, hidden @ rest[2] + rest[3], 1e-4)


def test_the_graph_and_the_program_of_a_compiled_function() -> None:
    @kpu.compile(optimize=False)
    def net(x: Tensor, w: Tensor) -> Tensor:
        return kpu.relu(x @ w)

    net(floats(np.zeros((4, 8))), floats(np.zeros((8, 16))))
    assert len(net.get_graph().nodes) == 2
    data = net.get_dfx().to_dict()
    assert [op["opcode"] for op in data["ops"]] == ["matmul", "relu"]
    assert data["version"] == "1.0"


def test_a_compiled_cnn_and_its_opcodes(draw: Callable[..., np.ndarray]) -> None:
    def network(x: Tensor, conv: Tensor, shift: Tensor, fc1: Tensor, b1: Tensor, fc2: Tensor, b2: Tensor) -> Tensor:
        h = kpu.relu(kpu.conv2d(x, conv) + shift.reshape(1, -1, 1, 1))
        h = kpu.max_pool2d(h, kernel_size=2, stride=2)
        h = kpu.relu(h.reshape(h.shape[0], -1) @ fc1 + b1)
        return h @ fc2 + b2

    given = [draw(2, 1, 8, 8), draw(4, 1, 3, 3), draw(4), draw(36, 12) * 0.1, draw(12), draw(12, 10) * 0.1, draw(10)]
    compiled = kpu.compile(network)
    got, direct = compiled(*map(Tensor, given)), network(*map(Tensor, given))
    assert got.shape == (2, 10)
    near(got, direct.numpy(), 1e-6)
    opcodes = {op.opcode.value for op in compiled.get_dfx().ops}
    assert {"conv2d", "relu", "maxpool2d", "reshape", "matmul", "add"} <= opcodes


def test_a_program_is_the_same_after_json() -> None:
    @kpu.compile
    def double(x: Tensor, w: Tensor) -> Tensor:
        return kpu.relu(x @ w)

    double(floats(np.zeros((4, 8))), floats(np.zeros((8, 16))))
    program = double.get_dfx()
    parsed = json.loads(program.to_json())
    assert parsed["name"] == "double"
    assert {"tensors", "ops", "inputs", "outputs", "metadata"} <= parsed.keys()
    assert kpu.DFXProgram.from_json(program.to_json()) == program


# transformers


def test_transformer_operators(draw: Callable[..., np.ndarray]) -> None:
    rows = kpu.compile(lambda x: kpu.softmax(x, axis=-1))
    np.testing.assert_allclose(rows(floats([1000, 1001, 1002], [1, 1, 1])).numpy()[1], [1 / 3] * 3, rtol=1e-5)
    assert np.isfinite(rows(floats([1000, 1001, 1002], [1, 1, 1])).numpy()).all()
    norm = kpu.compile(lambda x, w, b: kpu.layer_norm(x, normalized_shape=(4,), weight=w, bias=b))
    got = norm(floats([[1, 2, 3, 4]]), floats([2, 2, 2, 2]), floats([1, 1, 1, 1])).numpy()
    np.testing.assert_allclose((got.mean(), got.std()), (1, 2), atol=1e-2)
    attend = kpu.compile(lambda q, k, v: kpu.scaled_dot_product_attention(q, k, v))
    for shape in ((2, 4), (2, 4, 8, 16)):
        q, k, v = (draw(*shape) for _ in range(3))
        want = F.scaled_dot_product_attention(*(torch.tensor(t).double() for t in (q, k, v)))
        near(attend(Tensor(q), Tensor(k), Tensor(v)), want)
        assert attend.get_dfx().op_counts()["matmul"] == 2
    even = attend(floats(np.ones((4, 8))), floats(np.ones((4, 8))), floats(np.eye(4, 8))).numpy()
    np.testing.assert_allclose(even[0, :4], [0.25] * 4, rtol=1e-4)


# fusion


def traced(function: Callable[..., Tensor], *shapes: tuple[int, ...], optimize: bool = False) -> Any:
    compiled = kpu.compile(function, optimize=optimize)
    compiled(*(Tensor.randn(*shape) for shape in shapes))
    return compiled


def with_bias(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, w, bias: activation(x @ w + bias)


FUSED = {
    "fused_matmul_bias_relu": (with_bias(kpu.relu), "MatMulBiasActivation", ((32, 64), (64, 128), (128,))),
    "fused_matmul_bias_gelu": (with_bias(kpu.gelu), "MatMulBiasActivation", ((16, 32), (32, 64), (64,))),
    "fused_matmul_bias_silu": (with_bias(kpu.silu), "MatMulBiasActivation", ((16, 32), (32, 64), (64,))),
    "fused_matmul_relu": (lambda x, w: kpu.relu(x @ w), "MatMulActivation", ((32, 64), (64, 128))),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_pattern_is_found_joined_and_changes_no_value(name: str, draw: Callable[..., np.ndarray]) -> None:
    function, pattern, shapes = FUSED[name]
    plain = traced(function, *shapes)
    compiler = FusionCompiler()
    (node,) = compiler.optimize(plain.graph).nodes
    assert (compiler.num_fusions, compiler.fusion_stats) == (1, {pattern: 1})
    assert pattern in compiler.summary()
    assert node.op_type == OpType(name)
    assert node.op_type.is_fused()
    assert len(plain.graph.nodes) == len(shapes)  # the given graph stays as it is

    fused, operands = kpu.compile(function, optimize=True), [draw(*shape) for shape in shapes]
    near(fused(*map(Tensor, operands)), plain(*map(Tensor, operands)).numpy())
    assert len(fused.graph.nodes) == 1
    (op,) = fused.dfx.ops
    assert op.opcode.value == name
    assert len(op.inputs) == len(shapes)
    assert (op.attrs["M"], op.attrs["K"], op.attrs["N"]) == (*shapes[0], shapes[1][1])
    savings = kpu.estimate_memory_savings(plain.graph, fused.graph)
    assert savings["original_ops"] > savings["fused_ops"]
    assert savings["reduction_factor"] > 1


def test_what_others_read_or_nothing_follows_is_left_alone() -> None:
    def twice(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        return y + kpu.relu(y)

    cases: list[tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = [
        (lambda x, w: x @ w, ((4, 8), (8, 16))),
        (twice, ((4, 8), (8, 16))),
        (lambda x, w, rest: kpu.relu(x @ w + rest), ((4, 8), (8, 16), (4, 16))),
        (lambda x, w: kpu.relu(x @ kpu.transpose(w)), ((4, 8), (16, 8))),
    ]
    for function, shapes in cases:
        compiler, graph = FusionCompiler(), traced(function, *shapes).graph
        assert [node.op_type for node in compiler.optimize(graph).nodes] == [node.op_type for node in graph.nodes]
        assert (compiler.num_fusions, compiler.fusion_stats) == (0, {})


def test_layers_in_a_row_are_joined_each() -> None:
    def two(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return kpu.relu(kpu.relu(x @ w1 + b1) @ w2 + b2)

    shapes = ((4, 8), (8, 16), (16,), (16, 32), (32,))
    assert len(traced(two, *shapes).graph.nodes) == 6
    graph = traced(two, *shapes, optimize=True).graph
    assert [node.op_type for node in graph.topological_order()] == [OpType.FUSED_MATMUL_BIAS_RELU] * 2
    assert len({node._id for node in graph.nodes}) == 2
    assert not any(kind.is_fused() for kind in (OpType.MATMUL, OpType.RELU, OpType.ADD))


def test_only_what_the_machine_runs_as_one_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = traced(*(FUSED["fused_matmul_bias_relu"][0], *FUSED["fused_matmul_bias_relu"][2])).graph
    monkeypatch.setattr(
        "hal_kpu.frontend.fusing.groups",
        lambda program, asked: [g for g in groups(program, asked) if len(g.members) < 2],
    )
    assert len(FusionCompiler().optimize(graph).nodes) == 3


def test_a_pattern_of_ones_own() -> None:
    class Bias(FusionPattern):
        def match(self, graph: Any, node: Any) -> Any:
            readers = [other for other in graph.nodes if node.outputs[0] in other.inputs]
            if node.op_type != OpType.MATMUL or [other.op_type for other in readers] != [OpType.ADD]:
                return None
            bias = next(name for name in readers[0].inputs if name != node.outputs[0])
            return kpu.FusionGroup(
                nodes=(node, readers[0]),
                pattern_name=self.name,
                fused_op_type=OpType.LINEAR,
                external_inputs=(*node.inputs, bias),
                output=readers[0].outputs[0],
            )

    compiler = FusionCompiler([Bias()])
    (node,) = compiler.optimize(traced(lambda x, w, b: x @ w + b, (4, 8), (8, 16), (16,)).graph).nodes
    assert (node.op_type, compiler.fusion_stats) == (OpType.LINEAR, {"Bias": 1})


@pytest.mark.parametrize("fidelity", [kpu.TRANSACTIONAL, kpu.CYCLE_ACCURATE])
def test_joined_operators_take_less_time_than_one_by_one(fidelity: int) -> None:
    function, _, shapes = FUSED["fused_matmul_bias_relu"]
    program = traced(function, *shapes, optimize=True).get_dfx()
    together, apart = (time_program(program, fidelity, fuse=fuse) for fuse in (True, False))
    assert together.fused == ["matmul+add+maximum"]
    assert together.cycles < apart.cycles


# the package


def test_the_package_says_what_it_is() -> None:
    assert kpu.TORCH_AVAILABLE is True
    assert kpu.info()["fidelity"] == "BEHAVIORAL"
    assert kpu.get_fidelity_name() == "BEHAVIORAL"
    assert (kpu.BEHAVIORAL, kpu.TRANSACTIONAL, kpu.CYCLE_ACCURATE) == (0, 1, 2)
