"""Kernels beside attention: one specification per name, held to a float64 reference for every provider."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any, cast

import attrs


@attrs.frozen(kw_only=True)
class KernelSpec:
    """What a kernel name means. Shipped by any plugin through the `hal_kernels` hook.

    Attributes:
        name: for example "matmul".
        signature: the call as text, "matmul(a[M, K], b[K, N]) -> [M, N]".
        reference: "module:attr" of a float64 implementation on torch tensors.
        sampler: "module:attr" of a function (generator) -> argument tuple that draws fresh inputs.
        tolerance: largest ||x - reference|| / ||reference|| by dtype name.
    """

    name: str
    signature: str
    reference: str
    sampler: str
    tolerance: dict[str, float]


def resolve(target: str) -> Any:
    """The object that "module:attr" names. Raises whatever its import raises."""
    module, _, attribute = target.partition(":")
    return attrgetter(attribute)(importlib.import_module(module))


def kernel(name: str, backend: str | None = None) -> Callable[..., Any]:
    """The kernel `name` on a device.

    Args:
        name: a kernel name that an installed plugin specifies.
        backend: device or backend name; None for the first device, hardware before simulated, that provides it.

    Raises:
        UnknownBackendError: no such backend. UnsupportedError: nobody there provides the kernel.
    """
    from .errors import HalError, UnsupportedError
    from .protocols import KernelProvider
    from .registry import registry

    by_fidelity = (
        sorted(registry.devices(), key=lambda d: d.fidelity.rank) if backend is None else registry.find(backend)
    )
    for device in by_fidelity:
        provider, session = registry.backend_of(device), cast(Any, None)
        try:
            if isinstance(provider, KernelProvider) and name in provider.kernel_names(device):
                session = registry.session(device.id)
        except (
            Exception,
            SystemExit,
        ) as error:  # a broken provider must not hide the others; one that was named raises
            if not isinstance(error, HalError):
                registry.fail_entry(registry.entry(device.id), "kernel", error)
            if backend is not None:
                raise
        if session is not None:
            return session.kernel(name)  # type: ignore[no-any-return]
    known = ", ".join(sorted(registry.kernel_specs())) or "none"
    where = f"on {backend}" if backend is not None else "on any installed device"
    raise UnsupportedError(f"kernel {name!r} is not provided {where}: specified kernels are {known}")
