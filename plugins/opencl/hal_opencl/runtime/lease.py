"""Device memory of one call: operands are copied there, results copied back, and all of it is released at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Self

import pyopencl as cl
import torch
from hal_compute import waits
from hal_compute.pool import DevicePool, Region
from torch import Tensor

from ..memory import OpenClMemory
from .engine import Engine


class Operand(NamedTuple):
    """Device memory of one call.

    Attributes:
        buffer: a program's argument. host: the same memory as bytes where the device is a CPU; None elsewhere.
        block, offset: where it lies in which whole buffer: drivers copy to and from whole buffers faster.
    """

    buffer: Any
    host: Tensor | None
    nbytes: int
    block: Any
    offset: int


class Lease:
    """Device memory of one call, a context manager.

    Whatever ends the call, also an interrupt, its memory is released, or kept until the programs that use it have
    ended.
    """

    def __init__(self, engine: Engine, memory: OpenClMemory, what: str) -> None:
        """`what`: the work for messages, "compute attention"."""
        self.engine, self.memory, self.what = engine, memory, what
        self._regions: list[tuple[DevicePool, Region]] = []
        self._views: list[Any] = []
        self._shared: list[Tensor] = []  # kept as long as the buffers over them
        self._reads: list[tuple[Operand, Tensor, int]] = []

    def __enter__(self) -> Self:
        """Raises DeviceUnavailableError while a call that was given up still runs."""
        self.engine.check_idle()
        if not self.engine.abandoned:
            self.memory.free_lost()
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        engine = self.engine
        if kind is None:
            engine.launched = []
        elif not engine.end_within(events := engine.pending(), waits.GRACE):
            engine.abandon(self.what, events, self.release)  # what still runs reads and writes this memory
            return
        self.release()
        if not engine.abandoned:
            self.memory.free_lost()

    def scratch(self, shape: Sequence[int], dtype: str) -> Tensor:
        """An uninitialised host tensor, for the length of the call."""
        kind: torch.dtype = getattr(torch, dtype)
        nbytes, pool = math.prod(shape) * kind.itemsize, self.memory.scratch
        region = pool.allocate(nbytes)
        self._regions.append((pool, region))
        host: Tensor = region.block.bytes[region.offset : region.offset + nbytes]
        return host.view(kind).view(tuple(shape))

    def space(self, nbytes: int) -> Operand:
        """Uninitialised memory."""
        engine = self.engine
        region = self.memory.pool.allocate(nbytes)
        self._regions.append((self.memory.pool, region))
        buffer, host = region.block
        with engine.named("cut a buffer"):
            part = buffer.get_sub_region(region.offset, region.size)
        self._views.append(part)
        seen = None if host is None else host.bytes[region.offset : region.offset + nbytes]
        return Operand(part, seen, nbytes, buffer, region.offset)

    def stage(self, tensor: Tensor, dim: int | None = None) -> Operand:
        """A tensor's values, contiguous, the last dimension padded to `dim` with zeros. Shared where possible, else
        copied.
        """
        engine = self.engine
        last = tensor.shape[-1]
        padded = dim is not None and dim != last
        tensor = tensor.detach()
        if engine.shares_memory and not padded and tensor.is_contiguous():
            return self.share(tensor)
        rows = tensor.numel() // max(last, 1)
        operand = self.space(rows * (dim or last) * tensor.element_size())
        if operand.host is not None:
            typed = operand.host.view(tensor.dtype).view(*tensor.shape[:-1], dim or last)
            typed[..., :last].copy_(tensor)
            if padded:
                typed[..., last:].zero_()
        else:
            self.memory.ring.upload(tensor, operand.block, operand.offset, dim or last)
        self.memory.count_copy(tensor.numel() * tensor.element_size())
        return operand

    def share(self, tensor: Tensor) -> Operand:
        """The tensor's own memory as a buffer, on a device that shares the host's memory."""
        flat = tensor.view(-1).view(torch.uint8)
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
        with self.engine.named("share a tensor"):
            buffer = cl.Buffer(self.engine.context, flags, hostbuf=flat.numpy())
        self._views.append(buffer)
        self._shared.append(flat)
        return Operand(buffer, flat, flat.numel(), buffer, 0)

    def result(self, tensor: Tensor, dim: int | None = None) -> Operand:
        """Memory whose values `finish` copies to `tensor` (contiguous). Its rows have `dim` elements; the first are
        read.
        """
        if self.engine.shares_memory and dim in (None, tensor.shape[-1]):
            return self.share(tensor)
        rows = tensor.numel() // max(tensor.shape[-1], 1)
        operand = self.space(rows * (dim or tensor.shape[-1]) * tensor.element_size())
        self._reads.append((operand, tensor, dim or tensor.shape[-1]))
        return operand

    def finish(self) -> None:
        """Wait for the queue, and copy the results to their tensors."""
        engine = self.engine
        engine.wait(self.what)
        engine.note_time()
        for operand, tensor, dim in self._reads:
            if operand.host is None:
                self.memory.ring.download(operand.block, operand.offset, tensor, dim, self.what)
            else:
                typed = operand.host[: operand.nbytes].view(tensor.dtype).view(*tensor.shape[:-1], dim)
                tensor.copy_(typed[..., : tensor.shape[-1]])
            self.memory.count_copy(tensor.numel() * tensor.element_size())
        self._reads.clear()

    def release(self) -> None:
        """Release everything, once the device no longer uses it."""
        for view in self._views:
            with suppress(cl.Error):  # a lost device has nothing to release
                view.release()
        for pool, region in self._regions:
            pool.free(region)
        self._views.clear()
        self._shared.clear()
        self._regions.clear()
