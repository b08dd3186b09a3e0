"""A training step of whole models on a CUDA device: a Llama and a Gemma, random weights, through hal and through SDPA.

    python benchmarks/cuda_training.py [--record] [--tokens 8192] [--layers 0]

A step is forward, loss, backward and a fused AdamW step in bf16, on one sequence of random tokens. The two attention
settings take turns on the same weights in one run. Medians; lower is better. The shapes are those of Llama 3.2 1B and
of Gemma 3 1B and 4B, whose layers read 512 or 1,024 tokens but for one in six, which reads all; vocabularies are cut to
`VOCABULARY` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from cuda_attention import board, open_device
from cuda_model import in_turns
from record import parser, publish

import hal_core as hal

VOCABULARY = 32768


def llama(layers: int) -> Any:
    """Llama 3.2 1B's configuration. layers: 0 for all of them."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers or 16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    )


def gemma(layers: int, whole: int, hidden: int, inner: int, heads: int, heads_kv: int, window: int) -> Any:
    """A text configuration of Gemma 3: one layer in six reads all tokens, the others a window. whole: its layers."""
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers or whole,
        num_attention_heads=heads,
        num_key_value_heads=heads_kv,
        head_dim=256,
        sliding_window=window,
        max_position_embeddings=131072,
    )


MODELS: dict[str, Callable[[int], Any]] = {
    "Llama 3.2 1B": llama,
    "Gemma 3 1B": partial(gemma, whole=26, hidden=1152, inner=6912, heads=4, heads_kv=1, window=512),
    "Gemma 3 4B": partial(gemma, whole=34, hidden=2560, inner=10240, heads=8, heads_kv=4, window=1024),
}


def trained(config: Any, tokens: int) -> dict[str, Callable[[], Any]]:
    """One training step by attention setting, of two models that hold the same parameters."""
    from transformers import AutoModelForCausalLM

    def build(setting: str) -> Any:
        with torch.device("cuda"):
            # A configuration of its own: it holds the setting.
            model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=setting)
        return model.to(torch.bfloat16).train()

    models = {setting: build(setting) for setting in ("hal", "sdpa")}
    models["sdpa"].load_state_dict(models["hal"].state_dict(keep_vars=True), assign=True)
    optimizer = torch.optim.AdamW(models["hal"].parameters(), lr=1e-6, fused=True)
    ids = torch.randint(0, VOCABULARY, (1, tokens), device="cuda")

    def step(setting: str) -> float:
        with torch.enable_grad():
            loss = models[setting](input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return {setting: partial(step, setting) for setting in models}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=8192)
    options.add_argument("--layers", type=int, default=0, help="layers of each model; 0 for all that it has")
    options.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options.add_argument("--steps", type=int, default=11, help="steps of each setting that are timed")
    chosen = options.parse_args()
    open_device()
    import hal_nn

    hal_nn.register_huggingface()
    rows = []
    for name in chosen.models:
        config = MODELS[name](chosen.layers)
        steps = trained(config, chosen.tokens)
        with hal.meter() as meter:
            losses = {"hal": steps["hal"]()}
        assert meter.records, "no attention of the model ran on hal"
        losses["sdpa"] = steps["sdpa"]()  # one step later, on the same tokens
        for _ in range(2):
            for step in steps.values():
                step()
        times = in_turns(chosen.steps, steps)
        shown = [f"{times[setting] * 1e3:.1f}" for setting in ("hal", "sdpa")]
        lost = " / ".join(f"{losses[setting]:.4f}" for setting in ("hal", "sdpa"))
        rows.append([name, str(config.num_hidden_layers), *shown, f"{times['sdpa'] / times['hal']:.3f}", lost])
        print(rows[-1], flush=True)
        del steps
        torch.cuda.empty_cache()
    columns = ("model", "layers", "hal, ms", "sdpa, ms", "sdpa / hal", "loss of hal's first step / of sdpa's after it")
    notes = [f"{chosen.tokens} tokens, bf16, AdamW; vocabulary of {VOCABULARY}.", board()]
    publish(chosen, "cuda_training", "A training step", columns, rows, notes)


if __name__ == "__main__":
    main()
