"""A whole model on a CUDA device: prefill and decode of a Llama of about a billion parameters through hal and through
SDPA.

    python benchmarks/cuda_model.py [--record] [--tokens 8192]

Random weights in bf16, one sequence; the two attention settings take turns in one run. Medians; lower is better.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from cuda_attention import board, open_device
from record import parser, publish


def build(attention: str, base: Any = None) -> Any:
    """A Llama of Llama-3.2-1B's shape; the second one shares the first one's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(copy.deepcopy(config)).to(torch.bfloat16).eval()
    if base is not None:
        model.load_state_dict(base.state_dict())
    return model


def clocked(call: Callable[[], Any]) -> float:
    """Seconds of one call, the device waited for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(count: int, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call over `count` turns, in which they take turns at being first."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(count):
        for name in list(calls) if turn % 2 else reversed(calls):
            times[name].append(clocked(calls[name]))
    return {name: statistics.median(each) for name, each in times.items()}


def measure(models: Mapping[str, Any], tokens: int, steps: int) -> dict[str, dict[str, float]]:
    """Seconds by row and model: of a prefill, and of a token at lengths never seen and at lengths seen before."""
    ids = torch.randint(0, 128256, (1, tokens), device="cuda")
    caches = {name: model(ids, use_cache=True, logits_to_keep=1).past_key_values for name, model in models.items()}

    def generate(name: str, again: bool) -> None:
        """again: the cache is cut back to where it was."""
        token = ids[:, -1:]
        for _ in range(steps):
            token = models[name](token, past_key_values=caches[name], use_cache=True).logits[:, -1:].argmax(-1)
        if again:
            caches[name].crop(-steps)

    prefill = {name: partial(model, ids, use_cache=False, logits_to_keep=1) for name, model in models.items()}
    seen, fresh = ({name: partial(generate, name, again) for name in models} for again in (True, False))
    for call in (*prefill.values(), *seen.values()):
        call()
    found = {
        f"prefill {tokens} tokens, ms": in_turns(5, prefill),
        "decode at lengths seen before, ms": {name: s / steps for name, s in in_turns(14, seen).items()},
    }
    for call in fresh.values():  # past the lengths that were seen
        call()
    return found | {
        f"decode a token from {tokens} on, ms": {name: s / steps for name, s in in_turns(4, fresh).items()},
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=8192)
    options.add_argument("--steps", type=int, default=16, help="tokens generated in one timing")
    chosen = options.parse_args()
    open_device()
    import hal_nn

    hal_nn.register_huggingface()
    models = {"sdpa": build("sdpa")}
    models["hal"] = build("hal", models["sdpa"])
    with torch.no_grad():
        found = measure(models, chosen.tokens, chosen.steps)
    rows = [
        [label, f"{times['hal'] * 1e3:.2f}", f"{times['sdpa'] * 1e3:.2f}", f"{times['sdpa'] / times['hal']:.3f}"]
        for label, times in found.items()
    ]
    last = list(found.values())[-1]
    rows.append(["decode, tokens a second", *(f"{1 / last[name]:.1f}" for name in ("hal", "sdpa")), ""])
    publish(chosen, "cuda_model", "A billion-parameter Llama", ("", "hal", "sdpa", "sdpa / hal"), rows, [board()])


if __name__ == "__main__":
    main()
