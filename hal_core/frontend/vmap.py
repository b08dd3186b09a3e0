"""hal's operators inside torch.func's transforms: vmap's dimension becomes part of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import ContractError


def is_mapped() -> bool:
    """Whether the caller is inside vmap and wants no more than first derivatives, which the operators have."""
    kinds = [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()]
    transforms = torch._C._functorch.TransformType
    return transforms.Vmap in kinds and transforms.Jvp not in kinds and kinds.count(transforms.Grad) < 2


def gradient_bits(tensors: Iterable[Tensor | None]) -> int:
    """As `operands.gradient_bits`, for any level of the transforms around the caller."""
    return sum(1 << place for place, t in enumerate(tensors) if t is not None and _is_differentiated(t))


def _is_differentiated(tensor: Tensor) -> bool:
    inner = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return tensor.requires_grad or (inner and _is_differentiated(torch._C._functorch.get_unwrapped(tensor)))


def rule(operator: Callable[..., tuple[Tensor, ...]], first: int, seed: int) -> Callable[..., Any]:
    """What vmap does with an operator: one call with a larger batch.

    Args:
        first: where the query is among its arguments; a backward's gradients and results come before it.
        seed: where the seed is, the last tensor.
    """

    def mapped(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        size, mask_at = info.batch_size, first + 3
        if any(t is not None for t in arguments[first + 4 : seed]):
            raise ContractError("packed, paged, scaled or block-sparse attention was mapped by vmap: loop over it")
        if arguments[seed] is not None:  # each example draws from its own seed, or all from the same
            each = [
                operator(*(t if d is None else t.select(d, i) for t, d in zip(arguments, dims, strict=True)))
                for i in range(size)
            ]
            found = tuple(map(torch.stack, zip(*each, strict=True)))
            return found, (0,) * len(found)
        wide: list[Any] = [
            t if t is None else t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
            for t, d in zip(arguments[: mask_at + 1], dims, strict=False)
        ]
        batch, mask = wide[first].shape[1], wide[mask_at]
        if mask is not None:
            wide[mask_at] = mask.expand(-1, batch, -1, -1, -1)
        # What is not asked for is empty, of one dimension.
        flat = [t if t is None else t.flatten(0, 1) if t.dim() > 2 else t[0] for t in wide]
        found = operator(*flat, *arguments[mask_at + 1 :])
        results = [t.expand(size, -1) if t.dim() == 1 else t.unflatten(0, (size, batch)) for t in found]
        if first and mask is not None and results[3].dim() > 2:  # a backward's mask broadcast over the batch
            results[3] = results[3].sum_to_size(mask.shape)
        return tuple(results), (0,) * len(results)

    return mapped
