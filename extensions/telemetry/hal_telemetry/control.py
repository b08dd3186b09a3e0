"""Switching it on and off: the hooks that are attached, the server, the audit log, and what the environment says."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hal_core import ContractError, Decision, PluginError, hookimpl
from hal_core.plugin_api import registry

from .audit import AuditLog
from .recorder import recorder

Told = Callable[[Decision, float], None]


class _State:
    """What is on.

    Attributes:
        recording: metrics and the ring of calls. spans: what makes a span of a call. log: the audit log.
        log_calls: whether each call is a record too. refuse: what happens where no record can be written.
        problem: the sentence that this module put in the access policy. listening: whether denials are heard.
    """

    recording = log_calls = refuse = listening = False
    spans: Told | None = None
    log: AuditLog | None = None
    server: Any = None
    problem = ""


state = _State()


def _forked() -> None:
    """In a child process: the port is its parent's, whose server thread was not copied."""
    if state.server is not None:
        state.server.socket.close()
        state.server = None


os.register_at_fork(after_in_child=_forked)


def enable(
    port: int | None = None,
    *,
    host: str = "127.0.0.1",
    audit: str | Path | None = None,
    audit_calls: bool = False,
    audit_key: str | Path | None = None,
    refuse: bool = True,
) -> int | None:
    """Record calls and decisions from now on; what is on already stays on.

    Args:
        port: serve /metrics and /calls there; 0 for a free port, None for no server. host: the address to listen at.
        audit: a folder for the audit log. audit_calls: each call is a record, beside each decision and denial.
        audit_key: a file whose contents key the log's hashes. refuse: without a written record nothing may run; False:
            a warning instead.

    Returns:
        The port that is served; None without a server.

    Raises:
        ContractError: the port is in use, or the audit folder or key cannot be used.
        PluginError: the plugin `telemetry` is switched off.
    """
    registry.discover()
    plugin = registry.plugins.by_name.get("telemetry")
    if plugin is None or plugin.failure is not None:
        why = plugin.failure.message if plugin is not None and plugin.failure is not None else "is not installed"
        raise PluginError(f"the plugin telemetry {why}, so nothing can be recorded: see `hal doctor`")
    _start(port, host, audit, audit_calls, audit_key, refuse)
    _attach()
    return None if state.server is None else int(state.server.server_port)


def _start(
    port: int | None, host: str, audit: str | Path | None, calls: bool, key: str | Path | None, refuse: bool
) -> None:
    if audit is not None:
        try:
            log = AuditLog(audit, key=Path(key).read_bytes() if key is not None else b"")
        except OSError as error:
            raise ContractError(
                f"the audit log cannot be kept in {audit} ({error}): pass a folder that can be written"
            ) from error
        _close_log()
        state.log, state.log_calls, state.refuse = log, calls, refuse
    if port is not None:
        from .server import serve

        if state.server is not None:
            state.server.shutdown()
            state.server.server_close()
            state.server = None
        state.server = serve(host, port)
    state.recording = True
    if not state.listening:  # there is no way to take such a hook out again
        sys.addaudithook(_heard)
        state.listening = True


def disable() -> None:
    """Stop recording, serving and auditing; what was recorded stays until the process ends."""
    if state.server is not None:
        state.server.shutdown()
        state.server.server_close()
    _close_log()
    state.recording, state.spans, state.server = False, None, None
    if registry.plugins.manager.has_plugin("telemetry"):
        _attach()


def enabled() -> bool:
    """Whether calls are recorded."""
    return state.recording


def _close_log() -> None:
    if state.log is not None:
        state.log.close()
        state.log = None
    if state.problem and registry.access.problem == state.problem:  # a new log may be kept, so calls may run again
        registry.access.problem = state.problem = ""


