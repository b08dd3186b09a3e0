"""Fresh inputs for the kernels that the core specifies."""

from typing import Any

import torch


def _normal(generator: Any, *shapes: tuple[int, ...]) -> tuple[Any, ...]:
    """One float32 tensor for each shape, standard normal."""
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes)


def matmul(generator: Any) -> tuple[Any, ...]:
    return _normal(generator, (70, 150), (150, 40))


def linear(generator: Any) -> tuple[Any, ...]:
    return _normal(generator, (3, 17, 150), (40, 150), (40,))
