"""Vulkan devices of hal_core. This module holds the hooks alone; no driver is loaded until a device is used."""

from hal_core.hooks import BackendSpec, hookimpl
from hal_core.kernels import KernelSpec


@hookimpl
def hal_backends(api_version: tuple[int, int]) -> list[BackendSpec]:
    return [
        BackendSpec(
            name="vulkan",
            target="hal_vulkan.backend:VulkanBackend",
            requirements=("a Vulkan 1.2 driver",),
            install_hint="for a CPU device on Debian: apt-get install libvulkan1 mesa-vulkan-drivers",
        )
    ]


@hookimpl
def hal_kernels() -> list[KernelSpec]:
    signatures = {
        "vector_add": "vector_add(a[...], b[...]) -> [...]",
        "reduce_sum": "reduce_sum(x[...]) -> []",
        "matmul": "matmul(a[..., M, K], b[..., K, N]) -> [..., M, N]",
        "reaction_diffusion_step": "reaction_diffusion_step(u[..., H, W], v[..., H, W], ...) -> (u, v)",
        "ricci_flow_step": "ricci_flow_step(phi[..., H, W], dt) -> [..., H, W]",
    }
    return [
        KernelSpec(
            name=name, signature=signature, reference=f"hal_vulkan.references:{name}",
            sampler=f"hal_vulkan.references:draw_{name}", tolerance={"float32": 2e-6},
        ) for name, signature in signatures.items()
    ]  # fmt: skip
