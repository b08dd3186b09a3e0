"""What metrics add to a call: `hal.attention` on a tiny input with `hal_telemetry.enable()` and without, in turns.

Each figure is a median over rounds of the calling thread's processor time, so that other work of the machine counts
little; making the sums of noted calls is part of it. What a scrape and a decision cost stands beside.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import hal_telemetry
import record
import torch
from hal_telemetry.recorder import BATCH

import hal_core as hal

BAR = 2.0  # microseconds that metrics may add to a call
ROUNDS, CALLS = 200, 2 * BATCH


def each(call: Callable[[], object], calls: int = CALLS) -> float:
    """Microseconds of the thread's processor time for one call."""
    start = time.thread_time_ns()
    for _ in range(calls):
        call()
    return (time.thread_time_ns() - start) / calls / 1e3


def switch(turn: Callable[[], object], call: Callable[[], object]) -> None:
    """Enable or disable, and make the decision and the first checked call anew."""
    turn()
    call()
    call()


def compare(call: Callable[[], object], on: Callable[[], object]) -> tuple[float, float, list[float]]:
    """(median without, median with, the rounds' differences), both sides in turns."""
    without, beside = [], []
    for round_ in range(ROUNDS + 5):
        switch(hal_telemetry.disable, call)
        off = each(call)
        switch(on, call)
        if round_ >= 5:
            without.append(off)
            beside.append(each(call))
    hal_telemetry.disable()
    return statistics.median(without), statistics.median(beside), [b - a for a, b in zip(without, beside, strict=True)]


def main() -> int:
    options = record.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    query, key, value = torch.randn(3, 1, 2, 4, 16).unbind(0)
    rows, missed = [], False
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:

        def attend() -> object:
            return hal.attention(query, key, value)

        def audited() -> object:
            return hal_telemetry.enable(audit=folder, audit_calls=True)

        for name, on, bar in (
            ("metrics", hal_telemetry.enable, BAR),
            ("metrics and a record of each call", audited, None),
        ):
            off, with_, differences = compare(attend, on)
            median = statistics.median(differences)
            low, high = statistics.quantiles(differences, n=10)[0], statistics.quantiles(differences, n=10)[-1]
            verdict = "" if bar is None else "held" if median <= bar else "missed"
            missed |= verdict == "missed"
            span = f"{low:.2f} to {high:.2f}"
            rows.append(
                [name, f"{off:.2f}", f"{with_:.2f}", f"{median:.2f}", span, "" if bar is None else f"{bar}", verdict]
            )
        hal_telemetry.enable()
        for _ in range(1000):
            attend()
        scrape = statistics.median(each(hal_telemetry.metrics_text, 20) for _ in range(20))
        hal_telemetry.disable()
        rows.append(["a scrape, of one series of calls", "", f"{scrape:.0f}", "", "", "", ""])
        records = sum(hal_telemetry.verify(folder)[0].values())
    columns = ["what", "off, us", "on, us", "added, us", "a tenth of rounds below and above", "bar", ""]
    notes = [
        f"Medians over {ROUNDS} rounds of {CALLS} calls each, of the calling thread's processor time.",
        f"{records:,} audit records were written and verified.",
    ]
    record.publish(options, "telemetry", "What telemetry costs", columns, rows, notes, section="A tiny call")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
