"""`hal router`: what was learned on this machine, and the tables that `hal doctor` adds."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from hal_core.plugin_api import CommandResult, Table, registry

from . import control
from .estimator import Estimator
from .line import Line
from .store import Store, read_totals

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
    store, estimator, totals = Store(), Estimator(), dict[str, Any]()
    data = store.read(registry.devices())
    try:
        if data:
            estimator.read(data["beliefs"])
            totals = read_totals(data["totals"])
    except (ValueError, KeyError, TypeError) as error:
        store.refuse(error)
    served = [
        [name, f"{row[0]:.0f}", f"{row[1]:.3g} s", _share(row[2], row[1]), f"{row[3]:.0f}", _share(row[4], row[1])]
        for name, row in sorted(totals.items())
    ]
    arms = sorted(estimator.arms.items())
    learned = [[name, *_line(line)] for name, line in arms]
    by_kind = [
        [name, kind, *_line(known.line)]
        for name, _ in arms
        for kind, known in sorted(estimator.kinds.get(name, {}).items())
    ]
    columns = ["calls that count", "time over estimate", "time is about"]
    tables = [
        Table("Served", ["device", "calls", "time", "regret", "explored", "its cost"], served, _NOTES),
        Table("Learned", ["arm", *columns], learned),
        Table("By kind of request", ["arm", "kind", *columns], by_kind, _ABOUT_LINES),
    ]
    text = list(store.problems) or ([] if data else [f"Nothing was learned yet: there is no {store.path}."])
    if options.picture is not None and arms:
        from .picture import learned_factors

        options.picture.write_text(
            learned_factors({name: (line.calls, line.ratio) for name, line in arms}, totals), encoding="utf-8"
        )
        text.append(f"{options.picture} shows it.")
    shown = {name: {"calls": line.calls, "factor": math.exp(line.ratio)} for name, line in arms}
    return CommandResult({"totals": totals, "arms": shown}, tables, text)


def _line(line: Line) -> list[str]:
    """A line's cells: calls, mean factor, and what it says of a call."""
    fixed = f"{1e6 * line.fixed:.3g} us + " if line.fixed else ""
    return [f"{line.calls:.0f}", f"x{math.exp(line.ratio):.3g}", f"{fixed}{line.factor:.3g} x the estimate"]


_ABOUT_LINES = ["Beside these lines, means by size and by shape are kept. Calls that count: at most the newest 40."]
_NOTES = ["Regret: measured time beyond what was believed of the best other arm. Its cost: the part of exploring."]


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
