"""Multiply-accumulates of torch operators, and a count of everything that runs operator by operator."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Products of groups: rows of a 2-D operand go to one group each, its inner axis is cut where both are 2-D."""
    if a.dim() == 2 and b.dim() == 3:
        return a.shape[0] * a.shape[1] * b.shape[2]
    if a.dim() == 3 and b.dim() == 2:
        return a.shape[1] * a.shape[2] * b.shape[1]
    return math.prod(a.shape) * b.shape[-1]


def _layer(x: Tensor, w_input: Tensor, w_hidden: Tensor, *_: Any, **__: Any) -> int:
    """One direction of a recurrent layer: every position through both weights."""
    return math.prod(x.shape[:-1]) * (w_input.numel() + w_hidden.numel())


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape)) // 2


def _attention_gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)) // 2


#: Formulas beside those that torch.utils.flop_counter knows, which counts nothing for these.
FORMULAS: dict[Any, Callable[..., int]] = {
    aten._int_mm: lambda a, b, *_, **__: a.shape[0] * a.shape[1] * b.shape[1],
    aten._grouped_mm: _grouped,
    aten._addmm_activation: lambda start, a, b, **_: a.shape[0] * a.shape[1] * b.shape[1],
    aten.mv: lambda a, x: a.numel(),
    aten.addmv: lambda start, a, x, **_: a.numel(),
    aten.dot: lambda a, b: a.numel(),
    aten.vdot: lambda a, b: a.numel(),
    aten.addbmm: lambda start, a, b, **_: math.prod(a.shape) * b.shape[2],
    aten.mkldnn_rnn_layer: _layer,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_gradients,
}


def macs_of(operator: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int | None:
    """Multiply-accumulates of a call; None where no formula is known for the operator."""
    packet = getattr(operator, "overloadpacket", operator)
    if packet in FORMULAS:
        return int(FORMULAS[packet](*args, **kwargs))
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out)) // 2
    return None


#: Operators of torch that are whole layers inside.
_WHOLE_LAYERS = frozenset({aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default})


class Work:
    """What an operator did, all its calls together. seconds: of this machine's clock."""

    def __init__(self) -> None:
        self.calls = self.macs = self.bytes = 0
        self.seconds = 0.0

    def add(self, macs: int, size: int, seconds: float) -> None:
        self.calls, self.macs, self.bytes = self.calls + 1, self.macs + macs, self.bytes + size
        self.seconds += seconds


class Counting(TorchDispatchMode):
    """Counts every operator that runs in its thread, inside of custom operators too.

    Attributes:
        work: operator's name -> `Work`. Views and what moves no byte are left out.

    Args:
        paused: says that what runs now is counted elsewhere.
    """

    def __init__(self, paused: Callable[[], bool] = lambda: False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: dict[str, Work] = {}
        self._paused = paused

    @classmethod
    def is_infra_mode(cls) -> bool:
        """torch.compile goes on compiling under it."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What torch.compile does to its own ends is no work of the model's."""
        return True

    @property
    def macs(self) -> int:
        return sum(work.macs for work in self.work.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_of((args, kwargs))
        traced = TracingContext.try_get() is not None or any(isinstance(tensor, FakeTensor) for tensor in given)
        if traced or self._paused():
            return func(*args, **kwargs)
        packet = getattr(func, "overloadpacket", func)
        if packet not in FORMULAS and packet not in flop_registry:
            inner = self._inside(func, args, kwargs)
            if inner is not NotImplemented:
                return inner
        begun = time.perf_counter()
        out = func(*args, **kwargs)
        seconds = time.perf_counter() - begun
        if not _is_free(func):
            size = sum(map(bytes_of, (*given, *tensors_of(out))))
            self.work.setdefault(str(func), Work()).add(macs_of(func, args, kwargs, out) or 0, size, seconds)
        return out

    def _inside(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of an operator that is made of others, which are counted; NotImplemented where it is not."""
        if not isinstance(func, torch._ops.OpOverload):
            return NotImplemented
        if func.namespace in ("aten", "prim", "prims") and func not in _WHOLE_LAYERS:
            with self:
                return func.decompose(*args, **kwargs)
        keys = [torch._C.DispatchKey.CPU, torch._C.DispatchKey.CompositeExplicitAutograd]
        if not any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key) for key in keys):
            return NotImplemented
        with self:  # past the mode, to the kernel, whose operators meet the mode again
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)


def _is_free(func: Any) -> bool:
    """Whether an operator only gives its input another shape, or reads a size."""
    return bool(getattr(func, "is_view", False)) or func in (aten.detach.default, aten._unsafe_view.default)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; of a sparse one, of those that are there and of their places."""
    if tensor.layout == torch.strided:
        return tensor.nbytes
    if tensor.layout == torch.sparse_coo:
        return tensor._values().nbytes + tensor._indices().nbytes
    return tensor.numel() * tensor.itemsize


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for item in value for tensor in tensors_of(item)] if isinstance(value, (list, tuple)) else []
