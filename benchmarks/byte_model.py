"""A small byte-level language model, trained on the Python standard library's sources: real text and a real model
without a download.

    python benchmarks/byte_model.py            # trains it into out/byte_model, where it is not there yet
    model = byte_model.load()                  # from another benchmark or a test; trains it where it is absent

The model is a LlamaForCausalLM of 4 layers, 4 heads of 32 and a vocabulary of 256 bytes, for 2,048 bytes of context. It
is stored as transformers stores models (config.json, model.safetensors), with training.json beside it: its loss on
sources that it was not trained on, and how it was trained. One file in twenty is kept for that, chosen by its name.

Training text has needles in it: lines `KEY_kqzv = 52817394` that come again later with the same digits. The needle task
asks for the digits at the end of the context, up to 2,000 bytes after the line that gives them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

FOLDER = Path(os.environ.get("HAL_BYTE_MODEL", Path(__file__).resolve().parent.parent / "out" / "byte_model"))
CONTEXT = 2048
SECONDS = 900.0
DIGITS = 8
#: (share of the time, sequence length): short sequences first, since most of what bytes tell is near.
PHASES = ((0.6, 256), (0.2, 1024), (0.2, CONTEXT))
#: Bytes of a training step, on the CPU and on an accelerator.
BYTES_PER_STEP, BYTES_PER_STEP_ACCELERATED = 4096, 65536
NEEDLE_BYTES = len("KEY_abcd = 12345678\n")


class Sources(NamedTuple):
    """Bytes of the standard library's sources, uint8: what the model is trained on, and what it is not."""

    training: bytes
    held_out: bytes


