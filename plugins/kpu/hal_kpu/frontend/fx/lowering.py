"""From an FX graph of ATen operators to a DFX program, at one set of sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from ...simulator.opcodes.specs import DTYPE_BYTES
from ..dfx.program import DFXProgram
from ..emitter import Emitter, Value
from .lowerings import (  # noqa: F401  each registers its lowerings
    bags,
    chebyshev,
    copies,
    creation,
    elementwise,
    indexing,
    linear_algebra,
    normalization,
    ordering,
    products,
    random,
    reductions,
    shapes,
    special,
    windows,
)
from .registry import LOWERINGS, NotLowered

aten = torch.ops.aten
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_CHECKS = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}


def is_operator(node: Node) -> bool:
    """Whether a node computes tensors. Sizes, checks and the unpacking of tuples are the host's control flow."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if isinstance(node.target, OpOverload):
        name = node.target.overloadpacket.__name__
        return name not in _CHECKS and (not name.startswith("sym_"))
    return not isinstance(node.meta.get("val"), (*_SYMBOLIC, int, float, bool))


def hint(value: Any) -> Any:
    """The number a symbolic size had when the graph was traced.

    Raises:
        NotLowered: it depends on values, and had none.
    """
    if not isinstance(value, _SYMBOLIC):
        return value
    if not value.node.has_hint():
        raise NotLowered("a size depends on values")
    return value.node.hint


