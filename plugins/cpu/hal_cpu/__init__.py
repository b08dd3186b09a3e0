"""The CPU as a device of hal_core. This module holds the hook alone; nothing heavy is imported until the device is
used.
"""

from hal_core.plugin_api import BackendSpec, Table, hookimpl


@hookimpl
def hal_backends(api_version: tuple[int, int]) -> list[BackendSpec]:
    return [
        BackendSpec(
            name="cpu",
            target="hal_cpu.backend:CpuBackend",
            requirements=("torch 2.11 or newer",),
            install_hint="pip install 'hal-cpu[torch]'",
        )
    ]


@hookimpl
def hal_doctor() -> list[Table]:
    """Whether the optional compiled kernels are there, and what to do where they are not."""
    from .paths import why_no_native_module

    why = why_no_native_module()
    return [Table("CPU kernels", ["package", "state"], [["hal-cpu-native", why or "compiled kernels are used"]])]
