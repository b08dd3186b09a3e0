"""NVIDIA GPUs as devices of hal_core. This module holds the hooks alone; nothing heavy is imported until a device is
used.
"""

from hal_core.plugin_api import BackendSpec, KernelSpec, hookimpl


@hookimpl
def hal_backends(api_version: tuple[int, int]) -> list[BackendSpec]:
    return [
        BackendSpec(
            name="cuda",
            target="hal_cuda.backend:CudaBackend",
            requirements=(
                "an NVIDIA GPU of compute capability 8.0 or higher",
                "its driver",
                "torch 2.11 or newer with CUDA",
            ),
            install_hint="pip install 'hal-cuda[torch]'",
        )
    ]


@hookimpl
def hal_kernels() -> list[KernelSpec]:
    from .kernels.extra.specs import KERNELS

    return KERNELS
