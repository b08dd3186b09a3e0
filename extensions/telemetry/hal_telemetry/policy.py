"""What an access policy allows, and what is wrong with it: the contents of `hal access check`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

import hal_core as hal
from hal_core.plugin_api import AccessPolicy, registry


class PolicyReport(NamedTuple):
    """An access policy, read.

    Attributes:
        path: of the file; None for no policy. problem: why it denies everything, or "".
        rows: (caller, device, "yes" or why not, bytes or "", seconds or "") for every caller and device here.
        mistakes: sentences: names of nothing, and rules that nobody can satisfy. advice: sentences.
    """

    path: str | None
    problem: str
    rows: list[tuple[str, str, str, str, str]]
    mistakes: list[str]
    advice: list[str]


def check_policy(path: str | Path | None = None) -> PolicyReport:
    """Read a policy and hold it against the plugins and devices that are here.

    Args:
        path: of the file; None for the policy of this process.
    """
    registry.discover()
    policy = registry.access if path is None else AccessPolicy(str(path))
    if policy.problem or policy.path is None:
        return PolicyReport(policy.path, policy.problem, [], [], [])
    rows, devices = [], registry.devices()
    callers = {"": "everybody else"} | {name: name for name in policy.rules.get("callers", {})}
    for caller, shown in callers.items():
        for device in devices:
            simulated = device.fidelity is not hal.Fidelity.HARDWARE
            why = policy.why_not("devices", device.id, simulated, caller)
            limits = [f"{rule:,}" if (rule := policy.rule(key, caller)) else "" for key in ("memory", "seconds")]
            rows.append((shown, device.id, "no" if why else "yes", limits[0], limits[1]))
    return PolicyReport(
        policy.path, "", rows, [*_mistakes(policy, rows), *_of_plugins(policy)], [*_advice(policy, rows)]
    )


def _mistakes(policy: AccessPolicy, rows: list[tuple[str, str, str, str, str]]) -> Iterator[str]:
    kernels, present = list(registry.kernel_specs()), sorted({row[1] for row in rows})
    tables = {"default": policy.rules.get("default", {})}
    tables |= {f"callers.{name}": table for name, table in policy.rules.get("callers", {}).items()}
    for table, rules in tables.items():
        for key, names in (("devices", present), ("kernels", kernels)):
            for pattern in rules.get(key, ()):
                if not any(fnmatchcase(name, pattern) for name in names):
                    yield f"[{table}] {key} {pattern!r} is no name here: there are {', '.join(names) or 'none'}"
        if not re.fullmatch(r"[0-9a-fA-F]{64}", rules.get("secret", START)):
            yield f"[{table}] secret is no SHA-256 in hexadecimal digits: nobody has such a secret"
        shown = table.partition(".")[2] or "everybody else"
        if rules.get("devices") and all(row[2] == "no" for row in rows if row[0] == shown):
            yield f"[{table}] has devices, and may use none of those that are here: nobody can satisfy it"
    if "secret" in tables["default"]:
        yield "[default] has a secret, which nobody is asked for: give it to a caller"


START = "0" * 64


def _of_plugins(policy: AccessPolicy) -> Iterator[str]:
    installed = {point.name for point in entry_points(group="hal.plugins")}
    listed = policy.rules.get("plugins")
    for key in ("plugins", "required"):
        for name in policy.rules.get(key, ()):
            if name.rpartition(":")[2] not in installed:
                yield f"{key} {name!r} is no plugin here: there are {', '.join(sorted(installed))}"
    for name in policy.rules.get("required", ()):
        if listed is not None and name not in listed:
            yield f"required {name!r} is not among plugins, so everything is denied"
    audit = policy.rules.get("audit")
    if audit is not None and "telemetry" not in policy.rules.get("required", ()):
        yield '[audit] is kept by the plugin telemetry, which may be switched off: add required = ["telemetry"]'
    if audit is not None and not _can_write(Path(str(audit.get("folder", "")))):
        yield f"[audit] folder {audit.get('folder', '')!r} cannot be written by this user"


def _can_write(folder: Path) -> bool:
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    return bool(str(folder) != "." and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK))


def _advice(policy: AccessPolicy, rows: list[tuple[str, str, str, str, str]]) -> Iterator[str]:
    default = {row[1] for row in rows if row[0] == "everybody else" and row[2] == "yes"}
    for caller, rules in policy.rules.get("callers", {}).items():
        own = {row[1] for row in rows if row[0] == caller and row[2] == "yes"}
        if own - default and "secret" not in rules:
            yield f"any code may call itself {caller!r} and use {', '.join(sorted(own - default))}: give it a secret"
        if default - own:
            lost = ", ".join(sorted(default - own))
            yield f"a thread inherits no caller, so {caller!r} may use {lost} from one: let [default] allow less"
