"""`compile` (also `jit`): a function of Tensors as a DFX program that a KPU runs."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, overload

import numpy as np
import torch

from hal_core.plugin_api import ContractError

from ..runtime.executor import Executor
from .dfx.program import DFXProgram
from .emission import DFXEmitter
from .tensors.graph import OpGraph, tracing
from .tensors.tensor import Tensor, TensorMeta


class _Specialized:
    """A function at one set of shapes and types: its graph, its program, and how its results are arranged."""

    def __init__(self, graph: OpGraph, program: DFXProgram, arrange: Callable[[list[Tensor]], Any]) -> None:
        self.graph, self.program, self.arrange = graph, program, arrange
        self.executor = Executor(program)

    def inputs(self, given: list[Tensor]) -> list[torch.Tensor]:
        return [tensor.values() for tensor in (*given, *self.graph.constants.values())]


class CompiledFunction:
    """A function that runs on the KPU. Traced once for each set of shapes and types it is called with.

    Tensors that it closes over are weights: read at each run, from the Tensor object that was there when it was traced.
    Other arguments, such as numbers, are constants of the trace: another value is traced separately.

    Attributes:
        graph, dfx: of the last call; None before the first.
        stats: `ExecutionStats` of the last call; in BEHAVIORAL, which computes values alone, counts without cycles.
    """

    def __init__(self, function: Callable[..., Any], fidelity: int | None = 0, optimize: bool = True) -> None:
        functools.update_wrapper(self, function)
        self._function, self.fidelity, self.optimize = function, fidelity, optimize
        self._signature = inspect.signature(function)
        self._cache: dict[Any, _Specialized] = {}
        self._last: _Specialized | None = None
        self._stats: Any = None

    @property
    def graph(self) -> OpGraph | None:
        return self._last.graph if self._last else None

    @property
    def dfx(self) -> DFXProgram | None:
        return self._last.program if self._last else None

    @property
    def stats(self) -> Any:
        if self._stats is None and self._last is not None:
            from ..runtime.timing import time_program

            self._stats = time_program(self._last.program, 0)
        return self._stats

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """As a method its first argument is the object, which counts as a plain value."""
        return self if instance is None else types.MethodType(self, instance)

    def get_graph(self) -> OpGraph | None:
        return self.graph

    def get_dfx(self) -> DFXProgram | None:
        return self.dfx

    def get_stats(self) -> Any:
        return self.stats

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result, computed by the program. Timed too where the fidelity is TRANSACTIONAL or
        CYCLE_ACCURATE. Of symbolic tensors the results are symbolic: the program is timed and computes nothing.
        """
        fidelity = self._fidelity_now()
        special, given = self._specialize(args, kwargs)
        if any(tensor.is_symbolic() for tensor in given):
            return self._symbolic(special, fidelity)
        if fidelity == 0:
            results = special.executor.run(special.inputs(given))
            self._stats = None
        else:
            results = self._timed(special, given, fidelity)
        return special.arrange([Tensor(result) for result in results])

    def execute_with_stats(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """(result, `ExecutionStats`), at the function's fidelity."""
        special, given = self._specialize(args, kwargs)
        if any(tensor.is_symbolic() for tensor in given):
            return self._symbolic(special, self._fidelity_now()), self.stats
        results = self._timed(special, given, self._fidelity_now())
        return special.arrange([Tensor(result) for result in results]), self.stats

    def _symbolic(self, special: _Specialized, fidelity: int) -> Any:
        from ..runtime.timing import time_program

        self._stats = time_program(special.program, fidelity, fuse=self.optimize)
        specs = special.program.specs(special.program.outputs)
        return special.arrange([Tensor(spec.shape, dtype=spec.dtype) for spec in specs])

    def _fidelity_now(self) -> int:
        if self.fidelity is not None:
            return self.fidelity
        from ..runtime.settings import get_fidelity

        return int(get_fidelity())

    def _timed(self, special: _Specialized, given: list[Tensor], fidelity: int) -> list[torch.Tensor]:
        from ..runtime.runtime import KPURuntime

        inputs = dict(zip(special.program.inputs, special.inputs(given), strict=True))
        results, self._stats = KPURuntime(fidelity, fuse=self.optimize).execute(special.program, inputs)
        return list(results) if isinstance(results, (tuple, list)) else [results]

    def _specialize(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Specialized, list[Tensor]]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given: list[Tensor] = []

        def take(value: Any) -> Any:
            """Tensors and arrays become operands; lists and tuples are looked into; the rest is fixed."""
            if isinstance(value, (torch.Tensor, np.ndarray)):
                value = Tensor(value)
            if isinstance(value, Tensor):
                given.append(value)
                return value.meta
            if isinstance(value, (list, tuple)):
                return tuple(take(item) for item in value)
            return value

        taken = {name: take(value) for name, value in bound.arguments.items()}
        try:
            key = tuple(sorted(taken.items()))
            special = self._cache.get(key)
        except TypeError:
            unhashable = next(name for name, value in taken.items() if not _is_hashable(value))
            raise ContractError(
                f"argument {unhashable!r} of {self._function.__name__} is a {type(taken[unhashable]).__name__}, "
                f"and tensors, lists of them, or plain values are wanted."
            ) from None
        if special is None:
            special = self._cache[key] = self._trace(bound)
        self._last = special
        return special, given

    def _trace(self, bound: inspect.BoundArguments) -> _Specialized:
        graph = OpGraph(self._function.__name__)

        def symbol(value: Any, name: str) -> Any:
            if isinstance(value, (torch.Tensor, np.ndarray)):
                value = Tensor(value)
            if isinstance(value, Tensor):
                return graph.add_input(TensorMeta(value.shape, value.dtype, value.name or name))
            if isinstance(value, (list, tuple)):
                return type(value)(symbol(item, f"{name}{index}") for index, item in enumerate(value))
            return value

        for name, value in bound.arguments.items():
            bound.arguments[name] = symbol(value, name)
        with tracing(graph):
            results = self._function(*bound.args, **bound.kwargs)
            arrange = self._arrange(graph, results)
        if self.optimize:
            from .fusing import FusionCompiler

            graph = FusionCompiler().optimize(graph)
        return _Specialized(graph, DFXEmitter(self.optimize).emit(graph), arrange)

    def _arrange(self, graph: OpGraph, results: Any) -> Callable[[list[Tensor]], Any]:
        """Note the results as outputs of the graph; what comes back rebuilds a tuple, list, dict or lone Tensor."""
        if isinstance(results, Tensor):
            graph.outputs.append(graph.name_of(results))
            return lambda tensors: tensors[0]
        items = list(results.values()) if isinstance(results, dict) else results
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, Tensor) for item in items):
            raise ContractError(
                f"{self._function.__name__} returned {type(results).__name__}, and a Tensor, or a tuple, list or dict "
                f"of them, is wanted."
            )
        graph.outputs.extend(graph.name_of(item) for item in items)
        if isinstance(results, dict):
            names = list(results)
            return lambda tensors: dict(zip(names, tensors, strict=True))
        return type(results)

    def summary(self) -> str:
        """The graph and the program of the last call, one line per operation."""
        if self._last is None:
            return f"{self._function.__name__}: not traced yet; call it once"
        return f"{self._last.graph.summary()}\n{self._last.program.summary()}"


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@overload
def compile(func: Callable[..., Any], *, fidelity: int | None = 0, optimize: bool = True) -> CompiledFunction: ...
@overload
def compile(
    func: None = None, *, fidelity: int | None = 0, optimize: bool = True
) -> Callable[[Callable[..., Any]], CompiledFunction]: ...
def compile(func: Callable[..., Any] | None = None, *, fidelity: int | None = 0, optimize: bool = True) -> Any:
    """Compile a function of Tensors; as a decorator with or without arguments.

    Args:
        fidelity: BEHAVIORAL (0), TRANSACTIONAL (1), CYCLE_ACCURATE (2); None: what `set_fidelity` says at each call.
        optimize: join products with their bias and activation (`FusionCompiler`), fold transpositions into the products
            that read them, remove operations whose results are unused, and run elementwise chains with the product
            before them (`ExecutionStats.fused` names them).
    """
    from ..simulator.fidelity import check_fidelity

    if fidelity is not None:
        check_fidelity(fidelity)
    if func is None:
        return lambda function: CompiledFunction(function, fidelity, optimize)
    return CompiledFunction(func, fidelity, optimize)


jit = compile
