"""A sequence of a million tokens on one GPU: keys and values in host memory, device memory limited.

    python benchmarks/parallel_streaming.py [--record] [--tokens 1048576] [--limit 2147483648] [--pageable]

d_model 512, 8 heads of 64, bfloat16, causal. "at the 32k rate" is the time that the operations of the whole call would
take at the rate of `hal.attention` at 32,768 tokens on the same device in the same run: the median of a second of
calls, operands on the device. Errors are of some rows against float64. Memory is the allocator's peak beside query,
output and the gradients that lie on the device. "first rows" is the error of the query's gradient in rows 0 and 1,
where it is a small difference of large terms, one of which is taken from an output in bfloat16.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import hal_parallel
import torch
from cuda_attention import open_device
from record import parser, publish
from torch import Tensor

import hal_core as hal

HEADS, DIM, SHORT = 8, 64, 1 << 15
SUSTAINED = 1.0  # seconds of calls at 32k tokens: a chip that runs for long is slower than in a burst
DEVICE = "cuda"


def seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its wall time with the device's work."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    found = call()
    torch.cuda.synchronize()
    return found, time.perf_counter() - start


def rate(backward: bool) -> float:
    """Pairs of tokens a second over all heads, at 32k tokens: the median of calls that follow one another."""
    q, k, v = (
        torch.randn(1, HEADS, SHORT, DIM, device=DEVICE, dtype=torch.bfloat16, requires_grad=backward) for _ in range(3)
    )
    flowing = torch.randn_like(q)

    def call() -> Any:
        out = hal.attention(q, k, v, is_causal=True, return_lse=True, backend="cuda").out
        return torch.autograd.grad(out, (q, k, v), flowing) if backward else out

    for _ in range(3):
        call()
    times: list[float] = []
    while sum(times) < SUSTAINED:
        times.append(seconds(call)[1])
    return SHORT * (SHORT + 1) / 2 / median(times)


def exact(
    query: Tensor, key: Tensor, value: Tensor, head: int, rows: Tensor, grad_out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output of some rows of a head in float64, and, from these rows alone, the gradients of query, key and value."""
    q, k, v = (t[0, head].to(DEVICE, torch.float64) for t in (query[:, :, rows.to(query.device)], key, value))
    scores = q @ k.mT * DIM**-0.5
    scores.masked_fill_(torch.arange(k.shape[0], device=DEVICE) > rows[:, None], -torch.inf)
    weights = scores.softmax(-1)
    out = weights @ v
    if grad_out is None:
        return out, q, k, v
    g = grad_out[0, head, rows].double()
    inner = weights * (g @ v.mT - (g * out).sum(-1, keepdim=True)) * DIM**-0.5
    return out, inner @ k, inner.mT @ q, weights.mT @ g


def error(got: Tensor, want: Tensor) -> float:
    return float((got.to(want.device).double() - want).norm() / want.norm())


def measure(tokens: int, limit: int, pinned: bool, backward: bool) -> list[str]:
    """One row of the table."""
    host: dict[str, Any] = {"dtype": torch.bfloat16, "pin_memory": pinned}
    query = torch.randn(1, HEADS, tokens, DIM, device=DEVICE, dtype=torch.bfloat16, requires_grad=backward)
    key, value = (torch.empty(1, HEADS, tokens, DIM, **host) for _ in range(2))
    for tensor in (key, value):
        tensor.copy_(torch.randn(tensor.shape, device=DEVICE, dtype=torch.bfloat16))
        tensor.requires_grad_(backward)
    flowing = torch.randn_like(query) if backward else None
    hal.configure(memory_limit={"cuda:0": limit})
    best, beside = float("inf"), 0
    found = lse = grads = None
    for _ in range(2):  # the first also allocates
        found = lse = grads = None
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

        def call() -> Any:
            out, lse = hal_parallel.attention(query, key, value, is_causal=True, return_lse=True, backend="cuda")
            return out, lse, torch.autograd.grad(out, (query, key, value), flowing) if backward else None

        (found, lse, grads), taken = seconds(call)
        held = found.nbytes + lse.nbytes + (0 if grads is None else grads[0].nbytes)
        beside = max(beside, torch.cuda.max_memory_allocated() - before - held)
        best = min(best, taken)
        print(f"{tokens} tokens, backward {backward}: {taken:.3f} s, {beside / 2**20:.0f} MiB beside", flush=True)
    hal.configure()
    # The last keys are read by the last rows alone, so those rows give the whole gradient of these keys.
    last = torch.arange(tokens - 64, tokens, device=DEVICE)
    rows = torch.cat((torch.tensor([0, 1, tokens // 2 - 1, tokens // 2], device=DEVICE), last))
    errors, first = [], [0.0]
    for head in (0, HEADS - 1):
        with torch.no_grad():
            out, *exact_grads = exact(query, key, value, head, rows, flowing)
        errors.append(error(found[0, head, rows], out))
        if grads is not None:
            got = grads[0][0, head, rows]
            errors.append(error(got[2:], exact_grads[0][2:]))
            first.append(error(got[:2], exact_grads[0][:2]))
            by_row = (got.double() - exact_grads[0]).norm(dim=-1)[:6].tolist()
            print(f"head {head}, rows {rows[:6].tolist()}: {by_row} of {exact_grads[0].norm(dim=-1)[:6].tolist()}")
            part = slice(tokens - 64, tokens)
            errors += [error(grads[i][0, head, part], exact_grads[i][part]) for i in (1, 2)]
    print(f"errors {', '.join(f'{e:.1e}' for e in errors)}", flush=True)
    pairs = tokens * (tokens + 1) / 2
    at_rate = pairs / rate(backward)
    bar = 1.15 if backward else 1.10
    return [
        "forward and backward" if backward else "forward",
        f"{best:.3f}",
        f"{at_rate:.3f}",
        f"{best / at_rate:.3f}",
        f"{bar:.2f}",
        f"{beside / 2**20:,.0f}",
        f"{limit / 2**20:,.0f}",
        f"{max(errors):.1e}",
        f"{max(first):.1e}" if backward else "",
    ]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=1 << 20)
    options.add_argument("--limit", type=int, default=2 << 30, help="bytes beside query, output and gradients")
    options.add_argument("--pageable", action="store_true", help="keys and values in memory that is not pinned")
    given = options.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    open_device()
    torch.manual_seed(0)
    rows = []
    for backward in (False, True):
        measure(1 << 14, given.limit, not given.pageable, backward)  # compiles
        rows.append(measure(given.tokens, given.limit, not given.pageable, backward))
        print(rows[-1], flush=True)
    columns = [
        "call",
        "s",
        "s at the 32k rate",
        "ratio",
        "bar",
        "MiB beside",
        "limit, MiB",
        "largest error",
        "first rows",
    ]
    memory = "pageable" if given.pageable else "pinned"
    notes = [
        f"{given.tokens:,} tokens, 8 heads of 64, bfloat16, causal, on {torch.cuda.get_device_name()}; keys and values "
        f"in {memory} host memory. The better of two runs."
    ]
    publish(given, "parallel", "One device, long sequence", columns, rows, notes, section=f"{given.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
