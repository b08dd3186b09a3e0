"""The operators of the tracing API. On tensors with values they compute at once; inside a traced function they are
recorded.

Types are kept: an operator of int8 gives int8, of float16 float16, and its sums are kept in that type too. Functions
that need fractions (exp, softmax, mean, ...) refuse integers, and two tensors of different types are refused:
`Tensor.cast` is the way. Layouts are torch's: images [batch, channels, height, width], linear weights [out, in].
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from hal_core.plugin_api import ContractError

from ..emitter import Emitter, Value
from .graph import current_graph
from .rules import RULES
from .tensor import Tensor, as_dtype, operator

Pair: TypeAlias = int | tuple[int, int]


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else Tensor(value)


def _described(operands: Sequence[Tensor | None]) -> str:
    return ", ".join(f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}" for one in operands if one is not None)


def apply(op: str, *operands: Tensor | None, **settings: Any) -> tuple[Tensor, ...]:
    """Compute, or record while tracing. `operands` of None are left out.

    Raises:
        ContractError: shapes or types that the operator does not take.
    """
    given = [one for one in operands if one is not None]
    floats = {one.dtype for one in given if one.dtype != torch.bool}
    if len(floats) > 1:
        raise ContractError(
            f"{op} of {_described(operands)}: types are not mixed silently; cast one with .cast(dtype)."
        )
    symbolic = any(one.is_symbolic() for one in given)
    graph = current_graph()
    if symbolic and graph is None:
        raise ContractError(
            f"{op} of {_described(operands)}: a symbolic tensor was used after its function was traced."
        )
    try:
        if graph is not None and symbolic:
            return graph.add_node(op, operands, settings)
        emitter = Emitter()
        with torch.no_grad():
            values = [None if one is None else emitter.input(one.values()) for one in operands]
            results = RULES[op](emitter, *values, **settings)
        return tuple(Tensor(one.tensor) for one in ((results,) if isinstance(results, Value) else results))
    except (RuntimeError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ContractError(f"{op} cannot take {_described(operands)}: {reason}.") from None


def _one(op: str, *operands: Tensor | None, **settings: Any) -> Tensor:
    return apply(op, *operands, **settings)[0]


def _fractions(op: str, x: Any) -> Tensor:
    """The operand of a function that needs a floating type."""
    tensor = _tensor(x)
    if not tensor.dtype.is_floating_point:
        raise ContractError(
            f"{op} wants a floating type, and {_described([tensor])} was given: cast it with .cast('float32')."
        )
    return tensor


@operator
def binary(op: str, left: Any, right: Any) -> Tensor:
    """+ - * / of two tensors, or of a tensor and a number that its type can hold."""
    numbers = [value for value in (left, right) if isinstance(value, (bool, int, float))]
    if not numbers:
        return _one(op, _division(op, _tensor(left)), _tensor(right))
    tensor = _division(op, left if isinstance(left, Tensor) else right)
    if isinstance(numbers[0], float) and not tensor.dtype.is_floating_point:
        raise ContractError(
            f"{op} of {_described([tensor])} and {numbers[0]}: the type holds no fractions; cast the tensor."
        )
    return _one(op, tensor, number=numbers[0], number_first=tensor is right)


def _division(op: str, tensor: Tensor) -> Tensor:
    return _fractions("division", tensor) if op == "div" else tensor


@operator
def cast(x: Any, dtype: Any) -> Tensor:
    """The same numbers in another type."""
    return _one("cast", _tensor(x), dtype=str(as_dtype(dtype)).removeprefix("torch."))


def relu(x: Any) -> Tensor:
    """max(x, 0)."""
    return _one("relu", _tensor(x))


def gelu(x: Any, approximate: str = "none") -> Tensor:
    """x Phi(x), by the error function, or by "tanh"."""
    if approximate not in ("none", "tanh"):
        raise ContractError(f"gelu's approximate is {approximate!r}, and 'none' or 'tanh' is wanted.")
    return _one("gelu", _fractions("gelu", x), approximate=approximate)


def silu(x: Any) -> Tensor:
    """x sigmoid(x)."""
    return _one("silu", _fractions("silu", x))


def sigmoid(x: Any) -> Tensor:
    return _one("sigmoid", _fractions("sigmoid", x))


def tanh(x: Any) -> Tensor:
    return _one("tanh", _fractions("tanh", x))


def exp(x: Any) -> Tensor:
    return _one("exp", _fractions("exp", x))


def log(x: Any) -> Tensor:
    """Natural."""
    return _one("log", _fractions("log", x))


def sqrt(x: Any) -> Tensor:
    return _one("sqrt", _fractions("sqrt", x))


def _axis(op: str, x: Tensor, axis: int) -> int:
    if not -x.ndim <= axis < x.ndim:
        raise ContractError(
            f"{op}'s axis is {axis}, and {_described([x])} has {x.ndim} axes: use {-x.ndim} to {x.ndim - 1}."
        )
    return axis % x.ndim


def _axes(op: str, x: Tensor, axis: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if axis is None:
        return None
    return tuple(_axis(op, x, one) for one in ([axis] if isinstance(axis, int) else axis))


def softmax(x: Any, axis: int = -1) -> Tensor:
    tensor = _fractions("softmax", x)
    return _one("softmax", tensor, axis=_axis("softmax", tensor, axis))


def sum(x: Any, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """Over all axes the result has shape (1,)."""
    tensor = _tensor(x)
    return _one("sum", tensor, axes=_axes("sum", tensor, axis), keepdims=keepdims)


def mean(x: Any, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
    """Over all axes the result has shape (1,)."""
    tensor = _fractions("mean", x)
    return _one("mean", tensor, axes=_axes("mean", tensor, axis), keepdims=keepdims)


@operator
def reshape(x: Any, shape: Sequence[int]) -> Tensor:
    """One size may be -1."""
    tensor, sizes = _tensor(x), list(shape)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known and tensor.size % known == 0:
        sizes[sizes.index(-1)] = tensor.size // known
    if -1 in sizes or math.prod(sizes) != tensor.size:
        raise ContractError(
            f"reshape of {_described([tensor])} to {list(shape)}: {tensor.size} elements are wanted there."
        )
    return _one("reshape", tensor, shape=tuple(sizes))


@operator
def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    """Axes start_dim to end_dim as one."""
    tensor = _tensor(x)
    if not tensor.shape:
        return reshape(tensor, (1,))
    first, last = _axis("flatten", tensor, start_dim), _axis("flatten", tensor, end_dim)
    joined = math.prod(tensor.shape[first : last + 1])
    return reshape(tensor, (*tensor.shape[:first], joined, *tensor.shape[last + 1 :]))


def transpose(x: Any, axes: Sequence[int] | None = None) -> Tensor:
    """Axis i of the result is axis axes[i] of x; all in reverse where none are given."""
    tensor = _tensor(x)
    order = (
        tuple(reversed(range(tensor.ndim))) if axes is None else tuple(_axis("transpose", tensor, one) for one in axes)
    )
    if sorted(order) != list(range(tensor.ndim)):
        raise ContractError(
            f"transpose of {_described([tensor])} by {axes}: each of its {tensor.ndim} axes is wanted once."
        )
    return _one("transpose", tensor, axes=order)


def concat(tensors: Sequence[Any], axis: int | None = None, dim: int | None = None) -> Tensor:
    """Tensors one after the other along an axis (0 where none is given), which may be called `dim` too."""
    parts = [_tensor(part) for part in tensors]
    if not parts:
        raise ContractError("concat of no tensors: one or more is wanted.")
    if axis is not None and dim is not None:
        raise ContractError(f"concat of axis {axis} and dim {dim}: they are two names of one thing, pass one.")
    axis = axis or dim or 0
    return _one("concat", *parts, axis=_axis("concat", parts[0], axis))


@operator
def matmul(a: Any, b: Any) -> Tensor:
    """NumPy's matmul, [..., M, K] @ [..., K, N]."""
    left, right = _tensor(a), _tensor(b)
    if not left.ndim or not right.ndim:
        raise ContractError(f"matmul of {_described([left, right])}: one axis or more each is wanted.")
    inner = right.shape[-2] if right.ndim > 1 else right.shape[0]
    if left.shape[-1] != inner:
        raise ContractError(
            f"matmul of {_described([left, right])}: inner sizes {left.shape[-1]} and {inner} must agree."
        )
    return _one("matmul", left, right)


