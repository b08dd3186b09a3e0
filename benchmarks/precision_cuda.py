"""FP8 linear layers and a Llama block in FP8 against bfloat16, on an NVIDIA GPU of compute capability 8.9 or newer.

    python benchmarks/precision_cuda.py [--record] [--seconds 80]

Forward and backward with all casts inside the time, both sides under torch.compile, interleaved rounds, medians of CUDA
events. Errors are judged first, and what is wrong is not timed: a layer's against float32 products, a block's (y, dx,
the parameters' gradients) against the block in bfloat16. Rows that do not fit into --seconds are left out.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import record
import torch
from hal_precision import FP8Config, FP8Format, convert_model_to_fp8
from torch import Tensor, nn

#: Largest relative error of a result or gradient that is timed.
LIMIT = 0.15
CONFIGS = {
    "rowwise": FP8Config(statistics=False),
    "rowwise, exact accumulation": FP8Config(statistics=False, fast_accumulation=False),
    "tensorwise": FP8Config(statistics=False, granularity="tensorwise"),
    "rowwise, E4M3 gradients": FP8Config(statistics=False, backward_format=FP8Format.E4M3),
}


class Block(nn.Module):
    """A Llama block: norm, attention with rotary-free grouped heads, norm, gated MLP."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, kv_heads * self.dim, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        shape = (*y.shape[:-1], -1, self.dim)
        q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).flatten(2))
        y = self.norm_2(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def medians(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Milliseconds of each call, by events, interleaved."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for times, call in zip(found, calls, strict=True):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    return [statistics.median(times) for times in found]


def step(model: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], Any]:
    """A call that runs forward and backward of the compiled model."""
    compiled = torch.compile(model)

    def call() -> Tensor:
        x.grad = None
        model.zero_grad(set_to_none=True)
        out = compiled(x)
        out.backward(grad)
        return out  # type: ignore[no-any-return]

    return call


def judged(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> str:
    """Relative errors, of values that FP8 may be off by: E5M2 has steps of a quarter, so 0.06 of a product's norm.

    Raises:
        ValueError: one is above the limit, so that nothing is timed.
    """
    found = [
        float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())
        for a, b in zip(got, want, strict=True)
        if a is not None and b is not None
    ]
    text = " ".join(f"{error:.4f}" for error in found)
    if len(found) < len(want) or not max(found) < LIMIT:
        raise ValueError(f"WRONG, not timed: relative errors {text}")
    return text


def linear_errors(out: Tensor, x: Tensor, weight: Tensor, grad: Tensor, layer: nn.Linear) -> str:
    """Relative errors of y, dx and dw against float32."""
    want = x.detach().float() @ weight.float().T, grad.float() @ weight.float(), grad.float().T @ x.detach().float()
    return judged((out, x.grad, layer.weight.grad), want)


def measure_linear(size: int, config: FP8Config) -> list[str]:
    """Columns of one row: a linear layer of size^3, forward and backward."""
    torch.manual_seed(0)
    x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(size, size, bias=False)).to("cuda", torch.bfloat16)
    layers: Any = convert_model_to_fp8(nn.Sequential(model[0]), config)
    plain, call = step(model, x, grad), step(layers, x, grad)
    weight = model[0].weight.detach()
    wrong = linear_errors(call(), x, weight, grad, layers[0])
    for _ in range(2):
        plain()
        call()
    now = medians([plain, call], 15)
    return [f"{now[0]:.3f}", f"{now[1]:.3f}", f"{now[0] / now[1]:.3f}", wrong]


def measure_block(width: int, config: FP8Config) -> list[str]:
    """Columns of one row: a training step of a Llama block."""
    torch.manual_seed(0)
    block = Block(width, width * 7 // 2, width // 128, width // 512).to("cuda", torch.bfloat16)
    tokens = torch.randn(1, 8192, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    back = torch.randn_like(tokens)
    small = convert_model_to_fp8(block, config, inplace=False)
    plain, call = step(block, tokens, back), step(small, tokens, back)
    got: list[list[Tensor | None]] = []
    for run, model in ((plain, block), (call, small)):
        out = run()
        got.append([out, tokens.grad, *(each.grad for each in model.parameters())])
    wrong = judged(got[1], got[0])
    for _ in range(2):
        plain()
        call()
    now = medians([plain, call], 10)
    return [f"{now[0]:.3f}", f"{now[1]:.3f}", f"{now[0] / now[1]:.3f}", wrong]


def main() -> int:
    options = record.parser(__doc__)
    options.add_argument("--seconds", type=float, default=80.0)
    options.add_argument("--size", type=int, default=8192)
    options.add_argument("--width", type=int, default=4096)
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing is measured")
        return 0
    start, rows = time.monotonic(), []
    torch.backends.cuda.matmul.allow_tf32 = True

    def left() -> float:
        return given.seconds - (time.monotonic() - start)

    def say(*row: str) -> None:
        rows.append(list(row))
        print(f"{time.monotonic() - start:5.1f} s", *row, flush=True)

    plan = [(True, "rowwise"), (False, "rowwise"), *((True, name) for name in CONFIGS if name != "rowwise")]
    for linear, name in [*plan, (False, "tensorwise")]:
        if left() < 12:
            break
        what = f"linear {given.size}^3" if linear else f"Llama block, width {given.width}, 8,192 tokens"
        # A variant that fails leaves the others to be measured; its row says why.
        try:
            row = measure_linear(given.size, CONFIGS[name]) if linear else measure_block(given.width, CONFIGS[name])
        except Exception as error:
            row = ["", "", "", f"{type(error).__name__}: {str(error)[:160]}"]
        say(f"{what}, {name}", *row)
    columns = ["what", "bfloat16, ms", "FP8, ms", "ratio", "relative errors (y, dx, dw ...)"]
    notes = [f"{torch.cuda.get_device_name()}. Bars: linear rowwise 1.3, block 1.15."]
    record.publish(given, "precision", "FP8 against bfloat16 on a GPU", columns, rows, notes, section="FP8 on a GPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
