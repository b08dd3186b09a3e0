"""Metrics, spans, timelines and an audit log of attention calls, kept beside the calls and never in their way.

    import hal_telemetry
    hal_telemetry.enable(port=9464)            # or HAL_METRICS=9464: Prometheus scrapes http://127.0.0.1:9464/metrics
    print(hal_telemetry.metrics_text())        # the same, without a server
    with hal_telemetry.trace("run.json"):      # a timeline for ui.perfetto.dev
        model(inputs)

Importing this package imports neither torch nor a library of its own: a name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hal_core import __version__ as __version__

#: Public names by the module that holds them.
_NAMES = {
    "audit": "AuditLog Finding verify",
    "control": "disable enable enabled",
    "metrics": "Collector metrics_text",
    "policy": "PolicyReport check_policy",
    "recorder": "Call Series snapshot",
    "spans": "trace_calls",
    "timeline": "export_trace trace",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
