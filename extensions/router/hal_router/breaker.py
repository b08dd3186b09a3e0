"""Circuit breakers: a device that failed is gone round until a probe finds it well.

closed: the device is used. open: automatic selection and `prefer` pass it over; a named device runs, and raises what it
raises. half-open: the waiting time is over, and one small call, the probe, is run on it; where it succeeds the breaker
closes, where it fails it opens again for twice the time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

from hal_core import ContractError, DeviceUnavailableError, HalError, PluginError
from hal_core.plugin_api import LoadFailure, registry

#: Seconds that a breaker stays open at first, and at most.
FIRST, LONGEST = 1.0, 60.0
_MEMORY_NAMES = ("OutOfMemoryError", "MemoryError", "MemoryLimitError")


def is_device_fault(error: BaseException) -> bool:
    """Whether an error says that the device is not well. Lack of memory, refusals and malformed input do not."""
    chain: BaseException | None = error
    while chain is not None:
        text = str(chain).lower()
        if isinstance(chain, MemoryError) or type(chain).__name__ in _MEMORY_NAMES or "out of memory" in text:
            return False
        if "out_of_device_memory" in text or "out_of_host_memory" in text or "mem_object_allocation_failure" in text:
            return False
        chain = chain.__cause__
    if isinstance(error, DeviceUnavailableError | PluginError):
        return True
    unwell = isinstance(error, Exception) and not isinstance(error, HalError | ContractError)
    return unwell and not isinstance(error, TypeError | ValueError | NotImplementedError | LookupError | AssertionError)


class Breaker:
    """One device's. `until` is by the clock that was given; `opened` counts how often it opened."""

    def __init__(self) -> None:
        self.state, self.failures, self.opened, self.error = "closed", 0, 0, ""
        self.until: float | None = None
        self.held, self.wait = "", FIRST

    def to_dict(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "failures": self.failures,
            "opened": self.opened,
            "error": self.error,
            "until": self.until,
            "held": self.held,
        }


def probe(device: str) -> None:
    """Run a small call on a device. Raises what it raises; a device that refuses by its state fails the probe."""
    import torch

    import hal_core as hal

    registry.entry(device).broken.pop(device, None)  # a device that did not open is tried again
    found = hal.device(device)
    capabilities = hal.capabilities(device)
    for name in ("float32", "float16", "bfloat16", "float64"):
        if name in capabilities.dtypes:
            dim = capabilities.head_dim.next_up(16) or 64
            tensor = torch.zeros(1, 1, 16, dim, dtype=getattr(torch, name), device=found.reads[0])
            bound = hal.bind(tensor, tensor, tensor, backend=device)
            bound(tensor, tensor, tensor).sum().item()  # waits for the device
            return
    raise HalError(f"{device} takes no dtype that it can be probed with")


class Breakers:
    """Every device's breaker. Thread-safe.

    Args:
        clock: seconds. later: (seconds, function) runs a function in the background; a daemon timer by default.
        probe: called with a device id; raises where the device is not well.
    """

    def __init__(
        self,
        clock: Callable[[], float] = monotonic,
        later: Callable[[float, Callable[[], None]], None] | None = None,
        probe: Callable[[str], None] = probe,
    ) -> None:
        self.clock, self.later, self.probe = clock, later or _later, probe
        self.by_device: dict[str, Breaker] = {}
        self._lock = threading.RLock()
        self._probing: set[int] = set()

    def failed(self, device: str, error: Exception) -> None:
        """A call on the device raised. Opens the breaker where that is the device's fault."""
        if threading.get_ident() in self._probing or not is_device_fault(error):
            return
        with self._lock:
            breaker = self.by_device.setdefault(device, Breaker())
            breaker.failures += 1
            breaker.error = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            if breaker.state == "closed":
                breaker.wait = FIRST
                self._open(device, breaker)

    def succeeded(self, device: str) -> None:
        """A call on the device gave its result: one that somebody named it for, where the breaker is open."""
        breaker = self.by_device.get(device)
        if breaker is not None and breaker.state != "closed":
            self._close(device, breaker)

    def hold(self, device: str, why: str) -> None:
        """The device itself refuses, or no longer: shown beside the breaker, and decided by the device."""
        breaker = self.by_device.get(device)
        if breaker is None and why:
            breaker = self.by_device.setdefault(device, Breaker())
        if breaker is not None:
            breaker.held = why

    def is_open(self, device: str) -> bool:
        """Whether the device is to be gone round."""
        breaker = self.by_device.get(device)
        return breaker is not None and breaker.state != "closed"

    def _open(self, device: str, breaker: Breaker) -> None:
        breaker.state, breaker.opened = "open", breaker.opened + 1
        breaker.until = self.clock() + breaker.wait
        registry.avoided[device] = LoadFailure(
            device, "", "breaker", f"its breaker is open: {breaker.error}", fix="it is probed in the background"
        )
        registry.changed()
        self.later(breaker.wait, lambda: self._try(device))

    def _close(self, device: str, breaker: Breaker) -> None:
        with self._lock:
            breaker.state, breaker.until, breaker.wait, breaker.failures = "closed", None, FIRST, 0
            registry.avoided.pop(device, None)
        registry.changed()

    def _try(self, device: str) -> None:
        """Half-open: run the probe."""
        with self._lock:
            breaker = self.by_device.get(device)
            if breaker is None or breaker.state != "open":
                return
            breaker.state = "half-open"
        self._probing.add(threading.get_ident())
        try:
            self.probe(device)
        except Exception as error:
            with self._lock:
                breaker.error = f"{type(error).__name__}: {error}".split("\n")[0][:200]
                breaker.failures += 1
                breaker.wait = min(2 * breaker.wait, LONGEST)
                self._open(device, breaker)
        else:
            self._close(device, breaker)
        finally:
            self._probing.discard(threading.get_ident())

    def reset(self) -> None:
        """Close every breaker: the router was disabled."""
        for device, breaker in self.by_device.items():
            if breaker.state != "closed":
                self._close(device, breaker)
        self.by_device.clear()


def _later(seconds: float, function: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, function)
    timer.daemon = True
    timer.start()
