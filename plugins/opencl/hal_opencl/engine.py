"""An open OpenCL device: context, queue, compiled programs, device memory. With the files below it speaks pyopencl."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import pyopencl as cl
import torch
from hal_compute.pool import DevicePool, OutOfMemoryError

from hal_core.plugin_api import Device, DeviceUnavailableError

from .binaries import Programs
from .detect import is_cpu
from .lease import Lease
from .staging import StagingRing

#: Seconds after which a wait gives up.
TIMEOUT = 300.0
#: Seconds that work which should be over already is given to end, after a failure and before closing.
GRACE = 30.0
_NO_MEMORY = {-4: "device", -6: "host"}  # CL_MEM_OBJECT_ALLOCATION_FAILURE, CL_OUT_OF_HOST_MEMORY
#: What drivers answer once a device is gone: not available, out of resources (after a fault), invalid context or queue.
_LOST = frozenset({-2, -5, -34, -36})


_hanging: list[Engine] = []  # closed while something ran on: giving their queues back could wait without end


class Engine:
    """One device's context and queue. The session serialises calls."""

    def __init__(self, device: Device, handle: Any, limit: int | None = None) -> None:
        self.device, self.handle, self.lost = device, handle, False
        self.hangs = False  # something did not end before it was closed
        self.shares_memory = is_cpu(handle)
        with self.named("open the device"):
            self.context = cl.Context([handle])
            self.queue = cl.CommandQueue(self.context, properties=cl.command_queue_properties.PROFILING_ENABLE)
            self._programs = Programs(self.context, handle)
        self._kernels: dict[tuple[str, ...], dict[str, Any]] = {}
        self.copies = self.copied = 0
        self.launched: list[Any] = []  # events of the call's programs
        self.device_seconds: float | None = None  # of the last finished call's programs
        bound = int(handle.global_mem_size)
        self.pool = DevicePool(
            device.id,
            self._create,
            self._destroy,
            alignment=max(int(handle.mem_base_addr_align) // 8, 64),
            largest=int(handle.max_mem_alloc_size),
            limit=bound if limit is None else min(limit, bound),
        )
        self.ring = StagingRing(self)
        self._abandoned: list[tuple[Lease, list[Any]]] = []  # of failed calls, with their programs that did not end

    # Memory

    def _create(self, nbytes: int) -> Any:
        with self.named(f"allocate {nbytes:,} bytes", nbytes):
            if not self.shares_memory:
                return cl.Buffer(self.context, cl.mem_flags.READ_WRITE, nbytes), None
            host = torch.empty(nbytes, dtype=torch.uint8)
            flags = cl.mem_flags.READ_WRITE | cl.mem_flags.USE_HOST_PTR
            return cl.Buffer(self.context, flags, hostbuf=host.numpy()), host

    @staticmethod
    def _destroy(block: Any) -> None:
        with suppress(cl.Error):  # a lost device has nothing to give back
            block[0].release()

    @contextmanager
    def lease(self, what: str) -> Iterator[Lease]:
        """Memory for one call, given back at its end. `what`: the work in words, "compute attention".

        Raises:
            DeviceUnavailableError: a call that was given up still runs.
        """
        self._reclaim()
        if self._abandoned and not self.lost:
            raise DeviceUnavailableError(
                f"{self.device.id} did not end what was given up ({self._abandoned[0][0].what}): close the session of "
                f"{self.device.id} and open it again"
            )
        lease = Lease(self, what)
        try:
            yield lease
        except BaseException:
            if self._end_within(self.launched, GRACE):
                lease.release()
            else:  # what still runs reads and writes this memory
                self._abandoned.append((lease, self.launched))
            self.launched = []
            raise
        self.launched = []
        lease.release()

    def _reclaim(self) -> None:
        """Give back what failed calls have left, once their programs have ended."""
        ended = [lease for lease, events in self._abandoned if all(map(self.ended, events))]
        self._abandoned = [left for left in self._abandoned if left[0] not in ended]
        for lease in ended:
            lease.release()

    @staticmethod
    def ended(event: Any) -> bool:
        """Whether a command is over, well or not; also of a device that is said to be lost."""
        try:
            return bool(event.command_execution_status <= cl.command_execution_status.COMPLETE)
        except cl.Error:  # a driver that forgot the command does not run it
            return True

    def _end_within(self, events: Sequence[Any], timeout: float) -> bool:
        """Wait for commands, at most `timeout` seconds in all; whether they ended."""
        with suppress(cl.Error):  # of a lost device
            self.queue.flush()
        deadline = time.monotonic() + timeout
        for event in events:
            while not self.ended(event):
                if time.monotonic() > deadline:
                    return False
                time.sleep(1e-4)
        return True

    # Programs

    def kernel(self, program: str, name: str, options: Sequence[str] = ()) -> Any:
        """A kernel of programs/<program>.cl, compiled with options on first use."""
        key = (program, *options)
        if key not in self._kernels:
            with self.named(f"compile {program}.cl with {' '.join(options)}"):
                built = self._programs.build(program, options)
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
                if status in _LOST:
                    self._lose(what)
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
        self.launched = []

    @contextmanager
    def named(self, what: str, nbytes: int = 0) -> Iterator[None]:
        """OpenCL's errors as ours: what was asked ("could not `what`"), what came, what to do.

        Args:
            nbytes: of memory that is asked for; where it is 0, an error for want of resources means a lost device.

        Raises:
            OutOfMemoryError: the driver has no memory. DeviceUnavailableError: any other error, and always after a
                loss.
        """
        if self.lost:
            self._lose(what)
        try:
            yield
        except cl.Error as error:
            text = str(error).strip().splitlines()
            if error.code in _NO_MEMORY or (error.code == -5 and nbytes):
                whose = _NO_MEMORY.get(error.code, "device")
                raise OutOfMemoryError(self.device.id, whose, error.routine, nbytes, self.pool.limit) from error
            if error.code in _LOST:
                self._lose(what, error)
            raise DeviceUnavailableError(
                f"{self.device.id} could not {what} ({text[0] if text else type(error).__name__}): see `hal doctor`, and "
                "update the driver if it happens again"
            ) from error

    def _lose(self, what: str, cause: BaseException | None = None) -> NoReturn:
        self.lost = True
        raise DeviceUnavailableError(
            f"{self.device.id} was lost and could not {what}: close its session and open it again"
        ) from cause

    def trim(self) -> int:
        self._reclaim()
        return self.pool.trim() + (0 if self.lost or self.hangs else self.ring.trim())

    def synchronize(self) -> None:
        self.wait("finish what was queued")

    def stop(self) -> None:
        """Wait a last time, at most `GRACE` seconds, for all that was queued, before `close`."""
        with suppress(cl.Error):  # a lost device has no queue any more, and nothing in it
            self.hangs = not self._end_within([cl.enqueue_marker(self.queue)], GRACE)

    def close(self) -> None:
        """Give everything back, but on a device that hangs: what is in use there stays."""
        self._kernels.clear()
        self.trim()
        if self.hangs:
            _hanging.append(self)
