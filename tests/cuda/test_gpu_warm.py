"""`hal warm` on a GPU: after it the first calls of a new process wait for no compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
#: Seconds that a first call may take where torch and the device are up.
BAR = 0.1


def test_first_calls_after_hal_warm_take_a_tenth_of_a_second(gpu: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    # Python keeps what it compiled, too, as it does where packages lie in a folder that may be written.
    environment |= {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    def run(*command: str, **variables: str) -> Any:
        found = subprocess.run(
            [sys.executable, *command],
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
        return json.loads(found.stdout[found.stdout.index("{") :])

    # Compiles Python's bytecode, as an installer does.
    cold = run(str(HERE / "first_call.py"), "128", "8", "2", TRITON_CACHE_DIR=str(tmp_path / "cold"))
    print("nothing warmed", cold)
    warmed = run("-m", "hal_core", "warm", gpu, "--model", str(tmp_path), "--training", "--json")
    assert warmed["kernels"] > 10
    print(f"hal warm: {warmed['kernels']} kernels in {warmed['seconds']:.1f} s")
    first = run(str(HERE / "first_call.py"), "128", "8", "2")
    print(first)
    assert first["own"] == 2
    for name in ("prompt", "token", "unmodified", "unmodified backward"):
        assert first["seconds"][name] <= BAR, first
