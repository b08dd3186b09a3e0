"""Calls as OpenTelemetry spans, inside whatever span is current where the call is made."""

from __future__ import annotations

from time import time_ns
from typing import Any

from hal_core import ContractError, Decision

from . import control
from .recorder import MOST_DECISIONS


def trace_calls(provider: Any = None) -> None:
    """Make a span `hal.attention` of every call from now on.

    Args:
        provider: an OpenTelemetry TracerProvider; None for the process's own.

    There is no convention for attention: the attributes are `hal.device`, `hal.fidelity`, `hal.request`, `hal.origin`
    and `hal.caller`. A device that reports its times later gives spans of the right length that end when it reports.

    Raises:
        ContractError: opentelemetry-api is not installed.
    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise ContractError(
            f"spans need opentelemetry ({error}): pip install 'hal-telemetry[opentelemetry]'"
        ) from error
    tracer = trace.get_tracer("hal_telemetry", tracer_provider=provider)
    known: dict[int, tuple[dict[str, str], Decision]] = {}  # a decision is kept so that its identity stays its own

    def span_of(decision: Decision, seconds: float) -> None:
        if (found := known.get(id(decision))) is None:
            if len(known) >= MOST_DECISIONS:
                known.clear()
            device = decision.winner.device
            facts = {"hal.device": device.id, "hal.fidelity": str(device.fidelity), "hal.origin": decision.origin}
            facts |= {"hal.request": decision.request.describe(), "hal.caller": decision.policy.caller or ""}
            found = known[id(decision)] = (facts, decision)
        end = time_ns()
        span = tracer.start_span("hal.attention", start_time=end - round(seconds * 1e9), attributes=found[0])
        span.end(end)

    before, control.state.spans = control.state.spans, span_of
    try:
        control.enable()
    except BaseException:
        control.state.spans = before
        raise
