"""DFX programs: the same after a round through JSON, and refused with a sentence when anything is wrong."""

from __future__ import annotations

import copy
import json
import math

import pytest
from hal_kpu.frontend.dfx.program import DFXProgram
from hal_kpu.frontend.dfx.records import DFXError, DFXOp
from hal_kpu.simulator.opcodes.specs import TensorSpec


def perceptron() -> DFXProgram:
    shapes = {"x": (4, 8), "w": (8, 2), "y": (4, 2), "z": (4, 2)}
    return DFXProgram(
        name="perceptron",
        tensors={name: TensorSpec(name, shape, "float32", is_const=name == "w") for name, shape in shapes.items()},
        ops=[
            DFXOp("matmul", ["x", "w"], ["y"], {"M": 4, "K": 8, "N": 2}),
            DFXOp("maximum", ["y"], ["z"], {"scalar": 0.0}),
        ],
        inputs=["x", "w"],
        outputs=["z"],
    )


def broken(change) -> dict:
    data = copy.deepcopy(perceptron().to_dict())
    change(data)
    return data


def test_a_program_is_the_same_after_json():
    program = perceptron().validate()
    assert DFXProgram.from_json(program.to_json()) == program
    assert DFXProgram.from_dict(json.loads(json.dumps(program.to_dict()))) == program


def test_the_metadata_counts_operations_and_flops():
    metadata = perceptron().to_dict()["metadata"]
    assert metadata == {
        "num_ops": 2,
        "num_tensors": 4,
        "total_matmul_flops": 2 * 4 * 8 * 2,
        "op_counts": {"matmul": 1, "maximum": 1},
    }


def test_infinities_survive_json_and_the_text_stays_standard_json():
    program = perceptron()
    program.ops[1].attrs["scalar"] = -math.inf
    text = program.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert DFXProgram.from_json(text).ops[1].attrs["scalar"] == -math.inf


def test_the_summary_names_every_operation_with_shapes():
    text = perceptron().summary()
    assert "matmul(x: float32[4, 8], w: float32[8, 2]) -> y: float32[4, 2]" in text
    assert "64 MACs" in text


def rename_ops(data):
    data["ops"][0]["opcode"] = "matmull"


def make_a_ring(data):
    data["ops"][0]["inputs"] = ["z", "w"]
    data["tensors"]["z"]["shape"] = [4, 8]


