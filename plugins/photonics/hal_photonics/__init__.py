"""Photonic processors as devices of hal_core, simulated from profiles. This module holds the hooks and public names."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hal_core.plugin_api import BackendSpec, hookimpl

if TYPE_CHECKING:
    from .backend import ProfileBackend as ProfileBackend, register_profile as register_profile
    from .frontend.convert import optical_layers as optical_layers, to_optics as to_optics
    from .frontend.layers import (
        DeviceProduct as DeviceProduct,
        OpticalConv2d as OpticalConv2d,
        OpticalLinear as OpticalLinear,
        Settings as Settings,
    )
    from .frontend.tune import (
        keep_outliers_digital as keep_outliers_digital,
        tune_gains as tune_gains,
        with_settings as with_settings,
    )
    from .profiles.profile import Profile as Profile, ProfileError as ProfileError, load as load
    from .runtime.driver import Driver as Driver
    from .simulator.chip import Fault as Fault, SimulatedDriver as SimulatedDriver
    from .simulator.core import PhotonicCore as PhotonicCore

_WHERE = {
    "backend": ("ProfileBackend", "register_profile"),
    "frontend.convert": ("optical_layers", "to_optics"),
    "frontend.layers": ("DeviceProduct", "OpticalConv2d", "OpticalLinear", "Settings"),
    "frontend.tune": ("keep_outliers_digital", "tune_gains", "with_settings"),
    "profiles.profile": ("Profile", "ProfileError", "load"),
    "runtime.driver": ("Driver",),
    "simulator.chip": ("Fault", "SimulatedDriver"),
    "simulator.core": ("PhotonicCore",),
}
__all__ = sorted(name for names in _WHERE.values() for name in names)


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used (PEP 562): the hooks load neither torch nor numpy."""
    for module, names in _WHERE.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    from .cli import add_commands

    add_commands(subparsers)
