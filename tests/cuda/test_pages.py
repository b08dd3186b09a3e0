"""The Python of docs/cuda_pytorch.md runs, and what it says of commands and reasons is so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "cuda_pytorch.md").read_text(encoding="utf-8")
BLOCKS = [block.partition("```")[0] for block in PAGE.split("```python\n")[1:]]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.mark.parametrize("place", range(len(BLOCKS)))
def test_a_block_of_the_page_runs(place: int) -> None:
    assert "hal_cuda" in BLOCKS[place]
    exec(BLOCKS[place], {})


def test_options_of_the_command_are_its_own() -> None:
    from hal_cli.commands import COMMANDS

    (warm,) = (command for command in COMMANDS if command.name == "warm")
    known = {flag for flag, _ in warm.options} | {"--json"}
    lines = [line for line in PAGE.splitlines() if line.startswith("$ hal warm")]
    assert lines
    assert {word for line in lines for word in re.findall(r"--[a-z]+", line)} <= known


def test_names_of_the_page_are_names_of_the_package() -> None:
    import hal_cuda

    assert all(hasattr(hal_cuda, name) for name in re.findall(r"hal_cuda\.(\w+)", PAGE))
