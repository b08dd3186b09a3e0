"""`FusionCompiler`: rewrites a graph so that a product, its bias and its activation are one operator.

A pattern says which operators those are. Whether they run as one is the machine's matter: only what `runtime.fusion`
puts in one group is joined. `compile(optimize=True)` times such groups as one without rewriting the graph, and more of
them (residuals, sums of normalisations, chains of elementwise operators): `ExecutionStats.fused` names them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from ..runtime.fusion import groups
from ..runtime.timing import works
from .emission import DFXEmitter
from .expansion import Expanded
from .tensors.graph import OpGraph, OpNode, OpType


@attrs.frozen(kw_only=True)
class FusionGroup:
    """Operators that a pattern found.

    Attributes:
        nodes: in running order. pattern_name: the pattern's. fused_op_type: what they become. external_inputs: names of
            the tensors that they read from outside. output: name of the one they leave.
    """

    nodes: tuple[OpNode, ...]
    pattern_name: str
    fused_op_type: OpType
    external_inputs: tuple[str, ...]
    output: str


class FusionPattern(ABC):
    """What to look for and what it becomes. `name` is the class's."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def match(self, graph: OpGraph, node: OpNode) -> FusionGroup | None:
        """The group that begins at a node; None where there is none."""

    def fuse(self, graph: OpGraph, group: FusionGroup) -> OpNode:
        """The one operator that a group becomes: with the sizes of the product that it begins with."""
        a, b = (graph.tensors[name].shape for name in group.external_inputs[:2])
        options = {key: value for node in group.nodes for key, value in node.attrs.items() if key == "approximate"}
        if options.get("approximate") == "none":
            options = {}
        sizes: dict[str, Any] = {"M": a[-2], "K": a[-1], "N": b[-1]}
        origin = {"fused_from": tuple(str(node.op_type) for node in group.nodes)}
        return OpNode(str(group.fused_op_type), group.external_inputs, (group.output,), sizes | options | origin)


class MatMulBiasActivation(FusionPattern):
    """matmul, + bias[N], then relu, gelu or silu."""

    def match(self, graph: OpGraph, node: OpNode) -> FusionGroup | None:
        add = _reader(graph, node) if _is_product(graph, node) else None
        last = None if add is None or add.op_type != OpType.ADD else _reader(graph, add)
        kinds = {
            OpType.RELU: OpType.FUSED_MATMUL_BIAS_RELU,
            OpType.GELU: OpType.FUSED_MATMUL_BIAS_GELU,
            OpType.SILU: OpType.FUSED_MATMUL_BIAS_SILU,
        }
        if add is None or last is None or last.op_type not in kinds:
            return None
        bias = [name for name in add.inputs if name is not None and name != node.outputs[0]]
        if len(bias) != 1 or graph.tensors[bias[0]].shape != graph.tensors[node.outputs[0]].shape[-1:]:
            return None
        return _found(self, (node, add, last), kinds[last.op_type], bias)


class MatMulActivation(FusionPattern):
    """matmul, then relu."""

    def match(self, graph: OpGraph, node: OpNode) -> FusionGroup | None:
        last = _reader(graph, node) if _is_product(graph, node) else None
        if last is None or last.op_type != OpType.RELU:
            return None
        return _found(self, (node, last), OpType.FUSED_MATMUL_RELU)


def _found(pattern: FusionPattern, nodes: tuple[OpNode, ...], kind: OpType, others: Iterable[str] = ()) -> FusionGroup:
    operands = tuple(name for name in nodes[0].inputs if name is not None)
    return FusionGroup(
        nodes=nodes,
        pattern_name=pattern.name,
        fused_op_type=kind,
        external_inputs=(*operands, *others),
        output=nodes[-1].outputs[0],
    )


