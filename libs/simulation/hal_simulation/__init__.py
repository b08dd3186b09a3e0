"""What simulated devices share: profile files with provenance, metered kernels, and modelled intervals.

Names are imported when they are used (PEP 562), so that reading a profile does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .metering import MeteredKernel as MeteredKernel
    from .products import ProductSize as ProductSize, linear_size as linear_size, matmul_size as matmul_size
    from .profile import (
        Figure as Figure,
        Kind as Kind,
        Profile as Profile,
        ProfileError as ProfileError,
        Schema as Schema,
        worst as worst,
    )
    from .quantity import RELATIVE_UNCERTAINTY as RELATIVE_UNCERTAINTY, modelled as modelled
    from .uncertainty import Variation as Variation, variations as variations

_WHERE = {
    "metering": ("MeteredKernel",),
    "products": ("ProductSize", "linear_size", "matmul_size"),
    "profile": ("Figure", "Kind", "Profile", "ProfileError", "Schema", "worst"),
    "quantity": ("RELATIVE_UNCERTAINTY", "modelled"),
    "uncertainty": ("Variation", "variations"),
}


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name in names:
            return getattr(import_module(f".{module}", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
