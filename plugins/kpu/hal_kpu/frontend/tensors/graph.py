"""`OpGraph`: what a traced function does, operator by operator; and `DFXEmitter`, which turns it into a DFX program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import attrs
import torch

from ..dfx.program import DFXProgram
from ..emitter import Emitter, Value
from .rules import RULES
from .tensor import Tensor, TensorMeta


@attrs.frozen
class OpNode:
    """One operator: its name in `RULES`, the tensors it reads (or None for one left out) and writes, its settings."""

    op: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any]


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


class DFXEmitter:
    """`DFXEmitter().emit(graph)` gives the program: inputs first, then constants, in the graph's order.

    Args:
        optimize: fold transpositions into the products that read them, and remove operations whose results are unused.
    """

    def __init__(self, optimize: bool = True) -> None:
        self.optimize = optimize

    def emit(self, graph: OpGraph) -> DFXProgram:
        emitter = Emitter(graph.name, self.optimize)
        env: dict[str, Value] = {}
        with torch.device("meta"), torch.no_grad():
            for name in (*graph.inputs, *graph.constants):
                env[name] = emitter.input(_empty(graph.tensors[name]), name, is_const=name in graph.constants)
            for node in graph.nodes:
                operands = [None if name is None else env[name] for name in node.inputs]
                results = _as_tuple(RULES[node.op](emitter, *operands, **node.attrs))
                env.update(zip(node.outputs, results, strict=True))
        return emitter.program([env[name] for name in graph.outputs])


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
