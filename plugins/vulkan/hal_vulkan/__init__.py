"""Vulkan devices of hal_core. This module holds the hook alone; no driver is loaded until a device is used."""

from hal_core.plugin_api import BackendSpec, hookimpl


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
