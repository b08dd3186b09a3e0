"""Writes the opcodes of DFX 1.0 in the machine's general ones, which are what runs and what is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch

from ..simulator.opcodes.specs import TensorSpec
from .dfx.forms import axes_of, form_of, order_of, pair, pool_of, window_of
from .dfx.program import DFXProgram
from .dfx.records import VERSION, DFXOp
from .emitter import Emitter, Value
from .tensors.rules import RULES

Attributes: TypeAlias = Mapping[str, Any]
Rule: TypeAlias = Callable[..., Value]


def _copied(e: Emitter, x: Value, attrs: Attributes) -> Value:
    """Through the block mover."""
    return e.one("broadcast", x, shape=x.shape)


def _activation(kind: str) -> Rule:
    return lambda e, x, attrs: activated(e, kind, x, attrs)


def activated(e: Emitter, kind: str, x: Value, attrs: Attributes) -> Value:
    options = {"approximate": attrs["approximate"]} if "approximate" in attrs else {}
    out = RULES[kind](e, x, **options)
    assert isinstance(out, Value)
    return out


def _reduction(name: str) -> Rule:
    def rule(e: Emitter, x: Value, attrs: Attributes) -> Value:
        axes, keep = axes_of(attrs), attrs.get("keepdims", False)
        axes = None if axes is None else tuple(axis % x.ndim for axis in axes)
        out = RULES[name](e, x, axes=axes, keepdims=keep)
        assert isinstance(out, Value)
        return out

    return rule


def _extreme(opcode: str) -> Rule:
    def rule(e: Emitter, x: Value, attrs: Attributes) -> Value:
        axes = axes_of(attrs)
        axes = tuple(range(x.ndim)) if axes is None else tuple(axis % x.ndim for axis in axes)
        return e.one(opcode, x, axes=axes, keepdims=attrs.get("keepdims", False))

    return rule


def _padded(operands: Sequence[Any], number: int) -> list[Any]:
    """Operands with None for those that were left out."""
    return [*operands, *[None] * (number - len(operands))]


def _layer_norm(e: Emitter, x: Value, *rest: Any) -> Value:
    *scales, attrs = rest
    weight, bias = _padded(scales, 2)
    shape = tuple(attrs["normalized_shape"])
    out = RULES["layer_norm"](e, x, weight, bias, shape=shape, eps=attrs.get("eps", 1e-5))
    assert isinstance(out, Value)
    return out


def _batch_norm(e: Emitter, x: Value, *rest: Any) -> Value:
    *given, attrs = rest
    weight, bias, mean, variance = _padded(given, 4)
    if mean is None:
        axes = (0, *range(2, x.ndim))
        mean = e.mean(x, axes)
        apart = x - e.reshape(mean, (1, x.shape[1], *(1,) * (x.ndim - 2)))
        variance = e.mean(apart * apart, axes)
    out = RULES["batch_norm2d"](e, x, mean, variance, weight, bias, eps=attrs.get("eps", 1e-5))
    assert isinstance(out, Value)
    return out


def _conv2d(e: Emitter, x: Value, weight: Value, *rest: Any) -> Value:
    *bias, attrs = rest
    out = RULES["conv2d"](e, x, weight, bias[0] if bias else None, **window_of(attrs))
    assert isinstance(out, Value)
    return out


def _linear(e: Emitter, x: Value, weight: Value, *rest: Any) -> Value:
    *bias, _ = rest
    out = RULES["linear"](e, x, weight, bias[0] if bias else None)
    assert isinstance(out, Value)
    return out


def _pool(name: str) -> Rule:
    def rule(e: Emitter, x: Value, attrs: Attributes) -> Value:
        out = RULES[name](e, x, **pool_of(attrs))
        assert isinstance(out, Value)
        return out

    return rule


def _adaptive(e: Emitter, x: Value, attrs: Attributes) -> Value:
    out = RULES["adaptive_avg_pool2d"](e, x, output_size=pair(attrs["output_size"]))
    assert isinstance(out, Value)
    return out


def _concat(e: Emitter, *rest: Any) -> Value:
    *parts, attrs = rest
    return e.one("concat", *parts, axis=attrs["dim"] % parts[0].ndim)


def _fused(kind: str) -> Rule:
    def rule(e: Emitter, a: Value, b: Value, *rest: Any) -> Value:
        *bias, attrs = rest
        out = e.matmul(a, b)
        return activated(e, kind, out + bias[0] if bias else out, attrs)

    return rule


def _flatten(e: Emitter, x: Value, attrs: Attributes) -> Value:
    return e.reshape(x, tuple(x.tensor.flatten(attrs.get("start_dim", 0), attrs.get("end_dim", -1)).shape))


#: (emitter, *operands, attributes) -> result, of every form of DFX 1.0 that gives one.
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("load", "store", "prefetch", "copy"), _copied),
    **{kind: _activation(kind) for kind in ("relu", "gelu", "silu")},
    **{kind: _reduction(kind) for kind in ("sum", "mean")},
    "max": _extreme("reduce_max"),
    "min": _extreme("reduce_min"),
    "linear": _linear,
    "conv2d": _conv2d,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "maxpool2d": _pool("max_pool2d"),
    "avgpool2d": _pool("avg_pool2d"),
    "adaptive_avgpool2d": _adaptive,
    "transpose": lambda e, x, attrs: e.transpose(x, order_of(x.ndim, attrs)),
    "concat": _concat,
    "flatten": _flatten,
    **{f"fused_matmul_bias_{kind}": _fused(kind) for kind in ("relu", "gelu", "silu")},
    "fused_matmul_relu": _fused("relu"),
}


def written_out(
    rule: Callable[..., Any],
    inputs: Sequence[TensorSpec | None],
    outputs: Sequence[TensorSpec],
    *rest: Any,
    optimize: bool = True,
    **attributes: Any,
) -> tuple[list[DFXOp], dict[str, TensorSpec]]:
    """What a rule emits for operands of these shapes: operations that write `outputs`, and what lies between.

    Args:
        rule: (emitter, *operands, *rest, **attributes) -> one Value, or a tuple. An input of None is given as None.
    """
    emitter = Emitter(optimize=optimize)
    known: dict[str, Value] = {}
    for spec in inputs:
        if spec is not None and spec.name not in known:
            empty = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
            known[spec.name] = emitter.input(empty, f"%{spec.name}")
    with torch.device("meta"), torch.no_grad():
        results = rule(emitter, *(None if s is None else known[s.name] for s in inputs), *rest, **attributes)
        results = results if isinstance(results, tuple) else (results,)
        own = {id(value) for value in known.values()}
        made: list[Value] = []
        for value, spec in zip(results, outputs, strict=True):  # each output is written by an operation of its own
            same = value.shape == spec.shape and id(value) not in own and all(value is not other for other in made)
            made.append(value if same else emitter.one("reshape", value, shape=spec.shape))
    program = emitter.program(made)
    names = {f"%{name}": name for name in known}
    names |= {value.name: spec.name for value, spec in zip(made, outputs, strict=True)}
    for index, name in enumerate(name for name in program.tensors if name not in names):
        names[name] = f"{outputs[0].name}~{index}"
    ops = [
        attrs.evolve(op, inputs=[names[n] for n in op.inputs], outputs=[names[n] for n in op.outputs])
        for op in program.ops
    ]
    written = {name for op in ops for name in op.outputs} - {spec.name for spec in outputs}
    specs = {
        names[old]: attrs.evolve(spec, name=names[old])
        for old, spec in program.tensors.items()
        if names[old] in written
    }
    return ops, specs


class Expanded:
    """A program in general forms.

    Attributes:
        program: of general opcodes alone. origins: of each of its operations, the place of the one it is of.
    """

    def __init__(self, program: DFXProgram) -> None:
        self.program, self.origins = program, list(range(len(program.ops)))
        if not any(form_of(op) for op in program.ops):
            return
        ops: list[DFXOp] = []
        tensors, self.origins = dict(program.tensors), []
        for index, op in enumerate(program.ops):
            if form_of(op) is None:
                made = [op]
            elif not op.outputs:  # a barrier: operations follow each other in any case
                made = []
            else:
                inputs, outputs = program.specs(op.inputs), program.specs(op.outputs)
                made, specs = written_out(_RULES[op.opcode], inputs, outputs, op.attrs)
                tensors |= specs
            ops += made
            self.origins += [index] * len(made)
        self.program = attrs.evolve(program, ops=ops, tensors=tensors, version=VERSION)


def general(program: DFXProgram) -> DFXProgram:
    """The same program in the machine's general opcodes; itself where it is that already."""
    return Expanded(program).program
