"""What the core costs: import, discovery of eight plugins, and each way of calling beyond torch's own call.

Each figure is a median over rounds in which both sides are timed in turn, in random order. With `--against CHECKOUT`
the ways of calling are compared with another checkout's instead, in alternating processes.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import record
import torch
import torch.nn.functional as F

import hal_core as hal

ROOT = Path(__file__).resolve().parent.parent
LIGHT = """from hal_core.plugin_api import BackendSpec, hookimpl
@hookimpl
def hal_backends(api_version):
    return [BackendSpec(name='{n}', target='absent:Nothing')]
"""
PROCESSES, MOST = 10, 1.10  # of each checkout; the largest ratio that holds


def microseconds(calls: dict[str, Callable[[], object]], rounds: int = 150, repeat: int = 60) -> dict[str, float]:
    """Median microseconds of one call, the functions interleaved in blocks of `repeat` calls."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for round_ in range(rounds + 10):
        random.shuffle(order)
        for name in order:
            call = calls[name]
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            if round_ >= 10:
                times[name].append((time.perf_counter() - start) / repeat * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def calling() -> list[tuple[str, float, float]]:
    """(what, microseconds beyond SDPA, bar)."""
    query, key, value = torch.randn(3, 1, 2, 4, 16).unbind(0)
    bound = hal.bind(query, key, value)
    growing = [torch.randn(1, 2, length, 16) for length in range(1, 600)]
    mine, theirs = count(), count()

    def sdpa_growing() -> object:
        x = growing[next(theirs) % len(growing)]
        return F.scaled_dot_product_attention(query, x, x)

    def hal_growing() -> object:
        x = growing[next(mine) % len(growing)]
        return hal.attention(query, x, x)

    with torch.no_grad():
        plain = microseconds(
            {
                "sdpa": lambda: F.scaled_dot_product_attention(query, key, value),
                "hal": lambda: hal.attention(query, key, value),
                "bound": lambda: bound(query, key, value),
            }
        )
        grow = microseconds({"sdpa": sdpa_growing, "hal": hal_growing}, rounds=100, repeat=len(growing))
    q, k, v = (t.clone().requires_grad_() for t in (query, key, value))
    ones = torch.ones(1, 2, 4, 16)
    forward = microseconds(
        {
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
            "hal": lambda: hal.attention(q, k, v),
        }
    )
    both = microseconds(
        {
            "sdpa": lambda: F.scaled_dot_product_attention(q, k, v).backward(ones),
            "hal": lambda: hal.attention(q, k, v).backward(ones),
        },
        rounds=300,
    )
    return [
        ("hal.attention beyond SDPA, tiny input, no gradient", plain["hal"] - plain["sdpa"], 8),
        ("the same, key length growing by one each call", grow["hal"] - grow["sdpa"], 10),
        ("the same, forward under gradient", forward["hal"] - forward["sdpa"], 10),
        ("the same, forward and backward", both["hal"] - both["sdpa"], 20),
        ("a bound call beyond SDPA", plain["bound"] - plain["sdpa"], 2),
    ]


def process_ms(code: str, environment: dict[str, str], baseline: str = "pass", rounds: int = 21) -> float:
    """Median milliseconds of a fresh interpreter running `code` beyond one running `baseline`."""
    differences = []
    for _ in range(rounds):
        times = []
        for text in (code, baseline):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", text], check=True, env=environment)
            times.append((time.perf_counter() - start) * 1e3)
        differences.append(times[0] - times[1])
    return statistics.median(differences)


def starting() -> list[tuple[str, float, float]]:
    """(what, milliseconds, bar)."""
    environment = dict(os.environ)
    imported = process_ms("import hal_core", environment)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(8):
            text = "raise OSError('driver missing')" if i == 7 else LIGHT.replace("{n}", f"bench{i}")
            (Path(folder) / f"bench_plugin{i}.py").write_text(text)
            info = Path(folder) / f"bench_plugin{i}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bench-plugin{i}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[hal.plugins]\nbench{i} = bench_plugin{i}\n")
        environment["PYTHONPATH"] = folder
        environment["HAL_PLUGINS"] = ",".join(f"bench-plugin{i}:bench{i}" for i in range(8))
        code = "import hal_core.registry as r, sys; e = r.registry.entries()"
        check = code + "; assert len(e) == 7, e; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
        subprocess.run([sys.executable, "-c", check], check=True, env=environment)
        discovered = process_ms(code, environment, "import hal_core.registry")
    return [
        ("import hal_core beyond bare Python, torch not imported", imported, 60),
        ("discovery of 8 plugins, one broken, no torch, no driver", discovered, 80),
    ]


def comparing(other: Path) -> list[tuple[str, float, float, float]]:
    """(what, microseconds here, there, median ratio of the pairs of processes that ran one after the other)."""
    pairs: list[list[dict[str, float]]] = []
    for _ in range(PROCESSES):
        pair = []
        for checkout in (ROOT, other):
            command = [sys.executable, str(ROOT / "benchmarks" / "core_calls.py"), str(checkout)]
            pair.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        pairs.append(pair)
    return [
        (
            what,
            statistics.median(here[what] for here, _ in pairs),
            statistics.median(there[what] for _, there in pairs),
            statistics.median(here[what] / there[what] for here, there in pairs),
        )
        for what in pairs[0][0]
    ]


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="compare the calls with those of a checkout")
    options = parser.parse_args()
    if options.against is not None:
        compared = comparing(options.against.resolve())
        table = [
            [what, f"{here:.2f} us", f"{there:.2f} us", f"{ratio:.2f}", str(MOST), verdict(ratio, MOST)]
            for what, here, there, ratio in compared
        ]
        columns = ["a call", "here", "there", "median ratio", "bar", ""]
        notes = [f"Processor time; {PROCESSES} processes of each, in turn; the device returns its query."]
        record.publish(options, "core", "Calls against another checkout", columns, table, notes, section="Against")
        return int(any(ratio > MOST for *_, ratio in compared))
    rows = [[what, f"{found:.1f} ms", f"{bar} ms", verdict(found, bar)] for what, found, bar in starting()]
    rows += [[what, f"{found:.1f} us", f"{bar} us", verdict(found, bar)] for what, found, bar in calling()]
    record.publish(options, "core", "The core's own cost", ["what", "measured", "bar", ""], rows)
    return 0


def verdict(found: float, bar: float) -> str:
    return "held" if found <= bar else f"missed by {found / bar - 1:.0%}"


if __name__ == "__main__":
    sys.exit(main())
