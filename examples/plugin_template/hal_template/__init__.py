"""A plugin's light module: the hooks and nothing else. No torch, no driver."""

from hal_core.hooks import BackendSpec, hookimpl


@hookimpl
def hal_backends(api_version: tuple[int, int]) -> list[BackendSpec]:
    return [BackendSpec(name="template", target="hal_template.backend:TemplateBackend", api=(1, 0))]
