"""DFX 1.0 and 1.1: the opcodes of 1.0 by name, what they mean in general opcodes, and that files of both are read."""

from __future__ import annotations

import json
import math
from typing import Any

import hal_kpu
import pytest
import torch
from hal_kpu import DFXOpCode, DFXProgram, KPURuntime, Tensor
from hal_kpu.frontend.dfx.forms import FORMS, form_of
from hal_kpu.frontend.dfx.opcodes import LONG_DTYPES, SHORT_DTYPES, VOCABULARY
from hal_kpu.frontend.dfx.records import DFXError, DFXOp
from hal_kpu.frontend.expansion import Expanded, general
from hal_kpu.simulator.opcodes.specs import TensorSpec
from hal_kpu.simulator.opcodes.table import OPCODES

MATRIX, IMAGE = (6, 8), (2, 3, 9, 8)
CHANNELS = ((3,),) * 4
#: opcode of 1.0 -> (shapes of its operands, attributes), one or more.
SAMPLES: dict[str, list[tuple[tuple[tuple[int, ...], ...], dict[str, Any]]]] = {
    **{name: [((MATRIX,), {})] for name in ("load", "store", "prefetch", "copy", "relu", "gelu", "silu")},
    "gelu": [((MATRIX,), {}), ((MATRIX,), {"approximate": "tanh"})],
    "linear": [((MATRIX, (5, 8)), {}), (((2, 6, 8), (5, 8), (5,)), {"M": 6, "K": 8, "N": 5})],
    "conv2d": [
        ((IMAGE, (4, 3, 3, 3)), {}),
        ((IMAGE, (6, 1, 3, 2), (6,)), {"stride": [2, 1], "padding": 1, "dilation": [1, 2], "groups": 3}),
    ],
    "layer_norm": [
        ((MATRIX,), {"normalized_shape": [8], "eps": 1e-5}),
        (((2, 3, 4), (3, 4), (3, 4)), {"normalized_shape": [3, 4]}),
    ],
    "batch_norm": [
        ((IMAGE, *CHANNELS[:2]), {"eps": 1e-3, "training": False}),
        ((IMAGE, *CHANNELS), {}),
        ((IMAGE,), {}),
    ],
    "maxpool2d": [
        ((IMAGE,), {"kernel_size": [3, 2], "stride": [2, 2], "padding": [1, 0]}),
        ((IMAGE,), {"kernel_size": 2}),
    ],
    "avgpool2d": [((IMAGE,), {"kernel_size": [2, 2], "stride": [1, 2], "padding": [1, 1]})],
    "adaptive_avgpool2d": [((IMAGE,), {"output_size": [1, 1]}), ((IMAGE,), {"output_size": [3, 4]})],
    **{
        name: [
            ((MATRIX,), {"axis": axis, "keepdims": keep}) for axis in (None, -1, [0], [0, 1]) for keep in (True, False)
        ]
        for name in ("sum", "mean", "max", "min")
    },
    "transpose": [((MATRIX,), {"axes": [1, 0]}), (((2, 3, 4),), {"axes": None}), ((MATRIX,), {"axes": [0, 1]})],
    "concat": [((MATRIX, MATRIX), {"dim": -1}), ((MATRIX, (1, 8)), {"dim": 0})],
    "flatten": [((IMAGE,), {"start_dim": 1, "end_dim": -1}), ((IMAGE,), {}), (((7,),), {})],
    **{
        f"fused_matmul_bias_{kind}": [
            ((MATRIX, (8, 5), (5,)), {"M": 6, "K": 8, "N": 5, "fused_from": ["matmul", "add"]})
        ]
        for kind in ("relu", "gelu", "silu")
    },
    "fused_matmul_relu": [(((2, 6, 8), (8, 5)), {})],
}
CASES = [(name, index) for name in SAMPLES for index in range(len(SAMPLES[name]))]


def program_of(opcode: str, operands: list[torch.Tensor], attrs: dict[str, Any]) -> DFXProgram:
    """One operation of 1.0, whose result's shape is torch's."""
    outputs = FORMS[opcode].value(tuple(operands), attrs)
    names = [f"x{index}" for index in range(len(operands))]
    specs = {name: TensorSpec(name, tensor.shape, "float32") for name, tensor in zip(names, operands, strict=True)}
    specs["y"] = TensorSpec("y", outputs[0].shape, "float32")
    op = DFXOp(opcode, names, ["y"], attrs)
    return DFXProgram(name="one", version="1.0", tensors=specs, ops=[op], inputs=names, outputs=["y"])


