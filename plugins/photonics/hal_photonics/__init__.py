"""Photonic processors as devices of hal_core, simulated from profiles. This module holds the hooks and names alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hal_core.plugin_api import BackendSpec, hookimpl

if TYPE_CHECKING:
    from .backend import ProfileBackend, register_profile
    from .core import PhotonicCore
    from .driver import Driver, Fault, SimulatedDriver
    from .profile import Profile, ProfileError, load

_WHERE = {
    "ProfileBackend": "backend",
    "register_profile": "backend",
    "PhotonicCore": "core",
    "Driver": "driver",
    "Fault": "driver",
    "SimulatedDriver": "driver",
    "Profile": "profile",
    "ProfileError": "profile",
    "load": "profile",
}
__all__ = [
    "Driver",
    "Fault",
    "PhotonicCore",
    "Profile",
    "ProfileBackend",
    "ProfileError",
    "SimulatedDriver",
    "load",
    "register_profile",
]


def __getattr__(name: str) -> Any:
    """Public names, imported when they are used: finding the plugin loads neither torch nor numpy."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


@hookimpl
def hal_backends(api_version: tuple[int, int]) -> list[BackendSpec]:
    return [
        BackendSpec(
            name="photonic",
            target="hal_photonics.backend:PhotonicBackend",
            requirements=("torch 2.11 or newer",),
            install_hint="pip install 'hal-photonics[torch]'",
        )
    ]


@hookimpl
def hal_commands(subparsers: Any) -> None:
    from .commands import add_commands

    add_commands(subparsers)
