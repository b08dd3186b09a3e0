"""Train a small model, plan its formats with the command line, and store it by that plan.

    python examples/precision_plan.py [--out out/precision] [--steps 150]

The model reads bytes of the Python standard library's sources. `hal precision` measures how sensitive each block of its
weights is on such text, and writes a plan that saves four fifths of the bytes; the model is then stored by the plan,
and its loss on other text is printed beside the whole model's.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

import torch
from hal_cli.command_line import main as hal
from hal_precision import PrecisionPlan, create_ultra_precision_module
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM


def draw(text: bytes, rows: int, seed: int) -> torch.Tensor:
    """int64 [rows, 97] of bytes at random places."""
    whole = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(whole) - 97, (rows,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([whole[at : at + 97] for at in starts.tolist()])


def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Nats a byte."""
    logits = model(tokens[:, :-1], use_cache=False).logits
    return cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("out/precision"))
    options.add_argument("--steps", type=int, default=150)
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    training, other = inspect.getsource(argparse).encode(), inspect.getsource(inspect).encode()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(given.steps):
        found = loss(model, draw(training, 8, step))
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder, text, plan_file = given.out / "model", given.out / "text.py", given.out / "plan.json"
    model.eval().save_pretrained(folder)
    text.write_bytes(training)
    wanted = ["precision", str(folder), "--text", str(text), "--save", "0.8", "--top", "3", "--out", str(plan_file)]
    if code := hal(wanted):
        return code
    plan = PrecisionPlan.from_json(plan_file.read_text(encoding="utf-8"))
    small = create_ultra_precision_module(model, plan=plan)
    held = draw(other, 32, 1)
    with torch.no_grad():
        losses = {
            "float32": loss(model, held),
            "by the plan": loss(small, held),
        }
    print("nats a byte of other text:", ", ".join(f"{name} {float(value):.4f}" for name, value in losses.items()))
    size = small.save(given.out / "small.safetensors")
    print(f"{given.out / 'small.safetensors'}: {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
