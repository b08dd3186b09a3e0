"""Every code block of the README and the docs runs.

python: the blocks of a file run in order in one process. console: each line after "$ " runs in a shell at the root of
the repository and must succeed; `make` targets are resolved with `make -n`, because they install and run this suite.
Commands that take minutes run in a slow test of their own. A command for a device that is absent here must say so, and
is a skip once the rest of its page has run.
toml: must parse. text, and blocks without a language, are output and not code.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for pattern in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/**/*.md",
        "plugins/*/README.md",
        "libs/*/README.md",
        "extensions/*/README.md",
        "examples/**/*.md",
    )
    for path in ROOT.glob(pattern)
    if path.relative_to(ROOT).parts[0] != "docs" or path.relative_to(ROOT).parts[1] != "api"
)
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OUTPUT = {"", "text"}
#: Commands that take a minute or more: they run in the slow test, and the quick one asks for their help alone.
LONG = ("hal conformance",)
ABSENT = re.compile(r"^DeviceUnavailableError: (\w+:\d+ is installed but has no device: .*)$", re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(language, text) for language, text in BLOCK.findall(page.read_text(encoding="utf-8"))]


def environment(cache: Path) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HAL_CACHE": str(cache), "COLUMNS": "120"}


def run(command: list[str] | str, cache: Path, name: str) -> str:
    """Why the device that the command names is absent; "" where the command succeeded."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(cache),
        shell=isinstance(command, str),
        capture_output=True,
        text=True,
        timeout=900,
    )
    absent = ABSENT.search(done.stderr)
    if done.returncode and absent:
        return absent[1]
    assert done.returncode == 0, f"{name}: {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return ""


def test_every_block_says_what_it_is():
    known = {"python", "console", "toml", *OUTPUT}
    unknown = {(page.name, language) for page in PAGES for language, _ in blocks(page) if language not in known}
    assert not unknown, f"blocks that no test runs: {unknown}"


def commands(text: str) -> list[str]:
    """What a console block runs: each line after "$ ", without its comment."""
    lines = [line.removeprefix("$ ").partition("  #")[0] for line in text.splitlines() if line.startswith("$ ")]
    lines = [line.replace("make ", "make -n ") if line.startswith("make ") else line for line in lines]
    return [line.replace(".venv/bin/python", sys.executable) for line in lines]


LONG_COMMANDS = sorted(
    {
        c
        for page in PAGES
        for language, text in blocks(page)
        if language == "console"
        for c in commands(text)
        if c.startswith(LONG)
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("command", LONG_COMMANDS)
def test_long_commands_run(command, tmp_path):
    if absent := run(command, tmp_path, "a page"):
        pytest.skip(absent)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_run(page, tmp_path):
    found = [(language, text) for language, text in blocks(page) if language not in OUTPUT]
    if not found:
        pytest.skip("this page has no code block")
    python = "\n".join(text for language, text in found if language == "python")
    if python:
        script = tmp_path / "blocks.py"
        script.write_text(python, encoding="utf-8")
        assert not run([sys.executable, str(script)], tmp_path, page.name)
    absent = []
    for language, text in found:
        if language == "toml":
            tomllib.loads(text)
        for command in commands(text) if language == "console" else ():
            long = next((name for name in LONG if command.startswith(name)), None)
            absent += filter(None, [run(f"{long} --help" if long else command, tmp_path, page.name)])
    if absent:
        pytest.skip("; ".join(absent))
