"""PhotonicMultiHeadAttention beside nn.MultiheadAttention, small inputs, interleaved: what the drop-in costs."""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable

import record
import torch
from hal_nn import PhotonicMultiHeadAttention
from torch import nn

BAR = 1.10
#: batch, length, embed_dim, heads
SIZES = [(1, 4, 32, 2), (2, 8, 16, 2), (2, 16, 64, 4), (4, 32, 128, 8)]


def ratio(theirs: Callable[[], object], mine: Callable[[], object], rounds: int = 60, repeat: int = 10) -> list[float]:
    """Microseconds of one call by the process's own time, theirs and mine: medians over interleaved rounds, and the
    median of their ratio.
    """
    times: list[tuple[float, float]] = []
    for turn in range(rounds + 10):
        taken = {}
        for call in random.sample([theirs, mine], 2):
            start = time.process_time_ns()
            for _ in range(repeat):
                call()
            taken[call] = (time.process_time_ns() - start) / repeat / 1e3
        if turn >= 10:
            times.append((taken[theirs], taken[mine]))
    return [
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        statistics.median(b / a for a, b in times),
    ]


def calls(size: tuple[int, int, int, int]) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    batch, length, embed, heads = size
    x = torch.randn(batch, length, embed)
    pair = [kind(embed, heads, batch_first=True) for kind in (nn.MultiheadAttention, PhotonicMultiHeadAttention)]
    pair[1].load_state_dict(pair[0].state_dict())
    evaluated = [type(module)(embed, heads, batch_first=True).eval() for module in pair]

    def train(module: nn.Module, weights: bool) -> Callable[[], object]:
        return lambda: module(x, x, x, need_weights=weights)

    def infer(module: nn.Module) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return module(x, x, x, need_weights=False)

        return call

    def step(module: nn.Module) -> Callable[[], object]:
        return lambda: module(x, x, x, need_weights=False)[0].sum().backward()

    return {
        "training, weights asked for": (train(pair[0], True), train(pair[1], True)),
        "training, no weights": (train(pair[0], False), train(pair[1], False)),
        "forward and backward": (step(pair[0]), step(pair[1])),
        "inference (torch's fused path)": (infer(evaluated[0]), infer(evaluated[1])),
    }


def main() -> int:
    options = record.parser(__doc__).parse_args()
    torch.set_num_threads(1)
    rows, worst = [], 0.0
    for size in SIZES:
        for what, (theirs, mine) in calls(size).items():
            before, after, found = ratio(theirs, mine)
            worst = max(worst, found)
            verdict = "held" if found <= BAR else f"missed by {found / BAR - 1:.0%}"
            rows.append([str(size), what, f"{before:.1f} us", f"{after:.1f} us", f"{found:.2f}", str(BAR), verdict])
    columns = ["batch, length, width, heads", "call", "nn.MultiheadAttention", "drop-in", "ratio", "bar", ""]
    notes = ["Processor time of one thread; medians of 60 interleaved rounds of 10 calls."]
    record.publish(options, "nn_drop_in", "The drop-in beside nn.MultiheadAttention", columns, rows, notes)
    return int(worst > BAR)


if __name__ == "__main__":
    sys.exit(main())
