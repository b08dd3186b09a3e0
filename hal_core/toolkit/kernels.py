"""Specifications of kernels beside attention that several devices offer. A plugin specifies its own kernels only."""

from ..hooks import KernelSpec

_REFERENCES = f"{__package__}.kernel_references"

KERNELS = (
    KernelSpec(
        name="matmul",
        signature="matmul(a[..., M, K], b[..., K, N]) -> [..., M, N]",
        reference=f"{_REFERENCES}:matmul",
        sampler=f"{_REFERENCES}:sample_matmul",
        tolerance={"float32": 2e-6},
    ),
    KernelSpec(
        name="linear",
        signature="linear(x[..., K], weight[N, K], bias[N] or None) -> [..., N]",
        reference=f"{_REFERENCES}:linear",
        sampler=f"{_REFERENCES}:sample_linear",
        tolerance={"float32": 2e-6},
    ),
)
