"""The loss of a byte-level model trained with FP8 layers against the same training in bfloat16.

    python benchmarks/precision_training.py [--record] [--steps 1000] [--seeds 3] [--state out/precision_training.json]
        [--device cuda:0] [--workers 3] [--eager]

Both sides train under autocast to bfloat16, from the same weights and on the same bytes; the FP8 side multiplies in FP8
in every linear layer but the output layer, which shares the embedding's weight. On a device without FP8 its operands
are rounded alike and multiplied in float32. In the middle of the FP8 training one gradient is made infinite: that step
has to be skipped and counted. Losses are those of text that is not trained on, after the last step.

With --state, every finished training is kept in that file, and a run that was stopped goes on from it. On CUDA forward
and backward are captured as one graph, unless --eager is given; the step with the infinite gradient is not captured.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import byte_model
import record
import torch
from hal_precision import FP8Config, FP8TrainingEngine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

BAR = 0.005
LENGTH = 128
CONFIGS: dict[str, FP8Config | None] = {
    "bfloat16": None,
    "FP8 rowwise": FP8Config(),
    "FP8 tensorwise, delayed": FP8Config(granularity="tensorwise", scaling="delayed"),
}


def batch(rng: random.Random, text: bytes, sequences: int) -> Tensor:
    """int64 [sequences, LENGTH + 1] of bytes."""
    return byte_model._stacked([byte_model.excerpt(rng, text, LENGTH + 1) for _ in range(sequences)])


def loss_of(output: Any, targets: Tensor) -> Tensor:
    return cross_entropy(output.logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor) -> float:
    """Mean cross entropy in nats a byte, in float32."""
    parts = [
        float(cross_entropy(model(rows[:, :-1], use_cache=False).logits.flatten(0, 1), rows[:, 1:].flatten()))
        for rows in tokens.split(32)
    ]
    return sum(parts) / len(parts)


def spoil(gradient: Tensor) -> Tensor:
    """The gradient with one infinite value."""
    found = gradient.clone()
    found.view(-1)[0] = math.inf
    return found


class CapturedStep:
    """Forward and backward of one batch as a CUDA graph.

    Args:
        call: runs forward and backward of int64 [sequences, LENGTH + 1] and gives the loss. model: has the gradients.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], model: nn.Module, tokens: Tensor) -> None:
        self.tokens = tokens.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are chosen and built outside of the capture
            for _ in range(3):
                model.zero_grad(set_to_none=True)
                call(self.tokens)
        torch.cuda.current_stream().wait_stream(side)
        model.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = call(self.tokens)
        self.gradients = [(each, each.grad) for each in model.parameters()]
        model.zero_grad(set_to_none=True)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.loss


def train(
    seed: int, name: str, steps: int, sequences: int, rate: float, device: str = "cpu", capture: bool = False
) -> dict[str, Any]:
    """Train for a number of steps. Gives the held-out loss, the last losses and what was counted."""
    config, kind = CONFIGS[name], torch.device(device).type
    model = byte_model.build(seed).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    rng, text = random.Random(seed), byte_model.sources().training
    engine = FP8TrainingEngine(model, config or FP8Config(), loss=loss_of, clip_norm=1.0)
    start, losses, skipped_at = time.monotonic(), list[float](), None
    if config is not None:
        engine.setup_fp8_training()

    def differentiate(tokens: Tensor) -> Tensor:
        inputs = {"input_ids": tokens[:, :-1], "use_cache": False}
        with torch.autocast(kind, torch.bfloat16, cache_enabled=not capture):
            if config is not None:
                return engine.training_step(inputs, tokens[:, 1:])
            loss = loss_of(model(**inputs), tokens[:, 1:])
        loss.backward()
        return loss.detach()

    call: Callable[[Tensor], Tensor] = differentiate
    if capture:
        call = CapturedStep(differentiate, model, batch(random.Random(0), text, sequences).to(device))
        for layer in engine.layers.values():  # as before the warm-up
            layer.amax.zero_()
            layer.counts.zero_()
    for step in range(steps):
        factor = min(1.0, (step + 1) / 50) * min(1.0, (steps - step) / (0.5 * steps))
        optimizer.param_groups[0]["lr"] = rate * factor
        tokens = batch(rng, text, sequences).to(device)
        if config is not None and step == steps // 2:
            hook = model.get_parameter("model.layers.0.mlp.down_proj.weight").register_hook(spoil)
            loss = differentiate(tokens)
            hook.remove()
        else:
            loss = call(tokens)
        losses.append(float(loss))
        engine.micro_steps = 1  # a graph's replay is not seen by the engine
        if config is None:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        elif not engine.optimizer_step(optimizer):
            skipped_at = step
        if (step + 1) % 100 == 0:
            print(f"  {name}, seed {seed}, step {step + 1}, loss {sum(losses[-100:]) / 100:.4f}", flush=True)
    counted = engine.get_training_statistics() if config is not None else {}
    if config is not None:
        engine.__exit__()
    return {
        "held_out": held_out_loss(model.eval(), byte_model.held_out(11, 128, 256).to(device)),
        "curve": [sum(losses[at : at + 100]) / len(losses[at : at + 100]) for at in range(0, steps, 100)],
        "skipped_at": skipped_at,
        "seconds": time.monotonic() - start,
        **{key: counted[key] for key in ("overflows", "underflows", "skipped_steps", "steps", "note") if counted},
    }


