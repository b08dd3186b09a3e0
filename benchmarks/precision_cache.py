"""Perplexity of the byte-level model with its keys and values in a quantised cache, read by hal's attention.

    python benchmarks/precision_cache.py [--record] [--rows 8] [--length 1024]

Keys and values of every layer are rounded by `quantize_cache` (keys by channel, values by token, scales over the whole
sequence) after the rotary embedding, as a cache holds them, and `hal.attention` reads the codes. The text is held out.
"""

from __future__ import annotations

import math
import sys
from typing import Any

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


def main() -> int:
    options = record.parser(__doc__)
    options.add_argument("--rows", type=int, default=8)
    options.add_argument("--length", type=int, default=1024)
    given = options.parse_args()
    held = byte_model.held_out(7, given.rows, given.length)
    model = byte_model.load()
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
