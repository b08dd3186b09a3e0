"""Whether simulated devices say the same as another checkout's, to the last digit: cycles and bytes of the KPU, and
signal-to-noise ratios of the photonic devices for given draws. Ends with 1 where a figure differs. Without `--against`
this checkout is compared with itself, in two processes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import record
from checkouts import ROOT, Worker

PLUGINS = "kpu,photonics,photonic,photonic_lightmatter,lightmatter,luminous"
FAMILIES = ("kpu", "photonics")


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="the other checkout")
    options = parser.parse_args()
    checkouts = (ROOT, options.against or ROOT)
    workers = [Worker("simulator_worker.py", checkout, PLUGINS) for checkout in checkouts]
    rows, differing = [], 0
    for family in FAMILIES:
        here, there = (worker.ask(family) for worker in workers)
        for name in dict.fromkeys([*there, *here]):
            figures = [side.get(name) for side in (here, there)]
            differing += figures[0] != figures[1]
            rows.append([name, *_shown(*figures), "equal" if figures[0] == figures[1] else "different"])
    for worker in workers:
        worker.close()
    notes = [f"{len(rows) - differing} of {len(rows)} rows are equal in every figure."]
    columns = ("program or draw", "here", "there", "")
    section = "Against" if options.against else "Repeated"
    title = f"Simulated figures, beside {'another checkout' if options.against else 'a second process'}"
    record.publish(options, "simulators", title, columns, rows, notes, section)
    return int(differing > 0)


def _shown(here: dict[str, float] | None, there: dict[str, float] | None) -> tuple[str, str]:
    """The first figure of each side, and the first that differs."""
    if here is None or there is None:
        return ("absent" if here is None else "present"), ("absent" if there is None else "present")
    name = next((name for name in there if here.get(name) != there[name]), next(iter(there)))
    return f"{name} {here.get(name)!r}", f"{name} {there[name]!r}"


if __name__ == "__main__":
    sys.exit(main())
