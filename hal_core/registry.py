"""Which backends, devices, sessions and kernels there are. One broken device never breaks another."""

import atexit
import os
import pkgutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any, cast

from .access import AccessPolicy, read_policy
from .capability import Capabilities, listing
from .device_info import Device, Fidelity
from .errors import DeviceUnavailableError, HalError, PluginError, UnknownBackendError, UnsupportedError
from .hooks import API_VERSION, BackendSpec, KernelSpec
from .plugins import LoadFailure, Plugin, Plugins, failed
from .protocols import AttentionBackend, MemoryManager, Session
from .toolkit.kernels import KERNELS

_loading: ContextVar[bool] = ContextVar("hal_loading", default=False)
_SESSION = ("memory", "tiling", "autograd", "prepare_attention", "compute_attention", "close")


class Entry:
    """A backend's place in the registry.

    Attributes:
        found: its devices; None until they were looked for. sessions: open ones by device id.
        broken: devices that did not open. request_failures: the last exception of check() or estimate(), by device id.
    """

    def __init__(self, spec: BackendSpec, distribution: str = "", backend: AttentionBackend | None = None) -> None:
        self.spec, self.distribution, self.backend = spec, distribution, backend
        self.failure: LoadFailure | None = None
        self.found: tuple[Device, ...] | None = None
        self.sessions: dict[str, Session] = {}
        self.broken, self.request_failures = dict[str, LoadFailure](), dict[str, LoadFailure]()
        self.lock = threading.RLock()  # held while devices are looked for and opened; other backends go on

    def close(self) -> None:
        """Close the sessions, the last opened first; an error of one does not keep the others open."""
        with ExitStack() as closing:
            while self.sessions:
                closing.callback(self.sessions.popitem()[1].close)


