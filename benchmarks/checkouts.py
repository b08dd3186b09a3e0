"""Another checkout beside this one: a process of each, so that both answer equal requests in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER_PATTERNS = ("libs/*", "extensions/*", "plugins/*")


def imported_from(checkout: str) -> None:
    """Import every package from a checkout from now on; entry points stay those that are installed."""
    root = Path(checkout).resolve()
    found = [str(path.parent) for pattern in FOLDER_PATTERNS for path in root.glob(f"{pattern}/pyproject.toml")]
    sys.path[:0] = [str(root), *sorted(found)]


class Worker:
    """A script of benchmarks/ that runs with a checkout's packages and answers lines of JSON with lines of JSON."""

    def __init__(self, script: str, checkout: Path, plugins: str) -> None:
        self._cache = tempfile.TemporaryDirectory()  # no calibration of this machine's user
        environment = os.environ | {"HAL_CACHE": self._cache.name, "HAL_PLUGINS": plugins}
        command = [sys.executable, str(ROOT / "benchmarks" / script), str(checkout.resolve())]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)

    def ask(self, request: Any) -> Any:
        """The answer to a request. Raises RuntimeError where the process ended instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._process.args!r} ended with {self._process.wait()}: see its message above")
        return json.loads(line)

    def processor_seconds(self) -> float:
        """What the process has used so far; 0 where the system does not say."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))

    def close(self) -> None:
        self._process.communicate()
        self._cache.cleanup()
