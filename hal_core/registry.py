"""Which plugins, backends and devices there are. One broken plugin never breaks another.

pluggy validates hooks and marks them; calling is done here one implementation at a time, because a pluggy call stops at
the first implementation that raises, and its loader at the first import that fails.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import attrs
import pluggy

from .capabilities import listing
from .device import Device
from .errors import DeviceUnavailableError, HalError, PluginError, UnknownBackendError
from .hooks import API_VERSION, ENTRY_POINT_GROUP, BackendSpec, Hooks
from .kernels import KernelSpec, resolve
from .protocols import Absent, AttentionBackend, Session

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@attrs.frozen
class LoadFailure:
    """Something of a plugin that failed, kept instead of raised.

    Attributes:
        name: plugin or backend. distribution: "hal-x 1.0", "" for run-time registrations.
        stage: "disabled", "import", "hook", "api", "duplicate", "target", "devices", "open".
        message: one sentence. traceback: the whole of it, "" where nothing was raised. fix: what to do.
    """

    name: str
    distribution: str
    stage: str
    message: str
    traceback: str = ""
    fix: str = ""


@attrs.define
class Plugin:
    """An entry point that was found, loaded or not."""

    name: str
    distribution: str
    failure: LoadFailure | None = None


@attrs.define(eq=False)
class Entry:
    """A backend's place in the registry."""

    spec: BackendSpec
    distribution: str = ""
    backend: AttentionBackend | None = None
    failure: LoadFailure | None = None
    found: tuple[Device, ...] | None = None
    sessions: dict[str, Session] = attrs.field(factory=dict)
    broken: dict[str, LoadFailure] = attrs.field(factory=dict)  # devices that did not open


