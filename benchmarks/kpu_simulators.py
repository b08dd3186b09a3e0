"""The KPU's simulators: how long they take, how near the two timed ones are, and SCALE-Sim in the same run.

SCALE-Sim 3 takes part where `--scalesim-python PATH` names a Python that can import it (numpy 1.26.4, numba 0.61.2,
pandas 2.2.3: an environment of its own).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record
from hal_kpu import CYCLE_ACCURATE, TRANSACTIONAL, simulate_gemm
from hal_kpu.simulator.array import DATAFLOWS, multiply
from hal_kpu.simulator.cycle_accurate import run_cycle_accurate
from hal_kpu.simulator.dram.averaged import group_cost
from hal_kpu.simulator.movement import Opcode
from hal_kpu.simulator.opcodes.work import Work
from hal_kpu.simulator.products.gemm import machine
from hal_kpu.simulator.products.lowering import lower_product
from hal_kpu.simulator.products.product import Product
from hal_kpu.simulator.transactional import run_transactional

SIZE, ROUNDS, CASES, MODEL_CASES = 512, 3, 200, 600


def timed(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median seconds of the processor, with nothing remembered from before: schedules and patterns are found anew."""
    seconds = []
    for _ in range(rounds):
        lower_product.cache_clear()
        group_cost.cache_clear()
        seconds.append(_processor_seconds(call))
    return statistics.median(seconds)


def sizes() -> list[list[str]]:
    """TRANSACTIONAL products, schedule included."""
    rows = []
    for size, bar in ((512, ""), (1024, "<= 0.3 s"), (4096, "<= 5 s")):
        seconds = timed(
            lambda size=size: simulate_gemm(size, size, size, fidelity=TRANSACTIONAL, a=ZEROS[size], b=ZEROS[size])
        )
        rows.append([f"TRANSACTIONAL {size}^3 on 32 x 32, schedule found in the run", f"{seconds:.3f} s", bar])
    return rows


ZEROS = {size: np.zeros((size, size), np.int8).astype(np.float32) for size in (512, 1024, 4096)}


def cycle_accurate(python: str | None) -> list[list[str]]:
    """CYCLE_ACCURATE 512^3 with values, and SCALE-Sim on the same product."""
    a = np.random.default_rng(0).standard_normal((SIZE, SIZE), dtype=np.float32)
    rows = []
    for dataflow in DATAFLOWS:
        ours = timed(
            lambda flow=dataflow: simulate_gemm(SIZE, SIZE, SIZE, dataflow=flow, fidelity=CYCLE_ACCURATE, a=a, b=a)
        )
        stats = simulate_gemm(SIZE, SIZE, SIZE, dataflow=dataflow, fidelity=CYCLE_ACCURATE, a=a, b=a)
        bar = "<= 1.2 s" if dataflow == "os" else ""
        rows.append([f"CYCLE_ACCURATE {SIZE}^3 on 32 x 32, {dataflow}, values on", f"{ours:.3f} s", bar])
        pes = timed(lambda flow=dataflow: multiply(a, a, 32, 32, flow))
        rows.append([f"  of it the PEs, {dataflow}", f"{pes:.3f} s", ""])
        other = scalesim(python, dataflow)
        if other is None:
            rows.append([f"SCALE-Sim 3, {dataflow}", "not run: pass --scalesim-python", ""])
            continue
        rows.append(
            [
                f"SCALE-Sim 3, {dataflow}, no values",
                f"{other['seconds']:.2f} s",
                f"{other['seconds'] / ours:.1f} x ours",
            ]
        )
        equal = "equal" if other["cycles"] == stats.compute_cycles else "NOT EQUAL"
        rows.append([f"compute cycles, {dataflow}", f"{stats.compute_cycles:,} and {other['cycles']:,.0f}", equal])
    return rows


