"""The CPU as a device of hal_core. This module holds the hook alone; nothing heavy is imported until the device is
used.
"""

from hal_core.plugin_api import BackendSpec, hookimpl


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