class Registry:
    """Discovery, isolation, run-time registration and open sessions. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._plugins: dict[str, Plugin] = {}
        self._specs: dict[str, KernelSpec] = {}
        self._manager = pluggy.PluginManager("hal")
        self._manager.add_hookspecs(Hooks)
        self._discovered = False
        self.on_change: list[Callable[[], None]] = []  # caches of decisions clear themselves here

    # Discovery

    def discover(self) -> None:
        """Load the entry points once. Imports light modules, never a backend's target."""
        with self._lock:
            if not self._discovered:
                self._discovered = True
                from importlib.metadata import entry_points  # slow to import, so on first use

                for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
                    self._load_plugin(entry_point)

    def _load_plugin(self, entry_point: EntryPoint) -> None:
        name, distribution = (
            entry_point.name,
            f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist else "",
        )
        other, plugin = self._plugins.get(name), Plugin(name, distribution)
        self._plugins[name if other is None else f"{name} ({distribution})"] = plugin
        if off := _disabled_by(name):
            plugin.failure = LoadFailure(name, distribution, "disabled", f"switched off by {off}", fix=f"change {off}")
            return
        stage, before = "duplicate", (dict(self._entries), dict(self._specs))
        try:
            if other is not None:
                raise PluginError(f"the plugin name {name!r} is taken by {other.distribution} and by {distribution}")
            stage = "import"
            module = entry_point.load()
            stage = "hook"
            self._manager.register(module, name)
            specs = self._call(name, "hal_backends", api_version=API_VERSION) or []
            if not isinstance(specs, list) or not all(isinstance(spec, BackendSpec) for spec in specs):
                raise PluginError(f"hal_backends of {name!r} returned {specs!r}: return a list of BackendSpec")
            for spec in specs:
                self._add(Entry(spec, distribution))
            for kernel in self._call(name, "hal_kernels") or []:
                self._specs.setdefault(kernel.name, kernel)
        except (Exception, SystemExit) as error:  # a plugin may raise anything; it is kept, shown and rolled back
            self._entries, self._specs = before
            if other is None and self._manager.has_plugin(name):  # pluggy keeps a plugin that it rejected
                self._manager.unregister(name=name)
            plugin.failure = _failed(name, distribution, stage, error)

    def _add(self, entry: Entry) -> None:
        name, other = entry.spec.name, self._entries.get(entry.spec.name)
        if other is not None:
            by = [e.distribution or "a registration at run time" for e in (other, entry)]
            why = f"backend {name!r} is offered by {by[0]} and by {by[1]}"
            # Which of the two came first is chance, so the name serves neither.
            other.failure = LoadFailure(
                name, entry.distribution, "duplicate", why, fix="uninstall or disable one of them"
            )
            raise PluginError(f"{why}: uninstall or disable one of them")
        (major, minor), (core_major, core_minor) = entry.spec.api, API_VERSION
        if major != core_major or minor > core_minor:
            fix = "upgrade hal-core" if (major, minor) > API_VERSION else f"upgrade {entry.distribution or name}"
            why = f"written for plugin contract {major}.{minor}, this core has {core_major}.{core_minor}"
            entry.failure = _failed(name, entry.distribution, "api", PluginError(why), fix)
        self._entries[name] = entry

    def _call(self, plugin: str, hook: str, **arguments: Any) -> Any:
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            if implementation.plugin_name == plugin:
                return implementation.function(*(arguments[name] for name in implementation.argnames))
        return None

    def call_each(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """(plugin, result) of a hook, one implementation at a time; one that raises is recorded and left out later."""
        self.discover()
        for plugin in [name for name, p in self._plugins.items() if p.failure is None]:
            try:
                result = self._call(plugin, hook, **arguments)
            except (Exception, SystemExit) as error:  # the others must still be called
                self.fail_plugin(plugin, hook, error)
                continue
            if result is not None:
                yield plugin, result

    def fail_plugin(self, name: str, hook: str, error: BaseException) -> None:
        """Record that a plugin's hook broke its contract; it is not called again. Raises under HAL_STRICT=1."""
        plugin = self._plugins[name]
        plugin.failure = _failed(name, plugin.distribution, f"hook {hook}", error)

    def fail_entry(self, entry: Entry, stage: str, error: BaseException, fix: str = "") -> None:
        """Take a backend that raised where it must not out of service, with the reason kept."""
        entry.found = ()
        entry.failure = _failed(entry.spec.name, entry.distribution, stage, error, fix)

    # Looking up

    def plugins(self) -> list[Plugin]:
        self.discover()
        return list(self._plugins.values())

    def entries(self) -> list[Entry]:
        """Backends, highest priority first."""
        self.discover()
        return sorted(self._entries.values(), key=lambda e: (-e.spec.priority, e.spec.name))

    def kernel_specs(self) -> dict[str, KernelSpec]:
        self.discover()
        return dict(self._specs)

    def devices_of(self, entry: Entry) -> tuple[Device, ...]:
        """The entry's devices; empty, with `entry.failure` set, where its target fails. Tried once."""
        with self._lock:
            if entry.found is None and entry.failure is None:
                stage = "target"
                try:
                    entry.backend = entry.backend or resolve(entry.spec.target)()
                    stage = "devices"
                    found = tuple(entry.backend.devices())
                    if wrong := [d.id for d in found if not d.id.startswith(f"{entry.spec.name}:")]:
                        raise PluginError(f"device ids {wrong} were given: begin them with '{entry.spec.name}:'")
                    entry.found = found
                except (Exception, SystemExit) as error:  # cached as a refusal and not tried again
                    self.fail_entry(entry, stage, error, entry.spec.install_hint)
            entry.found = entry.found or ()
        return entry.found

    def devices(self) -> list[Device]:
        """Every device that is present and works, hardware, emulated and simulated."""
        return [device for entry in self.entries() for device in self.devices_of(entry)]

    def find(self, name: str) -> list[Device]:
        """Devices that a backend name ("cpu") or device id ("cpu:0") means; never empty.

        Raises:
            UnknownBackendError: no installed plugin offers it. DeviceUnavailableError: installed, but not present.
        """
        entry = self.entry(name)
        if found := [d for d in self.devices_of(entry) if name in (d.id, entry.spec.name)]:
            return found
        raise DeviceUnavailableError(self.why_absent(entry, name))

    def entry(self, name: str) -> Entry:
        """The entry of a backend name or device id. Raises UnknownBackendError."""
        self.discover()
        if not isinstance(name, str):
            raise UnknownBackendError(f"backend {name!r} was given: pass a backend name or device id as text")
        backend = name.partition(":")[0]
        if backend in self._entries:
            return self._entries[backend]
        if backend in self._plugins and (failure := self._plugins[backend].failure) is not None:
            raise UnknownBackendError(f"backend {name!r} is not available, {failure.message}: {failure.fix}")
        from difflib import get_close_matches

        question = "".join(f" (did you mean {close!r}?)" for close in get_close_matches(backend, self._entries, 1))
        installed = f"installed are {listing(self._entries)}; `hal doctor` shows more"
        raise UnknownBackendError(f"unknown backend {name!r}{question}: {installed}")

    def why_absent(self, entry: Entry, name: str = "") -> str:
        """One sentence on why an installed backend has no (such) device, with the fix."""
        name = name or entry.spec.name
        if entry.failure is not None:
            return f"{name} is installed but cannot be used, {entry.failure.message}: {entry.failure.fix}"
        if entry.found:
            return f"{name} is not present: {entry.spec.name} has {listing([d.id for d in entry.found])}"
        if isinstance(entry.backend, Absent):
            return f"{name} is installed but has no device: {entry.backend.why_absent()}"
        needs = f"it needs {listing(entry.spec.requirements)}" if entry.spec.requirements else "none was found"
        return f"{name} is installed but has no device, {needs}. {entry.spec.install_hint}".rstrip()

    def backend_of(self, device: Device | str) -> AttentionBackend:
        entry = self.entry(device if isinstance(device, str) else device.id)
        self.devices_of(entry)
        if entry.backend is None:
            raise DeviceUnavailableError(self.why_absent(entry))
        return entry.backend

    # Sessions

    def session(self, name: str) -> Session:
        """The open session of a device id (or of a backend's first device); opened on first use, and again once closed.

        Raises:
            UnknownBackendError, DeviceUnavailableError: also when opening failed before; it is not tried again.
        """
        device, entry = self.find(name)[0], self.entry(name)
        with self._lock:
            if getattr(entry.sessions.get(device.id), "closed", False):  # by its user, after the device was lost say
                del entry.sessions[device.id]
                self.changed()
            if device.id not in entry.sessions and device.id not in entry.broken:
                try:
                    entry.sessions[device.id] = self.backend_of(device).open(device)
                except (Exception, SystemExit) as error:
                    fix = entry.spec.install_hint or "see `hal doctor`"
                    entry.broken[device.id] = _failed(device.id, entry.distribution, "open", error, fix)
            if failure := entry.broken.get(device.id):
                raise DeviceUnavailableError(f"{device.id} cannot be opened, {failure.message}: {failure.fix}")
            return entry.sessions[device.id]

    def opened(self, device_id: str) -> Session | None:
        """The session of a device if one is open."""
        entry = self._entries.get(device_id.partition(":")[0])
        return entry.sessions.get(device_id) if entry else None

    # Registration at run time

    def register(self, what: BackendSpec | AttentionBackend, name: str | None = None) -> None:
        """Add a backend: its spec, or the object itself (its name is `name`, or the first part of its device ids)."""
        with self._lock:
            self.discover()
            if isinstance(what, BackendSpec):
                entry = Entry(what)
            else:
                if name is None:
                    name = next((device.id.partition(":")[0] for device in what.devices()), "")
                if not name:
                    raise PluginError("a backend without devices was given: pass its name")
                kind = type(what)
                entry = Entry(BackendSpec(name=name, target=f"{kind.__module__}:{kind.__name__}"), backend=what)
            if entry.spec.name in self._entries:
                raise PluginError(f"backend {entry.spec.name!r} is registered already: unregister it first")
            self._add(entry)
            self.changed()

    def unregister(self, name: str) -> None:
        """Remove a backend; its sessions are closed and calls bound to it raise."""
        with self._lock:
            entry = self.entry(name)
            del self._entries[entry.spec.name]
            self.changed()
            _close(entry)

    def changed(self) -> None:
        for callback in self.on_change:
            callback()

    def refresh(self, name: str) -> None:
        """Forget decisions, for example after a calibration of device `name`."""
        self.entry(name)
        self.changed()

    def close(self) -> None:
        """Close every session. Called at exit; later use opens them again."""
        with self._lock:
            self.changed()
            _close(*self._entries.values())


def _close(*entries: Entry) -> None:
    with ExitStack() as closing:  # one that raises does not keep the others open
        for entry in entries:
            sessions, entry.sessions = entry.sessions, {}
            for session in sessions.values():
                closing.callback(session.close)


def _disabled_by(name: str) -> str:
    """The environment variable that switches a plugin off; "" for none. Read before anything is imported."""
    allowed, denied = (os.environ.get(variable) for variable in ("HAL_PLUGINS", "HAL_DISABLE"))
    if allowed is not None and name not in [word.strip() for word in allowed.split(",")]:
        return "HAL_PLUGINS"
    return "HAL_DISABLE" if denied and name in [word.strip() for word in denied.split(",")] else ""


def _failed(name: str, distribution: str, stage: str, error: BaseException, fix: str = "") -> LoadFailure:
    """What is kept of an exception; under HAL_STRICT=1 it is raised instead."""
    import traceback

    lines = (
        (str(error) if isinstance(error, HalError) else traceback.format_exception_only(error)[-1]).strip().splitlines()
    )
    message, trace = lines[-1] if lines else type(error).__name__, "".join(traceback.format_exception(error))
    fix = fix or f"upgrade or uninstall {distribution or name}"
    if os.environ.get("HAL_STRICT") == "1":
        raise PluginError(f"{name} ({distribution}): {message}. {fix}") from error
    return LoadFailure(name, distribution, stage, message, trace, fix)


#: The process's registry.
registry = Registry()
atexit.register(registry.close)
devices, session, register, unregister = registry.devices, registry.session, registry.register, registry.unregister