class Registry:
    """Discovery, run-time registration, open sessions and kernels. Thread-safe.

    Attributes:
        plugins: every plugin. access: the access policy. memory_limits: bytes by device id, "" for every device.
        avoided: why automatic selection and `prefer` pass a device over, by device id; a named device is not held back.
        on_change: called when devices or settings change; caches of decisions clear themselves here.
    """

    def __init__(self) -> None:
        self._lock, self._discovered = threading.RLock(), False
        self._entries: dict[str, Entry] = {}
        self._specs: dict[str, tuple[KernelSpec, str]] = {spec.name: (spec, "hal-core") for spec in KERNELS}
        self.plugins, self.access = Plugins(), AccessPolicy(None)
        self.memory_limits, self.avoided = dict[str, int](), dict[str, LoadFailure]()
        self.on_change: list[Callable[[], None]] = []

    # Discovery

    def discover(self) -> None:
        """Read the access policy and load the entry points, once. Imports light modules, never a backend's target."""
        if self._discovered or _loading.get():  # a plugin that asks while it is imported sees what is there by then
            return
        with self._lock:
            token = _loading.set(True)
            try:
                if not self._discovered:
                    self.access = read_policy()
                    self.plugins.load(self._add_all, [] if self.access.problem else self.access.rules.get("plugins"))
                    working = {name for name, plugin in self.plugins.by_name.items() if plugin.failure is None}
                    if absent := sorted({*self.access.rules.get("required", ())} - working):
                        self.access.problem = (
                            f"{self.access.path} requires {listing(absent)}, not loaded: see `hal doctor`"
                        )
                    self._discovered = True
            except BaseException:  # an interrupt, or HAL_STRICT=1: the next call begins anew
                self.plugins, self._entries = Plugins(), {}
                self._specs = {spec.name: (spec, "hal-core") for spec in KERNELS}
                raise
            finally:
                _loading.reset(token)

    def _add_all(self, distribution: str, backends: list[BackendSpec], kernels: list[KernelSpec]) -> None:
        entries, specs = dict(self._entries), dict(self._specs)
        for spec in backends:
            self._add(Entry(spec, distribution), entries)
        for kernel_spec in kernels:
            own = (kernel_spec, distribution)
            if (other := specs.setdefault(kernel_spec.name, own)) is not own:
                raise PluginError(
                    f"kernel {kernel_spec.name!r} is specified by {other[1]} and by {distribution}: one of them "
                    "must rename its own"
                )
        self._entries, self._specs = entries, specs

    def _add(self, entry: Entry, entries: dict[str, Entry]) -> None:
        name, other = entry.spec.name, entries.get(entry.spec.name)
        if other is not None:
            by = " and by ".join(e.distribution or "a registration at run time" for e in (other, entry))
            why, fix = f"backend {name!r} is offered by {by}", "uninstall or disable one of them"
            failure = LoadFailure(name, entry.distribution, "duplicate", why, fix=fix)
            # No plugin displaces the backend of the distribution that has its name.
            owned, owns = (e.distribution.startswith(f"hal-{name} ") for e in (other, entry))
            if owned or not owns:
                if not owned:
                    other.failure = failure  # entry-point order is arbitrary, so both are disabled
                raise PluginError(f"{why}: {fix}")
            for plugin in [p for p in self.plugins.by_name.values() if p.distribution == other.distribution]:
                plugin.failure = failure
        if entry.spec.api[0] != API_VERSION[0] or entry.spec.api > API_VERSION:
            fix = f"upgrade {'hal-core' if entry.spec.api > API_VERSION else entry.distribution or name}"
            written, core = (".".join(map(str, version)) for version in (entry.spec.api, API_VERSION))
            why = f"written for plugin contract {written}, this core has {core}"
            entry.failure = failed(name, entry.distribution, "api", PluginError(why), fix)
        entries[name] = entry

    def call_each(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """(plugin, result) of a hook of every working plugin."""
        self.discover()
        return self.plugins.call_each(hook, **arguments)

    # Looking up

    def plugin_list(self) -> list[Plugin]:
        self.discover()
        return list(self.plugins.by_name.values())

    def entries(self) -> list[Entry]:
        """Backends, highest priority first."""
        self.discover()
        return sorted(self._entries.values(), key=lambda e: (-e.spec.priority, e.spec.name))

    def kernel_specs(self) -> dict[str, KernelSpec]:
        self.discover()
        return {name: spec for name, (spec, _) in self._specs.items()}

    def devices_of(self, entry: Entry) -> tuple[Device, ...]:
        """The entry's devices; empty, with `entry.failure` set, where its target fails. Tried once."""
        with entry.lock:
            if entry.found is not None or entry.failure is not None:
                return entry.found or ()
            name, own = entry.spec.name, f"{entry.spec.name}:"
            try:
                entry.backend = entry.backend or resolve(entry.spec.target)()
                found = tuple(entry.backend.devices())
                if wrong := [
                    getattr(d, "id", d) for d in found if not (isinstance(d, Device) and d.id.startswith(own))
                ]:
                    raise PluginError(f"device ids {wrong} were given: give Device records with ids '{own}...'")
                entry.found = found
            except (Exception, SystemExit, GeneratorExit) as error:  # cached as a refusal and not tried again
                stage = "target" if entry.backend is None else "devices"
                entry.failure = failed(name, entry.distribution, stage, error, entry.spec.install_hint)
            return entry.found or ()

    def devices(self) -> list[Device]:
        """Every device that is present and works, hardware, emulated and simulated."""
        return [device for entry in self.entries() for device in self.devices_of(entry)]

    def find(self, name: str, *, may_be_absent: bool = False) -> list[Device]:
        """Devices that a backend name ("cpu") or device id ("cpu:0") means; empty only if they may be absent.

        Raises:
            UnknownBackendError: no installed plugin offers it. DeviceUnavailableError: installed, but not present.
        """
        entry = self.entry(name)
        found = [device for device in self.devices_of(entry) if name in (device.id, entry.spec.name)]
        if not found and not may_be_absent:
            raise DeviceUnavailableError(self.why_absent(entry, name))
        return found

    def entry(self, name: str) -> Entry:
        """The entry of a backend name or device id. Raises UnknownBackendError."""
        self.discover()
        if not isinstance(name, str):
            raise UnknownBackendError(f"backend {name!r} was given: pass a backend name or device id as text")
        backend = name.partition(":")[0]
        if backend in self._entries:
            return self._entries[backend]
        plugin = self.plugins.by_name.get(backend)
        if plugin is not None and (failure := plugin.failure) is not None:
            raise UnknownBackendError(f"backend {name!r} is not available, {failure.message}: {failure.fix}")
        from difflib import get_close_matches

        question = "".join(f" (did you mean {close!r}?)" for close in get_close_matches(backend, self._entries, 1))
        raise UnknownBackendError(
            f"unknown backend {name!r}{question}: installed are {listing(self._entries)}; `hal doctor` shows more"
        )

    def why_absent(self, entry: Entry, name: str = "") -> str:
        """One sentence on why an installed backend has no (such) device, with the fix."""
        name, spec = name or entry.spec.name, entry.spec
        if entry.failure is not None:
            return f"{name} is installed but cannot be used, {entry.failure.message}: {entry.failure.fix}"
        if entry.found:
            return f"{name} is not present: {spec.name} has {listing([d.id for d in entry.found])}"
        reason = f"it needs {listing(spec.requirements)}" if spec.requirements else "none was found"
        reason = f"{reason}. {spec.install_hint}".rstrip()
        try:
            reason = cast(Any, entry.backend).why_absent() if hasattr(entry.backend, "why_absent") else reason
        except Exception as error:
            reason = f"{reason} (its why_absent() failed: {error!r})"
        return f"{name} is installed but has no device: {reason}"

    def backend_of(self, device: Device | str) -> AttentionBackend:
        entry = self.entry(device if isinstance(device, str) else device.id)
        if not self.devices_of(entry) and entry.backend is None:
            raise DeviceUnavailableError(self.why_absent(entry))
        return cast(AttentionBackend, entry.backend)

    def memory_limit(self, device_id: str) -> int | None:
        """The limit of a device in bytes, the configured one or the access policy's for the current caller; None for
        none.
        """
        limits = [self.memory_limits.get(device_id, self.memory_limits.get("")), self.access.rule("memory")]
        return min((limit for limit in limits if limit is not None), default=None)

    # Sessions

    def session(self, name: str) -> Session:
        """The open session of a device id (or of a backend's first device); opened on first use, and again once closed.

        Raises:
            UnknownBackendError, DeviceUnavailableError: also when opening failed before; it is not tried again.
            AccessDeniedError: the access policy does not allow the device.
        """
        device, entry = self.find(name)[0], self.entry(name)
        self.access.demand("devices", device.id, device.fidelity is not Fidelity.HARDWARE)
        with entry.lock:
            if getattr(entry.sessions.get(device.id), "closed", False):  # by its user, after the device was lost say
                del entry.sessions[device.id]
                self.changed()
            if device.id not in entry.sessions and device.id not in entry.broken:
                try:
                    session = self.backend_of(device).open(device)
                    if missing := [n for n in _SESSION if not hasattr(session, n)]:
                        raise PluginError(f"open() gave {session!r}, which has no {listing(missing)}: give a Session")
                    entry.sessions[device.id] = session
                except (Exception, SystemExit, GeneratorExit) as error:
                    entry.broken[device.id] = failed(
                        device.id, entry.distribution, "open", error, entry.spec.install_hint or "see `hal doctor`"
                    )
            if failure := entry.broken.get(device.id):
                raise DeviceUnavailableError(f"{device.id} cannot be opened, {failure.message}: {failure.fix}")
            return entry.sessions[device.id]

    # Registration at run time

    def register(self, what: BackendSpec | AttentionBackend, name: str | None = None) -> None:
        """Add a backend at run time: its spec, or the object itself, whose name is `name` or the first part of its
        device ids.

        Raises:
            PluginError: the name is taken. AccessDeniedError: the access policy does not allow it.
        """
        self.discover()
        if isinstance(what, BackendSpec):
            entry = Entry(what)
        else:
            name = next((d.id.partition(":")[0] for d in what.devices()), "") if name is None else name
            if not name:
                raise PluginError("a backend without devices was given: pass its name")
            target = f"{type(what).__module__}:{type(what).__name__}"
            entry = Entry(BackendSpec(name=name, target=target), backend=what)
        self.access.demand("register", entry.spec.name)
        with self._lock:
            if entry.spec.name in self._entries:
                raise PluginError(f"backend {entry.spec.name!r} is registered already: unregister it first")
            self._add(entry, self._entries)
        self.changed()

    def unregister(self, name: str) -> None:
        """Remove a backend; its sessions are closed and calls bound to it raise."""
        with self._lock:
            entry = self._entries.pop(self.entry(name).spec.name)
        self.changed()
        entry.close()

    def changed(self) -> None:
        for callback in self.on_change:
            callback()

    def refresh(self, name: str) -> None:
        """Forget decisions and failures of the backend of device `name`, for example after a calibration."""
        self.entry(name).request_failures.clear()
        self.changed()

    def close(self) -> None:
        """Close every session. Runs at exit."""
        for entry in list(self._entries.values()):
            entry.close()

    def forked(self) -> None:
        """In a child process: sessions belong to the parent, and locks may be held by threads that are gone."""
        self._lock = threading.RLock()
        for entry in self._entries.values():
            entry.lock, entry.sessions = threading.RLock(), {}
        self.changed()


#: The object that "module:attr" names. Raises whatever its import raises.
resolve = pkgutil.resolve_name
#: The process's registry.
registry = Registry()
atexit.register(registry.close)
os.register_at_fork(after_in_child=registry.forked)
devices, session, register, unregister = registry.devices, registry.session, registry.register, registry.unregister
find_devices, open_session, refresh = registry.find, registry.session, registry.refresh


def device(name: str) -> Device:
    """The device of an id, or the first device of a backend. Raises UnknownBackendError, DeviceUnavailableError."""
    return registry.find(name)[0]


def capabilities(name: str) -> Capabilities:
    """What a device can do, as data. Raises UnknownBackendError, DeviceUnavailableError."""
    return registry.backend_of(name).capabilities(device(name))


def memory(name: str) -> MemoryManager:
    """The memory manager of a device, which is opened for it. Raises as `session`."""
    return registry.session(name).memory


def kernel(name: str, backend: str | None = None) -> Callable[..., Any]:
    """The kernel `name` on a device.

    Args:
        name: a kernel name that the core or an installed plugin specifies.
        backend: device or backend name; None for the first device, hardware before simulated, that provides it.

    Raises:
        UnknownBackendError: no such backend. UnsupportedError: nobody there provides the kernel.
        AccessDeniedError: the access policy does not allow the kernel.
    """
    registry.discover()
    registry.access.demand("kernels", name)
    broken = list[str]()
    every = sorted(registry.devices(), key=lambda d: d.fidelity.rank) if backend is None else registry.find(backend)
    for found in every:
        entry = registry.entry(found.id)
        try:
            offered = getattr(registry.backend_of(found), "kernel_names", lambda device: ())(found)
            opened: Any = registry.session(found.id) if name in offered else None
        except (Exception, SystemExit) as error:
            if not isinstance(error, HalError):
                entry.request_failures[found.id] = failed(entry.spec.name, entry.distribution, "kernel", error)
            if backend is not None:  # without a name, a broken provider does not hide the others
                raise
            broken.append(f", {found.id} failed ({type(error).__name__}: {error})")
        else:
            if opened is not None:
                return opened.kernel(name)  # type: ignore[no-any-return]
    where = f"on {backend}" if backend is not None else f"on any installed device{''.join(broken)}"
    raise UnsupportedError(
        f"kernel {name!r} is not provided {where}: specified kernels are {', '.join(sorted(registry.kernel_specs()))}"
    )
