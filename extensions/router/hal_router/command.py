"""`hal router`: what was learned on this machine, and the tables that `hal doctor` adds."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from hal_core.plugin_api import CommandResult, Table, registry

from . import control
from .store import Store

_ABOUT = "what the router learned on this machine: time served, regret, exploration, and factors on estimates"


def add_parser(subparsers: Any) -> None:
    """Add `router` to the subparsers of `hal`."""
    parser = subparsers.add_parser("router", help=_ABOUT, description=_ABOUT)
    actions = parser.add_subparsers(dest="action", required=True)
    report = actions.add_parser("report", help=_ABOUT)
    report.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw what was learned")
    report.set_defaults(run=run_report)
    reset = actions.add_parser("reset", help="forget what was learned on this machine")
    reset.set_defaults(run=run_reset)


def run_report(options: argparse.Namespace) -> CommandResult:
    """Tables of the state file of this machine."""
    store = Store()
    data = store.read(registry.devices())
    totals, beliefs = data.get("totals", {}), data.get("beliefs", [])
    arms = {row[0]: row for row in beliefs if len(row) == 3}
    kinds = [row for row in beliefs if len(row) == 4 and row[0] != "*"]
    served = [
        [name, f"{row[0]:.0f}", f"{row[1]:.3g} s", _share(row[2], row[1]), f"{row[3]:.0f}", _share(row[4], row[1])]
        for name, row in sorted(totals.items())
    ]
    learned = [[name, f"{row[1]:.0f}", f"x{math.exp(row[2]):.3g}"] for name, row in sorted(arms.items())]
    by_kind = [
        [row[0], row[1], f"{row[2]:.0f}", f"x{math.exp(row[3]):.3g}"] for row in sorted(kinds, key=lambda r: r[:2])
    ]
    tables = [
        Table("Served", ["device", "calls", "time", "regret", "explored", "its cost"], served, _NOTES),
        Table("Learned", ["arm", "calls that count", "time over the device's estimate"], learned),
        Table("By kind of request", ["arm", "kind", "calls that count", "time over estimate"], by_kind),
    ]
    text = list(store.problems) or ([] if data else [f"Nothing was learned yet: there is no {store.path}."])
    if options.picture is not None and arms:
        from .picture import learned_factors

        options.picture.write_text(learned_factors(arms, totals), encoding="utf-8")
        text.append(f"{options.picture} shows it.")
    rows = {
        "totals": totals,
        "arms": {name: {"calls": row[1], "factor": math.exp(row[2])} for name, row in arms.items()},
    }
    return CommandResult(rows, tables, text)


_NOTES = [
    "Regret: measured time beyond what was believed of the best arm at that moment. Its cost: the part of exploring."
]


def run_reset(options: argparse.Namespace) -> CommandResult:
    """Remove the state file."""
    path = Store().path
    there = path.exists()
    path.unlink(missing_ok=True)
    return CommandResult({"removed": there}, (), [f"{path} {'is removed' if there else 'is not there'}."])


def doctor_tables() -> list[Table]:
    """What `hal doctor` adds: breakers of this process that are not closed, and problems of the state file."""
    rows = [
        [name, each["state"] if each["state"] != "closed" else "held by the device", each["error"] or each["held"]]
        for name, each in control.state()["breakers"].items()
        if each["state"] != "closed" or each["held"]
    ]
    store = control.store
    rows += [["state", "not used", problem] for problem in (store.problems if store is not None else ())]
    return [Table("Router", ["device", "breaker", "why"], rows)] if rows else []


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2f}%" if whole else ""