def scalesim(python: str | None, dataflow: str) -> dict[str, float] | None:
    if python is None:
        return None
    script = Path(__file__).with_name("kpu_scalesim.py")
    command = [python, str(script), *(str(n) for n in (SIZE, SIZE, SIZE, 32, 32)), dataflow]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def same_program() -> list[str]:
    """One program through both timed simulators; CYCLE_ACCURATE steps the PEs besides."""
    profile = machine(32, 32)
    program = lower_product(Product(batch=1, M=SIZE, N=SIZE, K=SIZE), profile)
    a = np.ones((SIZE, SIZE), np.float32)
    group_cost.cache_clear()
    quick = statistics.median(_processor_seconds(lambda: run_transactional(program, profile)) for _ in range(5))
    exact = statistics.median(
        _processor_seconds(lambda: (run_cycle_accurate(program, profile), multiply(a, a, 32, 32))) for _ in range(3)
    )
    ratio = f"{exact / quick:.0f} times"
    return [
        f"TRANSACTIONAL and CYCLE_ACCURATE on one {SIZE}^3 program",
        f"{quick * 1e3:.2f} ms, {exact * 1e3:.0f} ms: {ratio}",
        ">= 100 times",
    ]


def deviations() -> list[list[str]]:
    """Of TRANSACTIONAL from CYCLE_ACCURATE on random products, every second one bound by bandwidth."""
    found = []
    for seed in range(CASES):
        rng = random.Random(seed)
        rows, cols, size = rng.choice([4, 8, 16, 32]), rng.choice([4, 8, 16, 32]), rng.choice([1, 2, 4])
        M, N, K = (rng.randint(8, 160) for _ in range(3))
        product = Product(
            batch=1, M=M, N=N, K=K, dtype={1: "int8", 2: "bfloat16", 4: "float32"}[size], size=size, out_size=size
        )
        profile, dataflow = machine(rows, cols), rng.choice(DATAFLOWS)
        program = lower_product(product, profile, dataflow)
        moved = program.total("bytes", Opcode.DMA_LOAD_TILE, Opcode.DMA_STORE_TILE) * profile["clock.frequency"]
        compute = run_transactional(program, profile).timeline.engines["array"].busy
        bandwidth = moved / compute * (rng.uniform(0.1, 0.7) if seed % 2 else rng.uniform(1.5, 20))
        slower = profile.replace(dram__bandwidth=bandwidth, engines__dma_bandwidth=bandwidth)
        found.append(abs(run_transactional(program, slower).cycles / run_cycle_accurate(program, slower).cycles - 1))
    found.sort()
    beyond = sum(each > 0.05 for each in found)
    return [
        [
            f"TRANSACTIONAL from CYCLE_ACCURATE, {CASES} products, half bandwidth-bound: median",
            f"{found[CASES // 2]:.2%}",
            "",
        ],
        ["  the second worst", f"{found[-2]:.2%}", ""],
        ["  the worst", f"{found[-1]:.2%}", "<= 5%"],
        ["  beyond 5%", f"{beyond} of {CASES}", "0"],
    ]


