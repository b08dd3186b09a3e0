"""`DFXEmitter`: from what a traced function does to its DFX program, operator by operator.

An operator that DFX has by name becomes that opcode; of others the general operations are written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..simulator.opcodes.specs import TensorSpec
from .dfx.opcodes import version_of
from .dfx.program import DFXProgram
from .dfx.records import DFXOp
from .expansion import written_out
from .tensors.graph import OPCODE_NAMES, OpGraph, OpNode
from .tensors.rules import RULES
from .tensors.tensor import TensorMeta

_SAME = frozenset({"relu", "silu", "sigmoid", "tanh", "exp", "log", "sqrt", "softmax", "reshape", "cast", "conv2d"})


class DFXEmitter:
    """`DFXEmitter().emit(graph)` gives the program: inputs first, then constants, in the graph's order.

    Args:
        optimize: fold transpositions into the products that read them, and remove operations whose results are unused.
    """

    def __init__(self, optimize: bool = True) -> None:
        self.optimize = optimize

    def emit(self, graph: OpGraph) -> DFXProgram:
        inputs = [*graph.inputs, *graph.constants]
        tensors = {name: _spec(name, graph.tensors[name], name in graph.constants) for name in inputs}
        ops: list[DFXOp] = []
        for node in graph.nodes:
            outputs = [_spec(name, graph.tensors[name]) for name in node.outputs]
            read = [None if name is None else tensors[name] for name in node.inputs]
            named = name_of(node, graph.tensors)
            if named is not None:
                opcode, attributes = named
                made = [DFXOp(opcode, [name for name in node.inputs if name is not None], node.outputs, attributes)]
            else:
                rule = RULES[node.op]
                made, between = written_out(rule, read, outputs, optimize=self.optimize, **node.attrs)
                tensors |= between
            tensors |= {spec.name: spec for spec in outputs}
            ops += made
        if self.optimize:
            writers = {name: op for op in ops for name in op.outputs}
            ops = _needed([_folded(op, writers, tensors) for op in ops], graph.outputs)
        kept = [*inputs, *(name for op in ops for name in op.outputs)]
        return DFXProgram(
            name=graph.name,
            version=version_of(ops, {tensors[name].dtype for name in kept}),
            tensors={name: tensors[name] for name in kept},
            ops=ops,
            inputs=inputs,
            outputs=graph.outputs,
        )


def _spec(name: str, meta: TensorMeta, is_const: bool = False) -> TensorSpec:
    return TensorSpec(name, meta.shape, str(meta.dtype).removeprefix("torch."), is_const=is_const)


def name_of(node: OpNode, tensors: Mapping[str, TensorMeta]) -> tuple[str, dict[str, Any]] | None:
    """(opcode, attributes) of an operator that DFX has by name; None where general operations say it."""
    op, given = node.op, node.attrs
    shapes = [None if name is None else tensors[name].shape for name in node.inputs]
    if op.startswith("fused_"):
        return op, dict(given)
    if op in ("add", "sub", "mul", "div"):
        return op, _scalar(given)
    if op == "matmul":
        return _product(shapes, given)
    if op == "gelu":
        return op, {key: value for key, value in given.items() if (key, value) != ("approximate", "none")}
    if op in ("sum", "mean"):
        return op, {"axis": given["axes"], "keepdims": given["keepdims"]}
    if op == "layer_norm":  # a weight missing before a bias has no place in a list of operands
        bias_alone = shapes[1] is None and shapes[2] is not None
        return None if bias_alone else (op, {"normalized_shape": given["shape"], "eps": given["eps"]})
    if op in ("max_pool2d", "avg_pool2d"):
        return OPCODE_NAMES[op], {"kernel_size": given["kernel"], **{key: given[key] for key in ("stride", "padding")}}
    if op == "adaptive_avg_pool2d":
        return OPCODE_NAMES[op], dict(given)
    if op == "transpose":
        moves = tuple(given["axes"]) != tuple(range(len(given["axes"])))
        return (op, {"axes": given["axes"]}) if moves else None
    if op == "concat":
        return op, {"dim": given["axis"]}
    return (op, dict(given)) if op in _SAME else None


def _scalar(given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("number") is None:
        return {}
    return {"scalar": given["number"]} | ({"scalar_first": True} if given.get("number_first") else {})


def _product(shapes: list[Any], given: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """With its sizes; of vectors, which become matrices first, None."""
    a, b = shapes
    return None if len(a) < 2 or len(b) < 2 else ("matmul", {"M": a[-2], "K": a[-1], "N": b[-1], **given})


def _folded(op: DFXOp, writers: Mapping[str, DFXOp], tensors: Mapping[str, TensorSpec]) -> DFXOp:
    """A product that reads what is transposed in the last two axes reads the source: the streamer feeds columns."""
    if op.opcode != "matmul":
        return op
    inputs, attributes = list(op.inputs), dict(op.attrs)
    for place, flag in ((0, "transpose_a"), (1, "transpose_b")):
        name, ndim = inputs[place], len(tensors[inputs[place]].shape)
        writer = writers.get(name)
        order = None if writer is None else writer.attrs.get("axes", writer.attrs.get("permutation"))
        swapped = (*range(ndim - 2), ndim - 1, ndim - 2)
        if writer is not None and writer.opcode == "transpose" and order == swapped and not attributes.get(flag):
            inputs[place], attributes[flag] = writer.inputs[0], True
    return DFXOp(op.opcode, inputs, op.outputs, attributes)


def _needed(ops: list[DFXOp], outputs: list[str]) -> list[DFXOp]:
    """The operations whose results are used."""
    used, kept = set(outputs), list[DFXOp]()
    for op in reversed(ops):
        if used.intersection(op.outputs):
            kept.append(op)
            used.update(op.inputs)
    return kept[::-1]