def meta_tensor(value: Tensor) -> Tensor:
    """The tensor's sizes, strides and type on torch's meta device, at the sizes the graph was traced with."""
    name = str(value.dtype).removeprefix("torch.")
    if value.device.type not in ("cpu", "meta"):
        raise NotLowered(f"of tensors on {value.device.type}: the KPU takes them from the host's memory")
    if name not in DTYPE_BYTES or value.layout != torch.strided:
        raise NotLowered(f"of {name if value.layout == torch.strided else value.layout} tensors")
    sizes, strides = ([hint(size) for size in some] for some in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")


def why_not(node: Node, seen: dict[Any, str | None]) -> str | None:
    """Why an operator cannot be lowered; None where it can: it is lowered once without values and its results compared.

    `seen` keeps answers for operators of the same arguments.
    """
    if node.target not in LOWERINGS:
        return "no lowering"
    try:
        with unset_fake_temporarily():
            signature = (node.target, map_aggregate((node.args, node.kwargs), _signature))
            key = repr(signature)
            if key not in seen:
                seen[key] = _attempt(node)
            return seen[key]
    except NotLowered as reason:
        return str(reason)


def _signature(argument: Any) -> Any:
    if isinstance(argument, Node):
        value = argument.meta.get("val")
        if isinstance(value, Tensor):
            empty = meta_tensor(value)
            return f"{empty.dtype}{list(empty.shape)}{empty.stride()}"
        return str(hint(value))
    return argument


def _attempt(node: Node) -> str | None:
    emitter = Emitter()

    def operand(argument: Any) -> Any:
        if not isinstance(argument, Node):
            return hint(argument)
        value = argument.meta.get("val")
        return emitter.input(meta_tensor(value)) if isinstance(value, Tensor) else hint(value)

    try:
        args, kwargs = map_aggregate((node.args, node.kwargs), operand)
        with torch.device("meta"):
            given = LOWERINGS[node.target](emitter, *args, **kwargs)
    except NotLowered as reason:
        return str(reason)
    except Exception as error:
        return f"its lowering fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return _difference(given, node.meta["val"])


def _difference(given: Any, wanted: Any) -> str | None:
    """How lowered results differ from the operator's in number, shape or type."""
    if isinstance(wanted, Tensor):
        want = meta_tensor(wanted)
        if not isinstance(given, Value) or given.shape != tuple(want.shape) or given.dtype != want.dtype:
            found = f"{given.dtype}{list(given.shape)}" if isinstance(given, Value) else repr(given)
            return f"its lowering gives {found} for {want.dtype}{list(want.shape)}"
        return None
    if isinstance(wanted, (list, tuple)):
        if len(given) != len(wanted):
            return f"its lowering gives {len(given)} results for {len(wanted)}"
        return next((text for pair in zip(given, wanted, strict=True) if (text := _difference(*pair))), None)
    return None


class Lowered:
    """A graph as a program at one set of sizes.

    Attributes:
        program: what runs. outputs: the graph's outputs in order: a name in the program, or a plain number or None.
    """

    def __init__(self, program: DFXProgram, outputs: list[Any]) -> None:
        self.program, self.outputs = program, outputs


def lower_graph(
    graph: Graph, args: Sequence[Any], constant: Callable[[str], Tensor] | None = None, name: str = "main"
) -> tuple[Lowered, list[Any]]:
    """Lower a graph by running it on its arguments: (the program, the graph's outputs).

    Args:
        graph: of ATen operators that `why_not` lets pass. args: tensors (or meta tensors) and numbers for its
            placeholders. constant: gives the tensor of a get_attr node.

    Raises:
        NotLowered: an operator has no lowering for these arguments.
    """
    emitter = Emitter(name)
    given = iter(args)
    env: dict[Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            value = next(given)
            env[node] = emitter.input(value, _name_of(node)) if isinstance(value, Tensor) else value
        elif node.op == "get_attr":
            assert constant is not None, "a graph with constants wants a way to read them"
            env[node] = emitter.input(constant(str(node.target)), _name_of(node), is_const=True)
        elif node.op == "call_function":
            env[node] = _call(emitter, node, env)
        elif node.op == "output":
            results = [env[item] if isinstance(item, Node) else item for item in node.args[0]]
    values = [item for item in results if isinstance(item, Value)]
    outputs = [item.name if isinstance(item, Value) else item for item in results]
    return Lowered(emitter.program(values), outputs), [
        item.tensor if isinstance(item, Value) else item for item in results
    ]


def _name_of(node: Node) -> str:
    return f"%{node.name}"  # no name of an emitter's own starts so


def _call(emitter: Emitter, node: Node, env: dict[Node, Any]) -> Any:
    args, kwargs = map_aggregate((node.args, node.kwargs), lambda item: env[item] if isinstance(item, Node) else item)
    if is_operator(node):
        if node.target not in LOWERINGS:
            raise NotLowered(f"{node.target} has no lowering")
        return LOWERINGS[node.target](emitter, *args, **kwargs)
    if not isinstance(node.target, OpOverload):
        assert callable(node.target)
        return node.target(*args, **kwargs)  # Python's arithmetic on sizes, or unpacking a tuple
    if node.target.overloadpacket.__name__.startswith("sym_"):
        return node.target(*(item.tensor if isinstance(item, Value) else item for item in args), **kwargs)
    if node.target is aten._assert_scalar.default:
        return node.target(*args, **kwargs)
    return None  # a check that tracing has made


class FXToKPUConverter:
    """`FXToKPUConverter(gm, example_inputs).convert()` gives the DFX program of a graph of ATen operators.

    Args:
        gm: as torch.export's or make_fx's. example_inputs: tensors, real or on the meta device, and numbers.
        fidelity: kept for callers that choose it here; the program is the same in all three.

    Raises (convert):
        UnsupportedError: an operator has no lowering; names all of them.
    """

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any], fidelity: int | None = None) -> None:
        self.gm, self.example_inputs, self.fidelity = gm, tuple(example_inputs), fidelity

    def convert(self) -> DFXProgram:
        from hal_core.plugin_api import UnsupportedError

        missing = sorted({str(n.target) for n in self.gm.graph.nodes if is_operator(n) and n.target not in LOWERINGS})
        if missing:
            raise UnsupportedError(
                f"the graph has operators that do not lower to the KPU: {', '.join(missing)}; decompose them by "
                f"hal_kpu.decompositions(), or run the graph by backend='kpu', which leaves them to the host."
            )
        with torch.no_grad():
            lowered, _ = lower_graph(self.gm.graph, self.example_inputs, lambda name: _attribute(self.gm, name))
        return lowered.program


def _attribute(module: Any, path: str) -> Tensor:
    for name in path.split("."):
        module = getattr(module, name)
    assert isinstance(module, Tensor)
    return module
