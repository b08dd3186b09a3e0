"""The recorder as Prometheus metrics, by prometheus-client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

import hal_core as hal
from hal_core.plugin_api import registry

from .recorder import RATIOS, SECONDS, memory, recorder, routing

BREAKER = {"closed": 0, "half-open": 1, "open": 2}


class Collector:
    """A collector of prometheus-client: `prometheus_client.REGISTRY.register(hal_telemetry.Collector())` adds hal's
    metrics to those of a program.
    """

    def collect(self) -> Iterator[Metric]:
        """Every metric, as it is now."""
        info = InfoMetricFamily("hal", "The version of hal-core.")
        info.add_metric((), {"version": hal.__version__})
        yield info
        recorder.drain()
        with recorder._lock:
            yield from _calls()
            yield _counter(
                "hal_decisions",
                "Decisions by device, none where no device could, and by who named it.",
                ("device", "origin"),
                recorder.decisions.items(),
            )
            yield _counter(
                "hal_refusals",
                "Refusals of devices in decisions, by reason.",
                ("device", "code"),
                recorder.refusals.items(),
            )
            yield _counter(
                "hal_errors",
                "What sessions raised, by device and type of exception.",
                ("device", "type"),
                recorder.errors.items(),
            )
            denied = [((kind,), count) for kind, count in recorder.denied.items()]
            yield _counter("hal_access_denied", "Uses that the access policy denied.", ("kind",), denied)
            audited = [((outcome,), count) for outcome, count in recorder.audited.items()]
            yield _counter("hal_audit_records", "Records of the audit log.", ("outcome",), audited)
            yield _counter(
                "hal_calls_dropped", "Calls that left the ring of newest calls.", (), [((), recorder.dropped)]
            )
        yield from _memory()
        yield from _routing()
        failed = [p for p in registry.plugin_list() if p.failure is not None and p.failure.stage != "disabled"]
        gauge = GaugeMetricFamily("hal_plugins_failed", "Plugins that failed to load or were given up.")
        gauge.add_metric((), len(failed))
        yield gauge

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering must not collect."""
        return iter(())


def _counter(name: str, text: str, labels: Sequence[str], values: Any) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


def _calls() -> Iterator[Metric]:
    labels = ("device", "caller")
    seconds = HistogramMetricFamily(
        "hal_call_seconds", "Duration of attention calls, as the host or the device's events saw it.", labels=labels
    )
    ratio = HistogramMetricFamily(
        "hal_estimate_ratio",
        "Measured over estimated time of calls; estimates are for the bound of a length bucket.",
        labels=labels,
    )
    error = CounterMetricFamily("hal_estimate_error_seconds", "Sum of |measured - estimated| time.", labels=labels)
    for key, series in recorder.series.items():
        seconds.add_metric(key, _cumulative(SECONDS, series.buckets), series.seconds)
        if any(series.ratios):
            ratio.add_metric(key, _cumulative(RATIOS, series.ratios), series.ratio_sum)
            error.add_metric(key, series.error_sum)
    return iter((seconds, ratio, error))


def _cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    total, found = 0, list[tuple[str, float]]()
    for bound, count in zip((*map(repr, bounds), "+Inf"), counts, strict=True):
        total += count
        found.append((bound, total))
    return found


def _memory() -> Iterator[Metric]:
    used = GaugeMetricFamily(
        "hal_memory_bytes", "Bytes of the device's memory manager: in_use, pooled, peak.", labels=("device", "kind")
    )
    limit = GaugeMetricFamily("hal_memory_limit_bytes", "The limit of a device's memory.", labels=("device",))
    for device, stats in memory():
        for kind in ("in_use", "pooled", "peak"):
            used.add_metric((device, kind), getattr(stats, kind))
        most = registry.memory_limit(device) or stats.limit
        if most is not None:
            limit.add_metric((device,), most)
    return iter((used, limit))


def _routing() -> Iterator[Metric]:
    """Of hal_router, where a program uses it."""
    breaker = GaugeMetricFamily(
        "hal_breaker_state", "State of a device's breaker: 0 closed, 1 half open, 2 open.", labels=("device",)
    )
    queued = GaugeMetricFamily("hal_queue_length", "Requests that wait for a device.", labels=("device",))
    breakers, waiting = routing()
    for device, state in breakers.items():
        breaker.add_metric((device,), BREAKER[state])
    for device, count in waiting.items():
        queued.add_metric((device,), count)
    return iter((breaker, queued))


_registry = CollectorRegistry(auto_describe=False)
_registry.register(Collector())


def metrics_text() -> str:
    """All metrics in Prometheus' text format."""
    text: str = generate_latest(_registry).decode()
    return text