def linear(x: Any, weight: Any, bias: Any = None) -> Tensor:
    """x[..., in] weight[out, in]^T + bias[out]."""
    return _one("linear", _tensor(x), _tensor(weight), None if bias is None else _tensor(bias))


def layer_norm(
    x: Any, normalized_shape: int | Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """Over the last axes, of `normalized_shape`; weight and bias have that shape."""
    tensor = _fractions("layer_norm", x)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if tensor.shape[tensor.ndim - len(shape) :] != shape:
        raise ContractError(f"layer_norm of {_described([tensor])} over {list(shape)}: its last sizes must be those.")
    scale, shift = (None if one is None else _tensor(one) for one in (weight, bias))
    return _one("layer_norm", tensor, scale, shift, shape=shape, eps=eps)


def batch_norm2d(
    x: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """Of each channel, by the statistics given: inference."""
    others = [None if one is None else _tensor(one) for one in (running_mean, running_var, weight, bias)]
    return _one("batch_norm2d", _fractions("batch_norm2d", x), *others, eps=eps)


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def conv2d(
    x: Any, weight: Any, bias: Any = None, stride: Pair = 1, padding: Pair = 0, dilation: Pair = 1, groups: int = 1
) -> Tensor:
    """x[n, c_in, h, w], weight[c_out, c_in / groups, kh, kw], bias[c_out]."""
    operands = (_tensor(x), _tensor(weight), None if bias is None else _tensor(bias))
    window = {"stride": _pair(stride), "padding": _pair(padding), "dilation": _pair(dilation), "groups": groups}
    return _one("conv2d", *operands, **window)


def _window(kernel_size: Pair, stride: Pair | None, padding: Pair) -> dict[str, tuple[int, int]]:
    kernel = _pair(kernel_size)
    return {"kernel": kernel, "stride": kernel if stride is None else _pair(stride), "padding": _pair(padding)}


def max_pool2d(x: Any, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    return _one("max_pool2d", _tensor(x), **_window(kernel_size, stride, padding))


def avg_pool2d(x: Any, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """Padding counts as zeros."""
    return _one("avg_pool2d", _fractions("avg_pool2d", x), **_window(kernel_size, stride, padding))


def adaptive_avg_pool2d(x: Any, output_size: Pair) -> Tensor:
    """Means over output_size windows of nearly equal size."""
    return _one("adaptive_avg_pool2d", _fractions("adaptive_avg_pool2d", x), output_size=_pair(output_size))


def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """[..., length, dim] each. A boolean mask keeps what is true, another is added. scale: 1/sqrt(dim) where None."""
    q, k, v = (_fractions("scaled_dot_product_attention", one) for one in (query, key, value))
    mask = None if attn_mask is None else _tensor(attn_mask)
    return _one("scaled_dot_product_attention", q, k, v, mask, is_causal=is_causal, scale=scale)


def multi_head_attention(
    query: Any,
    key: Any,
    value: Any,
    num_heads: int,
    in_proj_weight: Any,
    out_proj_weight: Any,
    in_proj_bias: Any = None,
    out_proj_bias: Any = None,
    attn_mask: Any = None,
    is_causal: bool = False,
) -> Tensor:
    """query, key, value [batch, length, width]; weights as torch.nn.MultiheadAttention's: [3 width, width], [width,
    width].
    """
    operands = [
        None if one is None else _tensor(one)
        for one in (query, key, value, in_proj_weight, out_proj_weight, in_proj_bias, out_proj_bias, attn_mask)
    ]
    width = _tensor(query).shape[-1]
    if builtins.any(one is None for one in operands[:5]) or num_heads < 1 or width % num_heads:
        raise ContractError(
            f"multi_head_attention of width {width} with {num_heads} heads: a divisor of the width is wanted."
        )
    return _one("multi_head_attention", *operands, heads=num_heads, is_causal=is_causal)
