"""OpenCL devices of hal_core: the plugin's hook. No driver is loaded until a device is used."""

from hal_core.plugin_api import BackendSpec, hookimpl


@hookimpl
def hal_backends(api_version: tuple[int, int]) -> list[BackendSpec]:
    return [
        BackendSpec(
            name="opencl",
            target="hal_opencl.backend:OpenClBackend",
            requirements=("an OpenCL driver",),
            install_hint=(
                "a GPU vendor's driver brings one; for a CPU device on Debian: apt-get install pocl-opencl-icd"
            ),
        )
    ]
