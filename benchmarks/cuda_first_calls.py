"""First calls of a new process on a CUDA device, after `hal warm` and without it.

    python benchmarks/cuda_first_calls.py [--record]

Seconds of the host until the device has the result; torch and the device are up before. Each row is a process of its
own; Triton's cache and Python's bytecode lie in a folder that is empty at the start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import parser, publish

FIRST_CALL = Path(__file__).resolve().parent.parent / "tests" / "cuda" / "first_call.py"
#: Seconds that a first call may take after `hal warm`, and the calls that this holds for.
BAR, HELD = 0.1, ("prompt", "token", "unmodified", "unmodified backward")
REPEATS = 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
}


def measured(folder: Path) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    """What a process without a cache took, what `hal warm` said, and what processes after it took."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    # Python keeps what it compiled, as it does where packages lie in a folder that may be written.
    environment = os.environ | {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}

    def run(cache: str, *command: str) -> Any:
        given = environment | {"TRITON_CACHE_DIR": str(folder / cache)}
        found = subprocess.run([sys.executable, *command], env=given, capture_output=True, text=True, check=True)
        return json.loads(found.stdout[found.stdout.index("{") :])

    first_calls = (str(FIRST_CALL), "128", "8", "2")
    cold = run("cold", *first_calls)
    warm = run("warm", "-m", "hal_core", "warm", "cuda:0", "--model", str(folder), "--training", "--json")
    return cold, warm, [run("warm", *first_calls) for _ in range(REPEATS)]


def main() -> None:
    options = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cold, warm, found = measured(Path(folder))
    middle = {
        name: sorted(each["seconds"][name] for each in found)[REPEATS // 2]  # of the repeats
        for name in found[0]["seconds"]
    }
    rows = [
        [name, f"{cold['seconds'][name]:.3f}", f"{seconds:.3f}", "-" if name not in HELD else str(seconds <= BAR)]
        for name, seconds in middle.items()
    ]
    worst = max(middle[name] for name in HELD)
    notes = [
        f"`hal warm --training` made {warm['kernels']} kernels in {warm['seconds']:.1f} s. "
        f"Slowest first call after it: {worst:.3f} s; the bar is {BAR} s. Medians of {REPEATS} processes.",
    ]
    columns = ("call", "nothing warmed, s", "after hal warm, s", "within the bar")
    publish(options, "cuda_first_calls", "First calls", columns, rows, notes, "First calls")


if __name__ == "__main__":
    main()