@pytest.mark.parametrize(("opcode", "index"), CASES)
def test_an_opcode_of_1_0_survives_json_and_means_what_torch_means(opcode: str, index: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes, attrs = SAMPLES[opcode][index]
    operands = [torch.rand(shape, generator=draw) + 0.1 for shape in shapes]
    program = program_of(opcode, operands, attrs).validate()
    text = program.to_json()
    again = DFXProgram.from_json(text)
    assert again == program
    assert again.to_json() == text
    assert all(tensor["dtype"] == "f32" for tensor in json.loads(text)["tensors"].values())
    written = general(again)
    assert written.validate().version == "1.1"
    assert all(op.opcode in OPCODES and form_of(op) is None for op in written.ops)
    assert written.total_macs() == again.total_macs()
    wide = FORMS[opcode].value(tuple(tensor.double() for tensor in operands), attrs)[0]
    for fidelity in (0, 1, 2):
        result, stats = KPURuntime(fidelity).execute(again, operands)
        torch.testing.assert_close(result.data.double(), wide, rtol=1e-5, atol=1e-5)
        assert stats.total_macs == again.total_macs()
        assert stats.ops_executed == 1
        moves = any(op.opcode != "reshape" for op in written.ops)
        assert (stats.cycles > 0) == (moves and fidelity > 0)


def test_every_form_has_a_sample_and_the_enum_names_every_opcode() -> None:
    assert FORMS.keys() - SAMPLES.keys() == {"barrier", "nop"}
    assert {str(member) for member in DFXOpCode} == OPCODES.keys() | FORMS.keys()
    assert VOCABULARY.keys() - FORMS.keys() <= OPCODES.keys()
    assert DFXOpCode.RELU == "relu"
    assert DFXOp("relu", ["x"], ["y"]).opcode is DFXOpCode.RELU
    assert OPCODES[DFXOpCode.MAXIMUM].name == "maximum"
    assert [member.name.lower() for member in DFXOpCode] == [member.value for member in DFXOpCode]
    assert {name for name in SHORT_DTYPES.values() if LONG_DTYPES[name] not in SHORT_DTYPES} == set()


def file_of(version: str, ops: list[dict[str, Any]], tensors: dict[str, tuple[list[int], str]]) -> str:
    specs = {
        name: {"name": name, "shape": shape, "dtype": dtype, "memory_level": 0, "is_const": name == "w"}
        for name, (shape, dtype) in tensors.items()
    }
    ends = {"inputs": ["x", "w"], "outputs": ["y"], "metadata": {"num_ops": len(ops)}}
    return json.dumps({"name": "net", "version": version, "tensors": specs, "ops": ops, **ends})


def op_of(opcode: str, inputs: list[str], outputs: list[str], **attrs: Any) -> dict[str, Any]:
    return {"opcode": opcode, "inputs": inputs, "outputs": outputs, "attrs": attrs}


SHAPES = {"x": [4, 8], "w": [8, 2], "h": [4, 2], "y": [4, 2]}
FILES = {
    "1.0": file_of(
        "1.0",
        [
            op_of("prefetch", ["x"], ["p"]),
            op_of("matmul", ["p", "w"], ["h"], M=4, K=8, N=2),
            op_of("barrier", ["h"], []),
            op_of("relu", ["h"], ["y"]),
        ],
        {name: (shape, "f32") for name, shape in (SHAPES | {"p": [4, 8]}).items()},
    ),
    "1.0 with general opcodes, as hal-kpu wrote it before 1.1": file_of(
        "1.0",
        [op_of("matmul", ["x", "w"], ["h"], M=4, K=8, N=2), op_of("maximum", ["h"], ["y"], scalar=0)],
        {name: (shape, "float32") for name, shape in SHAPES.items()},
    ),
    "1.1": file_of(
        "1.1",
        [op_of("matmul", ["x", "w"], ["h"]), op_of("maximum", ["h"], ["y"], scalar=0)],
        {name: (shape, "float32") for name, shape in SHAPES.items()},
    ),
    "1.1 with an opcode of 1.0": file_of(
        "1.1",
        [op_of("matmul", ["x", "w"], ["h"]), op_of("relu", ["h"], ["y"])],
        {name: (shape, "float32") for name, shape in SHAPES.items()},
    ),
}


@pytest.mark.parametrize("fidelity", [0, 1, 2])
@pytest.mark.parametrize("kind", FILES)
def test_files_of_both_versions_load_and_run(kind: str, fidelity: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    program = DFXProgram.from_json(FILES[kind])
    assert program.version == kind[:3]
    assert DFXProgram.from_json(program.to_json()) == program
    x, w = torch.randn(4, 8, generator=draw), torch.randn(8, 2, generator=draw)
    result, stats = KPURuntime(fidelity).execute(program, {"x": x, "w": w})
    torch.testing.assert_close(result.data, torch.relu(x @ w))
    assert stats.total_macs == program.total_macs() == 64


def test_a_sum_of_everything_may_be_a_number() -> None:
    text = file_of(
        "1.0",
        [op_of("mean", ["x"], ["y"], axis=None, keepdims=False)],
        {**{n: (SHAPES[n], "f32") for n in "xw"}, "y": ([], "f32")},
    )
    result, _ = KPURuntime(0).execute(DFXProgram.from_json(text), [torch.ones(4, 8), torch.ones(8, 2)])
    assert result.shape == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": "2.0"},
            r"version is '2.0', and '1.0' or '1.1' is wanted: upgrade hal-kpu, which reads up to '1.1'",
        ),
        ({"version": "0.3"}, r"version is '0.3', and '1.0' or '1.1' is wanted: there was none before '1.0'"),
        ({"version": 1.0}, r"version is 1.0, and two numbers such as '1.0' are wanted: write '1.0' or '1.1'"),
        ({"opcode": "rellu"}, r"ops\[3\].opcode is 'rellu', which is not known: did you mean relu"),
        ({"opcode": "teleport 9"}, r"is 'teleport 9', which is not known: use one of load, store, .*maximum"),
        ({"attrs": {"speed": 3}}, r"ops\[3\].attrs has 'speed', which relu does not know; its attributes: none"),
        ({"inputs": ["h", "w"]}, r"ops\[3\].inputs has 2 tensors, and relu wants 1"),
    ],
)
def test_what_a_file_has_wrong_is_said_with_what_is_wanted(change: dict[str, Any], message: str) -> None:
    data = json.loads(FILES["1.0"])
    if "version" in change:
        data |= change
    else:
        data["ops"][3] |= change
    with pytest.raises(DFXError, match=message):
        DFXProgram.from_dict(data)


