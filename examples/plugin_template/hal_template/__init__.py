"""A plugin's light module: the hooks and nothing else. It imports neither torch nor a driver."""

from hal_core.plugin_api import BackendSpec, hookimpl


@hookimpl
def hal_backends(api_version: tuple[int, int]) -> list[BackendSpec]:
    return [BackendSpec(name="template", target="hal_template.backend:TemplateBackend", api=(1, 1))]
