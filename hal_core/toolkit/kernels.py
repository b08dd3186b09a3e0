"""Kernels beside attention that several devices offer: their specifications, and fresh inputs for them. A plugin
specifies its own kernels only.
"""

from typing import Any

from ..hooks import KernelSpec


def _normal(generator: Any, *shapes: tuple[int, ...]) -> tuple[Any, ...]:
    """One float32 tensor for each shape, standard normal."""
    import torch  # the specifications are read without it

    return tuple(torch.randn(shape, generator=generator, dtype=torch.float32) for shape in shapes)


def sample_matmul(generator: Any) -> tuple[Any, ...]:
    return _normal(generator, (70, 150), (150, 40))


def sample_linear(generator: Any) -> tuple[Any, ...]:
    return _normal(generator, (3, 17, 150), (40, 150), (40,))


KERNELS = (
    KernelSpec(
        name="matmul",
        signature="matmul(a[..., M, K], b[..., K, N]) -> [..., M, N]",
        reference="torch:matmul",
        sampler=f"{__name__}:sample_matmul",
        tolerance={"float32": 2e-6},
    ),
    KernelSpec(
        name="linear",
        signature="linear(x[..., K], weight[N, K], bias[N] or None) -> [..., N]",
        reference="torch.nn.functional:linear",
        sampler=f"{__name__}:sample_linear",
        tolerance={"float32": 2e-6},
    ),
)
