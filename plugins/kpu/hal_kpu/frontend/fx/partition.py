"""Splits a graph into what the KPU runs and what is left to the host, and runs both, keeping count."""

from __future__ import annotations

import contextlib
import functools
import operator
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from hal_core.plugin_api import current_meter

from ...runtime.settings import current_profile
from ...simulator.values import array_values
from .coverage import RECORDER, RUN, GraphRecord, HostOp, Run
from .lowering import _attribute, hint, is_operator, lower_graph, why_not
from .macs import Counting, bytes_of, tensors_of
from .plan import Plan, arrange
from .registry import NotLowered

_SHAPES_KEPT = 64  # programs of one partition that are kept, by sizes; the least recently used goes first


def _layout(node: Any) -> tuple[int, ...] | None:
    """The order of axes in memory, outermost first, of a dense tensor; None where it is not dense or not known."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, Tensor):
        return None
    try:
        sizes, strides = [hint(size) for size in value.shape], [hint(step) for step in value.stride()]
    except NotLowered:
        return None
    order = sorted(range(len(sizes)), key=lambda axis: (-strides[axis], axis))
    step = 1
    for axis in reversed(order):
        if sizes[axis] != 1 and strides[axis] != step:
            return None
        step *= max(sizes[axis], 1)
    return tuple(order)


class Partition(torch.nn.Module):
    """A part of a graph that runs on the KPU. One program for each set of sizes it meets."""

    def __init__(self, graph: Graph, constant: Callable[[str], Tensor], name: str) -> None:
        super().__init__()
        self.graph, self.name = graph, name
        self.nodes = [node for node in graph.nodes if is_operator(node)]
        self._constants = [constant(str(node.target)) for node in graph.nodes if node.op == "get_attr"]
        self._constant = constant
        self._plans: OrderedDict[Any, Plan] = OrderedDict()
        output = next(node for node in graph.nodes if node.op == "output")
        self.single = isinstance(output.args[0], Node)
        results = (output.args[0],) if self.single else tuple(output.args[0])
        if self.single:
            output.args = (results,)
        self._layouts = [_layout(item) for item in results]

    def forward(self, *args: Any) -> Any:
        begun, run = time.perf_counter(), RUN.get()
        key = tuple(tuple(item.shape) if isinstance(item, Tensor) else item for item in args)
        plan = self._plans.get(key)
        with _values_of(run.fidelity if run is not None else 0) as counted:
            if plan is None:
                plan, outputs = self._plan(args)
                self._plans[key] = plan
                if len(self._plans) > _SHAPES_KEPT:
                    self._plans.popitem(last=False)
            else:
                self._plans.move_to_end(key)
                outputs = plan.run([item for item in args if isinstance(item, Tensor)] + self._constants)
        if run is not None:
            run.plans.append(plan)
            run.active_macs += counted.active_macs if counted is not None else 0
            run.kpu_wall += time.perf_counter() - begun
        return outputs[0] if self.single else outputs

    def _plan(self, args: Sequence[Any]) -> tuple[Plan, list[Any]]:
        with torch.no_grad():
            lowered, outputs = lower_graph(self.graph, args, self._constant, self.name)
        return Plan(lowered.program, lowered.outputs, self._layouts), arrange(outputs, self._layouts)


class _Supported(OperatorSupportBase):
    def __init__(self, left_out: dict[Node, str]) -> None:
        self.left_out = left_out

    def is_node_supported(self, submodules: Any, node: Node) -> bool:
        if node.op != "call_function":
            return False
        if node.target is operator.getitem:
            return self.is_node_supported(submodules, node.args[0]) if isinstance(node.args[0], Node) else False
        return node not in self.left_out and (
            is_operator(node) or isinstance(node.meta.get("val"), (torch.SymInt, int))
        )


class CompiledGraph:
    """A graph as the KPU runs it: called with a list of tensors and numbers, gives a list."""

    def __init__(self, gm: GraphModule, kind: str, frame: Any, fidelity: Callable[[], int]) -> None:
        operators = [node for node in gm.graph.nodes if is_operator(node)]
        seen: dict[Any, str | None] = {}
        left_out = {node: reason for node in operators if (reason := why_not(node, seen)) is not None}
        self.record = GraphRecord(
            kind=kind,
            frame=frame,
            nodes=len(operators),
            kpu_nodes=len(operators) - len(left_out),
            fallback=tuple(HostOp(str(node.target), reason) for node, reason in left_out.items()),
        )
        self._fidelity = fidelity
        self._rest: GraphModule | None = None
        self.partitions: list[Partition] = []
        if not left_out:
            self.partitions = [Partition(gm.graph, functools.partial(_attribute, gm), kind)]
        else:
            self._rest = self._split(gm, left_out)

    def _split(self, gm: GraphModule, left_out: dict[Node, str]) -> GraphModule:
        partitioner = CapabilityBasedPartitioner(gm, _Supported(left_out), allows_single_node_partition=True)
        chosen = [part for part in partitioner.propose_partitions() if any(is_operator(node) for node in part.nodes)]
        fused = partitioner.fuse_partitions(chosen)
        for name, module in list(fused.named_children()):
            if isinstance(module, GraphModule) and name.startswith("fused_"):
                part = Partition(module.graph, functools.partial(_attribute, module), name)
                setattr(fused, name, part)
                self.partitions.append(part)
        return fused

    def __call__(self, *args: Any) -> Any:
        fidelity = self._fidelity()
        run = Run(self.record, fidelity)
        token = RUN.set(run)
        try:
            with torch.no_grad():
                outputs = self.partitions[0](*args) if self._rest is None else _Host(self._rest, run).run(*args)
        finally:
            RUN.reset(token)
        if fidelity:
            run.timings = [plan.time(fidelity) for plan in run.plans]
        RECORDER.add(run, fidelity)
        if current_meter() is not None:
            from .metering import meter_run

            meter_run(run)
        return outputs


def _values_of(fidelity: int) -> AbstractContextManager[Any]:
    """Where products take their values: in CYCLE_ACCURATE from the PEs, stepped cycle by cycle."""
    if fidelity != 2:
        return contextlib.nullcontext()
    return array_values(current_profile(), "os")


class _Host(Interpreter):
    """Runs what is left of a graph on the host, and counts what crosses between it and the KPU."""

    def __init__(self, gm: GraphModule, run: Run) -> None:
        super().__init__(gm)
        self._partitions = {node for node in gm.graph.nodes if node.op == "call_module"}
        self._run = run

    def run_node(self, n: Node) -> Any:
        if n.op != "call_function" or not is_operator(n):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        begun = time.perf_counter()
        with Counting() as counted:
            out = n.target(*args, **kwargs)  # type: ignore[operator]
        self._run.host_wall += time.perf_counter() - begun
        self._run.host_macs += counted.macs
        inputs, outputs = tensors_of((args, kwargs)), tensors_of(out)
        self._run.host_bytes += sum(map(bytes_of, (*inputs, *outputs)))
        crossing = [node for node in n.all_input_nodes if self._from_partition(node)]
        self._run.boundary_bytes += sum(bytes_of(t) for node in crossing for t in tensors_of(self.env.get(node)))
        if any(self._into_partition(user) for user in n.users):
            self._run.boundary_bytes += sum(map(bytes_of, outputs))
        return out

    def _from_partition(self, node: Node) -> bool:
        while node.target is operator.getitem:
            node = node.args[0]  # type: ignore[assignment]
        return node in self._partitions

    def _into_partition(self, node: Node) -> bool:
        if node.target is operator.getitem:
            return any(self._into_partition(user) for user in node.users)
        return node in self._partitions
