"""Adaptive tiling: skipping by a certificate where keys cluster, and two precisions on MiniLM.

    python examples/geometric/adaptive_tiling.py [--length 2048] [--minilm] [--device cpu:0] [--out tiling.png]

Clustered keys: tokens around 32 topics (standard normal, head size 64) with noise 0.1, shuffled; queries are twice as
long, so that a row reads its own topic. Times are medians of interleaved rounds, planning and ordering included.
MiniLM (--minilm): queries, keys and values of its layers on a passage of about 500 tokens; the error of attention with
0.64 of the blocks in float32 and the others in bfloat16, beside all of it in bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from hal_geometric import AdaptiveTiling, adaptive_attention
from torch import Tensor

import hal_core as hal
from hal_core.testing import relative_error


def clustered(length: int, topics: int = 32, noise: float = 0.1, heads: int = 8, seed: int = 0) -> list[Tensor]:
    """query, key, value, [1, heads, length, 64]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1, heads, topics, 64, generator=generator)

    def tokens() -> Tensor:
        topic = torch.randint(topics, (1, heads, length, 1), generator=generator).expand(-1, -1, -1, 64)
        return centres.gather(2, topic) + noise * torch.randn(1, heads, length, 64, generator=generator)

    return [2 * tokens(), tokens(), torch.randn(1, heads, length, 64, generator=generator)]


def medians(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def skip(
    length: int = 2048, rounds: int = 5, device: str = "cpu:0", tau: float = 0.01, heads: int = 8
) -> dict[str, Any]:
    """Density, lost mass and time of the certified tiling on clustered keys."""
    tensors = clustered(length, heads=heads)
    if device.startswith("cuda"):
        tensors = [t.to("cuda", torch.bfloat16) for t in tensors]
    tiling = AdaptiveTiling(tau, block=32, device=device)
    found = adaptive_attention(*tensors, tiling, order=True, backend=device)
    want = hal.attention(*tensors, backend=device)
    shuffled = adaptive_attention(*tensors, tiling, backend=device)
    calls = {
        "dense": lambda: hal.attention(*tensors, backend=device),
        "adaptive": lambda: adaptive_attention(*tensors, tiling, order=True, backend=device),
    }
    return {
        "density": found.density,
        "density_shuffled": shuffled.density,
        "error": relative_error(found.out, want),
        "seconds": medians(calls, rounds, device),
        "plan": found.plan,
    }


def minilm(layers: int = 4, share: float = 0.64, device: str = "cpu:0", block: int = 16) -> list[dict[str, float]]:
    """Errors of each layer's attention against float64: the two precisions, and bfloat16 alone."""
    from hal_geometric import ModelHeads
    from minilm_heads import TEXTS, texts

    model = ModelHeads("minilm")
    calls = model.read(model.tokens(texts.read([TEXTS])[0].texts[0], 512))[1]
    tiling, rows = AdaptiveTiling(0.1, mode="precision", share=share, block=block, device=device), []
    for call in calls[:layers]:
        q, k, v = (t.contiguous() for t in (call.query, call.key, call.value))
        want = hal.testing.reference(q, k, v).out
        found = adaptive_attention(q, k, v, tiling, backend=device)
        low = hal.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=device)
        rows.append(
            {
                "share": found.density,
                "error": relative_error(found.out, want),
                "bfloat16": relative_error(low.float(), want),
            }
        )
    return rows


def picture(path: str, result: dict[str, Any], rows: list[dict[str, float]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3 if rows else 2, figsize=(14 if rows else 9, 4), layout="constrained")
    plan = result["plan"]
    counts, indices = plan.counts[0, 0].cpu(), plan.indices[0, 0].cpu().long()
    image = torch.zeros(len(counts), int(indices.max()) + 1)
    for row, count in enumerate(counts.tolist()):
        image[row, indices[row, :count]] = 1
    axes[0].imshow(image, cmap="Blues")
    axes[0].set(
        title=f"blocks that head 0 reads; of all heads {result['density']:.2f}",
        xlabel="key block",
        ylabel="query block",
    )
    axes[1].bar([*result["seconds"]], [1e3 * s for s in result["seconds"].values()])
    axes[1].set(ylabel="ms", title="ordering and planning included")
    if rows:
        place = torch.arange(len(rows))
        axes[2].bar(place - 0.2, [r["error"] for r in rows], 0.4, label=f"{rows[0]['share']:.2f} in float32")
        axes[2].bar(place + 0.2, [r["bfloat16"] for r in rows], 0.4, label="all bfloat16")
        axes[2].set(xlabel="layer of MiniLM", ylabel="relative error", title="attention in two precisions")
        axes[2].legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu:0")
    parser.add_argument("--minilm", action="store_true")
    parser.add_argument("--out", help="write a picture here")
    options = parser.parse_args(arguments)
    found = skip(options.length, options.rounds, options.device, heads=options.heads)
    times = found["seconds"]
    print(
        f"{options.length} keys: reads {found['density']:.3f} of the blocks ({found['density_shuffled']:.3f} before "
        f"ordering), error {found['error']:.1e}"
    )
    faster = times["dense"] / times["adaptive"]
    print(f"dense {1e3 * times['dense']:.1f} ms, adaptive {1e3 * times['adaptive']:.1f} ms: {faster:.2f} times as fast")
    rows = minilm(device=options.device) if options.minilm else []
    for number, row in enumerate(rows):
        print(
            f"MiniLM layer {number}: error {row['error']:.1e} with {row['share']:.2f} in float32, "
            f"{row['bfloat16']:.1e} all in bfloat16"
        )
    if options.out:
        picture(options.out, found, rows)
    return found | {"minilm": rows}


if __name__ == "__main__":
    main()
