"""What the caller asked for around a call: `use`, `prefer`, `configure`, and `meter`.

`use`, `prefer` and `meter` live in ContextVars: asyncio tasks inherit them, threads do not (run a thread's function in
`contextvars.copy_context()` to hand them on). `configure` is for the whole process.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from typing import Any, Self

import attrs

from .access import caller_var
from .decision import NO_POLICY, Decision, Policy
from .device_info import Device, Estimate, MeterRecord, Quantity
from .errors import ContractError, refuse
from .registry import registry

#: The overrides of `use` and `prefer` in force, merged; equal policies are one object, so caches hash an identity.
policy_var: ContextVar[Policy] = ContextVar("hal_policy", default=NO_POLICY)
#: The overrides of the blocks that were entered, each a copy of its own. They do not hold the block itself, which
#: repairs a missing exit when it is deleted.
_entered: ContextVar[tuple[Policy, ...]] = ContextVar("hal_use", default=())
_interned: dict[Policy, Policy] = {NO_POLICY: NO_POLICY}
by_key: dict[str, Policy] = {"": NO_POLICY}  # a compiled graph names its policy by key


class _Mirror(threading.local):
    """What Dynamo guards on: it cannot trace a ContextVar. The attribute is per thread, the ContextVar the truth."""

    def __init__(self) -> None:
        self.key, self.names = "", tuple[str, ...]()


mirror = _Mirror()


def intern(policy: Policy) -> Policy:
    found = _interned.setdefault(policy, policy)
    by_key[found.key] = found
    return found


def _apply(entered: tuple[Policy, ...]) -> None:
    """Put what the entered blocks say, the innermost first, in force."""
    policy = intern(reduce(lambda outer, block: block.over(outer), entered, NO_POLICY))
    mirror.key, mirror.names = policy.key, policy.names
    caller_var.set(policy.caller or "")
    policy_var.set(policy)
    _entered.set(entered)  # last: until then, an interrupted block is still found here and taken out again


class use:  # noqa: N801 - reads as a statement: with hal.use("cpu:0")
    """Run the attention calls inside on one device, and nowhere else.

    Args:
        backend: backend name or device id; None changes only the overrides.
        overrides: objective, "time", "energy" or "error"; allow_simulated, let automatic selection take simulated and
            emulated devices; transfer, allow or forbid moving tensors to the device and back; options, a mapping of the
            device's own options (see `Capabilities.options`); tiling, a `TilingStrategy` that cuts the work.

    If the device cannot run a call, `UnsupportedError` says why; no other device is tried. Inside compiled code, pass
    `backend=` instead. Blocks may end in any order, as those of interleaved generators do.

    Raises:
        ContractError: an unknown or malformed override. UnknownBackendError: no such backend (on entering).
    """

    _origin, _unused = "use", False

    def __init__(self, backend: str | None = None, **overrides: Any) -> None:
        self._inside = list[Policy]()
        self.overrides = _overrides(self._origin, () if backend is None else (backend,), overrides)
        self._unused = True

    def __enter__(self) -> Self:
        self._unused = False
        for name in self.overrides.names:
            registry.entry(name)
        try:
            self._inside.append(attrs.evolve(self.overrides))
            _apply((*_entered.get(), self._inside[-1]))
            return self
        except BaseException:  # an interrupt before the block began
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        if self._inside:
            _apply(tuple(entry for entry in _entered.get() if entry is not self._inside[-1]))
            self._inside.pop()

    def __del__(self) -> None:
        if getattr(self, "_inside", ()):  # an interrupt came between the block's end and __exit__
            self.__exit__()
        elif self._unused:
            import warnings

            call = f"hal.{self._origin}({', '.join(map(repr, self.overrides.names))})"
            warnings.warn(
                f"{call} was never entered and changed nothing: write `with {call}:`", RuntimeWarning, stacklevel=2
            )


def _overrides(origin: str, names: tuple[str, ...], given: Mapping[str, Any]) -> Policy:
    known = ("allow_simulated", "objective", "options", "tiling", "transfer")
    if unknown := sorted(set(given) - set(known)):
        raise ContractError(f"unknown argument {unknown[0]!r} was given: use {', '.join(known)}")
    if (options := given.get("options")) is not None:
        refuse(
            (
                not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options),
                f"options={options!r} were given: pass a mapping of names to values",
            )
        )
        given = {**given, "options": tuple(sorted(options.items()))}
    return Policy(origin, names, origin == "prefer", **given)


class prefer(use):  # noqa: N801
    """Like `use`, with a list: the first device that supports a call runs it, decided before anything is launched.

    Where none of them does, `UnsupportedError` gives the reasons of all.
    """

    _origin = "prefer"

    def __init__(self, backends: Sequence[str], **overrides: Any) -> None:
        refuse(
            (isinstance(backends, str) or not backends, f"prefer({backends!r}) was given: pass a list of backend names")
        )
        super().__init__(None, **overrides)
        self.overrides = attrs.evolve(self.overrides, names=backends)


class caller(use):  # noqa: N801
    """Run the calls inside as `name`: the access policy and observers see it. Threads do not inherit it.

    Args:
        name: of the caller. secret: where the access policy knows the caller by one.

    Raises:
        AccessDeniedError: the secret is not the policy's.
    """

    _origin = "caller"

    def __init__(self, name: str, secret: str = "") -> None:
        registry.discover()
        registry.access.admit(str(name), secret)
        super().__init__()
        self.overrides = Policy(caller=str(name))


class settings:  # noqa: N801
    """Process-wide settings, its attributes; change them with `configure`."""

    policy = NO_POLICY
    name = ""  # the configured backend, a plain attribute for Dynamo to guard


_DEFAULTS = Policy(objective="time", allow_simulated=False, options=())


def configure(
    backend: str | None = None, *, memory_limit: int | Mapping[str, int] | None = None, **overrides: Any
) -> None:
    """Set the process's defaults; each call replaces all of them, and no argument at all restores the initial ones.

    Args:
        backend, overrides: as for `use`, for every call that says nothing itself.
        memory_limit: bytes, for every device or by device id. A call whose result and workspace would exceed it, on top
            of what the device's memory manager holds, is refused before anything is allocated.

    HAL_BACKEND is read when a decision is made; call `configure()` after changing it in a running process.
    """
    policy = _overrides("automatic" if backend is None else "configure", (backend,) if backend else (), overrides)
    if backend is not None:
        registry.entry(backend)
    limits = dict(memory_limit) if isinstance(memory_limit, Mapping) else {"": memory_limit or 0}
    refuse(
        (
            memory_limit is not None and any(type(limit) is not int or limit <= 0 for limit in limits.values()),
            f"memory_limit {memory_limit!r} was given: pass bytes, 1 or more",
        )
    )
    for name in filter(None, limits):
        registry.entry(name)
    registry.memory_limits = {} if memory_limit is None else limits
    settings.policy, settings.name = intern(policy), backend or ""
    registry.changed()


def merged_policy(
    backend: str | None = None,
    objective: str | None = None,
    allow_simulated: bool | None = None,
    transfer: bool | None = None,
    tiling: Any = None,
) -> Policy:
    """The call's arguments over `use` and `prefer`, over `configure`, over HAL_BACKEND, over automatic."""
    call = Policy(
        "argument",
        () if backend is None else (backend,),
        objective=objective,
        allow_simulated=allow_simulated,
        transfer=transfer,
        tiling=tiling,
    )
    variable = os.environ.get("HAL_BACKEND")
    environment = Policy("environment", (variable,)) if variable else NO_POLICY
    return reduce(Policy.over, (policy_var.get(), settings.policy, environment, _DEFAULTS), call)


