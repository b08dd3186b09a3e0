"""What the first calls of a process cost, printed as JSON: seconds, and the compilers that they started. Run by
test_gpu_warm.py and benchmarks/cuda_first_calls.py in a process of its own.

python tests/cuda/first_call.py [head size] [query heads] [key heads]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

dim, heads, heads_kv = (int(word) for word in (sys.argv[1:] or ("128", "8", "8")))
torch.zeros(1, device="cuda")
took: dict[str, float] = {}
#: Names of the programs that were started, Triton's assembler and the C compiler among them.
started: list[str] = []


def _note(event: str, details: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen" and "--version" not in map(
        str, details[1]
    ):  # asked its version, it compiles nothing
        started.append(Path(str(details[0] or details[1][0])).name)


sys.addaudithook(_note)


def timed(name: str, call: Callable[[], Any]) -> Any:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    took[name] = time.perf_counter() - begun
    return result


def opened() -> Any:
    import hal_core

    hal_core.session("cuda:0")
    return hal_core


def main() -> None:
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def draw(count: int, length: int) -> Any:
        return torch.randn(1, count, length, dim, device="cuda", dtype=torch.bfloat16)

    query, key, value = draw(heads, 2048), draw(heads_kv, 2048), draw(heads_kv, 2048)
    grad = draw(heads, 2048)
    cache_k, cache_v, token = draw(heads_kv, 4096), draw(heads_kv, 4096), draw(heads, 1)
    leaf = torch.zeros(1, device="cuda", requires_grad=True)
    # PyTorch imports what its first gradient needs, sympy among it.
    timed("torch's first gradient", lambda: torch.autograd.grad(leaf * 2, leaf, torch.ones_like(leaf)))
    hal = timed("device", opened)
    options = {"enable_gqa": True, "backend": "cuda"}
    timed("prompt", lambda: hal.attention(query, key, value, is_causal=True, **options))
    timed("token", lambda: hal.attention(token, cache_k, cache_v, causal="bottom_right", **options))
    import hal_cuda

    timed("activation", lambda: hal_cuda.activate_sdpa(always=True))
    trained = [t.requires_grad_() for t in (query, key, value)]
    out = timed("unmodified", lambda: sdpa(*trained, is_causal=True, enable_gqa=heads != heads_kv))
    timed("unmodified backward", lambda: torch.autograd.grad(out, trained, grad))
    timed("again", lambda: hal.attention(query.detach(), key.detach(), value.detach(), is_causal=True, **options))
    own = sum(hal_cuda.sdpa_statistics().own.values())
    print(json.dumps({"seconds": took, "own": own, "started": started}))


if __name__ == "__main__":
    main()