def models(path: str = "tests/kpu") -> list[list[str]]:
    """TRANSACTIONAL beside CYCLE_ACCURATE on 600 programs of what models run, by kind."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / path))
    from model_programs import KINDS, model_case

    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    faster, pages = [], []
    for seed in range(MODEL_CASES):
        case = model_case(seed)
        begun = time.process_time()
        exact = sum(run_cycle_accurate(program, case.profile, reuse_above=1 << 60).cycles for program in case.programs)
        between = time.process_time()
        for product in case.products if exact > 100_000 else ():
            rows, cols, _ = case.profile.arrays(product.dtype)
            multiply(*_operands(product), rows, cols, case.dataflow)
        stepped = time.process_time()
        quick = sum(run_transactional(program, case.profile).cycles for program in case.programs)
        if exact > 100_000:  # again: the costs of their page patterns are kept from the first time on
            again = min(
                _processor_seconds(lambda case=case: [run_transactional(each, case.profile) for each in case.programs])
                for _ in range(ROUNDS)
            )
        found[KINDS[seed % len(KINDS)]].append(abs(quick / exact - 1))
        if case.products and exact > 100_000:
            faster.append((stepped - begun) / again)
            pages.append((between - begun) / again)
    every = sorted(each for kind in found.values() for each in kind)
    beyond = sum(each > 0.05 for each in every)
    title = f"{MODEL_CASES} programs of models (tests/kpu/model_programs.py, seeds 0 to {MODEL_CASES - 1})"
    table = [
        [f"{title}: median deviation", f"{statistics.median(every):.2%}", "<= 1%"],
        ["  beyond 5%", f"{beyond} of {len(every)}", f"<= {len(every) // 20}"],
        ["  the worst", f"{every[-1]:.1%}", "<= 10%"],
    ]
    table += [[f"  {kind}: the worst of {len(each)}", f"{max(each):.1%}", ""] for kind, each in found.items()]
    return [
        *table,
        [
            f"the {len(faster)} with products above 100,000 cycles: CYCLE_ACCURATE / TRANSACTIONAL, processor time",
            f"median {statistics.median(faster):.0f}, least {min(faster):.0f}",
            ">= 50",
        ],
        ["  without the PEs and their values", f"median {statistics.median(pages):.0f}, least {min(pages):.0f}", ""],
    ]


def _processor_seconds(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def _operands(product: Product | Work) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    p, dtype = product, np.int32 if product.dtype == "int8" else np.float32
    return np.ones((p.batch, p.M, p.K), dtype), np.ones((p.batch, p.K, p.N), dtype)


def layer() -> list[list[str]]:
    """A BERT-base layer of 128 tokens on T64 in bfloat16, operations one by one and as one; and its first compile."""
    import torch
    from hal_kpu.frontend.fx import plan
    from hal_kpu.runtime.timing import time_program
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    programs: list[Any] = []
    made = plan.Plan.__init__
    plan.Plan.__init__ = lambda own, *given: (programs.append(given[0]), made(own, *given))[1]  # type: ignore[method-assign, assignment, func-returns-value]
    network = BertLayer(BertConfig(_attn_implementation="sdpa")).eval().bfloat16()
    x = torch.randn(1, 128, 768).bfloat16()
    compiled = torch.compile(network, backend="kpu_transactional")
    begun = time.process_time()
    with torch.no_grad():
        compiled(x)
    seconds = time.process_time() - begun
    rows = [["BERT-base layer, first compile and run, processor time", f"{seconds:.1f} s", "<= 5 s"]]
    for fidelity, name in ((TRANSACTIONAL, "TRANSACTIONAL"), (CYCLE_ACCURATE, "CYCLE_ACCURATE")):
        apart, together = (
            sum(time_program(program, fidelity, fuse=fuse).cycles for program in programs) for fuse in (False, True)
        )
        ratio = f"{together:,} of {apart:,} cycles: {together / apart:.2f}"
        rows.append([f"  operations as one against one by one, {name}", ratio, "<= 0.70"])
    return rows


def main() -> None:
    parser: argparse.ArgumentParser = record.parser(__doc__)
    parser.add_argument("--scalesim-python", metavar="PATH", help="a Python that can import scalesim")
    parser.add_argument("--only", default="simulators,models,layer", help="some of them, with commas between")
    options = parser.parse_args()
    header = ["what", "measured", "bar"]
    if "simulators" in options.only:
        rows = [*sizes(), *cycle_accurate(options.scalesim_python), same_program(), *deviations()]
        notes = [
            "Medians of processor time (of SCALE-Sim the clock's) on a machine that others may use.",
            "Simulated times, of a profile that is not calibrated.",
            "The whole run of CYCLE_ACCURATE includes the choice of the schedule, every DRAM page visit, and the PEs "
            "with values.",
        ]
        record.publish(options, "kpu", "Simulators of the KPU", header, rows, notes, section="Simulators")
    if "models" in options.only:
        notes = [
            "On T64, T256 and T768; float32, bfloat16 and int8; all dataflows. TRANSACTIONAL from CYCLE_ACCURATE, "
            "every loop turn of which is timed.",
            "Programs up to a length are timed page by page in TRANSACTIONAL too (hal_kpu.simulator.transactional).",
        ]
        title = "Programs of models"
        record.publish(options, "kpu", title, header, models(), notes, section=title)
    if "layer" in options.only:
        notes = ["Modelled cycles; processor time on a machine that others may use."]
        title = "A transformer layer"
        record.publish(options, "kpu", title, header, layer(), notes, section=title)


if __name__ == "__main__":
    main()
