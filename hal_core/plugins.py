"""Which plugins there are. One broken plugin never breaks another.

pluggy validates hooks and marks them; calling is done here one implementation at a time, because a pluggy call stops at
the first implementation that raises, and its loader at the first import that fails.
"""

import os
import re
import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any

import attrs
import pluggy

from .errors import HalError, PluginError
from .hooks import API_VERSION, ENTRY_POINT_GROUP, BackendSpec, Hooks, KernelSpec

IMPORT_SECONDS = 30.0  # a hook module imports neither torch nor a driver


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


class Plugins:
    """Loads the entry points, each by itself, and calls their hooks, each by itself.

    Attributes:
        by_name: every plugin that was found. manager: pluggy's, in which a plugin may change its hooks at run time;
            calls follow after `registry.changed()`.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Plugin] = {}
        self.manager = pluggy.PluginManager("hal")
        self.manager.add_hookspecs(Hooks)

    def load(
        self, add: Callable[[str, list[BackendSpec], list[KernelSpec]], None], listed: list[str] | None = None
    ) -> None:
        """Import every allowed entry point and hand what it offers to `add(distribution, backends, kernels)`.

        Entry points of the distribution that a plugin's name stands for (hal-NAME) come first, then by name. What `add`
        raises is kept as the plugin's failure. `listed`: those that the access policy allows, None for all.
        """
        from importlib.metadata import entry_points  # slow to import, so on first use

        points = entry_points(group=ENTRY_POINT_GROUP)
        for point in sorted(points, key=lambda p: (not _is_known(p), p.name, _distribution(p))):
            name, distribution = point.name, _distribution(point)
            other, plugin = self.by_name.get(name), Plugin(name, distribution)
            self.by_name[name if other is None else f"{name} ({distribution})"] = plugin
            if off := _disabled_by(point, listed):
                full = name if _is_known(point) else f"{distribution.partition(' ')[0]}:{name}"
                plugin.failure = LoadFailure(
                    name,
                    distribution,
                    "disabled",
                    f"switched off by {off}",
                    fix=f"remove {name} from {off}" if off == "HAL_DISABLE" else f"add {full} to {off}",
                )
                continue
            stage = "duplicate"
            try:
                if other is not None and other.failure is None:
                    raise PluginError(
                        f"the plugin name {name!r} is taken by {other.distribution} and by {distribution}"
                    )
                stage = "import"
                module = _within(IMPORT_SECONDS, point.load, f"importing {point.value}")
                stage = "hook"
                self.manager.register(module, name)
                add(
                    distribution,
                    _list_of(BackendSpec, name, self.call(name, "hal_backends", api_version=API_VERSION)),
                    _list_of(KernelSpec, name, self.call(name, "hal_kernels")),
                )
            except BaseException as error:  # a plugin may raise anything; it is kept, shown and rolled back
                if isinstance(error, KeyboardInterrupt):  # the user's: see `_within`
                    raise
                if other is None and self.manager.has_plugin(name):  # pluggy keeps a plugin that it rejected
                    self.manager.unregister(name=name)
                plugin.failure = failed(name, distribution, stage, error)

    def implementations(self, hook: str) -> list[Any]:
        """pluggy's record of each working plugin that implements a hook, in the order of `by_name`."""
        found = {each.plugin_name: each for each in getattr(self.manager.hook, hook).get_hookimpls()}
        return [found[name] for name, plugin in self.by_name.items() if plugin.failure is None and name in found]

    def call(self, plugin: str, hook: str, **arguments: Any) -> Any:
        found = [each for each in getattr(self.manager.hook, hook).get_hookimpls() if each.plugin_name == plugin]
        return found and found[0].function(*(arguments[name] for name in found[0].argnames))

    def call_each(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """(plugin, result) of a hook, one implementation at a time; one that raises is recorded and left out later."""
        for each in self.implementations(hook):
            plugin = each.plugin_name
            try:
                result = each.function(*map(arguments.get, each.argnames))
            except (Exception, SystemExit, GeneratorExit) as error:  # the others must still be called
                self.fail(plugin, hook, error)
            else:
                if result is not None:
                    yield plugin, result

    def fail(self, name: str, hook: str, error: BaseException) -> None:
        """Record that a plugin's hook broke its contract; it is not called again. Raises under HAL_STRICT=1."""
        plugin = self.by_name[name]
        plugin.failure = failed(name, plugin.distribution, f"hook {hook}", error)


def _within(seconds: float, function: Callable[[], Any], what: str) -> Any:
    """The function's result, computed in a thread: one that hangs is left behind, and its exits are not the
    process's.
    """
    error: list[BaseException] = [PluginError(f"{what} did not finish in {seconds:g} s")]
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as raised:  # an interrupt here is the function's own; a user's comes from `join`
            error[0] = PluginError(f"{what}: {raised!r}") if isinstance(raised, KeyboardInterrupt) else raised

    thread = threading.Thread(target=copy_context().run, args=(run,), daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise error[0]
    return result[0]


def _list_of(kind: type, plugin: str, given: Any) -> list[Any]:
    if not isinstance(given or [], list) or not all(isinstance(item, kind) for item in given or []):
        raise PluginError(f"a hook of {plugin!r} returned {given!r}: return a list of {kind.__name__}")
    return given or []


def _distribution(point: Any) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else ""


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).casefold()


def _is_known(point: Any) -> bool:
    """Whether the distribution is the one that the plugin's name stands for: hal-NAME."""
    return point.dist is not None and _normal(point.dist.name) == f"hal-{_normal(point.name)}"


def _disabled_by(point: Any, listed: list[str] | None) -> str:
    """What switches a plugin off, a variable or the access policy, which lists as HAL_PLUGINS does; "" for nothing.
    Read before anything is imported.

    HAL_PLUGINS lists what may load: "distribution:name", or "name" for the plugin of the distribution hal-NAME.
    HAL_DISABLE lists what may not: "distribution:name", or "name" for that plugin of any distribution.
    """
    given = {variable: os.environ.get(variable) for variable in ("HAL_PLUGINS", "HAL_DISABLE")}
    words = {variable: text.split(",") for variable, text in given.items() if text is not None}
    words |= {} if listed is None else {"the access policy": listed}
    name = _normal(point.name)
    full = f"{_normal(point.dist.name) if point.dist else ''}:{name}"
    for source, texts in words.items():
        found = {_normal(word.strip()) for word in texts} & {full, name}
        if bool(found) if source == "HAL_DISABLE" else not (full in found or (found and _is_known(point))):
            return source
    return ""


def raised_at(error: BaseException) -> str:
    """The plugin's innermost line on the way to an error, "hal_x/cost.py:47 (estimate)"; "" where none was run."""
    from traceback import walk_tb

    walked = ((str(f.f_globals.get("__name__")).split(".")[0], f.f_code, n) for f, n in walk_tb(error.__traceback__))
    calls = [call for call in walked if call[0] not in {"hal_core", "torch", "importlib", "pkgutil", "threading"}]
    own = (f"{code.co_filename}:{line} ({code.co_name})" for name, code, line in reversed(calls) if name == calls[0][0])
    return "/".join(next(own, "").split(os.sep)[-2:])


def failed(name: str, distribution: str, stage: str, error: BaseException, fix: str = "") -> LoadFailure:
    """What is kept of an exception; under HAL_STRICT=1 it is raised instead."""
    import traceback

    text = str(error) if isinstance(error, HalError) else traceback.format_exception_only(error)[-1]
    message, trace = (
        (text.strip().split("\n")[-1] or type(error).__name__)
        + (f", raised in {at}" if (at := raised_at(error)) else ""),
        "".join(traceback.format_exception(error)),
    )
    fix = fix or f"if this plugin is yours, mend it; otherwise upgrade or uninstall {distribution or name}"
    if os.environ.get("HAL_STRICT") == "1":
        raise PluginError(f"{name} ({distribution}): {message}. {fix}") from error
    return LoadFailure(name, distribution, stage, message, trace, fix)
