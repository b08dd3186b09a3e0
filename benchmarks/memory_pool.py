"""Microseconds to allocate and free 1 MiB from the pool of every device here: the least mean of several rounds.

The bar is 5 us of processor time for devices that read the host's memory. The elapsed time is given too, since a driver
may wait.
"""

from __future__ import annotations

import sys
import time

import record

import hal_core as hal

SHAPE, DTYPE, BAR = (512, 512), "float32", 5.0  # 1 MiB
ROUNDS, CALLS = 60, 300


def microseconds(memory: hal.MemoryManager) -> tuple[float, float]:
    """(elapsed, processor) microseconds of one allocate and free."""
    start, before = time.perf_counter(), time.process_time()
    for _ in range(CALLS):
        memory.free(memory.allocate(SHAPE, DTYPE))
    return (time.perf_counter() - start) / CALLS * 1e6, (time.process_time() - before) / CALLS * 1e6


def main() -> int:
    options = record.parser(__doc__).parse_args()
    managers, notes = dict[str, hal.MemoryManager](), [f"Least mean of {ROUNDS} rounds of {CALLS} calls, in turn."]
    for device in hal.devices():
        try:
            managers[device.id] = hal.memory(device.id)
        except hal.HalError as error:
            notes.append(f"{device.id} is not timed: {error}".splitlines()[0])
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in managers}
    for number in range(ROUNDS + 1):
        for name, memory in managers.items():
            taken = microseconds(memory)
            if number:  # the first round fills the pool
                found[name].append(taken)
    rows, missed = [], False
    for name, times in found.items():
        if managers[name].stats().pooled < 1 << 20:
            notes.append(f"{name} keeps no block after free: it has no pool.")
        elapsed, processor = (min(each) for each in zip(*times, strict=True))
        barred = "cpu" in hal.device(name).reads  # on a card, torch's allocator is another matter
        missed |= barred and processor > BAR
        verdict = "" if not barred else "held" if processor <= BAR else f"missed by {processor / BAR - 1:.0%}"
        rows.append([name, f"{elapsed:.2f} us", f"{processor:.2f} us", f"{BAR} us" if barred else "", verdict])
        managers[name].trim()
    columns = ("device", "elapsed", "processor time", "bar", "")
    record.publish(options, "memory", "Allocate and free 1 MiB from a device's pool", columns, rows, notes, "Pool")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
