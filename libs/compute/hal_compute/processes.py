"""Drivers do not survive a fork: their threads are not there in the child, so its first call would wait for ever."""

from __future__ import annotations

import os
import threading

from hal_core.plugin_api import DeviceUnavailableError


class ProcessGuard:
    """Remembers the process in which a driver was loaded or a device was opened."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that is remembered."""
        return os.getpid() != self._pid

    def check(self, name: str) -> None:
        """Raise DeviceUnavailableError in a forked process. `name`: the device's id."""
        if self.forked:
            raise DeviceUnavailableError(
                f"{name} cannot be used in a forked process, because its driver was loaded before the fork: use the "
                'spawn start method (multiprocessing.get_context("spawn"))'
            )


class DeviceLock:
    """A re-entrant lock by which calls of several threads take turns on a device.

    Entering it raises DeviceUnavailableError in a forked process, where the lock itself may be held for ever.
    """

    def __init__(self, name: str) -> None:
        self._name, self._guard, self._lock = name, ProcessGuard(), threading.RLock()

    @property
    def forked(self) -> bool:
        return self._guard.forked

    def __enter__(self) -> None:
        self._guard.check(self._name)
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()