@lru_cache(1)
def sources() -> Sources:
    """Every .py file of the standard library without its tests and without installed packages, in the order of names.

    A file whose name has a checksum divisible by 20 is held out.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not any(part in ("site-packages", "test", "tests") for part in name.split("/")):
            parts[zlib.crc32(name.encode()) % 20 == 0].append(path.read_bytes())
    return Sources(*(b"\n".join(texts) for texts in parts))


def needle(rng: random.Random) -> tuple[bytes, bytes]:
    """(`KEY_kqzv = `, `52817394`), both random."""
    name = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=4))
    return f"KEY_{name} = ".encode(), "".join(rng.choices("0123456789", k=DIGITS)).encode()


def insert(text: bytes, lines: list[tuple[float, bytes]]) -> bytes:
    """Text with lines put in after the next end of a line from the given share of its length on, in order."""
    out, before = [], 0
    for share, line in sorted(lines, key=lambda item: item[0]):
        place = max(text.find(b"\n", int(share * len(text))) + 1 or len(text), before)
        out += [text[before:place], line]
        before = place
    return b"".join([*out, text[before:]])


def excerpt(rng: random.Random, text: bytes, length: int) -> bytes:
    start = rng.randrange(len(text) - length)
    return text[start : start + length]


def training_sequence(rng: random.Random, text: bytes, length: int) -> bytes:
    """Bytes of sources, two times in three with needles that come again: up to one for each 64 bytes, at most 16."""
    if rng.random() < 1 / 3:
        return excerpt(rng, text, length)
    count = rng.randint(1, min(length // 64, 16))
    lines = []
    for _ in range(count):
        key, digits = needle(rng)
        first, second = sorted((rng.random(), rng.random()))
        lines += [(first * 0.95, key + digits + b"\n"), (second, key + digits + b"\n")]
    return insert(excerpt(rng, text, length - 2 * count * NEEDLE_BYTES), lines)


def needle_task(seed: int, count: int, length: int = CONTEXT) -> tuple[Tensor, Tensor]:
    """Contexts that give a needle at a random depth and end with its name and digits again.

    Returns:
        (int64 [count, length], float32 [count]): the last DIGITS bytes are what is asked for; the depth from 0 (the
        first line) to 1.
    """
    rng, text = random.Random(seed), sources().held_out
    rows, depths = [], []
    for _ in range(count):
        key, digits = needle(rng)
        depth = rng.random() * 0.9
        body = excerpt(rng, text, length - 2 * NEEDLE_BYTES)
        rows.append(insert(body, [(depth, key + digits + b"\n")]) + b"\n" + key + digits)
        depths.append(depth)
    return _stacked(rows), torch.tensor(depths)


def held_out(seed: int, count: int, length: int = CONTEXT) -> Tensor:
    """int64 [count, length + 1] of sources that the model was not trained on, without needles."""
    rng = random.Random(seed)
    return _stacked([excerpt(rng, sources().held_out, length + 1) for _ in range(count)])


def _stacked(rows: list[bytes]) -> Tensor:
    return torch.stack([torch.frombuffer(bytearray(row), dtype=torch.uint8) for row in rows]).long()


@torch.no_grad()
def loss(model: Any, tokens: Tensor) -> float:
    """Mean cross entropy of the next byte, in nats, over [count, length + 1]."""
    total = 0.0
    for row in tokens:
        logits = model(row[None, :-1], use_cache=False).logits[0]
        total += float(cross_entropy(logits.float(), row[1:]))
    return total / len(tokens)


@torch.no_grad()
def needle_accuracy(model: Any, tokens: Tensor) -> float:
    """Share of the digits of `needle_task` that have the largest logit, each after the true ones before it."""
    right = 0
    for row in tokens:
        logits = model(row[None, :-1], use_cache=False).logits[0, -DIGITS:]
        right += int((logits.argmax(-1) == row[-DIGITS:]).sum())
    return right / (len(tokens) * DIGITS)


def build(seed: int = 0) -> Any:
    """The model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def batches(seed: int, seconds: float, device: str) -> Iterator[tuple[float, Tensor]]:
    """(share of the time that is over, int64 [sequences, length + 1]) until the time is over.

    On the CPU, time is the processor's: other programs do not make it a worse model.
    """
    rng, text = random.Random(seed), sources().training
    clock = time.process_time if device == "cpu" else time.monotonic
    size = BYTES_PER_STEP if device == "cpu" else BYTES_PER_STEP_ACCELERATED
    start = clock()
    while (share := (clock() - start) / seconds) < 1:
        reached = 0.0
        for part, length in PHASES:  # noqa: B007
            reached += part
            if share < reached:
                break
        rows = [training_sequence(rng, text, length + 1) for _ in range(size // length)]
        yield share, _stacked([row[: length + 1] for row in rows]).to(device)


def train(
    seconds: float, seed: int = 0, device: str = "cpu", start: Path | None = None, verbose: bool = True
) -> tuple[Any, dict[str, Any]]:
    """Train a model for a time: a new one, or the one stored in `start`. Gives it with the facts of its training."""
    model = (build(seed) if start is None else load(start)).to(device).train()
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimisers = [torch.optim.Muon(hidden, lr=0.02, weight_decay=0.0), torch.optim.AdamW(others, lr=3e-3)]
    first_rates = [group["lr"] for each in optimisers for group in each.param_groups]
    steps = seen = 0
    smooth = 0.0
    for share, tokens in batches(seed, seconds, device):
        factor = min(1.0, (steps + 1) / 30) * min(1.0, (1 - share) / 0.4)
        groups = [group for each in optimisers for group in each.param_groups]
        for group, rate in zip(groups, first_rates, strict=True):
            group["lr"] = rate * factor
        with torch.autocast(device, torch.bfloat16):
            logits = model(tokens[:, :-1], use_cache=False).logits
        found = cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimisers:
            each.step()
            each.zero_grad(set_to_none=True)
        steps, seen = steps + 1, seen + tokens.shape[0] * (tokens.shape[1] - 1)
        value = float(found.detach())
        smooth = value if steps == 1 else 0.95 * smooth + 0.05 * value
        if verbose and steps % 25 == 0:
            print(f"{share:5.0%}  step {steps:5}  {tokens.shape[1] - 1:5} bytes  loss {smooth:.3f}", flush=True)
    model = model.cpu().eval()
    facts = {
        "seconds": seconds,
        "seed": seed,
        "device": device,
        "start": None if start is None else json.loads((start / "training.json").read_text(encoding="utf-8")),
        "steps": steps,
        "bytes": seen,
        "torch": torch.__version__,
        "held_out_loss": loss(model, held_out(1, 8)),
        "needle_accuracy": needle_accuracy(model, needle_task(1, 32)[0]),
    }
    return model, facts


def save(model: Any, facts: dict[str, Any], folder: Path = FOLDER) -> None:
    """Write the model, whole or not at all."""
    part = folder.with_name(folder.name + f".part{os.getpid()}")
    model.save_pretrained(part)
    (part / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    part.rename(folder)


def load(folder: Path = FOLDER, attention: str = "sdpa", seconds: float = SECONDS) -> Any:
    """The trained model in float32, ready for evaluation; trained first where the folder is absent."""
    from transformers import LlamaForCausalLM

    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        save(*train(seconds), folder)
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32).eval()


def described(folder: Path = FOLDER) -> str:
    """A sentence on how the stored model was trained."""
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    loss, needles = facts["held_out_loss"], facts["needle_accuracy"]
    return (
        f"trained for {facts['seconds']:g} s on {facts['device']} ({facts['bytes']:,} bytes in {facts['steps']:,} "
        f"steps, torch {facts['torch']}); its loss after training was {loss:.3f} nats a byte, and it had "
        f"{needles:.0%} of the needles' digits."
    )


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=SECONDS, help=f"how long to train (default {SECONDS:g})")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--threads", type=int, help="torch threads")
    options.add_argument("--device", default="cpu", help="a torch device to train on")
    options.add_argument("--start", type=Path, help="a folder with a model to go on from")
    options.add_argument("--folder", type=Path, default=FOLDER)
    given = options.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if (given.folder / "config.json").exists():
        print(f"{given.folder} is there already: remove it to train anew")
        return 0
    given.folder.parent.mkdir(parents=True, exist_ok=True)
    model, facts = train(given.seconds, given.seed, given.device, given.start)
    save(model, facts, given.folder)
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