def _is_product(graph: OpGraph, node: OpNode) -> bool:
    """Whether it is a product of matrices as they lie: one that is transposed before is fed so by the streamer, which a
    fused opcode cannot say.
    """
    if node.op_type != OpType.MATMUL or any(len(graph.tensors[str(name)].shape) < 2 for name in node.inputs):
        return False
    transposed = {name for other in graph.nodes if other.op_type == OpType.TRANSPOSE for name in other.outputs}
    return transposed.isdisjoint(node.inputs)


def _reader(graph: OpGraph, node: OpNode) -> OpNode | None:
    """The only operator that reads a node's result; None where there are more, or it leaves the graph."""
    (name,) = node.outputs
    readers = [other for other in graph.nodes for read in other.inputs if read == name]
    return readers[0] if len(readers) == 1 and name not in graph.outputs else None


DEFAULT_PATTERNS: tuple[FusionPattern, ...] = (MatMulBiasActivation(), MatMulActivation())


class FusionCompiler:
    """Joins operators that the machine runs as one.

    Attributes:
        patterns: tried in this order at each operator. num_fusions, fusion_stats: of the last `optimize`: how many, and
            pattern's name -> how many.
    """

    def __init__(self, patterns: Sequence[FusionPattern] | None = None) -> None:
        self.patterns = tuple(DEFAULT_PATTERNS if patterns is None else patterns)
        self.num_fusions = 0
        self.fusion_stats: dict[str, int] = {}

    def optimize(self, graph: OpGraph) -> OpGraph:
        """A graph with the groups joined; the given one stays as it is."""
        self.num_fusions, self.fusion_stats = 0, {}
        together = _run_together(graph)
        taken: dict[str, OpNode | None] = {}  # of each joined node, what it became; None but for the last
        for node in graph.topological_order():
            if node.outputs[0] in taken:
                continue
            for pattern in self.patterns:
                group = pattern.match(graph, node)
                names = [] if group is None else [one.outputs[0] for one in group.nodes]
                if group is None or not taken.keys().isdisjoint(names) or not together(names):
                    continue
                taken |= dict.fromkeys(names) | {names[-1]: pattern.fuse(graph, group)}
                self.num_fusions += 1
                self.fusion_stats[pattern.name] = self.fusion_stats.get(pattern.name, 0) + 1
                break
        nodes = [taken.get(node.outputs[0], node) for node in graph.nodes]
        return graph.with_nodes([node for node in nodes if node is not None])

    def summary(self) -> str:
        """What the last `optimize` joined."""
        lines = [f"{self.num_fusions} fusions"]
        return "\n".join([*lines, *(f"  {name}: {count}" for name, count in sorted(self.fusion_stats.items()))])


def _run_together(graph: OpGraph) -> Any:
    """Whether the machine runs all operations of some nodes, given by their results' names, as one."""
    expanded = Expanded(DFXEmitter(optimize=False).emit(graph))
    program, asked = expanded.program, works(expanded.program)
    group_of = {member: number for number, group in enumerate(groups(program, asked)) for member in group.members}
    of: dict[str, set[int]] = {}
    for index, op in enumerate(program.ops):
        if index in group_of:
            of.setdefault(op.outputs[0].split("~")[0], set()).add(group_of[index])
    return lambda names: len(set().union(*(of.get(name, set()) for name in names))) == 1


def estimate_memory_savings(graph: OpGraph, optimized: OpGraph) -> dict[str, Any]:
    """What joining saves of tensors read and written.

    Returns:
        original_ops, fused_ops: operators. original_memory_passes, fused_memory_passes: operands and results of all of
        them. reduction_factor: the first by the second.
    """

    def passes(of: OpGraph) -> int:
        return sum(sum(name is not None for name in node.inputs) + len(node.outputs) for node in of.nodes)

    before, after = passes(graph), passes(optimized)
    return {
        "original_ops": len(graph.nodes),
        "fused_ops": len(optimized.nodes),
        "original_memory_passes": before,
        "fused_memory_passes": after,
        "reduction_factor": before / after if after else 1.0,
    }
