"""Switching the router on and off, and what it shows of itself. The process has one router."""

from __future__ import annotations

import atexit
import math
import threading
from typing import Any

from hal_core import Decision, PluginError, hookimpl
from hal_core.plugin_api import registry

from .estimator import Estimator
from .router import Router
from .store import Store, read_totals

_lock = threading.Lock()
router: Router | None = None
store: Store | None = None
pools: list[Any] = []  # weak references to the pools that are open


class Hooks:
    """What the plugin `router` implements while it is enabled, `hal_commands` and `hal_doctor` beside it."""

    def __init__(self, router: Router, module: Any) -> None:
        self.router, self.module = router, module

    @hookimpl
    def hal_policy(self, request: Any, candidates: Any, policy: Any) -> Any:
        return self.router.policy(request, candidates, policy)

    @hookimpl
    def hal_call(self, decision: Any, seconds: float, operands: Any) -> None:
        self.router.call(decision, seconds, operands)

    @hookimpl
    def hal_error(self, decision: Any, error: Exception) -> None:
        self.router.error(decision, error)

    @hookimpl
    def hal_decision(self, decision: Any) -> None:
        self.router.decided(decision)

    @hookimpl
    def hal_commands(self, subparsers: Any) -> None:
        self.module.hal_commands(subparsers)

    @hookimpl
    def hal_doctor(self) -> Any:
        return self.module.hal_doctor()


def enable() -> None:
    """Route `hal.attention` from now on, in the whole process. What was learned on this machine is read.

    Named devices, `hal.use` and error bounds keep their meaning: they are never overridden. Twice is harmless. After an
    error inside the router, which `hal doctor` reports and calls go on without, it starts anew from what was saved.

    Raises:
        PluginError: the plugin `router` was switched off by HAL_PLUGINS or HAL_DISABLE, or failed to load.
    """
    global router, store
    registry.discover()
    plugin: Any = registry.plugins.by_name.get("router")
    if plugin is not None and plugin.failure is not None and plugin.failure.stage.startswith("hook hal_"):
        disable()
        plugin.failure = None
    if plugin is None or plugin.failure is not None:
        why = "is not installed" if plugin is None else plugin.failure.message
        raise PluginError(f"the plugin router cannot be enabled: it {why}")
    with _lock:
        if router is not None:
            return
        module = registry.plugins.manager.get_plugin("router")
        router, store = Router(), Store()
        _restore(router, store)
        router.on_save = save
        registry.plugins.manager.unregister(name="router")
        registry.plugins.manager.register(Hooks(router, module), "router")
    registry.changed()


def disable() -> None:
    """Leave the choice to the core again; what was learned is saved. Twice is harmless."""
    global router, store
    save()
    with _lock:
        if router is None:
            return
        attached: Any = registry.plugins.manager.unregister(name="router")
        registry.plugins.manager.register(attached.module, "router")
        router.breakers.reset()
        router = store = None
    registry.changed()


def _restore(router: Router, store: Store) -> None:
    data = store.read(registry.devices())
    if not data:
        return
    try:
        router.chooser.estimator.read(data["beliefs"])
        router.chooser.estimator.forget(data["changed"])
        router.totals = read_totals(data["totals"])
    except (ValueError, KeyError, TypeError) as error:
        router.chooser.estimator = Estimator()
        store.refuse(error)


def save() -> bool:
    """Write what was learned; False where there is no router or the file cannot be written, which is said once."""
    with _lock:
        if router is None or store is None:
            return False
        data = {"beliefs": router.chooser.estimator.to_dict(), "totals": dict(router.totals)}
        return store.write(data, registry.devices())


atexit.register(save)


def state() -> dict[str, Any]:
    """What the router believes and does now, as plain data. Empty parts where it is not enabled.

    `breakers` by device: state "closed", "open" or "half-open", failures, how often it opened, the newest error, until
    when (`time.monotonic`), and `held`, why the device itself refuses. `devices`: calls, load as a factor, recent error
    of the belief as mean |log|. `arms`: calls and learned factor on the estimate. `pools`: see `Pool.state`.
    """
    found = router
    opened = [pool.state() for reference in pools if (pool := reference()) is not None]
    if found is None:
        empty: dict[str, Any] = {"breakers": {}, "devices": {}, "arms": {}, "exploration": {"calls": 0, "seconds": 0.0}}
        return {"enabled": False, **empty, "pools": opened}
    chooser = found.chooser
    with found._lock:
        return {
            "enabled": True,
            "breakers": {name: each.to_dict() for name, each in found.breakers.by_device.items()},
            "devices": {
                name: {"calls": load.calls, "load": math.exp(load.value), "error": load.error}
                for name, load in chooser.estimator.loads.items()
            },
            "arms": {
                name: {"calls": line.calls, "factor": math.exp(line.ratio)}
                for name, line in chooser.estimator.arms.items()
            },
            "exploration": {"calls": chooser.explored, "seconds": chooser.spent},
            "pools": opened,
        }


def believed(decision: Decision) -> float | None:
    """Seconds that the router expects of a decision's calls, at its bucket's lengths; None where it has no idea."""
    expected = getattr(getattr(decision.expired, "__self__", None), "expected", None)
    return None if expected is None else math.exp(expected)
