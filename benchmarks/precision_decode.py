"""A decode step and a prefill of a Llama of about a billion parameters on a GPU: fused with hal's attention, and with
SDPA under torch.compile.

    python benchmarks/precision_decode.py [--record] [--cache 8192] [--layers 16] [--prefill]

Random weights in bfloat16, one sequence, a static cache that is full but for the last tokens. A decode step reads one
token, all weights and the cache. Times are medians of interleaved calls with the device waited for. Errors are
relative, of the step's logits, against SDPA that is not compiled.
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

STEPS = 32
BARS = {"default": "1.5", "reduce-overhead": "1.05"}


def build(given: Any, device: str, source: Any = None) -> Any:
    """A Llama of Llama-3.2-1B's shape; with a source, of its parameters and not of copies."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=given.vocabulary,
        hidden_size=given.width,
        intermediate_size=4 * given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=given.width // 64,
        num_key_value_heads=max(1, given.width // 256),
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device if source is None else "meta"):
        model = LlamaForCausalLM(config).to(dtype).eval()
    if source is not None:
        model.load_state_dict(source.state_dict(), assign=True)
        model.tie_weights()
        model.model.rotary_emb = source.model.rotary_emb
    return model


class Step:
    """One decode step, again and again at the same place of a filled cache.

    Attributes:
        cache: transformers' StaticCache after the prompt. positions: int64 [1], where the step's token is.
    """

    def __init__(self, model: Any, call: Callable[..., Any], prompt: Tensor, length: int) -> None:
        from transformers import StaticCache

        self.model, self.call = model, call
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.token = prompt[:, -1:].clone()
        with torch.no_grad():
            for part in prompt.split(2048, dim=1):
                model(input_ids=part, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.kept = [(layer, _length(layer)) for layer in self.cache.layers]

    def __call__(self) -> Tensor:
        for layer, seen in self.kept:
            if seen is not None:
                layer.cumulative_length.copy_(seen)
        with torch.no_grad():
            return self.call(input_ids=self.token, past_key_values=self.cache, use_cache=True).logits  # type: ignore[no-any-return]


def _length(layer: Any) -> Tensor | None:
    """A copy of what a layer of the cache keeps of its length, where it keeps it in a tensor."""
    seen = getattr(layer, "cumulative_length", None)
    return seen.clone() if isinstance(seen, Tensor) else None


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> int:
    options = record.parser(__doc__)
    options.add_argument("--cache", type=int, default=8192)
    options.add_argument("--layers", type=int, default=16)
    options.add_argument("--width", type=int, default=2048)
    options.add_argument("--vocabulary", type=int, default=128256)
    options.add_argument("--rounds", type=int, default=STEPS)
    options.add_argument("--prefill", action="store_true", help="a prefill too")
    given = options.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        from cuda_attention import open_device

        open_device()
    start = time.monotonic()
    plain = build(given, device)
    prompt = torch.randint(given.vocabulary, (1, given.cache - 64), device=device)
    steps: dict[str, Callable[[], Any]] = {"SDPA, eager": Step(plain, plain, prompt, given.cache)}
    want = steps["SDPA, eager"]().float()
    kernels: dict[str, tuple[int, int]] = {}
    fills: dict[str, Callable[[], Any]] = {}
    errors: dict[str, str] = {}
    fusion = FusionConfig(
        strategy=FusionStrategy.MODEL, optimization_level=OptimizationLevel.AGGRESSIVE, enable_mixed_precision=False
    )
    for name in ("default", "reduce-overhead", "hal"):
        model = build(given, device, plain)
        call: Any = (
            create_unified_attention_fusion(model, config=fusion).eval()
            if name == "hal"
            else torch.compile(model, mode=name, fullgraph=True, dynamic=False)
        )
        label = "hal, fused" if name == "hal" else f"SDPA, compiled, {name}"
        try:
            step = Step(plain, call, prompt, given.cache)
            for _ in range(4):
                got = step().float()
            errors[label] = f"{float((got - want).norm() / want.norm()):.2g}"
            counted, launches = count_kernels(step)
            kernels[label] = sum(counted.values()), launches
            steps[label] = step
        except Exception as error:  # the others are measured all the same
            print(f"{label}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
        print(f"{time.monotonic() - start:5.1f} s: {label} {errors.get(label)} {kernels.get(label)}", flush=True)
        fills[label] = lambda call=call: call(input_ids=prompt, use_cache=False, logits_to_keep=1)
    times = medians(steps, given.rounds)
    rows = []
    for name, ms in times.items():
        count, launches = kernels.get(name, (0, 0))
        ratio = f"{ms / times['hal, fused']:.3f}" if "hal, fused" in times else ""
        bar = next((bar for mode, bar in BARS.items() if name.endswith(mode)), "")
        rows.append(
            ["decode step", name, f"{ms:.3f}", ratio, bar, str(count or ""), str(launches), errors.get(name, "")]
        )
        print(*rows[-1], flush=True)
    if given.prefill:
        with torch.no_grad():
            fills = {"SDPA, eager": lambda: plain(input_ids=prompt, use_cache=False, logits_to_keep=1), **fills}
            fills.pop("SDPA, compiled, reduce-overhead", None)
            for name, call in fills.items():
                call()
                call()
                print(f"{time.monotonic() - start:5.1f} s: prefill {name}", flush=True)
            times = medians(fills, 7)
        for name, ms in times.items():
            bar = "1.05" if "default" in name else ""
            rows.append(
                [
                    f"prefill of {prompt.shape[1]:,}",
                    name,
                    f"{ms:.3f}",
                    f"{ms / times['hal, fused']:.3f}",
                    bar,
                    "",
                    "",
                    "",
                ]
            )
    columns = ["what", "model", "ms", "over hal, fused", "bar", "kernels", "graph launches", "error"]
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    notes = [f"{where}; width {given.width}, {given.layers} layers, a static cache of {given.cache:,} tokens."]
    record.publish(given, "precision", "A decode step", columns, rows, notes, section="A decode step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
