"""Plugins as pip would leave them, in a temporary folder, and Python processes that find them there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

#: A device without torch: claims float32, and computes with torch where it is opened.
DEVICE = """
import hal_core as hal

class Backend:
    name, time = "{name}", {time}

    def devices(self):
        return [hal.Device(id=self.name + ":0", family=self.name, vendor="fake", model="toy", fidelity="hardware")]

    def capabilities(self, device):
        numerics = {{"float32": hal.Numerics(relative=1e-5)}}
        return hal.Capabilities(dtypes=numerics, numerics=numerics, head_dim=hal.Range(1))

    def check(self, request, device):
        return ()

    def estimate(self, request, device):
        return hal.Estimate(time=hal.Quantity(self.time, self.time, "declared", "assumed"))

    def open(self, device):
        def attend(query, key, value, mask, request):
            return (query @ key.mT * request.effective_scale).softmax(-1) @ value, None
        return hal.SimpleSession(attend)
"""
HOOK = """
from hal_core import BackendSpec, hookimpl

@hookimpl
def hal_backends(api_version):
    return [BackendSpec(name="{name}", target="{target}")]
"""


class Site:
    """A folder of installed distributions."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.plugins = folder, list[str]()

    def add(
        self, plugin: str, hook: str | None = None, device: str = "", *, time: float = 1e-9, distribution: str = ""
    ) -> None:
        """Install distribution hal-<plugin> 1.0 with the entry point <plugin>.

        Args:
            plugin: its name, and its backend's. hook: source of the light module; None for a good one.
            device: source added to a good backend's module, <plugin>_device. time: what the device estimates.
            distribution: an installed plugin whose distribution this entry point shall join; "" for one of its own.
        """
        self.plugins.append(plugin)
        hook = HOOK.format(name=plugin, target=f"{plugin}_device:Backend") if hook is None else textwrap.dedent(hook)
        (self.folder / f"{plugin}_hook.py").write_text(hook)
        (self.folder / f"{plugin}_device.py").write_text(
            DEVICE.format(name=plugin, time=time) + textwrap.dedent(device)
        )
        info = self.folder / f"hal_{distribution or plugin}-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: hal-{distribution or plugin}\nVersion: 1.0\n")
        points = info / "entry_points.txt"
        head = points.read_text() if points.exists() else "[hal.plugins]\n"
        points.write_text(head + f"{plugin} = {plugin}_hook\n")

    def python(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python with these plugins installed, and no other allowed unless HAL_PLUGINS is among the `variables`."""
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH", "")]))
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HAL_")}
        own = {"HAL_CACHE": str(self.folder / "cache"), "HAL_PLUGINS": ",".join(self.plugins)}
        environment = kept | own | {"PYTHONPATH": path, "COLUMNS": "400"} | variables
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300, cwd=self.folder
        )

    def run(self, code: str, **variables: str) -> Any:
        """Run a program that prints JSON; what it printed."""
        done = self.python("-c", textwrap.dedent(code), **variables)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)
