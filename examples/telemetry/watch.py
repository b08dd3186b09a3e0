"""A program that is watched: metrics for Prometheus, an audit log, and a timeline for ui.perfetto.dev.

    python examples/telemetry/watch.py --port 9464 --seconds 60       # and in another terminal: hal top

Without --seconds it makes a few calls, prints what Prometheus would read, and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

import hal_telemetry
import torch

import hal_core as hal


def work(calls: int) -> None:
    """Attention of two callers, one device that is named, and one request that no device takes."""
    query, key, value = torch.randn(3, 1, 4, 128, 32).unbind(0)
    for _ in range(calls):
        with hal.caller("chat"):
            hal.attention(query, key, value, is_causal=True)
        with hal.caller("search"):
            hal.attention(query, key, value, backend="cpu:0")
    with contextlib.suppress(hal.UnsupportedError):
        hal.attention(query, key, value, backend="cpu:0", max_error=1e-30)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--port", type=int, default=0, help="of the metrics; 0 for a free one")
    options.add_argument("--seconds", type=float, default=0.0, help="how long to go on")
    options.add_argument("--out", type=Path, default=Path("out/telemetry"), help="folder of the log and the timeline")
    given = options.parse_args()
    port = hal_telemetry.enable(given.port, audit=given.out / "audit")
    print(f"http://127.0.0.1:{port}/metrics", flush=True)
    end = time.monotonic() + given.seconds
    with hal_telemetry.trace(given.out / "run.json"):
        work(20)
        while time.monotonic() < end:
            work(5)
            time.sleep(0.05)
    if not given.seconds:
        wanted = ("hal_call_seconds_count", "hal_decisions_total", "hal_refusals_total{", "hal_audit_records_total")
        print("\n".join(line for line in hal_telemetry.metrics_text().splitlines() if line.startswith(wanted)))
    _, findings = hal_telemetry.verify(given.out / "audit")
    print(f"{len(findings)} findings in {given.out / 'audit'}; the timeline is {given.out / 'run.json'}")


if __name__ == "__main__":
    main()
