"""`OpGraph`: what a traced function does, operator by operator."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import attrs
import torch

from ..dfx.opcodes import DFXOpCode
from ..emitter import Emitter, Value
from .rules import RULES
from .tensor import Tensor, TensorMeta

#: DFX's name of an operator, where it has another one in Python.
OPCODE_NAMES = {
    "max_pool2d": "maxpool2d",
    "avg_pool2d": "avgpool2d",
    "adaptive_avg_pool2d": "adaptive_avgpool2d",
    "batch_norm2d": "batch_norm",
    "scaled_dot_product_attention": "attention",
    "multi_head_attention": "attention",
}


class OpType(enum.StrEnum):
    """Operators of a graph, by the names that DFX has for them."""

    ATTENTION = "attention"
    CAST = DFXOpCode.CAST
    MATMUL = DFXOpCode.MATMUL
    LINEAR = DFXOpCode.LINEAR
    CONV2D = DFXOpCode.CONV2D
    RELU = DFXOpCode.RELU
    GELU = DFXOpCode.GELU
    SILU = DFXOpCode.SILU
    SIGMOID = DFXOpCode.SIGMOID
    TANH = DFXOpCode.TANH
    SOFTMAX = DFXOpCode.SOFTMAX
    LAYER_NORM = DFXOpCode.LAYER_NORM
    BATCH_NORM = DFXOpCode.BATCH_NORM
    ADD = DFXOpCode.ADD
    SUB = DFXOpCode.SUB
    MUL = DFXOpCode.MUL
    DIV = DFXOpCode.DIV
    EXP = DFXOpCode.EXP
    LOG = DFXOpCode.LOG
    SQRT = DFXOpCode.SQRT
    SUM = DFXOpCode.SUM
    MEAN = DFXOpCode.MEAN
    MAXPOOL2D = DFXOpCode.MAXPOOL2D
    AVGPOOL2D = DFXOpCode.AVGPOOL2D
    ADAPTIVE_AVGPOOL2D = DFXOpCode.ADAPTIVE_AVGPOOL2D
    RESHAPE = DFXOpCode.RESHAPE
    TRANSPOSE = DFXOpCode.TRANSPOSE
    CONCAT = DFXOpCode.CONCAT
    FUSED_MATMUL_BIAS_RELU = DFXOpCode.FUSED_MATMUL_BIAS_RELU
    FUSED_MATMUL_BIAS_GELU = DFXOpCode.FUSED_MATMUL_BIAS_GELU
    FUSED_MATMUL_BIAS_SILU = DFXOpCode.FUSED_MATMUL_BIAS_SILU
    FUSED_MATMUL_RELU = DFXOpCode.FUSED_MATMUL_RELU

    def is_fused(self) -> bool:
        """Whether it is several operators in one."""
        return self.startswith("fused_")


@attrs.frozen
class OpNode:
    """One operator: its name in `RULES`, the tensors it reads (or None for one left out) and writes, its settings."""

    op: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any]

    @property
    def op_type(self) -> OpType:
        """The operator as a member of `OpType`."""
        return OpType(OPCODE_NAMES.get(self.op, self.op))

    @property
    def _id(self) -> str:
        """What no other node of the graph has: the name of its first result."""
        return self.outputs[0]


class OpGraph:
    """Operators in the order in which they were called.

    Attributes:
        name: the function's. nodes: `OpNode`s. tensors: name to `TensorMeta`. inputs, outputs: names.
        constants: name to the `Tensor` that the function closes over. Its values are read at each run.
    """

    def __init__(self, name: str = "main") -> None:
        self.name = name
        self.nodes: list[OpNode] = []
        self.tensors: dict[str, TensorMeta] = {}
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.constants: dict[str, Tensor] = {}
        self._known: dict[int, str] = {}

    def add_input(self, meta: TensorMeta) -> Tensor:
        """A tensor that the caller gives."""
        name = self._free(meta.name or f"arg{len(self.inputs)}")
        self.inputs.append(name)
        return self._symbol(name, meta)

    def add_node(self, op: str, operands: tuple[Tensor | None, ...], attributes: dict[str, Any]) -> tuple[Tensor, ...]:
        """An operator; its results' shapes and types are found by lowering it without values."""
        names = tuple(None if operand is None else self.name_of(operand) for operand in operands)
        metas = _infer(op, operands, attributes)
        made = tuple(self._symbol(self._free(f"{op}{len(self.nodes)}"), meta) for meta in metas)
        self.nodes.append(OpNode(op, names, tuple(str(tensor.name) for tensor in made), dict(attributes)))
        return made

    def name_of(self, tensor: Tensor) -> str:
        """A tensor's name in this graph; one with values becomes a constant."""
        if tensor._graph is self:
            return str(tensor.name)
        if tensor.is_symbolic():
            from hal_core.plugin_api import ContractError

            raise ContractError(
                f"{tensor!r} belongs to another traced function: return it from there and pass it here."
            )
        if id(tensor) not in self._known:
            name = self._free(tensor.name or f"const{len(self.constants)}")
            self._known[id(tensor)] = name
            self.constants[name] = tensor
            self.tensors[name] = TensorMeta(tensor.shape, tensor.dtype, name, is_weight=True)
        return self._known[id(tensor)]

    def _symbol(self, name: str, meta: TensorMeta) -> Tensor:
        self.tensors[name] = attrs.evolve(meta, name=name)
        return Tensor.symbolic(self.tensors[name], self)

    def _free(self, name: str) -> str:
        found, count = name, 1
        while found in self.tensors:
            found, count = f"{name}_{count}", count + 1
        return found

    def with_nodes(self, nodes: list[OpNode]) -> OpGraph:
        """The same graph with other operators between its inputs and its outputs."""
        other = OpGraph(self.name)
        other.nodes, other.inputs, other.outputs = nodes, list(self.inputs), list(self.outputs)
        other.tensors, other.constants, other._known = dict(self.tensors), dict(self.constants), dict(self._known)
        return other

    def topological_order(self) -> list[OpNode]:
        """The operators, each after those that it reads from: the order in which they were called."""
        return list(self.nodes)

    def summary(self) -> str:
        """One line per operator."""
        lines = [f"{self.name}({', '.join(self.inputs)}): {len(self.nodes)} operators, {len(self.constants)} constants"]
        for node in self.nodes:
            made = self.tensors[node.outputs[0]]
            read = ", ".join(str(name) for name in node.inputs if name is not None)
            kind = str(made.dtype).removeprefix("torch.")
            lines.append(f"  {', '.join(node.outputs)} = {node.op}({read})  {kind}{list(made.shape)}")
        return "\n".join(lines)


def _infer(op: str, operands: tuple[Tensor | None, ...], attributes: dict[str, Any]) -> list[TensorMeta]:
    emitter = Emitter()
    values = [None if one is None else emitter.input(_empty(one.meta)) for one in operands]
    with torch.device("meta"):
        results = _as_tuple(RULES[op](emitter, *values, **attributes))
    return [TensorMeta(value.shape, value.dtype) for value in results]


def _empty(meta: TensorMeta) -> torch.Tensor:
    return torch.empty(meta.shape, dtype=meta.dtype, device="meta")


def _as_tuple(results: Value | tuple[Value, ...]) -> tuple[Value, ...]:
    return results if isinstance(results, tuple) else (results,)


_TRACING: ContextVar[OpGraph | None] = ContextVar("hal_kpu_tracing", default=None)


def current_graph() -> OpGraph | None:
    """The graph of the function that is being traced in this context."""
    return _TRACING.get()


@contextlib.contextmanager
def tracing(graph: OpGraph) -> Iterator[OpGraph]:
    """Operators inside are recorded in `graph` where an operand is symbolic."""
    token = _TRACING.set(graph)
    try:
        yield graph
    finally:
        _TRACING.reset(token)
