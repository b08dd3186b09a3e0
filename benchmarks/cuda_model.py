"""A whole model on a CUDA device: prefill and decode of a Llama of about a billion parameters through hal and through SDPA.

    python benchmarks/cuda_model.py [--record] [--tokens 8192]

Random weights in bf16, one sequence; the two attention settings take turns in one run. Medians; lower is better.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from cuda_attention import board, open_device
from record import parser, publish


def build(attention: str, base: Any = None) -> Any:
    """A Llama of Llama-3.2-1B's shape; the second one shares the first one's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=True,
        attn_implementation=attention,
    )  # fmt: skip
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


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=8192)
    options.add_argument("--steps", type=int, default=32, help="tokens generated in one timing")
    chosen = options.parse_args()
    open_device()
    import hal_nn

    hal_nn.register_huggingface()
    models = {"sdpa": build("sdpa")}
    models["hal"] = build("hal", models["sdpa"])
    ids = torch.randint(0, 128256, (1, chosen.tokens), device="cuda")
    prefill: dict[str, list[float]] = {name: [] for name in models}
    fresh: dict[str, list[float]] = {name: [] for name in models}
    seen: dict[str, list[float]] = {name: [] for name in models}

    def generate(model: Any, cache: Any) -> None:
        token = ids[:, -1:]
        for _ in range(chosen.steps):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    with torch.no_grad():
        caches = {name: model(ids, use_cache=True, logits_to_keep=1).past_key_values for name, model in models.items()}
        for turn in range(5):
            for name, model in models.items():
                seconds = clocked(lambda model=model: model(ids, use_cache=False, logits_to_keep=1))
                again = model(ids, use_cache=True, logits_to_keep=1).past_key_values
                repeated = clocked(lambda model=model, again=again: generate(model, again))
                longer = clocked(lambda model=model, name=name: generate(model, caches[name]))
                if turn:
                    prefill[name].append(seconds)
                    seen[name].append(repeated / chosen.steps)
                    fresh[name].append(longer / chosen.steps)
    rows = []
    for label, times in (
        (f"prefill {chosen.tokens} tokens, ms", prefill), (f"decode a token from {chosen.tokens} on, ms", fresh),
        ("decode at lengths seen before, ms", seen),
    ):  # fmt: skip
        hal, sdpa = (statistics.median(times[name]) for name in ("hal", "sdpa"))
        rows.append([label, f"{hal * 1e3:.2f}", f"{sdpa * 1e3:.2f}", f"{sdpa / hal:.3f}"])
    rows.append(["decode, tokens a second", *(f"{1 / statistics.median(fresh[name]):.1f}" for name in ("hal", "sdpa")), ""])
    publish(chosen, "cuda_model", "A billion-parameter Llama", ("", "hal", "sdpa", "sdpa / hal"), rows, [board()])


if __name__ == "__main__":
    main()
