"""`hal warm` on a GPU: after it the first calls of a new process start no compiler and leave Triton's cache as it was.

benchmarks/cuda_first_calls.py holds their seconds to the bar.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: Triton's assembler, and what Triton builds launchers with.
COMPILERS = ("ptxas", "gcc", "cc", "clang", "g++", "c++")


def _compilers(started: list[str]) -> list[str]:
    return [name for name in started if name.partition("-")[0] in COMPILERS]


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_first_calls_after_hal_warm_compile_nothing(gpu: str, tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    def run(cache: str, *command: str) -> Any:
        found = subprocess.run(
            [sys.executable, *command],
            env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path / cache)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
        return json.loads(found.stdout[found.stdout.index("{") :])

    first_calls = (str(HERE / "first_call.py"), "128", "8", "2")
    cold = run("cold", *first_calls)
    assert _compilers(cold["started"]), "compilers that are started are seen"
    assert _files(tmp_path / "cold")
    warmed = run("warm", "-m", "hal_core", "warm", gpu, "--model", str(tmp_path), "--training", "--json")
    assert warmed["kernels"] > 10
    before = _files(tmp_path / "warm")
    first = run("warm", *first_calls)
    assert first["own"] == 2
    assert not _compilers(first["started"]), first
    assert _files(tmp_path / "warm") == before
