"""What was learned, kept between processes: one JSON file for each machine, under the cache folder."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import stat
import warnings
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from hal_core import Device, cache_dir
from hal_core.plugin_api import write_whole

FORMAT = 2
_MOST_BYTES = 1 << 24


@cache
def machine() -> str:
    """A key of this machine's processor and system, 16 digits."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        lines = sorted({line for line in text.splitlines() if line.startswith(("model name", "Hardware", "flags"))})
    parts = (platform.system(), platform.machine(), platform.processor(), str(os.cpu_count()), *lines)
    return sha256("\0".join(parts).encode()).hexdigest()[:16]


def state_path() -> Path:
    """This machine's file."""
    return cache_dir() / "router" / f"{machine()}.json"


class Store:
    """Reads and writes the state. What is wrong with the file is said once, and learning starts anew.

    Attributes:
        problems: what was said.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.problems = path or state_path(), list[str]()

    def _say(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)
            warnings.warn(problem, RuntimeWarning, stacklevel=4)

    def read(self, devices: Iterable[Device]) -> dict[str, Any]:
        """The state's data; empty where there is none that can be used. `changed` lists devices whose model or driver
        is another one now.
        """
        try:
            with open(self.path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                facts = os.fstat(file.fileno())
                if not stat.S_ISREG(facts.st_mode) or facts.st_size > _MOST_BYTES:
                    raise ValueError("it is not a regular file of at most 16 MiB")
                data = json.loads(file.read())
            if not isinstance(data, dict):
                raise ValueError("it holds no object")
            if data.get("format") != FORMAT:
                raise ValueError(f"its format is {data.get('format')!r}, this version writes {FORMAT}")
            if data.get("machine") != machine():
                raise ValueError("it was learned on another machine")
            known = data["devices"]
            if not isinstance(known, dict):
                raise ValueError("it names no devices")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, RecursionError) as error:
            self.refuse(error)
            return {}
        now = {device.id: device.fingerprint for device in devices}
        return data | {"changed": [name for name, print_ in known.items() if now.get(name, print_) != print_]}

    def refuse(self, error: Exception) -> None:
        """Say that the file is not used."""
        self._say(f"the router's state {self.path} is not used ({error}): learning starts anew")

    def write(self, data: dict[str, Any], devices: Iterable[Device]) -> bool:
        """Write the state, whole or not at all. Says once why it cannot, and returns whether it could."""
        known = {device.id: device.fingerprint for device in devices}
        try:
            write_whole(self.path, json.dumps({"format": FORMAT, "machine": machine(), "devices": known} | data))
        except OSError as error:
            self._say(
                f"the router's state {self.path} cannot be written ({error}): what is learned ends with the process"
            )
            return False
        return True


def read_totals(data: Any) -> dict[str, list[float]]:
    """By device: calls, seconds, regret, explored calls and their cost. Raises ValueError where it is no such data."""
    totals = {str(name): [float(x) for x in row] for name, row in dict(data).items()}
    if any(len(row) != 5 or not all(map(math.isfinite, row)) for row in totals.values()):
        raise ValueError("its totals are no numbers")
    return totals