WRONG = {
    "not an object": (lambda d: d["ops"].__setitem__(0, 7), r"ops\[0\] is 7, and an object"),
    "no version": (lambda d: d.pop("version"), r"version is None, and two numbers such as '1.0'"),
    "newer": (
        lambda d: d.update(version="1.2"),
        r"version is '1.2', and '1.0' or '1.1' is wanted: upgrade hal-kpu, which reads up to '1.1', or write",
    ),
    "older": (
        lambda d: d.update(version="0.9"),
        r"version is '0.9', and '1.0' or '1.1' is wanted: there was none before",
    ),
    "unknown opcode": (rename_ops, r"ops\[0\].opcode is 'matmull', which is not known: did you mean matmul"),
    "cycle": (make_a_ring, r"cycle, ops\[\d\] \w+ -> ops\[\d\] \w+ -> ops\[\d\] \w+"),
    "order": (lambda d: d["ops"].reverse(), r"ops\[0\] reads 'y', which ops\[1\] writes later"),
    "never written": (lambda d: d["ops"].pop(0), r"ops\[0\] reads 'y', which no operation writes"),
    "written twice": (lambda d: d["ops"][1].update(outputs=["y"]), r"ops\[1\].outputs writes 'y'.*written by ops\[0\]"),
    "input written": (lambda d: d["ops"][1].update(outputs=["x"]), r"writes 'x', which is an input already"),
    "unknown tensor": (
        lambda d: d["ops"][1].update(inputs=["q"]),
        r"ops\[1\].inputs\[0\] is 'q'.*not among the tensors",
    ),
    "unknown output": (lambda d: d.update(outputs=["q"]), r"outputs\[0\] is 'q'"),
    "operands": (lambda d: d["ops"][0].update(inputs=["x"]), r"ops\[0\].inputs has 1 tensors, and matmul wants 2 to 3"),
    "attribute missing": (lambda d: d["ops"][1].update(opcode="transpose", attrs={}), r"no 'permutation'"),
    "attribute unknown": (lambda d: d["ops"][1]["attrs"].update(speed=2), r"has 'speed', which maximum does not know"),
    "field missing": (lambda d: d["tensors"]["x"].pop("dtype"), r"tensors.x has no 'dtype', and a string is wanted"),
    "field of another type": (lambda d: d["tensors"]["x"].update(shape="4,8"), r"tensors.x.shape is '4,8', and a list"),
    "field unknown": (lambda d: d["tensors"]["x"].update(color=1), r"tensors.x has an unknown field 'color'"),
    "truth for a number": (lambda d: d["tensors"]["x"].update(memory_level=True), r"memory_level is True"),
    "size": (lambda d: d["tensors"]["x"].update(shape=[4, -1]), r"tensors.x.shape\[1\] is -1"),
    "dtype": (lambda d: d["tensors"]["x"].update(dtype="f32"), r"tensors.x.dtype is 'f32'.*float32"),
    "level": (lambda d: d["tensors"]["x"].update(memory_level=9), r"memory_level is 9, and 0 .* to 4"),
    "key": (lambda d: d["tensors"]["x"].update(name="v"), r"tensors.x.name is 'v', and its key 'x'"),
    "inner sizes": (
        lambda d: d["tensors"]["w"].update(shape=[9, 2]),
        r"ops\[0\] matmul cannot take .*\[4, 8\].*\[9, 2\]",
    ),
    "result shape": (
        lambda d: d["tensors"]["y"].update(shape=[2, 4]),
        r"tensors.y is float32\[2, 4\].*gives float32\[4, 2\]",
    ),
    "result dtype": (lambda d: d["tensors"]["z"].update(dtype="float16"), r"tensors.z is float16.*gives float32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_program_is_refused_with_the_place_and_what_is_wanted(case):
    change, message = WRONG[case]
    with pytest.raises(DFXError, match=message):
        DFXProgram.from_dict(broken(change))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"float": "abc"}, r"ops\[1\]\.attrs\.scalar\.float is 'abc', and 'inf', '-inf' or 'nan' is wanted"),
        ({"float": 1.5}, r"scalar\.float is 1\.5"),
        ({"float": ["inf"]}, r"scalar\.float is \['inf'\]"),
        pytest.param(
            10**10_000,
            r"an? int too large to print is in the DFX program, and whole numbers up to 2\*\*63 - 1",
            id="10,000 digits",
        ),
        (2**63, r"9223372036854775808 is in the DFX program"),
    ],
)
def test_an_attribute_that_no_program_can_have_is_refused(value, message):
    with pytest.raises(DFXError, match=message):
        DFXProgram.from_dict(broken(lambda d: d["ops"][1]["attrs"].update(scalar=value)))


def test_nesting_without_end_is_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(DFXError, match="nested more than 32 levels"):
        DFXProgram.from_dict(broken(lambda d: d["ops"][1]["attrs"].update(scalar=0)) | {"metadata": deep})
    ring: dict = {}
    ring["again"] = ring
    with pytest.raises(DFXError, match="nested more than 32 levels"):
        DFXProgram.from_dict(broken(lambda d: d["ops"][1]["attrs"].update(scalar=ring)))
    while deep:  # freed by the interpreter's recursion otherwise
        deep = deep.pop()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('{"name": ' + "9" * 10_000 + "}", "cannot be read"),
        ('{"version": "1.' + "9" * 5_000 + '"}', "two numbers such as '1.0'"),
    ],
)
def test_text_that_json_cannot_take_is_refused(text, message):
    with pytest.raises(DFXError, match=message):
        DFXProgram.from_json(text)


def test_sizes_beyond_any_memory_are_refused():
    for size in (10**10_000, 2**64):
        program = perceptron()
        program.tensors["x"] = TensorSpec("x", (4, size), "float32")
        with pytest.raises(DFXError, match=r"tensors\.x\.shape\[1\] is .* from 0 to 2\*\*63 - 1 is wanted"):
            program.validate()


def test_text_that_is_not_json_is_refused_with_line_and_column():
    with pytest.raises(DFXError, match=r"line 1, column 10"):
        DFXProgram.from_json('{"name": }')
    with pytest.raises(DFXError, match="object with name"):
        DFXProgram.from_json("[]")
