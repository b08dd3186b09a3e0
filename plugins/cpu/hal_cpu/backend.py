"""The CPU as a backend: one device, what it claims, what it costs. Imports no torch until a session opens."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hal_core.plugin_api import (
    AttentionRequest,
    Capabilities,
    Causal,
    Code,
    Device,
    Estimate,
    Fidelity,
    MaskKind,
    Numerics,
    Range,
    Refusal,
    cache_dir,
    load_calibration as load,
)

from .cost import Rates, estimate
from .discovery import this_machine, torch_threads
from .paths import native_module, use_gains
from .tiling import LARGEST_BLOCK

if TYPE_CHECKING:
    from .session import CpuSession

CAPABILITIES = Capabilities(
    dtypes=frozenset({"float64", "float32", "bfloat16", "float16"}),
    numerics={
        "float64": Numerics(relative=1e-12, lse=1e-12, gradient=1e-11),
        "float32": Numerics(relative=1e-5, lse=1e-5, gradient=1e-5),
        "bfloat16": Numerics(relative=4e-3, lse=1e-4, gradient=2e-2),
        "float16": Numerics(relative=1e-3, lse=1e-4, gradient=5e-3),
    },
    head_dim=Range(1),
    masks=frozenset(MaskKind),
    causal=frozenset(Causal),
    features=frozenset(
        {
            "grouped_heads",
            "value_dim",
            "strides",
            "diagonal",
            "window",
            "softcap",
            "dropout",
            "packed",
            "paged",
            "used_lengths",
            "fp8_cache",
            "block_plan",
            "lse",
            "backward",
            "mask_grad",
            "lse_grad",
            "deterministic",
        }
    ),
    batch=Range(0),
    length=Range(0),
    page_sizes=Range(1),
    cache_dtypes=frozenset({"float8_e4m3fn", "float8_e5m2", "int8", "int4"}),
    block_sizes=Range(1),
    tile_sizes=Range(0, LARGEST_BLOCK),
)


class CpuBackend:
    """The processor this process runs on, always present where torch is installed."""

    def __init__(self) -> None:
        self._rates: Rates | None = None

    def devices(self) -> Sequence[Device]:
        """cpu:0; none without torch."""
        version = _torch_version()
        if version is None:
            return []
        machine = this_machine()
        return [
            Device(
                id="cpu:0",
                family="cpu",
                vendor=machine.vendor,
                model=machine.model,
                fidelity=Fidelity.HARDWARE,
                reads=("cpu",),
                memory=machine.memory,
                driver=f"torch {version}",
                features=(f"{machine.cores} cores", *machine.simd, *(["hal-cpu-native"] if native_module() else [])),
            )
        ]

    def why_absent(self) -> str:
        return "torch is not installed: pip install 'hal-cpu[torch]'"

    def capabilities(self, device: Device) -> Capabilities:
        return CAPABILITIES

    def kernel_names(self, device: Device) -> frozenset[str]:
        from hal_compute.backend import KERNEL_NAMES

        return KERNEL_NAMES

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        """Gradients stop at a cache: its pages and narrow numbers are not trained."""
        if request.grads and request.page_size is not None:
            yield Refusal(
                Code.BACKWARD,
                "page_size",
                "gradients through a paged cache",
                "gradients of plain key and value",
                "gather the pages, or call under torch.no_grad()",
            )
        if request.grads and request.used:
            yield Refusal(
                Code.BACKWARD,
                "used",
                "gradients through used lengths",
                "gradients of whole key and value",
                "cut the keys, or call under torch.no_grad()",
            )
        if request.grads and request.cache_dtype is not None:
            yield Refusal(
                Code.BACKWARD,
                "cache_dtype",
                f"gradients through a {request.cache_dtype} cache",
                "gradients of key and value in the query's dtype",
                "convert the cache, or call under torch.no_grad()",
            )

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        """Time from `hal calibrate`'s measurements, else modelled from assumed rates with a wide interval. No
        energy.
        """
        return estimate(request, self._loaded(device), torch_threads())

    def _loaded(self, device: Device) -> Rates:
        """The rates in force; the gains of compiled kernels are in force from the first time on."""
        if self._rates is None:
            self._rates = _stored_rates(device) or Rates.assumed(this_machine())
            use_gains(self._rates.gains)
        return self._rates

    def open(self, device: Device) -> CpuSession:
        from .session import CpuSession

        self._loaded(device)
        return CpuSession(device)

    def calibrate(self, device: Device, progress: Callable[[str, float], None]) -> dict[str, Any]:
        """Measure bandwidth, products, host time and attention, in under a minute; estimates use it from now on."""
        from .calibrate import measure

        values = measure(self.open(device), progress)
        self._rates = Rates.measured(values, this_machine())
        use_gains(self._rates.gains)
        return values


def _stored_rates(device: Device) -> Rates | None:
    """Rates of the stored calibration; None where there is none, or, with a warning that names it, an unusable one."""
    stored = load(device)
    if stored is None:
        return None
    try:
        return Rates.measured(stored.values, this_machine())
    except ValueError as error:
        file = cache_dir() / "calibration" / f"{device.id.replace(':', '-')}-{device.fingerprint}.json"
        why = f"the calibration {file} of {device.id} is not used ({error})"
        warnings.warn(f"{why}: run `hal calibrate {device.id}`", RuntimeWarning, stacklevel=2)
        return None


def _torch_version() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
