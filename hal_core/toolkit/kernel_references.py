"""What `matmul` and `linear` compute, in the precision of their inputs (float64 for a reference), and fresh inputs for
them.
"""

from functools import partial

import torch
from torch import Generator, Tensor

_normal = partial(torch.randn, dtype=torch.float32)  # whatever torch's default dtype is


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [..., M, K] @ b [..., K, N]."""
    return a @ b


def sample_matmul(generator: Generator) -> tuple[Tensor, Tensor]:
    return _normal(70, 150, generator=generator), _normal(150, 40, generator=generator)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight [N, K]^T + bias [N]."""
    return torch.nn.functional.linear(x, weight, bias)


def sample_linear(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = _normal(3, 17, 150, generator=generator), _normal(40, 150, generator=generator)
    return x, weight, _normal(40, generator=generator)
