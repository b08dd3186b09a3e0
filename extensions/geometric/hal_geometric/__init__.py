"""Curved attention, information, flows and patterns on every hal device, and tilings that read content.

    from hal_geometric import AdaptiveTiling, lift
    q, k = lift.lorentz(query, key)                                # hyperbolic attention, as plain attention
    out = hal.attention(q, k, value, scale=1.0)
    out = hal.attention(query, key, value, tiling=AdaptiveTiling(0.01))

Importing this package imports no torch: a name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hal_core import __version__ as __version__

#: Public names by the module that holds them; modules that are public themselves.
_NAMES = {
    "adaptive": "AdaptiveResult adaptive_attention",
    "captured": "CapturedAttention",
    "core": "QuantumGeometricCore",
    "heads": "ModelHeads",
    "manifold": "Euclidean Lorentz Manifold Poincare Product Sphere",
    "orders": "ContentOrder content_order topic_orders",
    "tile": "QuantumMotivicTile",
    "tiling": "AdaptiveTiling",
}
_MODULES = (
    "arithmetic",
    "certificate",
    "flow",
    "graph",
    "heads",
    "information",
    "lift",
    "manifold",
    "metric",
    "pattern",
    "quantum",
)
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted([*_WHERE, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
