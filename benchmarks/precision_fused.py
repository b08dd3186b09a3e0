"""Kernels of a fused Llama block with hal's attention, against torch.compile of the same block with SDPA.

    python benchmarks/precision_fused.py [--record] [--width 2048] [--tokens 2048]

One layer of Llama-3.2-1B's proportions with its embedding and norm, in bfloat16 on CUDA and float32 on the CPU. Kernels
are counted by the profiler: of one call in evaluation, of forward and backward in training; graph launches are those of
evaluation at OptimizationLevel.AGGRESSIVE. "Fused" has one product for queries, keys and values, one for gate and up,
and hal's attention or SDPA. Times are medians of interleaved calls in evaluation.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from hal_precision import FusionConfig, FusionStrategy, OptimizationLevel, create_unified_attention_fusion
from hal_precision.fusion import count_kernels
from torch import Tensor
from transformers import LlamaConfig, LlamaModel


def build(width: int, device: str, state: Any = None) -> Any:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        head_dim=64,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = LlamaModel(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    if state is not None:
        model.load_state_dict(state)
    return model


def evaluation(model: Any, tokens: Tensor) -> Callable[[], Any]:
    def call() -> Tensor:
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    return call


def training(model: Any, tokens: Tensor) -> Callable[[], Any]:
    def call() -> None:
        model(input_ids=tokens, use_cache=False).last_hidden_state.float().square().mean().backward()

    return call


def medians(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Milliseconds of each call, interleaved, the device waited for."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call in zip(found, calls, strict=True):
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in found]


def main() -> int:
    options = record.parser(__doc__)
    options.add_argument("--width", type=int, default=2048)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--evaluation", action="store_true", help="no training, which compiles a graph more")
    given = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        from cuda_attention import open_device

        open_device()
    tokens = torch.randint(256, (1, given.tokens), device=device)
    eager = build(given.width, device).eval()
    want = evaluation(eager, tokens)().float()
    rows, calls, base = [], [evaluation(eager, tokens)], [0, 0]
    one, aggressive = OptimizationLevel.BALANCED, OptimizationLevel.AGGRESSIVE
    kinds = [("SDPA, compiled", False, False, one), ("fused", True, True, one), ("fused, SDPA", False, True, one)]
    if device == "cuda":
        kinds += [(f"{name}, one graph launch", hal, merge, aggressive) for name, hal, merge, _ in kinds]
    count = sum(count_kernels(calls[0])[0].values())
    rows.append(["SDPA, eager", str(count), "", "", "0", "0"])
    for name, hal, merge, level in kinds:
        model = build(given.width, device, eager.state_dict())
        config = FusionConfig(
            strategy=FusionStrategy.MODEL,
            optimization_level=level,
            merge_projections=merge,
            hal_attention=hal,
            enable_mixed_precision=False,
            enable_memory_optimization=level is OptimizationLevel.AGGRESSIVE,
        )
        fused = create_unified_attention_fusion(model, config=config).eval()
        call = evaluation(fused, tokens)
        for _ in range(3):
            error = float((call().float() - want).norm() / want.norm())
        kernels, launches = count_kernels(call)
        print(name, error, sum(kernels.values()), launches, kernels, flush=True)
        counts = [sum(kernels.values()), 0]
        if level is OptimizationLevel.BALANCED and not given.evaluation:
            both = training(fused.train(), tokens)
            both()
            counts[1] = sum(count_kernels(both)[0].values())
            fused.eval()
        if name == kinds[0][0]:
            base = counts
        less = [f"{have} ({have / of - 1:+.0%})" if have else "" for have, of in zip(counts, base, strict=True)]
        rows.append([name, *less, "", str(launches), f"{error:.2g}"])
        calls.append(call)
    for row, each in zip(rows, medians(calls, given.rounds), strict=True):
        row[3] = f"{each:.3f}"
    columns = ["block", "kernels, evaluation", "kernels, training", "ms, evaluation", "graph launches", "error"]
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    notes = [
        f"{where}, width {given.width}, {given.tokens:,} tokens. In brackets against SDPA, compiled; bar -25%. Error: "
        "relative, against the eager block in the same dtype."
    ]
    record.publish(
        given, "precision", "Fused blocks against torch.compile", columns, rows, notes, section="Fused blocks"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
