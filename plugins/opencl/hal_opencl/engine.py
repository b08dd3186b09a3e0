"""An open OpenCL device: context, queue, compiled programs, device memory. With lease.py and staging.py it speaks pyopencl."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib import resources
from typing import Any

import pyopencl as cl
import torch
from hal_compute.pool import DevicePool

from hal_core import Device, DeviceUnavailableError, HalError, MemoryLimitError, cache_dir

from .detect import is_cpu
from .lease import Lease
from .staging import Staging

#: Seconds after which a wait gives up.
TIMEOUT = 300.0


class Engine:
    """One device's context and queue. The session serialises calls."""

    def __init__(self, device: Device, handle: Any, limit: int | None = None) -> None:
        self.device, self.handle = device, handle
        self.shares_memory = is_cpu(handle)
        with self.named("open the device"):
            self.context = cl.Context([handle])
            self.queue = cl.CommandQueue(self.context, properties=cl.command_queue_properties.PROFILING_ENABLE)
        self._kernels: dict[tuple[str, ...], dict[str, Any]] = {}
        self.copies = self.copied = 0
        self.launched: list[Any] = []  # events of the call's programs
        self.device_seconds: float | None = None  # of the last finished call's programs
        bound = int(handle.global_mem_size)
        self.pool = DevicePool(
            device.id, self._create, self._destroy, alignment=max(int(handle.mem_base_addr_align) // 8, 64),
            largest=int(handle.max_mem_alloc_size), limit=bound if limit is None else min(limit, bound),
        )  # fmt: skip
        self.staging = Staging(self)

    # Memory

    def _create(self, nbytes: int) -> Any:
        with self.named(f"allocate {nbytes:,} bytes"):
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
            with self.named(f"compile {program}.cl with {' '.join(options)}"):
                built = cl.Program(self.context, _source(program)).build(["-w", *options], cache_dir=_program_cache())
            self._kernels[key] = {kernel.function_name: kernel for kernel in built.all_kernels()}
        return self._kernels[key][name]

    def launch(self, kernel: Any, size: Sequence[int], group: Sequence[int] | None, *arguments: Any) -> None:
        """Put a kernel into the queue, after everything that is in it."""
        with self.named(f"start {kernel.function_name}"):
            kernel.set_args(*arguments)
            event = cl.enqueue_nd_range_kernel(self.queue, kernel, tuple(size), None if group is None else tuple(group))
        self.launched.append(event)

    def wait(self, what: str, timeout: float = TIMEOUT, event: Any = None) -> None:
        """Until an event has come, or, without one, until the queue is empty. `what` follows "could not".

        Raises:
            DeviceUnavailableError: after `timeout` seconds, or when the device fails.
        """
        with self.named(what):
            marker = cl.enqueue_marker(self.queue) if event is None else event
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
        if self.launched:
            with self.named("read its clock"):
                first, last = self.launched[0].profile.start, self.launched[-1].profile.end
            self.device_seconds = (last - first) * 1e-9
        self.launched.clear()

    @contextmanager
    def named(self, what: str) -> Iterator[None]:
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
        return self.pool.trim() + self.staging.trim()

    def synchronize(self) -> None:
        self.wait("finish what was queued")

    def close(self) -> None:
        self._kernels.clear()
        self.trim()


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
