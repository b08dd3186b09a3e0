"""The plugin template is what a hardware maker copies: installed into a fresh environment, found there, and
conformant.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "examples" / "plugin_template"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A new environment with the template installed. It borrows torch and the core from this one's folder of
    packages.
    """
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    packages = next(folder.glob("lib/python*/site-packages"), folder / "Lib" / "site-packages")
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(ROOT)}
    (packages / "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    source = folder / "template"
    shutil.copytree(TEMPLATE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
            "--target",
            str(packages),
            str(source),
        ],
        check=True,
        capture_output=True,
    )
    python = next(folder.glob("bin/python"), folder / "Scripts" / "python.exe")
    environment = {**os.environ, "HAL_CACHE": str(folder / "cache"), "HAL_PLUGINS": "template"}

    def hal(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(python), "-m", "hal_core", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=folder)

    return hal


def test_is_under_120_lines():
    files = [*TEMPLATE.glob("hal_template/*.py"), TEMPLATE / "pyproject.toml"]
    assert sum(len(file.read_text().splitlines()) for file in files) < 120


def test_is_discovered(fresh):
    done = fresh("devices", "--json")
    assert done.returncode == 0, done.stderr
    assert [device["id"] for device in json.loads(done.stdout)] == ["template:0"]


def test_passes_the_conformance_kit(fresh):
    done = fresh("conformance", "template:0", "--json")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert json.loads(done.stdout)["passed"] is True


@pytest.mark.parametrize("example", ["simple_device.py", "register_at_run_time.py"])
def test_examples_run(example, tmp_path):
    environment = {**os.environ, "HAL_CACHE": str(tmp_path)}
    command = [sys.executable, str(ROOT / "examples" / example)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
