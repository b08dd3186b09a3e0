"""Vulkan devices of hal_core: the plugin's hook, and public names on demand. No driver is loaded until a device is
used.
"""

from importlib import import_module
from typing import Any

from hal_core.plugin_api import BackendSpec, hookimpl

_PUBLIC = {
    "VulkanCommandBuffer": ".runtime.command_buffer",
    "VulkanMemoryPool": ".runtime.pool",
    "VulkanShaderManager": ".runtime.pipelines",
}


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


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
