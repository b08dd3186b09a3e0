"""An open OpenCL device: context, queue, compiled programs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import pyopencl as cl
from hal_compute import waits
from hal_compute.pool import OutOfMemoryError

from hal_core.plugin_api import Device, DeviceUnavailableError

from ..discovery import is_cpu
from .binaries import Programs

_NO_MEMORY = {-4: "device", -6: "host"}  # CL_MEM_OBJECT_ALLOCATION_FAILURE, CL_OUT_OF_HOST_MEMORY
#: Codes of a lost device: not available, out of resources (after a fault), invalid context, invalid queue.
_LOST = frozenset({-2, -5, -34, -36})


#: (context, programs) by device. Drivers do not give back all memory of a program that has run, so that programs are
#: kept for the next session of their device.
_contexts: dict[int, tuple[Any, Programs]] = {}


def _opened_once(handle: Any) -> tuple[Any, Programs]:
    found = _contexts.get(handle.int_ptr)
    if found is None:
        context = cl.Context([handle])
        found = _contexts.setdefault(handle.int_ptr, (context, Programs(context, handle)))
    return found


_hanging: list[Engine] = []  # closed while something still ran: releasing their queues might never return


class Engine:
    """One device's context and queue. The session serialises calls."""

    def __init__(self, device: Device, handle: Any) -> None:
        self.device, self.handle, self.lost = device, handle, False
        self.hangs = False  # something had not ended when the session was closed
        self.shares_memory = is_cpu(handle)
        with self.named("open the device"):
            self.context, self._programs = _opened_once(handle)
            self.queue = cl.CommandQueue(self.context, properties=cl.command_queue_properties.PROFILING_ENABLE)
        self._kernels: dict[tuple[str, ...], dict[str, Any]] = {}
        self.launched: list[Any] = []  # events of the call's programs
        self.device_seconds: float | None = None  # of the programs of the last finished call
        self._abandoned: list[tuple[str, Sequence[Any], Callable[[], None]]] = []

    # Calls that failed

    def abandon(self, what: str, events: Sequence[Any], release: Callable[[], None]) -> None:
        """Keep the memory of a failed call, whose programs may still use it, until they have ended."""
        self._abandoned.append((what, events, release))

    def reclaim(self) -> None:
        """Release what failed calls have left behind, once their programs have ended."""
        left = []
        for what, events, release in self._abandoned:
            if all(map(self.ended, events)):
                release()
            else:
                left.append((what, events, release))
        self._abandoned = left

    @property
    def abandoned(self) -> Sequence[str]:
        """The work of failed calls whose programs have not ended."""
        return [what for what, _, _ in self._abandoned]

    def check_idle(self) -> None:
        """Raise DeviceUnavailableError while a call that was given up still runs."""
        self.reclaim()
        if self._abandoned and not self.lost:
            raise DeviceUnavailableError(
                f"{self.device.id} did not end what was given up ({self._abandoned[0][0]}): close the session of "
                f"{self.device.id} and open it again"
            )

    def pending(self) -> list[Any]:
        """Events of everything that was launched, and of what else is in the queue."""
        events, self.launched = self.launched, []
        with suppress(cl.Error):  # a lost device has no queue
            events.append(cl.enqueue_marker(self.queue))
        return events

    @staticmethod
    def ended(event: Any) -> bool:
        """Whether a command has ended, successfully or not. Asks a lost device too."""
        try:
            return bool(event.command_execution_status <= cl.command_execution_status.COMPLETE)
        except cl.Error:  # a driver that does not know the command does not run it
            return True

    def end_within(self, events: Sequence[Any], timeout: float) -> bool:
        """Wait for commands, at most `timeout` seconds in all; returns whether they have ended."""
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
        """A kernel of kernels/programs/<program>.cl, compiled with options on first use."""
        key = (program, *options)
        if key not in self._kernels:
            with self.named(f"compile {program}.cl with {' '.join(options)}"):
                built = self._programs.build(program, options)
            self._kernels[key] = {kernel.function_name: kernel for kernel in built.all_kernels()}
        return self._kernels[key][name]

    def launch(self, kernel: Any, size: Sequence[int], group: Sequence[int] | None, *arguments: Any) -> None:
        """Enqueue a kernel, after everything that is in the queue."""
        with self.named(f"start {kernel.function_name}"):
            kernel.set_args(*arguments)
            event = cl.enqueue_nd_range_kernel(self.queue, kernel, tuple(size), None if group is None else tuple(group))
        self.launched.append(event)

    def wait(self, what: str, timeout: float | None = None, event: Any = None) -> None:
        """Wait for an event, or, without one, until the queue is empty.

        Args:
            what: the work for messages, as it follows "could not". timeout: seconds; None: `waits.TIMEOUT`.

        Raises:
            DeviceUnavailableError: after `timeout` seconds, or when the device fails.
        """
        timeout = waits.TIMEOUT if timeout is None else timeout
        with self.named(what):
            marker = cl.enqueue_marker(self.queue) if event is None else event
            self.queue.flush()
            start = time.monotonic()
            while (status := marker.command_execution_status) != cl.command_execution_status.COMPLETE:
                if status in _LOST:
                    self._lose(what)
                if status < 0:
                    raise DeviceUnavailableError(
                        f"{self.device.id} failed to {what} (OpenCL status {status}): close and reopen the device, and "
                        "make the call smaller if it happens again"
                    )
                passed = time.monotonic() - start
                if passed > timeout:
                    raise DeviceUnavailableError(
                        f"{self.device.id} did not {what} within {timeout:g} s: make the call smaller, or reopen "
                        "the device"
                    )
                if passed > 5e-4:
                    time.sleep(min(max(passed * 0.02, 2e-5), 0.01))

    def note_time(self) -> None:
        """Keep the device time from the first program's start to the last one's end."""
        if self.launched:
            with self.named("read its clock"):
                first, last = self.launched[0].profile.start, self.launched[-1].profile.end
            self.device_seconds = (last - first) * 1e-9
        self.launched = []

    @contextmanager
    def named(self, what: str, nbytes: int = 0) -> Iterator[None]:
        """Turn OpenCL's errors into this project's, with what was asked ("could not `what`") and what to do.

        Args:
            nbytes: of memory that is asked for; where it is 0, an "out of resources" error means a lost device.

        Raises:
            OutOfMemoryError: the driver has no memory.
            DeviceUnavailableError: any other error, and every call on a lost device.
        """
        if self.lost:
            self._lose(what)
        try:
            yield
        except cl.Error as error:
            text = str(error).strip().splitlines()
            if error.code in _NO_MEMORY or (error.code == -5 and nbytes):
                whose = _NO_MEMORY.get(error.code, "device")
                raise OutOfMemoryError(
                    self.device.id, whose, error.routine, nbytes, int(self.handle.global_mem_size)
                ) from error
            if error.code in _LOST:
                self._lose(what, error)
            raise DeviceUnavailableError(
                f"{self.device.id} could not {what} ({text[0] if text else type(error).__name__}): see `hal doctor`, "
                "and update the driver if it happens again"
            ) from error

    def _lose(self, what: str, cause: BaseException | None = None) -> NoReturn:
        self.lost = True
        _contexts.pop(self.handle.int_ptr, None)  # the next session opens the device anew
        raise DeviceUnavailableError(
            f"{self.device.id} was lost and could not {what}: close its session and open it again"
        ) from cause

    def synchronize(self) -> None:
        self.wait("finish what was queued")

    def stop(self) -> None:
        """Wait a last time, at most `waits.GRACE` seconds, for everything in the queue, before `close`."""
        with suppress(cl.Error):  # a lost device has no queue, and nothing in it
            self.hangs = not self.end_within([cl.enqueue_marker(self.queue)], waits.GRACE)

    def close(self) -> None:
        """Release everything. On a device that hangs, what is in use stays."""
        self._kernels.clear()
        self.reclaim()
        if self.hangs:
            _hanging.append(self)
