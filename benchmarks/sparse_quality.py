"""What sparse attention costs in quality: loss and a needle task of the byte-level model, at a context of 2,048 bytes.

    python benchmarks/sparse_quality.py [--record] [--contexts 8] [--needles 16]

Blocks of 32; the sparsity counts blocks of the causal triangle. Every attention of the model runs by the pattern, in
all layers. Gates of the learned pattern are trained here, one for each layer, on text that the model was trained on.
Loss is on sources that it was not trained on, in nats for a byte; "loss, more" is against dense attention. The needle
task asks for 8 digits that were given once, up to 2,000 bytes before; a digit by chance is right in 10% of the cases.
The bar: the dynamic threshold, as it is by default, adds at most 1% to the loss at 80%.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import byte_model
import record
import torch
from hal_nn.sparse import LearnedTiling, SparseGate, SparsePattern, plan_density, tiling_of, train_gate
from hal_nn.sparse.selection import SparseTiling

import hal_core as hal
from hal_core import AttentionRequest, BlockPlan

BLOCK, SPARSITIES, BAR = 32, (0.5, 0.8, 0.9), 0.01
SCORES = ("mean", "antidiagonal")


class Layers(SparseTiling):
    """A tiling for each layer of a model, taken in turn; keeps the queries and keys that it has seen, where asked to,
    and the density of its plans.
    """

    needs_content = True

    def __init__(self, name: str, tilings: list[SparseTiling], keep: bool = False) -> None:
        super().__init__(0.0, BLOCK, BLOCK)
        self.name, self.tilings, self.keep, self.max_blocks = f"layers of {name}", tilings, keep, 1 << 14
        self.calls, self.densities = 0, list[float]()
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def plan(
        self, request: AttentionRequest, limits: Mapping[str, int], *, query: Any = None, key: Any = None
    ) -> BlockPlan:
        tiling = self.tilings[self.calls % len(self.tilings)]
        self.calls += 1
        if self.keep:
            self.kept.append((query.detach(), key.detach()))
        plan = tiling.plan(request, limits, query=query, key=key)
        self.densities.append(plan_density(plan, request))
        return plan


def trained_gates(model: Any, contexts: int) -> list[SparseGate]:
    """A gate for each layer, distilled from the dense attention of texts with needles."""
    layers, rng = len(model.model.layers), random.Random(5)
    seen = Layers("dense", [tiling_of("local_global", 0.0, BLOCK)], keep=True)
    text = byte_model.sources().training
    with torch.no_grad(), hal.use("cpu:0", tiling=seen):
        for _ in range(contexts):
            row = byte_model.training_sequence(rng, text, byte_model.CONTEXT)
            model(torch.tensor([list(row)]), use_cache=False)
    gates = []
    for layer in range(layers):
        query, _ = seen.kept[layer]
        gate = SparseGate(query.shape[1], query.shape[3])
        train_gate(gate, seen.kept[layer::layers] * 3, block_size=BLOCK)
        gates.append(gate)
    return gates


def variants(sparsity: float, gates: list[SparseGate]) -> dict[str, list[SparseTiling]]:
    """The tilings of all patterns, by the name of the row."""
    found: dict[str, list[SparseTiling]] = {}
    for pattern in SparsePattern:
        if pattern is SparsePattern.LEARNED:
            found["learned"] = [LearnedTiling(gate, sparsity, BLOCK, BLOCK) for gate in gates]
        elif pattern is SparsePattern.DYNAMIC_THRESHOLD:
            for score in SCORES:
                found[f"dynamic_threshold, {score}"] = [tiling_of(pattern, sparsity, BLOCK, score=score)]
        else:
            found[pattern.value] = [tiling_of(pattern, sparsity, BLOCK)]
    return found


def main() -> int:
    options = record.parser(__doc__)
    options.add_argument("--contexts", type=int, default=8)
    options.add_argument("--needles", type=int, default=16)
    options.add_argument("--gate-contexts", type=int, default=24)
    options.add_argument("--threads", type=int, help="torch threads")
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    import hal_nn

    hal_nn.register_huggingface()
    model = byte_model.load(attention="hal")
    text, needles = byte_model.held_out(3, given.contexts), byte_model.needle_task(3, given.needles)[0]
    with hal.use("cpu:0"):
        dense = byte_model.loss(model, text)
        rows = [["0%", "dense", "100%", f"{dense:.4f}", "", f"{byte_model.needle_accuracy(model, needles):.0%}", ""]]
    gates, missed = trained_gates(model, given.gate_contexts), False
    for sparsity in SPARSITIES:
        for name, tilings in variants(sparsity, gates).items():
            tiling = Layers(f"{name} {sparsity}", tilings)
            with hal.use("cpu:0", tiling=tiling):
                loss, found = byte_model.loss(model, text), byte_model.needle_accuracy(model, needles)
            density, more = sum(tiling.densities) / len(tiling.densities), loss / dense - 1
            verdict = ""
            if name == "dynamic_threshold, mean" and sparsity == 0.8:
                missed |= more > BAR
                verdict = "held" if more <= BAR else "missed"
            rows.append(
                [f"{sparsity:.0%}", name, f"{density:.1%}", f"{loss:.4f}", f"{more:+.2%}", f"{found:.0%}", verdict]
            )
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    columns = ("sparsity", "pattern", "blocks read", "loss", "loss, more", "needle digits", "bar")
    notes = [
        f"{given.contexts} contexts of {byte_model.CONTEXT} bytes, {given.needles} needles, blocks of {BLOCK}.",
        f"The model: {byte_model.described()}",
    ]
    record.publish(given, "sparse_quality", "Quality of sparse attention", columns, rows, notes)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
