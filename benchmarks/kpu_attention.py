"""Attention on simulated KPUs: fused on the chip against scores that go through DRAM, cycles by the tile-level
simulator.

python benchmarks/kpu_attention.py --record
"""

from __future__ import annotations

from time import perf_counter

import record
from hal_kpu.profiles.profile import load
from hal_kpu.simulator.attention.baseline import compare
from hal_kpu.simulator.energy import energy

from hal_core import AttentionRequest, Causal


def main() -> None:
    options = record.parser(__doc__)
    options.add_argument("--lengths", default="128,512,2048", help="(default %(default)s)")
    options = options.parse_args()
    rows = []
    for name in ("t64", "t256", "t768"):
        profile = load(name)
        for dtype in ("float32", "bfloat16"):
            for length in (int(word) for word in options.lengths.split(",")):
                for causal in (Causal.NONE, Causal.BOTTOM_RIGHT):
                    request = AttentionRequest(1, 8, 8, length, length, 64, 64, dtype, causal=causal)
                    start = perf_counter()
                    found = compare(profile, request)
                    took = perf_counter() - start
                    ways = (found.fused, found.unfused)
                    rows.append(
                        [
                            name,
                            dtype,
                            f"{length:,}",
                            str(causal),
                            *(f"{s.cycles:,}" for s in ways),
                            f"{found.speedup:.2f}x",
                            *(f"{s.external_bytes / 1e6:.1f}" for s in ways),
                            f"{found.fused.utilization:.0%}",
                            *(f"{energy(s, profile).total * 1e3:.3g}" for s in ways),
                            f"{took:.2f}",
                        ]
                    )
    columns = [
        "profile",
        "dtype",
        "tokens",
        "causal",
        "fused cycles",
        "unfused cycles",
        "cycles saved",
        "fused DRAM MB",
        "unfused DRAM MB",
        "arrays used",
        "fused mJ",
        "unfused mJ",
        "simulated in s",
    ]
    notes = [
        "Batch 1, 8 heads of 64. Simulated from profiles whose figures are at worst assumed; energies are not "
        "calibrated.",
        "The unfused baseline computes all pairs, also hidden ones; its softmax runs on the vector units of all arrays "
        "of the machine, the fused program's on those of the arrays that multiply its dtype.",
    ]
    record.publish(options, "kpu_attention", "Attention on simulated KPUs", columns, rows, notes)


if __name__ == "__main__":
    main()
