"""Processor milliseconds of attention in the shapes of models, on the CPU device of a checkout.

    python benchmarks/cpu_worker.py CHECKOUT

answers each line with a shape's name with the least milliseconds of a call, and `null` with the names;
`cpu_attention.py --against` asks two of them in turn. One thread, so that processor time is the call's own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from checkouts import imported_from

if __name__ == "__main__":
    imported_from(sys.argv[1])

import hal_core as hal

SECONDS, LEAST_CALLS = 0.15, 3  # of one answer


def _inputs(sizes: tuple[int, int, int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    batch, heads, heads_kv, len_q, len_k, dim = sizes
    shapes = ((batch, heads, len_q, dim), *((batch, heads_kv, len_k, dim),) * 2)
    return [torch.randn(shape).to(dtype) for shape in shapes]


#: (batch, query heads, key heads, queries, keys, head size), dtype and options of each.
SHAPES: dict[str, tuple[tuple[int, int, int, int, int, int], torch.dtype, dict[str, Any]]] = {
    "MiniLM, 64 tokens": ((8, 12, 12, 64, 64, 32), torch.float32, {}),
    "BERT, 128 tokens": ((1, 12, 12, 128, 128, 64), torch.float32, {}),
    "BERT, 128 tokens, padding": ((4, 12, 12, 128, 128, 64), torch.float32, {"attn_mask": "boolean"}),
    "ViT, 197 tokens": ((1, 12, 12, 197, 197, 64), torch.float32, {}),
    "T5, 256 tokens, bias": ((1, 8, 8, 256, 256, 64), torch.float32, {"attn_mask": "additive", "scale": 1.0}),
    "GPT-2, 512 tokens": ((1, 12, 12, 512, 512, 64), torch.float32, {"is_causal": True}),
    "GPT-2, 512 tokens, bfloat16": ((1, 12, 12, 512, 512, 64), torch.bfloat16, {"is_causal": True}),
    "GPT-2, 512 tokens, float16": ((1, 12, 12, 512, 512, 64), torch.float16, {"is_causal": True}),
    "GPT-2, 256 tokens, training": ((1, 12, 12, 256, 256, 64), torch.float32, {"is_causal": True, "backward": True}),
    "Llama, 512 tokens": ((1, 32, 8, 512, 512, 128), torch.float32, {"is_causal": True}),
    "Llama, 1 of 4,096 tokens": ((1, 32, 8, 1, 4096, 128), torch.float32, {}),
    "Llama, 1 of 4,096 tokens, bfloat16": ((1, 32, 8, 1, 4096, 128), torch.bfloat16, {}),
    "Mistral, window of 256": ((1, 8, 2, 2048, 2048, 64), torch.float32, {"is_causal": True, "window": (255, 0)}),
    "Mistral, window of 256, bfloat16": (
        (1, 8, 2, 2048, 2048, 64),
        torch.bfloat16,
        {"is_causal": True, "window": (255, 0)},
    ),
    "Gemma 2, 512 tokens, softcap": ((1, 8, 4, 512, 512, 256), torch.float32, {"is_causal": True, "softcap": 50.0}),
    "log-sum-exp, 512 tokens": ((1, 8, 8, 512, 512, 64), torch.float32, {"return_lse": True}),
    "window of 64, training": (
        (1, 8, 8, 512, 512, 64),
        torch.float32,
        {"is_causal": True, "window": (63, 0), "backward": True},
    ),
    "packed, 4 sequences": ((1, 12, 12, 512, 512, 64), torch.float32, {"packed": 4}),
}


def prepared(name: str) -> Callable[[], object]:
    """A call of a shape."""
    sizes, dtype, options = SHAPES[name]
    torch.manual_seed(0)
    tensors, given = _inputs(sizes, dtype), dict(options)
    _, heads, heads_kv, len_q, len_k, _ = sizes
    if mask := given.pop("attn_mask", None):
        added = torch.randn(1, heads, len_q, len_k)
        given["attn_mask"] = added if mask == "additive" else (torch.arange(len_k) < len_k - 20).view(1, 1, 1, -1)
    if parts := given.pop("packed", 0):
        ends = torch.arange(parts + 1, dtype=torch.int32) * (len_q // parts)
        given |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        given |= {"max_seqlen_q": len_q // parts, "max_seqlen_k": len_q // parts}
    backward = given.pop("backward", False)

    def call() -> Any:
        return hal.attention(*tensors, enable_gqa=heads != heads_kv, backend="cpu", **given)

    if not backward:
        return call
    leaves = [tensor.requires_grad_() for tensor in tensors]
    return lambda: torch.autograd.grad(call().sum(), leaves)


def milliseconds(call: Callable[[], object]) -> float:
    """The least of the calls that fit into `SECONDS`."""
    found, begun = list[float](), time.perf_counter()
    while len(found) < LEAST_CALLS or time.perf_counter() - begun < SECONDS:
        start = time.process_time()
        call()
        found.append((time.process_time() - start) * 1e3)
    return min(found)


if __name__ == "__main__":
    torch.set_num_threads(1)
    calls: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name = json.loads(line)
        if name is not None and name not in calls:
            calls[name] = prepared(name)
        print(json.dumps(list(SHAPES) if name is None else milliseconds(calls[name])), flush=True)
