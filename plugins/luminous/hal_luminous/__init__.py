"""A hypothetical Luminous Computing micro-ring bank as a simulated device of hal_core. This module holds the hook."""

from __future__ import annotations

from hal_core.plugin_api import BackendSpec, hookimpl


@hookimpl
def hal_backends(api_version: tuple[int, int]) -> list[BackendSpec]:
    return [
        BackendSpec(
            name="luminous",
            target="hal_luminous.backend:LuminousBackend",
            requirements=("torch 2.11 or newer", "hal-photonics"),
            install_hint="pip install 'hal-luminous[torch]'",
        )
    ]
