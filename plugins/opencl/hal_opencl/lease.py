"""Device memory of one call: operands brought there, results brought home, all given back at the end."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import pyopencl as cl
import torch
from hal_compute.pool import Region
from torch import Tensor

if TYPE_CHECKING:
    from .engine import Engine


class Operand(NamedTuple):
    """Device memory of one call.

    Attributes:
        buffer: what programs are given. host: the same as bytes where the device is a CPU; None elsewhere.
        block, offset: the buffer that it was cut from, and where: drivers copy to and from whole buffers faster.
    """

    buffer: Any
    host: Tensor | None
    nbytes: int
    block: Any
    offset: int


class Lease:
    """Device memory of one call. `what` names its work for messages."""

    def __init__(self, engine: Engine, what: str) -> None:
        self.engine, self.what = engine, what
        self._regions: list[Region] = []
        self._views: list[Any] = []
        self._shared: list[Tensor] = []  # kept as long as the buffers over them
        self._reads: list[tuple[Operand, Tensor, int]] = []

    def space(self, nbytes: int) -> Operand:
        """Uninitialised memory."""
        engine = self.engine
        region = engine.pool.allocate(nbytes)
        self._regions.append(region)
        buffer, host = region.block
        with engine.named("cut a buffer"):
            part = buffer.get_sub_region(region.offset, region.size)
        self._views.append(part)
        seen = None if host is None else host[region.offset : region.offset + nbytes]
        return Operand(part, seen, nbytes, buffer, region.offset)

    def stage(self, tensor: Tensor, dim: int | None = None) -> Operand:
        """A tensor's values, contiguous, its last dimension padded to `dim` with zeros; shared where that is
        possible.
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
            engine.ring.upload(tensor, operand.block, operand.offset, dim or last)
        engine.copies += 1
        engine.copied += tensor.numel() * tensor.element_size()
        return operand

    def share(self, tensor: Tensor) -> Operand:
        """The tensor's own memory as a buffer, on a device that shares the host's."""
        flat = tensor.view(-1).view(torch.uint8)
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
        with self.engine.named("share a tensor"):
            buffer = cl.Buffer(self.engine.context, flags, hostbuf=flat.numpy())
        self._views.append(buffer)
        self._shared.append(flat)
        return Operand(buffer, flat, flat.numel(), buffer, 0)

    def result(self, tensor: Tensor, dim: int | None = None) -> Operand:
        """Memory that becomes `tensor` (contiguous) when `finish` is called; rows of `dim` elements, cut on the way."""
        if self.engine.shares_memory and dim in (None, tensor.shape[-1]):
            return self.share(tensor)
        rows = tensor.numel() // max(tensor.shape[-1], 1)
        operand = self.space(rows * (dim or tensor.shape[-1]) * tensor.element_size())
        self._reads.append((operand, tensor, dim or tensor.shape[-1]))
        return operand

    def finish(self) -> None:
        """Wait for the queue and bring the results home."""
        engine = self.engine
        engine.wait(self.what)
        engine.note_time()
        for operand, tensor, dim in self._reads:
            if operand.host is None:
                engine.ring.download(operand.block, operand.offset, tensor, dim, self.what)
            else:
                typed = operand.host[: operand.nbytes].view(tensor.dtype).view(*tensor.shape[:-1], dim)
                tensor.copy_(typed[..., : tensor.shape[-1]])
            engine.copies += 1
            engine.copied += tensor.numel() * tensor.element_size()
        self._reads.clear()

    def release(self) -> None:
        """Give everything back, once the device is done with it."""
        for view in self._views:
            with suppress(cl.Error):  # a lost device has nothing to give back
                view.release()
        for region in self._regions:
            self.engine.pool.free(region)
        self._views.clear()
        self._shared.clear()
        self._regions.clear()
