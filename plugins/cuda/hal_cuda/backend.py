"""NVIDIA GPUs as a backend: found by NVML, described by their compute capability. Imports no torch until a GPU is
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hal_core.plugin_api import (
    AttentionRequest,
    Capabilities,
    Causal,
    Choice,
    Code,
    Device,
    DeviceUnavailableError,
    Estimate,
    MaskKind,
    Numerics,
    Range,
    Refusal,
    load_calibration as load,
)

from .discovery import Chip, Found, find
from .kernels.fp8 import wish as fp8
from .kernels.skipping import wish as skipping
from .tiling import FOREIGN_SIZES, foreign_excess

if TYPE_CHECKING:
    from hal_core.plugin_api import BenchSetup

    from .cost import Rates
    from .runtime.nvml import Gpu
    from .session import CudaSession

CAPABILITIES = Capabilities(
    dtypes=frozenset({"float64", "float32", "bfloat16", "float16"}),
    numerics={
        "float64": Numerics(relative=1e-12, lse=1e-12, gradient=1e-11),
        "float32": Numerics(relative=1e-5, lse=1e-5, gradient=1e-5),
        "bfloat16": Numerics(relative=5e-3, lse=1e-4, gradient=1e-2),
        "float16": Numerics(relative=1e-3, lse=1e-4, gradient=2e-3),
    },
    head_dim=Range(1, 256),
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
    batch=Range(0, 65535),
    heads=Range(1, 65535),
    length=Range(0, (1 << 31) - (1 << 16)),
    page_sizes=Range(1),
    cache_dtypes=frozenset({"float8_e4m3fn", "float8_e5m2", "int8", "int4"}),
    block_sizes=Range(1, 1 << 16),
    tile_sizes=Choice(FOREIGN_SIZES),
    options={**fp8.OPTIONS, **skipping.OPTIONS},
)


class CudaBackend:
    """Every GPU of compute capability 8.0 and up that this process may use."""

    def __init__(self) -> None:
        self._found: Found | None = None
        self._chips: dict[str, Chip] = {}
        self._rates: dict[str, Rates] = {}
        self._sessions: dict[str, CudaSession] = {}

    def devices(self) -> Sequence[Device]:
        """cuda:0 and so on; CUDA is not initialised."""
        self._found = find()
        return self._found.devices

    def why_absent(self) -> str:
        return (self._found or find()).reason or "no NVIDIA GPU is visible"

    def capabilities(self, device: Device) -> Capabilities:
        return CAPABILITIES

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        """What data cannot say: a cache has no gradients, and float64 is composed of torch's operations on plain
        tensors.
        """
        if request.options:
            from .runtime import binaries

            runs = binaries.tested() and not binaries.INTERPRETED
            yield from fp8.refusals(request, self.chip(device).capability, runs)
            yield from skipping.refusals(request)
        if request.tiling is not None:
            yield from self._tiling_refusals(request, device)
        cache = "" if request.page_size is None else "a paged cache"
        cache = f"a cache of {request.cache_dtype}" if request.cache_dtype is not None else cache
        cache = "used lengths" if request.used and not cache else cache
        field = "page_size" if request.page_size is not None else "used" if request.used else "cache_dtype"
        if cache and request.grads:
            fix = "gather the pages, or call under torch.no_grad()"
            yield Refusal(Code.BACKWARD, field, f"gradients through {cache}", "gradients of plain key and value", fix)
        if cache and request.dtype == "float64":
            offered = "float32, bfloat16 or float16"
            yield Refusal(Code.DTYPE, field, f"{cache} in float64", offered, "cast to float32")
        if request.cache_dtype == "float8_e4m3fn" and self.chip(device).capability < (8, 9):
            offered = "int8 or int4 before compute capability 8.9"
            yield Refusal(Code.CACHE_DTYPE, "cache_dtype", request.cache_dtype, offered, "quantize to int8")

    def _tiling_refusals(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        """Why a tiling that the caller brings does not suit: the backward and torch have cuts of their own, and shared
        memory has an end.
        """
        assert request.tiling is not None
        name, block_q, block_k = request.tiling
        if request.grads or request.dtype == "float64":
            what = "gradients" if request.grads else "float64"
            cut = "the own tiling for gradients" if request.grads else "the cut of torch's operations for float64"
            yield Refusal(Code.TILING, "tiling", f"{name} for {what}", cut, "leave tiling= out")
        elif min(block_q, block_k) > 0 and foreign_excess(request, block_q, block_k, self.chip(device)):
            given = (
                f"tiles of {block_q} x {block_k} at head_dim {max(request.dim_qk, request.dim_v)} in {request.dtype}"
            )
            offered = f"{self.chip(device).shared_memory:,} bytes of shared memory"
            yield Refusal(Code.TILING, "tiling", given, offered, "ask for smaller tiles")

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        """From `hal calibrate`'s measurements, else this package's table of the same model, else scaled from
        datasheets.

        The time's source names every candidate path with its own time.
        """
        from . import cost, paths

        chip, rates = self.chip(device), self.rates(device)
        return cost.estimate(request, paths.choose(request, chip, rates), rates, chip)

    def chip(self, device: Device) -> Chip:
        """The device as its kernels see it. Initialises CUDA, which a process that asks for an estimate is about to
        use.

        Raises DeviceUnavailableError after a fork.
        """
        if device.id not in self._chips:
            _refuse_fork(device)
            self._chips[device.id] = Chip.of(int(device.id.partition(":")[2]))
        return self._chips[device.id]

    def rates(self, device: Device) -> Rates:
        """What the estimates and the choice of paths go by."""
        from .cost import Rates, shipped

        if device.id not in self._rates:
            stored, table = load(device), shipped()
            if stored is not None:
                self._rates[device.id] = Rates.of(stored.values, "hal calibrate")
            elif table is not None and table[0] == device.model:
                self._rates[device.id] = table[1]
            else:
                chip = self.chip(device)
                self._rates[device.id] = Rates.assumed(chip.capability, chip.multiprocessors, table and table[1])
        return self._rates[device.id]

    def kernel_names(self, device: Device) -> frozenset[str]:
        """Kernels beside attention: those in CUDA C++ where CuPy is installed, and the Triton ones."""
        from .kernels.extra import provided

        return provided.names()

    def open(self, device: Device) -> CudaSession:
        """Raises DeviceUnavailableError after a fork, and where CUDA numbers the GPUs otherwise than NVML."""
        import torch

        from .session import CudaSession

        _refuse_fork(device)
        index = int(device.id.partition(":")[2])
        name = torch.cuda.get_device_properties(index).name
        if name != device.model:
            raise DeviceUnavailableError(
                f"{device.id} is a {device.model} for the driver and a {name} for CUDA: "
                "set CUDA_DEVICE_ORDER=PCI_BUS_ID"
            )
        session = CudaSession(device, self.chip(device), lambda: self.rates(device))
        _load(self.chip(device))
        if not torch.cuda.is_current_stream_capturing():
            session.take_workspaces()
        self._sessions[device.id] = session
        return session

    def calibrate(self, device: Device, progress: Callable[[str, float], None]) -> dict[str, Any]:
        """Measure bandwidth, products, launches, every path on a grid, and energy; estimates and dispatch then use
        it.
        """
        from .calibrate import measure
        from .cost import Rates

        values = measure(device, self.chip(device), self._gpu(device), progress)
        self._rates[device.id] = Rates.of(values, "hal calibrate")
        if device.id in self._sessions:
            self._sessions[device.id].refresh()
        return values

    def warm_up(self, device: Device, requests: Sequence[AttentionRequest]) -> Sequence[tuple[str, Callable[[], int]]]:
        """Compilations of the own kernels of requests, for processes of their own: `hal warm` runs them.

        A request whose features these kernels do not have is left out.
        """
        from .kernels import ahead

        taken = [r for r in requests if r.dtype != "float64" and not CAPABILITIES.refusals(r)]
        return ahead.tasks(taken, self.chip(device), self.rates(device))

    def benchmark(self, device: Device) -> BenchSetup:
        """Own kernels and installed peers as columns of `hal bench`, with clocks and power."""
        from .benchmark import CudaBench

        return CudaBench(device, self.chip(device), self.rates(device), self._gpu(device)).setup()

    def _gpu(self, device: Device) -> Gpu | None:
        """The device as its driver's management library sees it."""
        gpus = (
            {} if self._found is None else dict(zip([d.id for d in self._found.devices], self._found.gpus, strict=True))
        )
        return gpus.get(device.id)


def _load(chip: Chip) -> None:
    """Import what a first call would wait for otherwise: the kernels' sources and Triton's driver."""
    from triton.runtime import driver

    from .kernels.portable import attend  # noqa: F401
    from .paths import hopper_runs
    from .runtime import binaries, kept

    if binaries.tested():
        driver.active.utils  # noqa: B018 - loads the library that it names
        kept.sources()
    if hopper_runs(chip):
        from .kernels.hopper import forward  # noqa: F401
        from .kernels.hopper_backward import kernel  # noqa: F401


def _refuse_fork(device: Device) -> None:
    import torch

    if torch.cuda._is_in_bad_fork():
        raise DeviceUnavailableError(
            f"{device.id} was asked for in a forked process whose parent uses CUDA: start workers with "
            "multiprocessing's 'spawn'"
        )
