"""Specifications of kernels beside attention that several devices offer. A plugin specifies its own kernels only."""

from ..hooks import KernelSpec

KERNELS = (
    KernelSpec(
        name="matmul",
        signature="matmul(a[..., M, K], b[..., K, N]) -> [..., M, N]",
        reference="torch:matmul",
        sampler="hal_core.testing.samplers:matmul",
        tolerance={"float32": 2e-6},
    ),
    KernelSpec(
        name="linear",
        signature="linear(x[..., K], weight[N, K], bias[N] or None) -> [..., N]",
        reference="torch.nn.functional:linear",
        sampler="hal_core.testing.samplers:linear",
        tolerance={"float32": 2e-6},
    ),
)
