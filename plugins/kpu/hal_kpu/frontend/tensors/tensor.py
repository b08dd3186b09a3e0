"""`Tensor`: data for the KPU's tracing API. Holds a torch tensor of any type, or is a symbol while a function is
traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import attrs
import numpy as np
import torch

from hal_core.plugin_api import ContractError

from ...simulator.opcodes.specs import DTYPE_BYTES

#: The functions behind Tensor's operators, by name. `operators` registers them, since they build Tensors themselves.
_OPERATORS: dict[str, Callable[..., Tensor]] = {}
Operator = TypeVar("Operator", bound=Callable[..., Any])


def operator(function: Operator) -> Operator:
    """Register a function of `operators` by its name, for the methods of `Tensor`."""
    _OPERATORS[function.__name__] = function
    return function


@attrs.frozen
class TensorMeta:
    """What is known of a tensor without its values: shape, type, name, and whether it is a weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str | None = None
    is_weight: bool = False


def as_dtype(dtype: Any) -> torch.dtype:
    """torch's type for torch's, NumPy's, or a name such as "float16".

    Raises:
        ContractError: the KPU has no such type.
    """
    if isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    elif isinstance(dtype, str):
        name = dtype
    else:
        try:
            name = np.dtype(dtype).name
        except TypeError:
            name = repr(dtype)
    if name not in DTYPE_BYTES:
        raise ContractError(f"dtype {name} was given, and one of {', '.join(DTYPE_BYTES)} is wanted.")
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


class Tensor:
    """An operand of the tracing API.

    Args:
        data: a torch tensor, a NumPy array, numbers in lists, or another Tensor. Types are kept: integers and halves
            too. A tuple of whole numbers is a shape, and the tensor symbolic: a compiled function that is called with
            one is timed, and gives symbolic tensors.
        name: for programs and messages.
        dtype: converts, where it is given. Without it floats of Python become float32, its integers int64; a symbolic
            tensor is float32.

    `+ - * / @` work with Tensors of the same type, and the first four with numbers. Types are never mixed without a
    `cast`: an int8 tensor plus 1.5 is refused.
    """

    __slots__ = ("_graph", "_meta", "data", "name")
    data: torch.Tensor | None
    name: str | None
    _graph: object | None
    _meta: TensorMeta
    __array_priority__ = 1000  # NumPy arrays on the left leave the operator to this class

    def __init__(self, data: Any, name: str | None = None, dtype: Any = None) -> None:
        if isinstance(data, tuple) and all(isinstance(size, int) and not isinstance(size, bool) for size in data):
            if any(size < 0 for size in data):
                raise ContractError(f"the shape {data} was given: sizes of 0 or more are wanted.")
            self.data, self.name, self._graph = None, name, None
            self._meta = TensorMeta(data, as_dtype("float32" if dtype is None else dtype), name)
            return
        if isinstance(data, Tensor):
            if data.data is None:
                raise ContractError(
                    "a symbolic tensor has no data to copy: use it as it is inside the traced function."
                )
            data = data.data
        if not isinstance(data, torch.Tensor):
            array = np.asarray(data)
            if dtype is None and array.dtype == np.float64 and not isinstance(data, (np.ndarray, np.generic)):
                dtype = "float32"
            data = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
        wanted = as_dtype(data.dtype if dtype is None else dtype)
        self.data, self.name, self._graph = data.detach().to(wanted), name, None
        self._meta = TensorMeta(tuple(data.shape), wanted, name)

    @classmethod
    def symbolic(cls, meta: TensorMeta, graph: object) -> Tensor:
        """The symbol of a tensor of `graph` while a function is traced."""
        tensor = cls.__new__(cls)
        tensor.data, tensor.name, tensor._graph, tensor._meta = None, meta.name, graph, meta
        return tensor

    @classmethod
    def from_numpy(cls, array: np.ndarray[Any, Any], name: str | None = None) -> Tensor:
        return cls(np.asarray(array), name)

    @classmethod
    def zeros(cls, *shape: Any, dtype: Any = "float32", name: str | None = None) -> Tensor:
        return cls(torch.zeros(_sizes(shape), dtype=as_dtype(dtype)), name)

    @classmethod
    def ones(cls, *shape: Any, dtype: Any = "float32", name: str | None = None) -> Tensor:
        return cls(torch.ones(_sizes(shape), dtype=as_dtype(dtype)), name)

    @classmethod
    def randn(cls, *shape: Any, dtype: Any = "float32", name: str | None = None) -> Tensor:
        """From torch's generator."""
        return cls(torch.randn(_sizes(shape), dtype=as_dtype(dtype)), name)

    @property
    def meta(self) -> TensorMeta:
        return self._meta

    @property
    def shape(self) -> tuple[int, ...]:
        return self._meta.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._meta.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def numel(self) -> int:
        return self.size

    def is_symbolic(self) -> bool:
        """Whether it has no values: made of a shape, or a symbol of a function that is being traced."""
        return self.data is None

    def values(self) -> torch.Tensor:
        """The torch tensor.

        Raises:
            ContractError: it is symbolic.
        """
        if self.data is None:
            raise ContractError(
                f"the values of {self!r} were asked for, and a symbolic tensor has none: while tracing, return it and "
                f"read the result; one made of a shape stands for values in calls of compiled functions only."
            )
        return self.data

    def numpy(self) -> np.ndarray[Any, Any]:
        """A NumPy array.

        Raises:
            ContractError: it is symbolic, or of a type that NumPy does not have.
        """
        try:
            return self.values().numpy()
        except TypeError:
            raise ContractError(f"NumPy has no {_dtype_name(self.dtype)}: cast to 'float32' first.") from None

    def reshape(self, *shape: Any) -> Tensor:
        return _OPERATORS["reshape"](self, _sizes(shape))

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        return _OPERATORS["flatten"](self, start_dim, end_dim)

    def cast(self, dtype: Any) -> Tensor:
        """The same numbers in another type: nearest-even into floats, towards zero into integers."""
        return _OPERATORS["cast"](self, dtype)

    def __add__(self, other: Any) -> Tensor:
        return _binary("add", self, other)

    def __radd__(self, other: Any) -> Tensor:
        return _binary("add", other, self)

    def __sub__(self, other: Any) -> Tensor:
        return _binary("sub", self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return _binary("sub", other, self)

    def __mul__(self, other: Any) -> Tensor:
        return _binary("mul", self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return _binary("mul", other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return _binary("div", self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return _binary("div", other, self)

    def __neg__(self) -> Tensor:
        return _binary("mul", self, -1)

    def __matmul__(self, other: Any) -> Tensor:
        return _OPERATORS["matmul"](self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return _OPERATORS["matmul"](other, self)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without axes has no length")
        return self.shape[0]

    def __bool__(self) -> bool:
        return bool(self.values())

    def __repr__(self) -> str:
        kind = "symbolic " if self.is_symbolic() else ""
        name = f" {self.name!r}" if self.name else ""
        return f"<{kind}Tensor{name} {_dtype_name(self.dtype)}{list(self.shape)}>"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """(2, 3) and 2, 3 alike."""
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else tuple(shape)


def _binary(name: str, left: Any, right: Any) -> Tensor:
    return _OPERATORS["binary"](name, left, right)
