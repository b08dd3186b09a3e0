"""One call on the device: its memory, its commands, its results."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from hal_compute.pool import Region
from torch import Tensor

from hal_core import Device, HalError

from ._vk import Adapter, Bound, Gpu
from .memory import VulkanMemoryPool
from .pipelines import VulkanShaderManager, cache_path

#: Seconds after which a wait gives up.
TIMEOUT = 300.0


class Operand(NamedTuple):
    """Device memory of one call. `host` shares it as bytes where the device's memory is mapped; None elsewhere."""

    bound: Bound
    host: Tensor | None

    def part(self, offset: int, size: int) -> Operand:
        """A piece of it, for a shader alone."""
        return Operand(Bound(self.bound.block, self.bound.offset + offset, size), None)


class Recorder:
    """An open device: queue, pools, pipelines. The session serialises calls."""

    def __init__(self, device: Device, adapter: Adapter, limit: int | None = None) -> None:
        self.device, self.adapter = device, adapter
        self.gpu = Gpu(adapter, device.id, cache_path(adapter))
        self.shaders = VulkanShaderManager(self.gpu)
        self.mapped = adapter.is_cpu  # the device's memory is the host's
        self.copies = self.copied = 0
        self.device_seconds: float | None = None
        self.pool = VulkanMemoryPool(self.gpu, device.id, host=self.mapped, limit=limit)
        # Where the device's memory is not mapped, operands pass through host-visible memory of the driver's.
        self.staging = VulkanMemoryPool(self.gpu, device.id, host=True, limit=limit)

    @contextmanager
    def call(self, what: str) -> Iterator[VulkanCommandBuffer]:
        """Commands and memory of one call; both are given back at its end."""
        commands = VulkanCommandBuffer(self, what)
        try:
            yield commands
        finally:
            commands.release()

    def trim(self) -> int:
        return self.pool.trim() + self.staging.trim()

    def synchronize(self) -> None:
        self.gpu.wait(self.gpu.submitted, "finish what was queued", TIMEOUT)

    def close(self) -> None:
        self.shaders.save(cache_path(self.adapter))
        self.trim()
        self.gpu.close()


class VulkanCommandBuffer:
    """Commands of one call, in order, with a barrier before every dispatch that reads what the one before wrote."""

    def __init__(self, recorder: Recorder, what: str) -> None:
        self._recorder, self._what = recorder, what
        self._gpu = recorder.gpu
        self._regions: list[tuple[VulkanMemoryPool, Region]] = []
        self._reads: list[tuple[Operand, Operand, Tensor]] = []
        self._commands: Any = self._gpu.begin()
        self._dispatched = self._uploaded = False

    def space(self, nbytes: int) -> Operand:
        """Uninitialised device memory."""
        return self._cut(self._recorder.pool, nbytes)

    def _cut(self, pool: VulkanMemoryPool, nbytes: int) -> Operand:
        region = pool.allocate(nbytes)
        self._regions.append((pool, region))
        host = None
        if region.block.mapped is not None:
            host = torch.frombuffer(region.block.mapped, dtype=torch.uint8, count=nbytes, offset=region.offset)
        return Operand(Bound(region.block, region.offset, region.size), host)

    def stage(self, tensor: Tensor, dim: int | None = None, *, rows: int | None = None, wide: bool = False) -> Operand:
        """A tensor's values, contiguous: one counted copy.

        Args:
            dim: size of the last dimension, padded with zeros. rows: likewise of the one before it. wide: as float32.
        """
        recorder, tensor = self._recorder, tensor.detach()
        dtype = torch.float32 if wide else tensor.dtype
        shape, last = [*tensor.shape], tensor.shape[-1]
        shape[-1] = dim or last
        if rows is not None:
            shape[-2] = rows
        nbytes = math.prod(shape) * dtype.itemsize
        operand = self.space(nbytes)
        near = operand if recorder.mapped else self._cut(recorder.staging, nbytes)
        assert near.host is not None
        typed = near.host.view(dtype).view(shape)
        if rows is not None and rows != tensor.shape[-2]:
            typed[..., tensor.shape[-2] :, :].zero_()
            typed = typed[..., : tensor.shape[-2], :]
        typed[..., :last].copy_(tensor)
        if shape[-1] != last:
            typed[..., last:].zero_()
        if near is not operand:
            self._gpu.copy(self._commands, near.bound, operand.bound)
            self._uploaded = True
        recorder.copies += 1
        recorder.copied += tensor.numel() * tensor.element_size()
        return operand

    def result(self, tensor: Tensor, dim: int | None = None) -> Operand:
        """Memory that becomes `tensor` when `finish` is called; rows of `dim` elements are cut on the way."""
        nbytes = tensor.numel() // max(tensor.shape[-1], 1) * (dim or tensor.shape[-1]) * tensor.element_size()
        operand = self.space(nbytes)
        near = operand if self._recorder.mapped else self._cut(self._recorder.staging, nbytes)
        self._reads.append((operand, near, tensor))
        return operand

    def dispatch(
        self, shader: str, constants: Sequence[int], operands: Sequence[Operand], numbers: Sequence[float], layout: str,
        groups: Sequence[int], *, kinds: str = "", after: bool = True,
    ) -> None:  # fmt: skip
        """Record a shader.

        Args:
            numbers: its push constants in struct's `layout`. kinds: see `Gpu.pipeline`; "" for storage buffers alone.
            after: whether it reads what was recorded before; without it no barrier is needed.
        """
        pipeline = self._recorder.shaders.pipeline(shader, kinds or "s" * len(operands), constants)
        if (self._dispatched or self._uploaded) and after:
            self._gpu.barrier(self._commands)
        if not self._dispatched:
            self._gpu.stamp(self._commands, 0)
        bound = [operand.bound for operand in operands]
        self._gpu.dispatch(self._commands, pipeline, bound, struct.pack(layout, *numbers), groups)
        self._dispatched = True

    def finish(self) -> None:
        """Run everything, wait, and bring the results home."""
        recorder, gpu = self._recorder, self._gpu
        gpu.stamp(self._commands, 1)
        gpu.barrier(self._commands)
        for operand, near, _ in self._reads:
            if near is not operand:
                gpu.copy(self._commands, operand.bound, near.bound)
        if not recorder.mapped:
            gpu.barrier(self._commands)
        gpu.end(self._commands)
        gpu.wait(gpu.submit(self._commands), self._what, TIMEOUT)
        recorder.device_seconds = gpu.stamped_seconds()
        for _, near, tensor in self._reads:
            assert near.host is not None
            typed = near.host.view(tensor.dtype).view(*tensor.shape[:-1], -1)
            tensor.copy_(typed[..., : tensor.shape[-1]])
            recorder.copies += 1
            recorder.copied += tensor.numel() * tensor.element_size()
        self._reads.clear()

    def release(self) -> None:
        """Give memory and commands back, once the device is done with them."""
        with suppress(HalError):  # a lost device has nothing running any more
            self._gpu.wait(self._gpu.submitted, "finish before its memory is given back", 30.0)
        self._gpu.drop(self._commands)
        for pool, region in self._regions:
            pool.free(region)
        self._regions.clear()
