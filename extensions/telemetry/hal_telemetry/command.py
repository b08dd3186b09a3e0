"""`hal top`, `hal audit verify` and `hal access check`."""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from hal_core import ContractError
from hal_core.plugin_api import CommandResult, Table, write_whole

from .audit import verify
from .policy import check_policy


def add_parsers(subparsers: Any) -> None:
    """Add the commands to the subparsers of `hal`."""
    top = subparsers.add_parser("top", help="what a running program's attention does, live")
    top.add_argument("address", nargs="?", default="127.0.0.1:9464", help="host:port of its metrics (%(default)s)")
    top.add_argument("--once", action="store_true", help="print one table and end")
    top.add_argument("--interval", type=float, default=1.0, metavar="SECONDS")
    top.add_argument(
        "--trace", type=Path, metavar="FILE", help="write its newest calls as a timeline for Perfetto instead"
    )
    top.set_defaults(run=run_top)
    audit = subparsers.add_parser("audit", help="the audit log").add_subparsers(required=True, metavar="COMMAND")
    check = audit.add_parser("verify", help="find changed, removed, swapped and cut-off records")
    check.add_argument("folder", type=Path)
    check.add_argument("--key", type=Path, metavar="FILE", help="the key that the log was written with")
    check.set_defaults(run=run_verify)
    access = subparsers.add_parser("access", help="the access policy").add_subparsers(required=True, metavar="COMMAND")
    check = access.add_parser("check", help="what the policy allows to whom, and what is wrong with it")
    check.add_argument("file", type=Path, nargs="?", help="default: the policy that is in force")
    check.set_defaults(run=run_check)


def _fetch(address: str, path: str) -> Any:
    url = (address if "://" in address else f"http://{address}").rstrip("/") + path
    if not url.startswith(("http://", "https://")):
        raise ContractError(f"address {address!r} was given: pass host:port")
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())
    except (OSError, ValueError) as error:
        raise ContractError(
            f"nothing of hal answers at {url} ({error}): start the program with HAL_METRICS=9464, or pass its host:port"
        ) from error


def run_top(options: argparse.Namespace) -> CommandResult:
    """Show the newest state, again and again on a terminal until it is stopped."""
    if options.trace is not None:
        data = _fetch(options.address, "/trace")
        write_whole(options.trace, json.dumps(data))
        calls = sum(event.get("ph") == "X" for event in data["traceEvents"])
        return CommandResult({"calls": calls}, text=[f"{calls} calls in {options.trace}: open it at ui.perfetto.dev"])
    if options.interval <= 0:
        raise ContractError(f"--interval {options.interval} was given: use seconds above 0")
    data = _fetch(options.address, "/calls")
    if sys.stdout.isatty() and not options.once and not options.json:
        from rich.console import Group
        from rich.live import Live
        from rich.table import Table as Drawn

        def drawn(data: dict[str, Any]) -> Group:
            found = []
            for table in tables(data):
                shown = Drawn(*table.columns, title=table.title, title_justify="left")
                for row in table.rows:
                    shown.add_row(*row)
                found.append(shown)
            return Group(*found)

        with Live(drawn(data), screen=True, auto_refresh=False) as live:
            while True:  # until Ctrl-C
                live.update(drawn(data), refresh=True)
                time.sleep(options.interval)
                data = _fetch(options.address, "/calls")
    return CommandResult(data, tables(data))


def tables(data: dict[str, Any]) -> list[Table]:
    """A `snapshot` as tables: devices and callers, memory and health, refusals, the newest calls."""
    rows = [
        [
            row["device"],
            row["caller"],
            f"{row['calls']:,}",
            f"{row['calls'] / max(data['uptime'], 1e-9):,.1f}",
            _time(row["seconds"] / max(row["calls"], 1)),
            f"<= {_time(row['p50'])}",
            f"<= {_time(row['p99'])}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        ]
        for row in data["series"]
    ]
    columns = ["device", "caller", "calls", "per s", "mean", "p50", "p99", "measured / estimated"]
    found = [Table(f"Calls in {data['uptime']:,.0f} s", columns, rows)]
    devices = sorted({*data["memory"], *data["breakers"], *data["queued"]})
    health = []
    for device in devices:
        held = data["memory"].get(device, {})
        sizes = [f"{held[kind] / 2**20:,.1f} MiB" if held else "" for kind in ("in_use", "pooled", "peak")]
        health.append([device, *sizes, data["breakers"].get(device, ""), str(data["queued"].get(device, ""))])
    if health:
        found.append(Table("Devices", ["device", "in use", "pooled", "peak", "breaker", "waiting"], health))
    if data["refusals"]:
        refusals = [[row["device"], row["code"], str(row["count"])] for row in data["refusals"]]
        found.append(Table("Refusals", ["device", "reason", "count"], refusals))
    newest = [[c["device"], c["caller"], _time(c["seconds"]), c["request"], c["origin"]] for c in data["calls"][:10]]
    if newest:
        found.append(Table("Newest calls", ["device", "caller", "time", "request", "chosen by"], newest))
    return found


def _time(seconds: float) -> str:
    if seconds == float("inf"):
        return "more"
    unit, scale = next((u, s) for u, s, low in (("s", 1, 1), ("ms", 1e3, 1e-3), ("us", 1e6, 0)) if seconds >= low)
    return f"{seconds * scale:.3g} {unit}"


def run_verify(options: argparse.Namespace) -> CommandResult:
    """Read every chain of a folder; exit code 1 where something was found that is certain."""
    counts, findings = verify(options.folder, options.key.read_bytes() if options.key is not None else b"")
    if not counts:
        raise ContractError(f"{options.folder} holds no audit log: pass the folder that HAL_AUDIT names")
    rows = [
        [f.file, str(f.line or ""), f.what, "" if f.certain else "perhaps the process ended here"] for f in findings
    ]
    chains = Table("Chains", ["chain", "records"], [[chain, f"{count:,}"] for chain, count in counts.items()])
    found = Table("Found", ["file", "line", "what", ""], rows)
    certain = any(finding.certain for finding in findings)
    text = [] if findings else ["Nothing was changed, removed, swapped or cut off."]
    data = {"chains": counts, "findings": [finding._asdict() for finding in findings]}
    return CommandResult(data, [chains, *([found] if rows else [])], text, int(certain))


def run_check(options: argparse.Namespace) -> CommandResult:
    """Read a policy; exit code 1 where it is wrong."""
    if options.file is not None and not options.file.is_file():
        raise ContractError(f"{options.file} is no file: pass an access policy")
    report = check_policy(options.file)
    if report.path is None and not report.problem:
        return CommandResult(report._asdict(), text=["There is no access policy: everything is allowed to everybody."])
    wrong = [report.problem] if report.problem else report.mistakes
    shown = [Table(str(report.path), ["caller", "device", "may use it", "bytes", "seconds"], report.rows)]
    text = [*(f"Wrong: {line}." for line in wrong), *(f"Consider: {line}." for line in report.advice)]
    return CommandResult(report._asdict(), shown if report.rows else [], text, int(bool(wrong)))
