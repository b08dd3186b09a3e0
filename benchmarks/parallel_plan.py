"""What `hal_parallel.explain` says of every strategy, beside runs on processors of this machine.

    python benchmarks/parallel_plan.py [--ranks 2] [--rounds 15] [--record]

Starts itself with torchrun, one thread a rank, calibrates `cpu:0` on the first rank and measures the links. Times are
processor time, the least of interleaved rounds, of the slowest rank: what else runs on the machine only adds to them,
and a rank that waits for another takes none. The regret of
`auto` is the time of its choice over the least, less 1. Memory is the peak of the resident set beside a rank's own
tensors and results, the most of three calls and of all ranks, in processes of its own whose C library maps every tensor
for itself: what is freed leaves the resident set at once, as it leaves what an accelerator's allocator counts. Ranks
that are more than the cores share them, which the plan does not know: their times are no test of it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hal_parallel
import torch
import torch.distributed as dist
from record import parser, publish
from torch.distributed.device_mesh import init_device_mesh

import hal_core as hal
from hal_core.plugin_api import calibrate

#: Name, heads, key heads, tokens of the whole sequence, with gradients.
CASES = (
    ("causal", 8, 8, 4096, False),
    ("causal, gradients", 8, 8, 2048, True),
    ("grouped heads", 8, 2, 4096, False),
    ("short", 8, 8, 512, False),
)
STRATEGIES = ("ring", "gathered", "ulysses", "pass_query")
#: glibc: blocks of 64 KiB and more are mapped, and unmapped when they are freed.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _memory(call: Any, tensors: list[torch.Tensor]) -> int:
    """Bytes of the resident set's peak during a call, beside its results."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before, out = _status("VmRSS"), call()
    grads = sum(t.nbytes for t in tensors) if out.requires_grad else 0
    return _status("VmHWM") - before - out.nbytes - grads


def run_ranks(rounds: int) -> list[list[str]]:
    """The rows of one world size, on every rank: of times, or without rounds of memory."""
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    mesh = init_device_mesh("cpu", (world,))
    rank = dist.get_rank()
    if rank == 0 and rounds:
        calibrate("cpu")
    dist.barrier()
    hal.configure()  # what was measured is read again
    hal_parallel.measure_link(mesh)
    rows = []
    for name, heads, heads_kv, tokens, grads in CASES:
        sizes = (heads, heads_kv, heads_kv)
        tensors = [torch.randn(1, count, tokens // world, 64, requires_grad=grads) for count in sizes]
        flowing = torch.ones_like(tensors[0])
        options: dict[str, Any] = {"is_causal": True, "layout": "zigzag", "enable_gqa": heads != heads_kv}
        options["backend"] = "cpu"
        found = hal_parallel.explain(*tensors, mesh, **options)
        able = [e for e in found.estimates if not e.refusal and e.strategy in STRATEGIES]

        def call(strategy: str, tensors: Any = tensors, options: Any = options, flowing: Any = flowing) -> Any:
            out = hal_parallel.attention(*tensors, mesh, strategy=strategy, **options)
            if out.requires_grad:
                torch.autograd.grad(out, tensors, flowing)
            return out

        times: dict[str, list[float]] = {e.strategy: [] for e in able}
        for number in range(rounds + 1):
            for strategy in times:
                dist.barrier()
                start = time.process_time()
                call(strategy)
                if number:
                    times[strategy].append(time.process_time() - start)
        if rounds:
            own, planned = [min(times[e.strategy]) * 1e3 for e in able], [e.total * 1e3 for e in able]
        else:
            peaks = [[_memory(lambda e=e: call(e.strategy), tensors) for _ in range(4)] for e in able]
            own = [max(peak[1:]) / 2**20 for peak in peaks]  # the first of them also touches code
            planned = [e.memory / 2**20 for e in able]
        largest = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        measured = largest.tolist()
        chosen = next((i for i, e in enumerate(able) if e.strategy == found.strategy and rounds), -1)
        for i, (e, wanted, got) in enumerate(zip(able, planned, measured, strict=True)):
            regret = [f"{got / min(measured) - 1:.0%}" if i == chosen else ""] if rounds else []
            first = [str(world), f"{name}, {heads}/{heads_kv} heads, {tokens}", e.strategy]
            rows.append([*first, f"{wanted:.2f}", f"{got:.2f}", f"{got / wanted:.2f}", *regret])
    return rows


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--ranks", default="2", help="comma-separated numbers of ranks")
    options.add_argument("--rounds", type=int, default=15, help="of times; 0: memory alone")
    options.add_argument("--worker", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker:
        rows = run_ranks(given.rounds)
        if dist.get_rank() == 0:
            Path(given.worker).write_text("\n".join("\t".join(row) for row in rows), encoding="utf-8")
        dist.destroy_process_group()
        return 0
    rows = []
    for world in map(int, given.ranks.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            halves = []
            for number, setting in ((given.rounds, {}), (0, MAPPED)) if given.rounds else ((0, MAPPED),):
                command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
                command += ["--nproc-per-node", str(world), str(Path(__file__).resolve())]
                command += ["--worker", f"{folder}/rows", "--rounds", str(number)]
                more = {"OMP_NUM_THREADS": "1", "HAL_CACHE": f"{folder}/cache", "HAL_PLUGINS": "cpu,parallel"}
                subprocess.run(command, check=True, env={**os.environ, **more, **setting})
                halves.append(Path(f"{folder}/rows").read_text(encoding="utf-8").splitlines())
            *times, memory = ([line.split("\t") for line in half] for half in halves)
            rows += [(times[0][n] if times else row[:3]) + row[3:] for n, row in enumerate(memory)]
    columns = ["ranks", "call", "strategy", "MiB planned", "MiB", "ratio of MiB"]
    if given.rounds == 0:
        notes = ["head_dim 64, float32, zigzag, one thread a rank."]
        section = "Plan's memory against runs"
        publish(given, "parallel", section, columns, rows, notes, section=section)
        return 0
    columns[3:3] = ["ms planned", "ms", "ratio", "regret of auto"]
    notes = [
        f"head_dim 64, float32, zigzag, processor time, one thread a rank, {os.cpu_count()} cores (a load of "
        f"{os.getloadavg()[0]:.1f} when it ended). The regret stands in the row of auto's choice."
    ]
    publish(given, "parallel", "Plan against runs", columns, rows, notes, section="Plan against runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