class Meter:
    """Sums of the calls inside `with hal.meter() as m`, per device id, in `m.records`.

    `costs` holds what sessions said of calls that are running now, by call and thread.
    """

    def __init__(self) -> None:
        self.records: dict[str, MeterRecord] = {}
        self.costs: dict[tuple[int, int], Estimate] = {}
        self._lock = threading.Lock()

    def add(
        self,
        device: Device,
        wall: float,
        time: Quantity | None,
        energy: Quantity | None,
        macs: int,
        transferred: int,
    ) -> None:
        call = MeterRecord(device, 1, wall, time, energy, macs, transferred)
        with self._lock:
            before = self.records.get(device.id)
            self.records[device.id] = call if before is None else before.plus(call)

    @property
    def wall(self) -> float:
        """Seconds over all devices."""
        return sum(record.wall for record in self.records.values())


class watch:  # noqa: N801 - reads as a statement: with hal.watch() as seen
    """Keep the decision of the newest attention call inside, without timing it or waiting for its device.

    Attributes:
        decision: the decision that ran; None before a call has ended. calls: how many have.
    """

    def __init__(self) -> None:
        self.decision: Decision | None = None
        self._cost: Estimate | None = None
        self.outer, self.calls = meter_var.get(), 0
        self.costs: dict[tuple[int, int], Estimate] = {} if self.outer is None else self.outer.costs

    def __enter__(self) -> Self:
        self._token = meter_var.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        meter_var.reset(self._token)

    def saw(self, decision: Decision, cost: Estimate | None) -> None:
        self.decision, self.calls, self._cost = decision, self.calls + 1, cost

    @property
    def estimate(self) -> Estimate | None:
        """What the session said of the newest call, or the decision's estimate, made for its length bucket; None where
        neither says anything.
        """
        return self._cost if self._cost or self.decision is None else self.decision.winner.estimate


meter_var: ContextVar[Meter | watch | None] = ContextVar("hal_meter", default=None)


def current_meter() -> Meter | None:
    """The innermost `meter` around the caller; None where nothing is metered."""
    found = meter_var.get()
    while isinstance(found, watch):
        found = found.outer
    return found


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
