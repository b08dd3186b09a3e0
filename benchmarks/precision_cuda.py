"""FP8 linear layers and a Llama block in FP8 against bfloat16, on an NVIDIA GPU of compute capability 8.9 or newer.

    python benchmarks/precision_cuda.py [--record] [--seconds 80]

Forward and backward with all casts inside the time, both sides under torch.compile, interleaved rounds, medians of CUDA
events. Errors are against float32 products. Rows that do not fit into --seconds are left out.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from hal_precision import FP8Config, convert_model_to_fp8
from torch import Tensor, nn

CONFIGS = {
    "rowwise": FP8Config(statistics=False),
    "rowwise, exact accumulation": FP8Config(statistics=False, fast_accumulation=False),
    "tensorwise": FP8Config(statistics=False, granularity="tensorwise"),
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


def errors(out: Tensor, x: Tensor, weight: Tensor, grad: Tensor, layer: nn.Linear) -> str:
    """Relative errors of y, dx and dw."""
    want = x.detach().float() @ weight.float().T, grad.float() @ weight.float(), grad.float().T @ x.detach().float()
    got = out, x.grad, layer.weight.grad
    return " ".join(f"{float((a.float() - b).norm() / b.norm()):.4f}" for a, b in zip(got, want, strict=True))


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

    def tried(name: str, make: Callable[[], None]) -> None:
        """A variant that fails leaves the others to be measured; its row says why."""
        try:
            make()
        except Exception as error:
            say(name, "", "", "", f"{type(error).__name__}: {str(error)[:160]}")

    torch.manual_seed(0)
    size = given.size
    x = torch.randn(size, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(size, size, bias=False)).to("cuda", torch.bfloat16)
    plain = step(model, x, grad)
    plain()
    for name, config in CONFIGS.items():
        if left() < 15:
            break

        def linear(name: str = name, config: FP8Config = config) -> None:
            fp8: Any = convert_model_to_fp8(nn.Sequential(model[0]), config)
            call = step(fp8, x, grad)
            wrong = errors(call(), x, model[0].weight.detach(), grad, fp8[0])
            call()
            now = medians([plain, call], 15)
            say(f"linear {size}^3, {name}", f"{now[0]:.3f}", f"{now[1]:.3f}", f"{now[0] / now[1]:.3f}", wrong)

        tried(f"linear {size}^3, {name}", linear)
    del x, grad, model, plain
    torch.cuda.empty_cache()

    if left() > 20:
        width = given.width
        block: Any = Block(width, width * 7 // 2, width // 128, width // 512).to("cuda", torch.bfloat16)
        tokens = torch.randn(1, 8192, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        back = torch.randn_like(tokens)
        plain = step(block, tokens, back)
        want = plain().float()
        for name in ("rowwise", "tensorwise"):
            if left() < 15:
                break

            def whole(name: str = name) -> None:
                fp8: Any = convert_model_to_fp8(block, CONFIGS[name], inplace=False)
                call = step(fp8, tokens, back)
                wrong = float((call().float() - want).norm() / want.norm())
                call()
                now = medians([plain, call], 10)
                ratio = f"{now[0] / now[1]:.3f}"
                say(f"Llama block, width {width}, 8,192 tokens, {name}", *(f"{t:.3f}" for t in now), ratio, f"{wrong:.4f}")

            tried(f"Llama block, {name}", whole)
    columns = ["what", "bfloat16, ms", "FP8, ms", "ratio", "relative error (of the layer: y, dx, dw)"]
    notes = [f"{torch.cuda.get_device_name()}. Bars: linear rowwise 1.3, block 1.15."]
    record.publish(given, "precision", "FP8 against bfloat16 on a GPU", columns, rows, notes, section="FP8 on a GPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
