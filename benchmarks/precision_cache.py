"""Perplexity of the byte-level model with its keys and values in a quantised cache, read by hal's attention.

    python benchmarks/precision_cache.py [--record] [--rows 8] [--length 1024]

Keys and values of every layer are rounded by `quantize_cache` (keys by channel, values by token, scales over the whole
sequence) after the rotary embedding, as a cache holds them, and `hal.attention` reads the codes. The text is held out.

--ways measures other ways to round to 4 bits, which no kernel reads: smaller groups, zero points, the last tokens left
unrounded, and a rotation of keys and values before they are rounded. They are rounded and computed with in float32.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any, NamedTuple

import byte_model
import record
import torch
from torch import Tensor
from transformers import AttentionInterface

import hal_core as hal

#: Largest rise of the perplexity.
BARS = {"int8": 0.001, "int4": 0.01}
VARIANTS = [("float32", "token"), ("int8", "token"), ("int8", "head"), ("int4", "token"), ("float8_e4m3fn", "token")]


def attention_of(kind: str, values: str) -> Any:
    """transformers' attention function over a cache of a dtype."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        if kind == "float32":
            out = hal.attention(query, key, value, is_causal=True, scale=scaling)
        else:
            cache = hal.quantize_cache(key, value, kind, values=values)
            out = hal.attention(
                query,
                cache.key,
                cache.value,
                key_scale=cache.key_scale,
                value_scale=cache.value_scale,
                is_causal=True,
                scale=scaling,
            )
        return out.transpose(1, 2).contiguous(), None

    return attend


class Way(NamedTuple):
    """How 4 bits are used. tokens: of keys that share a channel's scale; channels: of a value that share a token's
    scale; 0 for all. zeros: codes from the least to the largest, not around 0. recent: last tokens that each query
    reads unrounded. rotate: keys and values are multiplied by a Hadamard matrix first, and queries and results too.
    """

    tokens: int = 0
    channels: int = 0
    zeros: bool = False
    recent: int = 0
    rotate: bool = False

    def bits(self, length: int, dim: int) -> float:
        """Bits of a number of keys and values, with 16-bit scales and zero points; without the recent tokens."""
        each = 32 if self.zeros else 16
        return 4 + each * (1 / (self.tokens or length) + 1 / (self.channels or dim)) / 2


WAYS = {
    "as the kernels": Way(),
    "keys in groups of 64 tokens": Way(tokens=64),
    "keys in groups of 32 tokens": Way(tokens=32),
    "groups of 32 tokens and 16 channels": Way(32, 16),
    "zero points": Way(zeros=True),
    "zero points, 32 tokens": Way(32, zeros=True),
    "zero points, 32 tokens and 16 channels": Way(32, 16, zeros=True),
    "last 32 tokens unrounded": Way(recent=32),
    "last 128 tokens unrounded": Way(recent=128),
    "rotated": Way(rotate=True),
    "rotated, zero points, 32 tokens": Way(32, zeros=True, rotate=True),
    "zero points, 32 tokens, last 32 unrounded": Way(32, zeros=True, recent=32),
    "zero points, 32 tokens, last 128 unrounded": Way(32, zeros=True, recent=128),
    "zero points, 32 tokens and 16 channels, last 32 unrounded": Way(32, 16, zeros=True, recent=32),
}


def rounded(numbers: Tensor, axis: int, group: int, zeros: bool) -> Tensor:
    """Numbers at 4 bits, with a scale for every `group` of them along an axis; 0 for the whole axis."""
    cut = numbers.split(group or numbers.shape[axis], axis)
    found = []
    for part in cut:
        if zeros:
            low, high = part.amin(axis, keepdim=True), part.amax(axis, keepdim=True)
            scale = ((high - low) / 15).clamp_min(1e-20)
            found.append(((part - low) / scale).round().clamp(0, 15) * scale + low)
        else:
            scale = (part.abs().amax(axis, keepdim=True) / 7).clamp_min(1e-20)
            found.append((part / scale).round().clamp(-7, 7) * scale)
    return torch.cat(found, axis)


def hadamard(size: int) -> Tensor:
    """The normalised Hadamard matrix of a power of two."""
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / math.sqrt(size)


