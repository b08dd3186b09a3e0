"""What devices that run compute programs share: the plugin's hook with the kernels that they offer."""

from hal_core.plugin_api import KernelSpec, hookimpl

_SIGNATURES = {
    "vector_add": "vector_add(a[...], b[...]) -> [...]",
    "reduce_sum": "reduce_sum(x[...]) -> []",
    "reaction_diffusion_step": "reaction_diffusion_step(u[..., H, W], v[..., H, W], ..., steps=1) -> (u, v)",
    "ricci_flow_step": "ricci_flow_step(phi[..., H, W], dt, steps=1) -> [..., H, W]",
    "euler_characteristic": "euler_characteristic(field[..., H, W], levels[T]) -> [..., T]",
}


@hookimpl
def hal_kernels() -> list[KernelSpec]:
    return [
        KernelSpec(
            name=name,
            signature=signature,
            reference=f"hal_compute.references:{name}",
            sampler=f"hal_compute.references:draw_{name}",
            tolerance={"float32": 0.0 if name == "euler_characteristic" else 2e-6},  # whole numbers
        )
        for name, signature in _SIGNATURES.items()
    ]