def traced(function: Any, *operands: Tensor, **options: Any) -> DFXProgram:
    compiled = hal_kpu.compile(function, **options)
    compiled(*operands)
    program = compiled.get_dfx()
    assert isinstance(program, DFXProgram)
    assert DFXProgram.from_json(program.to_json()) == program
    return program


def test_a_traced_network_is_written_in_the_names_of_1_0() -> None:
    def network(x: Tensor, w: Tensor, fc: Tensor) -> Tensor:
        x = hal_kpu.relu(hal_kpu.conv2d(x, w, padding=1))
        x = hal_kpu.avg_pool2d(hal_kpu.max_pool2d(x, 2), 2, stride=1)
        x = hal_kpu.layer_norm(hal_kpu.flatten(x, 1), 4)
        x = hal_kpu.softmax(hal_kpu.tanh(hal_kpu.silu(hal_kpu.sigmoid(x @ fc))))
        return hal_kpu.mean(hal_kpu.concat([x, x], dim=1), axis=0)

    program = traced(network, Tensor.randn(2, 1, 5, 5), Tensor.randn(4, 1, 3, 3), Tensor.randn(4, 3))
    assert program.version == "1.0"
    assert [str(op.opcode) for op in program.ops] == [
        "conv2d",
        "relu",
        "maxpool2d",
        "avgpool2d",
        "reshape",
        "layer_norm",
        "matmul",
        "sigmoid",
        "silu",
        "tanh",
        "softmax",
        "concat",
        "mean",
    ]


@pytest.mark.parametrize(
    ("function", "shapes", "dtype"),
    [
        (lambda x: x * 2.0, [(3, 4)], "float32"),
        (lambda x: hal_kpu.gelu(x, approximate="tanh"), [(3, 4)], "float32"),
        (lambda x: x + x, [(3, 4)], "float64"),
        (lambda x, w: hal_kpu.linear(x, w), [(3, 4), (5, 4)], "float32"),
        (lambda q: hal_kpu.scaled_dot_product_attention(q, q, q, is_causal=True), [(2, 5, 4)], "float32"),
    ],
)
def test_what_1_0_cannot_say_is_written_as_1_1(function: Any, shapes: list[Any], dtype: str) -> None:
    program = traced(function, *(Tensor.randn(*shape, dtype=dtype) for shape in shapes))
    assert program.version == "1.1"
    assert program.tensors[program.inputs[0]].dtype == dtype


def test_a_program_is_timed_as_its_general_opcodes() -> None:
    program = traced(lambda x, w: hal_kpu.gelu(x @ w), Tensor.randn(32, 64), Tensor.randn(64, 32))
    expanded = Expanded(program)
    assert [op.opcode for op in expanded.program.ops][:2] == ["matmul", "mul"]
    assert expanded.origins == [0, *[1] * (len(expanded.program.ops) - 1)]
    operands = [torch.randn(32, 64), torch.randn(64, 32)]
    for fidelity in (1, 2):
        _, named = KPURuntime(fidelity).execute(program, operands)
        _, plain = KPURuntime(fidelity).execute(expanded.program, operands)
        assert named.cycles == plain.cycles > 0
        assert (named.ops_executed, plain.ops_executed) == (2, len(expanded.program.ops))
    assert math.prod(expanded.program.tensors[expanded.program.ops[1].outputs[0]].shape) == 32 * 32