def attend_rounded(
    way: Way, causal: bool, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention over keys and values that are rounded a way; without padding."""
    turn = hadamard(key.shape[-1]) if way.rotate else torch.eye(key.shape[-1])
    query, key, value = query @ turn, key @ turn, value @ turn
    near_scores, length = query @ key.mT, key.shape[2]
    scores = query @ rounded(key, 2, way.tokens, way.zeros).mT
    age = torch.arange(length)[:, None] - torch.arange(length)
    near = age.abs() < way.recent
    hidden = (age < 0) & causal
    weights = (torch.where(near, near_scores, scores) * scaling).masked_fill(hidden, -math.inf).softmax(-1)
    out = (weights * near) @ value + (weights * ~near) @ rounded(value, 3, way.channels, way.zeros)
    return (out @ turn.T).transpose(1, 2).contiguous(), None


def ways(given: Any, model: Any, held: Tensor) -> None:
    """Measure every way, and record them."""
    plain, bar, rows = byte_model.loss(model, held), BARS["int4"], []
    for name, way in WAYS.items():
        AttentionInterface.register("way", partial(attend_rounded, way, True))
        model.set_attn_implementation("way")
        loss = byte_model.loss(model, held)
        rise = math.exp(loss - plain) - 1
        bits = way.bits(given.length, model.config.hidden_size // model.config.num_attention_heads)
        rows.append([name, f"{bits:.2f}", f"{loss:.5f}", f"{rise:+.3%}", "held" if rise <= bar else "missed"])
        print(*rows[-1], flush=True)
    notes = [
        f"{given.rows} texts of {given.length:,} bytes; loss in nats a byte, {plain:.5f} with torch's attention. Bits: "
        "of a number, with 16-bit scales and zero points, without the tokens that are left unrounded. "
        f"The byte-level model was {byte_model.described()}"
    ]
    title = "Other ways to 4 bits in a cache"
    record.publish(
        given, "precision", title, ["way", "bits", "loss", "perplexity", f"bar {bar:.1%}"], rows, notes, title
    )


def encoder_ways(given: Any) -> None:
    """Measure every way on MiniLM, an encoder: what it does to the last hidden states."""
    from hal_compare import models

    found = models.load("minilm", "float32")
    text = byte_model.sources().held_out.decode("utf-8", "replace")
    tokens = torch.tensor(found.tokenizer(text[: 40 * given.rows * 256], verbose=False)["input_ids"])
    tokens = tokens[: given.rows * 256].view(given.rows, 256)
    clean, rows = found.network(input_ids=tokens).last_hidden_state, []
    config = found.network.config
    for name, way in WAYS.items():
        AttentionInterface.register("way", partial(attend_rounded, way, False))
        found.network.set_attn_implementation("way")
        error = (found.network(input_ids=tokens).last_hidden_state - clean).norm() / clean.norm()
        bits = way.bits(256, config.hidden_size // config.num_attention_heads)
        rows.append([name, f"{bits:.2f}", f"{float(error):.4f}"])
        print(*rows[-1], flush=True)
    title = "Other ways to 4 bits for an encoder's keys and values"
    notes = [
        f"MiniLM, {given.rows} texts of 256 tokens of source text. Error: ||y - clean|| / ||clean|| of the last hidden "
        "states. An encoder reads tokens on both sides, so those near a query are left unrounded on both."
    ]
    record.publish(given, "precision", title, ["way", "bits", "error"], rows, notes, title)


def main() -> int:
    options = record.parser(__doc__)
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--length", type=int, default=1024)
    options.add_argument("--ways", action="store_true", help="other ways to round to 4 bits, and nothing else")
    options.add_argument("--encoder", action="store_true", help="those ways on MiniLM, and nothing else")
    given = options.parse_args()
    if given.encoder:
        encoder_ways(given)
        return 0
    held = byte_model.held_out(7, given.rows, given.length)
    model = byte_model.load()
    if given.ways:
        ways(given, model, held)
        return 0
    rows, missed = [], False
    plain = byte_model.loss(model, held)
    for kind, values in VARIANTS:
        AttentionInterface.register("cache", attention_of(kind, values))
        model.set_attn_implementation("cache")
        loss = byte_model.loss(model, held)
        rise = math.exp(loss - plain) - 1
        bar = BARS.get(kind)
        barred = bar is not None and values == "token"
        missed |= bool(barred and rise > (bar or 0))
        verdict = ("held" if rise <= (bar or 0) else "missed") if barred else ""
        rows.append([kind, values, f"{loss:.5f}", f"{rise:+.3%}", f"{bar:.1%}" if bar and barred else "", verdict])
        print(*rows[-1], flush=True)
    columns = ["cache", "a scale for each value's", "loss", "perplexity", "bar", ""]
    notes = [
        f"{given.rows} texts of {given.length:,} bytes; loss in nats a byte, {plain:.5f} with torch's attention. "
        f"The byte-level model was {byte_model.described()}"
    ]
    record.publish(
        given, "precision", "Quantised caches", columns, rows, notes, section="Quantised caches of keys and values"
    )
    return int(missed)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
