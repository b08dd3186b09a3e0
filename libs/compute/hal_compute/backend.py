"""Devices that run compute programs: capabilities, limits, estimates, calibration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hal_core.plugin_api import (
    AttentionRequest,
    Capabilities,
    Causal,
    Code,
    Device,
    Estimate,
    MaskKind,
    Numerics,
    Quantity,
    Range,
    Refusal,
    Session,
    load_calibration as load,
)

from . import calibrate

CAPABILITIES = Capabilities(
    dtypes={"float32", "float16"},
    numerics={
        "float32": Numerics(relative=1e-5, lse=1e-5, gradient=2e-5),
        "float16": Numerics(relative=2e-3, lse=1e-3, gradient=5e-3),
    },
    head_dim=Range(1, 256),
    masks={MaskKind.NONE, MaskKind.BOOLEAN, MaskKind.ADDITIVE},
    causal={Causal.NONE, Causal.TOP_LEFT, Causal.BOTTOM_RIGHT},
    features={
        "grouped_heads",
        "value_dim",
        "strides",
        "diagonal",
        "window",
        "softcap",
        "block_plan",
        "lse",
        "backward",
        "lse_grad",
        "deterministic",
    },
    length=Range(0, 1 << 24),
    block_sizes=Range(64, None, 64),
)
KERNEL_NAMES = frozenset(
    {"vector_add", "reduce_sum", "matmul", "reaction_diffusion_step", "ricci_flow_step", "euler_characteristic"}
)


class ComputeBackend(ABC):
    """The backend protocol, except for finding and opening devices."""

    #: Tokens of the first long call of a calibration, with 8 heads of 64.
    calibration_length = 1024

    @abstractmethod
    def devices(self) -> Sequence[Device]: ...

    @abstractmethod
    def why_absent(self) -> str: ...

    @abstractmethod
    def open(self, device: Device) -> Session: ...

    @abstractmethod
    def room(self, device: Device) -> tuple[int, int]:
        """(bytes of the device's memory, bytes of the largest buffer that a program can read)."""

    @abstractmethod
    def assumed(self, device: Device) -> tuple[tuple[float, float], tuple[float, float]]:
        """Without a calibration: (least, most) seconds of a call, and (least, most) multiply-accumulates per second."""

    @abstractmethod
    def loaded_before_fork(self) -> bool:
        """Whether the driver was loaded in a process of which this one is a fork."""

    def capabilities(self, device: Device) -> Capabilities:
        return CAPABILITIES

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        """Memory, which depends on the device, and whether this process may use the driver."""
        if self.loaded_before_fork():
            yield Refusal(
                Code.DEVICE,
                "process",
                "a forked process",
                "the process that loaded the driver",
                'use multiprocessing.get_context("spawn")',
            )
        limit, most = self.room(device)
        if (needed := self.memory(request, device)) > limit:
            yield Refusal(Code.MEMORY, "memory", f"{needed:,} bytes", f"{limit:,} bytes", "shorten the request")
        if (largest := self.largest_buffer(request, device)) > most:
            yield Refusal(
                Code.MEMORY, "memory", f"a buffer of {largest:,} bytes", f"{most:,} bytes", "split the heads or keys"
            )

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        """Time from a calibration that has the request's dtype and place (see `calibrate.seconds`), or from assumed
        rates.
        """
        measured = load(device)
        taken = None if measured is None else calibrate.seconds(measured.values, request)
        if taken is not None:
            source = f"calibration of {device.id}"
            span = Quantity(taken / 3, 3 * taken, basis="measured", provenance="measured-silicon", source=source)
        else:
            macs = request.visible_macs * (4 if request.grads else 1)
            (least, most), (slow, fast) = self.assumed(device)
            span = Quantity(least + macs / fast, most + macs / slow, basis="declared", provenance="assumed")
        return Estimate(time=span, memory=self.memory(request, device))

    @abstractmethod
    def memory(self, request: AttentionRequest, device: Device) -> int:
        """The most bytes that a call allocates, results included."""

    @abstractmethod
    def largest_buffer(self, request: AttentionRequest, device: Device) -> int:
        """Bytes of the largest buffer that the call's programs read or write."""

    def kernel_names(self, device: Device) -> frozenset[str]:
        return KERNEL_NAMES

    def calibrate(self, device: Device, progress: Callable[[str, float], None]) -> dict[str, Any]:
        """Seconds of a call, of copies and of work in each of the device's dtypes, see `calibrate.measure`."""
        with self.open(device) as session:
            dtypes = self.capabilities(device).dtypes
            return dict(calibrate.measure(session, device.reads, dtypes, self.calibration_length, progress))
