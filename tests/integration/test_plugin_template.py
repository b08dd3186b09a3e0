"""The plugin template is what a device's author copies: installed into a fresh environment, it is found there and
conformant.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys

import distributions as tree
import pytest

TEMPLATE = tree.ROOT / "examples" / "plugin_template"
FILES = sorted(TEMPLATE.glob("hal_template/*.py"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """hal(*arguments): the command in a new environment that has the template; core and command line are borrowed."""
    folder = tmp_path_factory.mktemp("fresh")
    source = folder / "template"
    shutil.copytree(TEMPLATE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    python, packages = tree.fresh_environment(folder / "fresh", source)
    borrowed = [tree.ROOT, tree.ROOT / "extensions" / "cli"]
    (packages / "core.pth").write_text("\n".join(map(str, borrowed)) + "\n", encoding="utf-8")
    environment = {**os.environ, "HAL_CACHE": str(folder / "cache"), "HAL_PLUGINS": "template"}

    def hal(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(python), "-m", "hal_core", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=folder)

    return hal


def passes(hal, *options: str) -> None:
    done = hal("conformance", "template:0", "--json", *options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert json.loads(done.stdout)["passed"] is True


def test_has_at_most_120_lines():
    files = [*FILES, TEMPLATE / "pyproject.toml"]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= 120


def test_imports_the_plugin_api_alone():
    """Of this project the template imports `hal_core.plugin_api` and itself, and nothing that is not public there."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("hal_")]
            elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("hal_"):
                names = [alias.name for alias in node.names]
                assert node.module == "hal_core.plugin_api" or (node.module, names) == ("hal_core", ["plugin_api"])


@pytest.mark.xdist_group("template")
def test_is_discovered(fresh):
    done = fresh("devices", "--json")
    assert done.returncode == 0, done.stderr
    assert [device["id"] for device in json.loads(done.stdout)] == ["template:0"]


@pytest.mark.xdist_group("template")
def test_passes_the_quick_conformance_kit(fresh):
    passes(fresh, "--quick")


@pytest.mark.slow
@pytest.mark.xdist_group("template")
def test_passes_the_whole_conformance_kit(fresh):
    passes(fresh)


@pytest.mark.parametrize("example", ["simple_device.py", "register_at_run_time.py"])
def test_examples_run(example, tmp_path):
    environment = {**os.environ, "HAL_CACHE": str(tmp_path)}
    command = [sys.executable, str(tree.ROOT / "examples" / example)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
