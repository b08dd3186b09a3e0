"""What the caller asked for around a call: `use`, `prefer`, `configure`, and `meter`.

`use`, `prefer` and `meter` live in a ContextVar: asyncio tasks inherit them, threads do not (run a thread's function in
`contextvars.copy_context()` to hand them on). `configure` is for the whole process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import attrs

from .errors import ContractError

if TYPE_CHECKING:
    from .device import Device, Quantity

OBJECTIVES = ("time", "energy", "error")


@attrs.frozen
class Frame:
    """One level of wishes; None leaves a field to the level outside."""

    origin: str
    names: tuple[str, ...] = ()
    fall_through: bool = False
    objective: str | None = None
    allow_simulated: bool | None = None
    transfer: bool | None = None

    def __attrs_post_init__(self) -> None:
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise ContractError(f"objective {self.objective!r} was given: use 'time', 'energy' or 'error'")

    @property
    def key(self) -> str:
        """A text that two frames share only if they mean the same; "" for no wishes at all."""
        return "" if self == NO_FRAME else repr(attrs.astuple(self))


NO_FRAME = Frame("automatic")


@lru_cache(maxsize=1024)  # equal frames are one object, so that decision caches hash an identity
def _interned(frame: Frame) -> Frame:
    return frame


class _Mirror(threading.local):
    """What Dynamo guards on: it cannot trace a ContextVar. The attribute is per thread, the ContextVar the truth."""

    def __init__(self) -> None:
        self.key = ""
        self.names: tuple[str, ...] = ()


frame_var: ContextVar[Frame] = ContextVar("hal_frame", default=NO_FRAME)
mirror = _Mirror()


def _reflect() -> None:
    frame = frame_var.get()
    mirror.key, mirror.names = frame.key, frame.names


class use:  # noqa: N801 - reads as a statement: with hal.use("cpu:0")
    """Run the attention calls inside on one device, and nowhere else.

    Args:
        backend: backend name or device id; None changes only the wishes.
        wishes: objective, "time", "energy" or "error"; allow_simulated, let automatic selection take simulated and
            emulated devices; transfer, allow or forbid moving tensors to the device and back.

    If the device cannot run a call, `UnsupportedError` says why; no other device is tried. Inside compiled code, pass
    `backend=` instead.

    Raises:
        ContractError: an unknown objective. UnknownBackendError: no such backend (on entering).
    """

    def __init__(self, backend: str | None = None, **wishes: Any) -> None:
        self._wish = _wish("use", () if backend is None else (backend,), wishes)
        self._tokens: list[Token[Frame]] = []

    def __enter__(self) -> Self:
        from .registry import registry

        for name in self._wish.names:
            registry.entry(name)
        outer, wish = frame_var.get(), self._wish
        named = wish if wish.names else outer
        kept = {f: getattr(outer, f) for f in _WISHES if getattr(wish, f) is None}
        frame = attrs.evolve(wish, origin=named.origin, names=named.names, fall_through=named.fall_through, **kept)
        self._tokens.append(frame_var.set(_interned(frame)))
        _reflect()
        return self

    def __exit__(self, *error: object) -> None:
        frame_var.reset(self._tokens.pop())
        _reflect()


_WISHES = ("objective", "allow_simulated", "transfer")


def _wish(origin: str, names: tuple[str, ...], wishes: Mapping[str, Any]) -> Frame:
    if unknown := sorted(set(wishes) - set(_WISHES)):
        raise ContractError(f"unknown argument {unknown[0]!r} was given: use {', '.join(_WISHES)}")
    return Frame(origin, names, origin == "prefer", **wishes)


class prefer(use):  # noqa: N801
    """Like `use`, with a list: the first device that supports a call runs it, decided before anything is launched.

    Where none of them does, `UnsupportedError` gives the reasons of all.
    """

    def __init__(self, backends: Sequence[str], **wishes: Any) -> None:
        if isinstance(backends, str) or not backends:
            raise ContractError(f"prefer({backends!r}) was given: pass a list of backend names")
        super().__init__(None)
        self._wish = _wish("prefer", tuple(backends), wishes)


class Settings:
    """Process-wide settings; change them with `configure`."""

    def __init__(self) -> None:
        self.frame = NO_FRAME
        self.name = ""  # the configured backend, a plain attribute for Dynamo to guard
        self.memory_limits: dict[str, int] = {}


settings = Settings()


def configure(
    backend: str | None = None, *, memory_limit: int | Mapping[str, int] | None = None, **wishes: Any
) -> None:
    """Set the process's defaults; each call replaces all of them, and no argument at all restores the initial ones.

    Args:
        backend, wishes: as for `use`, for every call that says nothing itself.
        memory_limit: bytes, for every device or by device id. A call whose result and workspace would pass it, on top
            of what the device's memory manager holds, is refused before anything is allocated.

    HAL_BACKEND is read when a decision is made; call `configure()` after changing it in a running process.
    """
    from .registry import registry

    limits = (
        dict(memory_limit) if isinstance(memory_limit, Mapping) else {} if memory_limit is None else {"": memory_limit}
    )
    if any(type(limit) is not int or limit <= 0 for limit in limits.values()):
        raise ContractError(f"memory_limit {memory_limit!r} was given: pass bytes, 1 or more")
    if backend is not None:
        registry.entry(backend)
    settings.frame = _interned(
        _wish("automatic" if backend is None else "configure", (backend,) if backend else (), wishes)
    )
    settings.name, settings.memory_limits = backend or "", limits
    registry.changed()


def memory_limit(device_id: str) -> int | None:
    """The configured limit of a device in bytes; None for none."""
    return settings.memory_limits.get(device_id, settings.memory_limits.get(""))


@attrs.define
class MeterRecord:
    """What ran on one device inside a `meter`.

    Attributes:
        device: the device. calls: attention calls.
        wall: seconds by the host's clock, the device synchronised after each call; measured.
        time: seconds the device itself is said to need, for a simulated device; None where `wall` is the time.
        energy: joules; None where the device states none. Sums of the calls' estimates, with the worst origin met.
        macs: multiply-accumulates of visible pairs. transferred: bytes moved to the device and back.
    """

    device: Device
    calls: int = 0
    wall: float = 0.0
    time: Quantity | None = None
    energy: Quantity | None = None
    macs: int = 0
    transferred: int = 0


class Meter:
    """Sums of the calls inside `with hal.meter() as m`, per device id, in `m.records`."""

    def __init__(self) -> None:
        self.records: dict[str, MeterRecord] = {}
        self._lock = threading.Lock()

    def add(
        self, device: Device, wall: float, time: Quantity | None, energy: Quantity | None, macs: int, transferred: int
    ) -> None:
        with self._lock:
            if (record := self.records.get(device.id)) is None:
                self.records[device.id] = MeterRecord(device, 1, wall, time, energy, macs, transferred)
                return
            record.calls, record.wall = record.calls + 1, record.wall + wall
            record.time, record.energy = _sum(record.time, time), _sum(record.energy, energy)
            record.macs, record.transferred = record.macs + macs, record.transferred + transferred

    @property
    def wall(self) -> float:
        """Seconds over all devices."""
        return sum(record.wall for record in self.records.values())


def _sum(total: Quantity | None, part: Quantity | None) -> Quantity | None:
    """Interval sum. A call without a figure makes the sum None: a partial sum would look like a total."""
    if part is None or total is None:
        return None
    basis = max(total.basis, part.basis, key=lambda b: b.rank)
    provenance = max(total.provenance, part.provenance, key=lambda p: p.rank)
    source = total.source if total.source == part.source else "several"
    return type(total)(total.low + part.low, total.high + part.high, basis, provenance, source)


meter_var: ContextVar[Meter | None] = ContextVar("hal_meter", default=None)


@contextmanager
def meter() -> Iterator[Meter]:
    """Sum time, energy and work of the attention calls inside, per device.

    A metered call is synchronised before and after, so it costs more than an unmetered one. Meters nest: the innermost
    one counts. Compiled code is metered where its operators run.
    """
    current = Meter()
    token = meter_var.set(current)
    try:
        yield current
    finally:
        meter_var.reset(token)
