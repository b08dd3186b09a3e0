"""An open OpenCL device: context, queue, compiled programs, device memory. The only file that speaks pyopencl."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import pyopencl as cl
import torch
from hal_compute.pool import DevicePool, Region
from torch import Tensor

from hal_core import Device, DeviceUnavailableError, HalError, MemoryLimitError, cache_dir

from .detect import is_cpu

#: Seconds after which a wait gives up.
TIMEOUT = 300.0


class Operand(NamedTuple):
    """Device memory of one call. `host` shares it as bytes where the device is a CPU; None elsewhere."""

    buffer: Any
    host: Tensor | None
    nbytes: int


class Engine:
    """One device's context and queue. The session serialises calls."""

    def __init__(self, device: Device, handle: Any, limit: int | None = None) -> None:
        self.device, self.handle = device, handle
        self.shares_memory = is_cpu(handle)
        with self._named("open the device"):
            self.context = cl.Context([handle])
            self.queue = cl.CommandQueue(self.context, properties=cl.command_queue_properties.PROFILING_ENABLE)
        self._kernels: dict[tuple[str, ...], dict[str, Any]] = {}
        self.copies = self.copied = 0
        self._launched: list[Any] = []
        self.device_seconds: float | None = None  # of the last finished call's programs
        bound = int(handle.global_mem_size)
        self.pool = DevicePool(
            device.id, self._create, self._destroy, alignment=max(int(handle.mem_base_addr_align) // 8, 64),
            largest=int(handle.max_mem_alloc_size), limit=bound if limit is None else min(limit, bound),
        )  # fmt: skip

    # Memory

    def _create(self, nbytes: int) -> Any:
        with self._named(f"allocate {nbytes:,} bytes"):
            if not self.shares_memory:
                return cl.Buffer(self.context, cl.mem_flags.READ_WRITE, nbytes), None
            host = torch.empty(nbytes, dtype=torch.uint8)
            flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
            return cl.Buffer(self.context, flags, hostbuf=host.numpy()), host

    @staticmethod
    def _destroy(block: Any) -> None:
        block[0].release()

    @contextmanager
    def lease(self) -> Iterator[Lease]:
        """Memory for one call, given back at its end."""
        lease = Lease(self)
        try:
            yield lease
        except BaseException:
            with suppress(HalError):  # what is still running may read the memory that is given back below
                self.wait("finish after a failure", 30.0)
            raise
        finally:
            lease.release()

    # Programs

    def kernel(self, program: str, name: str, options: Sequence[str] = ()) -> Any:
        """A kernel of programs/<program>.cl, compiled with options on first use."""
        key = (program, *options)
        if key not in self._kernels:
            with self._named(f"compile {program}.cl with {' '.join(options)}"):
                built = cl.Program(self.context, _source(program)).build(list(options), cache_dir=_program_cache())
            self._kernels[key] = {kernel.function_name: kernel for kernel in built.all_kernels()}
        return self._kernels[key][name]

    def launch(self, kernel: Any, size: Sequence[int], group: Sequence[int] | None, *arguments: Any) -> None:
        """Put a kernel into the queue, after everything that is in it."""
        with self._named(f"start {kernel.function_name}"):
            kernel.set_args(*arguments)
            event = cl.enqueue_nd_range_kernel(self.queue, kernel, tuple(size), None if group is None else tuple(group))
        self._launched.append(event)

    def wait(self, what: str, timeout: float = TIMEOUT) -> None:
        """Until the queue is empty.

        Raises:
            DeviceUnavailableError: after `timeout` seconds, or when the device fails.
        """
        with self._named(what):
            marker = cl.enqueue_marker(self.queue)
            self.queue.flush()
            start = time.monotonic()
            while (status := marker.command_execution_status) != cl.command_execution_status.COMPLETE:
                if status < 0:
                    raise DeviceUnavailableError(
                        f"{self.device.id} failed to {what} (OpenCL status {status}): close and reopen the device, and make "
                        "the call smaller if it happens again"
                    )
                passed = time.monotonic() - start
                if passed > timeout:
                    raise DeviceUnavailableError(
                        f"{self.device.id} did not {what} within {timeout:g} s: make the call smaller, or reopen the device"
                    )
                if passed > 5e-4:
                    time.sleep(min(max(passed * 0.02, 2e-5), 0.01))

    def note_time(self) -> None:
        """Keep the device's time from the first program's start to the last one's end, by its own clock."""
        if self._launched:
            with self._named("read its clock"):
                first, last = self._launched[0].profile.start, self._launched[-1].profile.end
            self.device_seconds = (last - first) * 1e-9
        self._launched.clear()

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """OpenCL's errors as ours: what was asked, what came, what to do."""
        try:
            yield
        except cl.MemoryError as error:
            raise MemoryLimitError(self.device.id, 0, self.pool.in_use, self.pool.limit) from error
        except cl.Error as error:
            text = str(error).strip().splitlines()
            raise DeviceUnavailableError(
                f"{self.device.id} could not {what} ({text[0] if text else type(error).__name__}): see `hal doctor`, and "
                "update the driver if it happens again"
            ) from error

    def trim(self) -> int:
        return self.pool.trim()

    def synchronize(self) -> None:
        self.wait("finish what was queued")

    def close(self) -> None:
        self._kernels.clear()
        self.pool.trim()


class Lease:
    """Device memory of one call."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._regions: list[Region] = []
        self._views: list[Any] = []
        self._reads: list[tuple[Operand, Tensor]] = []

    def space(self, nbytes: int) -> Operand:
        """Uninitialised memory."""
        engine = self.engine
        region = engine.pool.allocate(nbytes)
        self._regions.append(region)
        buffer, host = region.block
        with engine._named("cut a buffer"):
            part = buffer.get_sub_region(region.offset, region.size)
        self._views.append(part)
        return Operand(part, None if host is None else host[region.offset : region.offset + nbytes], nbytes)

    def stage(self, tensor: Tensor, dim: int | None = None) -> Operand:
        """A tensor's values, contiguous, its last dimension padded to `dim` with zeros; shared where that is possible."""
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
            source = torch.nn.functional.pad(tensor, (0, dim - last)) if padded and dim else tensor.contiguous()
            with engine._named("copy operands"):
                cl.enqueue_copy(engine.queue, operand.buffer, source.view(torch.uint8).numpy(), is_blocking=True)
        engine.copies += 1
        engine.copied += tensor.numel() * tensor.element_size()
        return operand

    def share(self, tensor: Tensor) -> Operand:
        """The tensor's own memory as a buffer, on a device that shares the host's."""
        flat = tensor.view(-1).view(torch.uint8)
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
        with self.engine._named("share a tensor"):
            buffer = cl.Buffer(self.engine.context, flags, hostbuf=flat.numpy())
        self._views.append(buffer)
        return Operand(buffer, flat, flat.numel())

    def result(self, tensor: Tensor, dim: int | None = None) -> Operand:
        """Memory that becomes `tensor` (contiguous) when `finish` is called; rows of `dim` elements, cut on the way."""
        if self.engine.shares_memory and dim in (None, tensor.shape[-1]):
            return self.share(tensor)
        rows = tensor.numel() // max(tensor.shape[-1], 1)
        operand = self.space(rows * (dim or tensor.shape[-1]) * tensor.element_size())
        self._reads.append((operand, tensor))
        return operand

    def finish(self, what: str) -> None:
        """Wait for the queue and bring the results home."""
        engine = self.engine
        engine.wait(what)
        engine.note_time()
        for operand, tensor in self._reads:
            host = operand.host
            if host is None:
                host = torch.empty(operand.nbytes, dtype=torch.uint8)
                with engine._named("copy results"):
                    cl.enqueue_copy(engine.queue, host.numpy(), operand.buffer, is_blocking=True)
            typed = host[: operand.nbytes].view(tensor.dtype).view(*tensor.shape[:-1], -1)
            tensor.copy_(typed[..., : tensor.shape[-1]])
            engine.copies += 1
            engine.copied += tensor.numel() * tensor.element_size()
        self._reads.clear()

    def release(self) -> None:
        # A buffer over a caller's tensor must be gone before the tensor may be; after a failure the queue is drained first.
        self.engine._launched.clear()
        for view in self._views:
            view.release()
        for region in self._regions:
            self.engine.pool.free(region)
        self._views.clear()
        self._regions.clear()


@lru_cache(maxsize=8)
def _source(program: str) -> str:
    folder = resources.files("hal_opencl") / "programs"
    shared = "" if program == "kernels" else (folder / "problem.h").read_text(encoding="utf-8")
    return shared + (folder / f"{program}.cl").read_text(encoding="utf-8")


def _program_cache() -> str | None:
    """pyopencl's cache of compiled programs, keyed by device, driver and source; None where it cannot be written."""
    folder = cache_dir() / "opencl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return str(folder)