def hooks() -> SimpleNamespace:
    """The hooks of what is on, for pluggy: a call costs nothing where nobody asked for calls."""
    from .plugin import hal_commands

    found = SimpleNamespace(hal_commands=hal_commands)
    wanted: list[Told] = [recorder.observe] if state.recording else []
    wanted += [state.spans] if state.spans is not None else []
    wanted += [_audit_call] if state.log is not None and state.log_calls else []
    if wanted == [recorder.observe]:
        found.hal_call = recorder.observe
    elif wanted:

        def hal_call(decision: Decision, seconds: float) -> None:
            for tell in wanted:
                tell(decision, seconds)

        found.hal_call = hookimpl(hal_call)
    if state.recording:
        found.hal_decision, found.hal_error = hookimpl(_decided), hookimpl(_failed)
    return found


def _attach() -> None:
    """Give pluggy the hooks of what is on, in the place of those before."""
    manager = registry.plugins.manager
    manager.unregister(name="telemetry")
    manager.register(hooks(), "telemetry")
    registry.changed()


def _decided(decision: Decision) -> None:
    recorder.decided(decision)
    refused = [[c.device.id, str(r.code), r.field] for c in decision.candidates for r in c.refusals]
    _audit(
        "decision",
        caller=decision.policy.caller or "",
        asked=decision.request.describe(),
        named=list(decision.policy.names),
        origin=decision.origin,
        chosen=decision.chosen,
        refused=refused,
    )


def _failed(decision: Decision, error: Exception) -> None:
    recorder.count(recorder.errors, (decision.chosen, type(error).__name__))


def _audit_call(decision: Decision, seconds: float) -> None:
    caller = decision.policy.caller or ""
    _audit("call", caller=caller, asked=decision.request.describe(), chosen=decision.chosen, seconds=seconds)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    """A hook of sys.addaudithook: what the access policy denied."""
    if event == "hal_core.access_denied" and state.recording:
        kind, name, caller = arguments
        recorder.count(recorder.denied, kind)
        _audit("denied", caller=caller, kind=kind, asked=name)


def _audit(event: str, **facts: Any) -> None:
    """One record; where it cannot be written nothing runs any more, or a warning says so."""
    if state.log is None:
        return
    try:
        state.log.append(event, **facts)
    except (OSError, ValueError, TypeError) as error:
        recorder.count(recorder.audited, "failed")
        no_log(state.log.folder, error, state.refuse)
    else:
        recorder.count(recorder.audited, "written")


def no_log(folder: Any, error: Exception, refuse: bool) -> None:
    """Deny everything, or warn, because the audit log cannot be kept."""
    why = f"the audit log in {folder} cannot be written ({error})"
    if refuse:
        registry.access.problem = state.problem = f"{why}, so everything is denied"
        registry.changed()
    else:
        warnings.warn(f"{why}, and calls go on without it", RuntimeWarning, stacklevel=4)


def from_environment() -> bool:
    """Switch on what HAL_METRICS ("9464" or "host:9464"), HAL_AUDIT (a folder) and the access policy's table [audit]
    ask for, while plugins are loaded; whether there was anything.
    """
    served, folder = os.environ.get("HAL_METRICS"), os.environ.get("HAL_AUDIT")
    ruled = dict(registry.access.rules.get("audit", {}))
    failure, calls = ruled.pop("failure", "refuse"), ruled.pop("calls", False)
    folder, key = ruled.pop("folder", folder), ruled.pop("key", os.environ.get("HAL_AUDIT_KEY"))
    if (
        ruled
        or failure not in ("refuse", "warn")
        or type(calls) is not bool
        or (folder is None and "audit" in registry.access.rules)
    ):
        given = registry.access.rules["audit"]
        no_log(folder, ValueError(f"[audit] {given!r} has folder, key, calls and failure, 'refuse' or 'warn'"), True)
        return False
    if folder is not None:
        try:
            _start(None, "", folder, calls, key, failure == "refuse")
        except (ContractError, TypeError) as error:
            no_log(folder, error, failure == "refuse")
    if served:
        host, _, port = served.rpartition(":")
        try:
            if not port.isdecimal():
                raise ContractError(f"HAL_METRICS={served!r} was given: use a port, or host:port")
            _start(int(port), host or "127.0.0.1", None, False, None, True)
        except ContractError as error:
            warnings.warn(f"no metrics are served: {error}", RuntimeWarning, stacklevel=2)
    return state.recording