def key_of(given: Any, name: str, seed: int) -> str:
    """The name of a training in the state's file."""
    return f"{name} {seed} {given.steps} {given.sequences} {given.rate:g}"


def trainings(given: Any, known: dict[str, Any]) -> None:
    """Run the trainings that `known` lacks and put them there, and into the state's file, as they end."""
    asked = {key_of(given, name, seed): (seed, name) for seed in range(given.seeds) for name in CONFIGS}
    capture = given.device.startswith("cuda") and not given.eager
    with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
        jobs = {
            pool.submit(train, *job, given.steps, given.sequences, given.rate, given.device, capture): key
            for key, job in asked.items()
            if key not in known
        }
        for job in as_completed(jobs):
            known[jobs[job]] = job.result()
            print(jobs[job], {k: v for k, v in job.result().items() if k != "curve"}, flush=True)
            if given.state is not None:
                given.state.parent.mkdir(parents=True, exist_ok=True)
                part = given.state.with_suffix(".part")
                part.write_text(json.dumps(known, indent=1), encoding="utf-8")
                part.replace(given.state)


def main() -> int:
    options = record.parser(__doc__)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--sequences", type=int, default=8, help=f"of {LENGTH} bytes, in a step")
    options.add_argument("--rate", type=float, default=1e-3, help="largest learning rate")
    options.add_argument("--device", default="cpu")
    options.add_argument("--workers", type=int, default=1, help="trainings at a time")
    options.add_argument("--eager", action="store_true", help="no CUDA graph")
    options.add_argument("--state", type=Path, help="a file that keeps finished trainings")
    given = options.parse_args()
    known: dict[str, Any] = {}
    if given.state is not None and given.state.exists():
        known = json.loads(given.state.read_text(encoding="utf-8"))
    trainings(given, known)
    rows, missed = [], False
    for name, config in CONFIGS.items():
        if config is None:
            continue
        for seed in range(given.seeds):
            plain, found = (known[key_of(given, each, seed)] for each in ("bfloat16", name))
            share = found["held_out"] / plain["held_out"] - 1
            curve = max(b / a - 1 for a, b in zip(plain["curve"], found["curve"], strict=True))
            recovered = found["skipped_steps"] == 1 and found["skipped_at"] == given.steps // 2
            held = share <= BAR and recovered
            missed |= not held
            rows.append(
                [
                    name,
                    str(seed),
                    f"{plain['held_out']:.4f}",
                    f"{found['held_out']:.4f}",
                    f"{share:+.2%}",
                    f"{curve:+.2%}",
                    f"step {found['skipped_at']}, {found['skipped_steps']} skipped of {given.steps}",
                    f"{found['overflows']} / {found['underflows']}",
                    "held" if held else "missed",
                ]
            )
    columns = [
        "layers",
        "seed",
        "bfloat16's loss",
        "FP8's loss",
        "difference",
        "largest in a hundred steps",
        "injected overflow",
        "overflows / underflows",
        f"bar {BAR:.1%}",
    ]
    on_gpu = given.device.startswith("cuda")
    where = f"on {torch.cuda.get_device_name(given.device)}" if on_gpu else "emulated on the CPU"
    notes = [
        f"{given.steps} steps of {given.sequences} sequences of {LENGTH} bytes, learning rate {given.rate:g}, "
        f"FP8 {where}. Loss: nats a byte "
        "of sources that are not trained on, after the last step. 'Largest in a hundred steps' compares the means of "
        "the training losses of every hundred steps. Both sides have the same weights at the start and the same bytes; "
        "the FP8 side does one step less, the skipped one."
    ]
    title = "Training with FP8 layers" + (" on a GPU" if on_gpu else "")
    record.publish(given, "precision", title, columns, rows, notes, section=title)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
