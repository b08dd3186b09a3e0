"""Lightmatter's published photonic processors as simulated devices of hal_core. This module holds the hook."""

from __future__ import annotations

from hal_core.plugin_api import BackendSpec, hookimpl


@hookimpl
def hal_backends(api_version: tuple[int, int]) -> list[BackendSpec]:
    return [
        BackendSpec(
            name="lightmatter",
            target="hal_photonic_lightmatter.backend:LightmatterBackend",
            requirements=("torch 2.11 or newer", "hal-photonics"),
            install_hint="pip install 'hal-photonic-lightmatter[torch]'",
        )
    ]
