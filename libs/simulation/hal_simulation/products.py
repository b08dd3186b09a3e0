"""The operands of `matmul` and `linear`: their shapes are checked, and give the size of the product."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from hal_core.plugin_api import ContractError

if TYPE_CHECKING:
    from torch import Tensor


class ProductSize(NamedTuple):
    """`batch` products [rows, length] @ [length, outputs], with operands and results of a dtype ("float32", ...)."""

    batch: int
    rows: int
    outputs: int
    length: int
    dtype: str

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.batch * self.rows * self.outputs * self.length

    @property
    def results(self) -> int:
        """Elements of the result."""
        return self.batch * self.rows * self.outputs


def matmul_size(a: Tensor, b: Tensor) -> ProductSize:
    """Of matmul(a [..., M, K], b [..., K, N]) -> [..., M, N]; leading dimensions broadcast.

    Raises:
        ContractError: an operand is no tensor, or the shapes do not fit.
    """
    _check_tensors(a=a, b=b)
    given = f"a {list(a.shape)} and b {list(b.shape)} were given"
    if a.dim() < 2 or b.dim() < 2 or a.shape[-1] != b.shape[-2]:
        raise ContractError(f"{given}: pass [..., M, K] and [..., K, N] with one K")
    import torch

    try:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]).numel()
    except RuntimeError:
        raise ContractError(f"{given}: pass leading dimensions that broadcast") from None
    return ProductSize(batch, a.shape[-2], b.shape[-1], a.shape[-1], _name(a))


def linear_size(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> ProductSize:
    """Of linear(x [..., K], weight [N, K], bias [N] or None) -> [..., N].

    Raises:
        ContractError: an operand is no tensor, or the shapes do not fit.
    """
    _check_tensors(x=x, weight=weight)
    if bias is not None:
        _check_tensors(" or None", bias=bias)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ContractError(f"x {list(x.shape)} and weight {list(weight.shape)} were given: pass [..., K] and [N, K]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ContractError(f"bias {list(bias.shape)} and weight {list(weight.shape)} were given: pass [N] and [N, K]")
    rows = x.shape[:-1].numel()
    return ProductSize(1, rows, weight.shape[0], x.shape[-1], _name(x))


def _check_tensors(alternative: str = "", **operands: Tensor) -> None:
    import torch

    for name, tensor in operands.items():
        if not isinstance(tensor, torch.Tensor):
            given = f"{name} of type {type(tensor).__name__} was given"
            raise ContractError(f"{given}: pass a tensor{alternative}")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
