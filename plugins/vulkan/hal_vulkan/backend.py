"""Vulkan devices: what they are, what they run, what a call would cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hal_core import (
    AttentionRequest,
    Capabilities,
    Causal,
    Code,
    Device,
    DeviceUnavailableError,
    Estimate,
    MaskKind,
    Numerics,
    Quantity,
    Range,
    Refusal,
    Session,
)
from hal_core.calibration import load

from .detect import find

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
        "grouped_heads", "value_dim", "strides", "diagonal", "window", "softcap", "block_plan", "lse", "backward", "lse_grad",
        "deterministic",
    },
    length=Range(0, 1 << 24),
    block_sizes=Range(64, None, 64),
)  # fmt: skip
KERNEL_NAMES = frozenset({"vector_add", "reduce_sum", "matmul", "reaction_diffusion_step", "ricci_flow_step"})


class VulkanBackend:
    """All Vulkan devices of the machine, GPUs first."""

    def devices(self) -> Sequence[Device]:
        return find().devices

    def why_absent(self) -> str:
        return find().reason

    def capabilities(self, device: Device) -> Capabilities:
        return CAPABILITIES

    def check(self, request: AttentionRequest, device: Device) -> Iterable[Refusal]:
        """Memory, which depends on the device."""
        adapter = find().adapters[device.id]
        needed, limit = _memory(request), adapter.memory
        if needed > limit:
            yield Refusal(Code.MEMORY, "memory", f"{needed:,} bytes", f"{limit:,} bytes", "shorten the request")
        largest = max(_operands(request))
        if largest > (most := adapter.limits["maxStorageBufferRange"]):
            yield Refusal(Code.MEMORY, "memory", f"a buffer of {largest:,} bytes", f"{most:,} bytes", "split the heads or keys")

    def estimate(self, request: AttentionRequest, device: Device) -> Estimate:
        """From a calibration (seconds per call and per multiply-accumulate) where there is one, assumed rates elsewhere."""
        macs = request.visible_macs * (4 if request.grads else 1)
        measured = load(device)
        if measured is not None and {"call", "mac"} <= set(measured.values):
            seconds = measured.values["call"] + macs * measured.values["mac"]
            source = f"calibration of {device.id}"
            time = Quantity(seconds / 3, 3 * seconds, basis="measured", provenance="measured-silicon", source=source)
            return Estimate(time=time, memory=_memory(request))
        slow, fast = (5e8, 2e10) if find().adapters[device.id].is_cpu else (1e11, 2e13)
        time = Quantity(1e-4 + macs / fast, 2e-2 + macs / slow, basis="declared", provenance="assumed")
        return Estimate(time=time, memory=_memory(request))

    def open(self, device: Device) -> Session:
        adapter = find().adapters.get(device.id)
        if adapter is None:
            raise DeviceUnavailableError(f"{device.id} is not present: {find().reason or 'see `hal devices`'}")
        from .session import VulkanSession

        return VulkanSession(device, adapter)

    def kernel_names(self, device: Device) -> frozenset[str]:
        return KERNEL_NAMES

    def calibrate(self, device: Device, progress: Callable[[str, float], None]) -> dict[str, Any]:
        """Seconds of a call without work, and per multiply-accumulate of a large one (float32, head_dim 64)."""
        import statistics
        import time

        import torch

        def seconds(length: int, repeats: int) -> float:
            query = torch.randn(1, 8, length, 64)
            request = AttentionRequest(
                batch=1, heads_q=8, heads_kv=8, len_q=length, len_k=length, dim_qk=64, dim_v=64, dtype="float32"
            )
            run = session.bind(request)
            run(query, query, query)
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                run(query, query, query)
                times.append(time.perf_counter() - start)
            return statistics.median(times)

        session: Any = self.open(device)
        with session:
            progress("short calls", 0.1)
            short = seconds(16, 50)
            progress("long calls", 0.4)
            long = seconds(512, 8)
        progress("done", 1.0)
        return {"call": short, "mac": max(long - short, 1e-9) / (8 * 512 * 512 * 128)}


def _operands(request: AttentionRequest) -> tuple[int, int, int]:
    """Bytes of the query, the packed keys and the mask on the device."""
    dim = -(-max(request.dim_qk, request.dim_v) // 64) * 64
    queries = request.batch * request.heads_q * request.len_q * dim * 4
    keys = request.batch * request.heads_kv * (request.len_k + 64) * dim * 4
    mask = 0 if request.mask is MaskKind.NONE else request.batch * request.heads_q * request.len_q * request.len_k * 4
    return queries, keys, mask


def _memory(request: AttentionRequest) -> int:
    """Most bytes that a call takes, results included; a mask that broadcasts takes less."""
    queries, keys, mask = _operands(request)
    return (6 if request.grads else 3) * queries + 4 * keys + mask + 64 * request.batch * request.heads_q * request.len_q
