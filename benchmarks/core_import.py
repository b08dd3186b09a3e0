"""What `import hal_core` and the use of every public data class cost, beyond bare Python and in units of the core's two
dependencies.

Each figure is the median over interpreters that were started in turn, with compiled bytecode. `hal_core` may cost 1.5
times as much as `import attrs, pluggy`.
"""

from __future__ import annotations

import compileall
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import record

ROOT = Path(__file__).resolve().parent.parent
BAR = 1.5
ROUNDS = 11
DATA = (
    "AttentionOutput AttentionRequest BackendSpec BlockPlan Buffer Calibration Candidate Capabilities Choice Decision "
    "Device Estimate Grads KernelSpec MemoryStats MeterRecord Numerics Policy PolicyChoice Quantity Range Refusal "
    "SequenceMetadata Tile TilePlan"
)
PROGRAMS = {
    "bare Python": "pass",
    "import attrs, pluggy": "import attrs, pluggy",
    "import hal_core": "import hal_core",
    "every public data class": f"import hal_core\nfor name in {DATA!r}.split():\n    getattr(hal_core, name)",
}


def milliseconds(rounds: int = ROUNDS) -> dict[str, float]:
    """Median milliseconds of processor time of an interpreter by program, the programs run in turn."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(rounds):
        for name, program in PROGRAMS.items():
            start = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-c", program], check=True)
            end = resource.getrusage(resource.RUSAGE_CHILDREN)
            times[name].append((end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime) * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> int:
    options = record.parser(__doc__).parse_args()
    compileall.compile_dir(ROOT / "hal_core", quiet=1)
    found = milliseconds()
    bare, *_ = found.values()
    unit = found["import attrs, pluggy"] - bare
    ratios = {name: (ms - bare) / unit for name, ms in found.items()}
    rows = []
    for name, ratio in ratios.items():
        verdict = "" if "hal_core" not in PROGRAMS[name] else "held" if ratio <= BAR else f"missed by {ratio - BAR:.2f}"
        rows.append([name, f"{found[name]:.1f} ms", f"{ratio:.2f}", str(BAR) if verdict else "", verdict])
    columns = ["program", "median", "beyond bare Python, attrs and pluggy = 1", "bar", ""]
    notes = [f"Processor time; medians of {ROUNDS} interpreters each, started in turn, with compiled bytecode."]
    record.publish(options, "core", "What importing the core costs", columns, rows, notes, section="Import")
    return int(max(ratios["import hal_core"], ratios["every public data class"]) > BAR)


if __name__ == "__main__":
    sys.exit(main())
